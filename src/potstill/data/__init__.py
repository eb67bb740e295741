"""Documents into packed rows: which positions bear loss, and what their label is, is decided here, once."""
