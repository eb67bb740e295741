"""The words `a.b=value` behind a verb."""

from __future__ import annotations

import argparse

FIELD = "a.b=value"


def add_overrides(
    parser: argparse.ArgumentParser, what: str = "set a field of the recipe", field: str = FIELD
) -> None:
    """Any number of them, none too: without a default argparse would call them required."""
    parser.add_argument("overrides", nargs="*", default=[], metavar=field, help=what)
