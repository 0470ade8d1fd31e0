"""The microbenchmark for a GPU: python -m benchmarks.gpu. See __main__.py."""
