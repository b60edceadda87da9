"""Parts of `benchmarks/switch.py`: load, bounds, ports, and the ways without a live switch."""
