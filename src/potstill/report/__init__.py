"""Runs and comparisons as one HTML page that needs no other file."""
