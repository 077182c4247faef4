"""How fast the package is, beside the limit: `python -m benchmarks`."""
