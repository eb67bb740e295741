"""The command line: one file a group of verbs. Torch is imported only inside a verb that needs it."""
