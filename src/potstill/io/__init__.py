"""Files, terminal, BLAS: what any program needs; nothing here knows a model."""
