"""The record of a comparison: `comparison.json` in the folder that `potstill compare` made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potstill.io.safe_open import read_object

RESULT = "comparison.json"


def read_comparison(folder: Path) -> dict[str, Any] | None:
    """The result of a comparison, or None where `folder` holds none."""
    path = folder / RESULT
    return read_object(path, "Give the folder that `potstill compare` made.") if path.is_file() else None
