"""Parts of benchmarks/forecast.py."""
