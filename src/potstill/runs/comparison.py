"""The record of a comparison: the file that `potstill compare` leaves in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potstill.io.safe_open import read_object

RESULT = "comparison.json"


def read_comparison(folder: Path) -> dict[str, Any] | None:
    """Every arm's figures, or None for a folder that is not a comparison's."""
    path = folder / RESULT
    return read_object(path, "Give the folder that `potstill compare` made.") if path.is_file() else None
