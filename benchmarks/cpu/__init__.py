"""The benchmark for the CPU: python -m benchmarks.cpu. See __main__.py."""
