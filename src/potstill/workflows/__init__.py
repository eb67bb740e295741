"""Whole jobs: distil, compare, capture; and the receipt that each leaves."""
