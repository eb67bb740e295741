"""Whoever answers `targets(batch)`."""
