"""The command line: one file per group of verbs. Torch is imported only inside a verb that needs it."""
