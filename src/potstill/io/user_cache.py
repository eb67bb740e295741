"""Numbers that take long to measure and would be the same again, in the user's cache folder.

    $XDG_CACHE_HOME/potstill/KIND/KEY.json        ~/.cache where that is not set

KEY is a hash of all that they were measured on. It is a cache: whatever cannot be read is measured again, and whatever
cannot be written is not kept.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path

from potstill.errors import UserError
from potstill.io.atomic import write_whole
from potstill.io.safe_open import read_object


def place_of(kind: str, key: str) -> Path:
    """The file of these numbers, which may not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "potstill" / kind / f"{key}.json"


def recall(kind: str, key: str) -> dict[str, float]:
    """The numbers by name; none where there is no whole file of finite numbers."""
    try:
        found = read_object(place_of(kind, key), "")
    except UserError:
        return {}
    is_whole = all(type(value) is float and math.isfinite(value) for value in found.values())
    return found if is_whole else {}


def remember(kind: str, key: str, numbers: dict[str, float]) -> None:
    """Keep the numbers for later runs, if the folder can be written."""
    path = place_of(kind, key)
    with contextlib.suppress(OSError, UserError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(numbers).encode())
