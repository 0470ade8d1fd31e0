"""What setup.py decides before it compiles. Runs at build time only; never installed."""
