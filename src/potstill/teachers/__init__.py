"""Teachers: models in memory, stored targets, and toys; all of them have `targets(batch)`."""
