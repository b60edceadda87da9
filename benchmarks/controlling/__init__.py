"""Parts of `benchmarks/control.py`."""
