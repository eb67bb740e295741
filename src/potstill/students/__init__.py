"""Whoever learns: loaded, made from a config, or cut from the teacher."""
