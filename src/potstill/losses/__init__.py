"""Divergences per position, and the objective that sums them over positions with gradients."""
