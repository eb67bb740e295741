"""Files, terminal, BLAS: what any program needs, and nothing that knows a model."""
