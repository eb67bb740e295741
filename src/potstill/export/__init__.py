"""A student in the formats that other programs run, and the round trip through each of them."""
