"""Documents into packed rows: which positions bear loss, and what their next token is, is decided here, once."""
