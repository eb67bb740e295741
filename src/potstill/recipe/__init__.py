"""One YAML file that describes a whole run: its sections, their checks and their error messages. No torch."""
