"""Formulas, and the one place that turns them into sums with gradients."""
