"""From a recipe to the objects that it names."""
