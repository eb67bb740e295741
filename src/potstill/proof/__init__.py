"""Before an hour is spent."""
