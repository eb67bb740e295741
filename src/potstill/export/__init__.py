"""A student in the formats that other programs run, each read back by those programs."""
