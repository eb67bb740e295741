"""The jobs of the command line, end to end: distil, compare, capture."""
