"""Runs model-written programs in isolation, with verdicts that the programs cannot forge."""
