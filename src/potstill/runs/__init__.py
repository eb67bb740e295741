"""The run directory: the record that every published number is read from."""
