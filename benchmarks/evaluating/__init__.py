"""Parts of benchmarks/ope.py."""
