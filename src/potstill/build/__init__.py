"""From a recipe to the objects of a run: resolve, read the corpus, load the models."""
