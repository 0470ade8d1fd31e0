"""What the project's documents say: examples run, links lead somewhere, commands and names are there."""
