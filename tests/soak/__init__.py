"""A run is killed, signalled, damaged and starved of disk: a small count under `make test`, the full one under
`make soak`.
"""
