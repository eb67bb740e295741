"""Other people's training loops: each takes a potstill teacher and objective."""
