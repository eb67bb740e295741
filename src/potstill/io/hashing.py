"""sha256 of files: what receipts, manifests and `--resume` compare."""

from __future__ import annotations

import hashlib
from pathlib import Path

from potstill.io.safe_open import FETCH_AGAIN, opened


def file_sha256(path: Path) -> str:
    """sha256 of the file's bytes, read in pieces.

    Raises:
        UserError: no such file, or one that is not a plain file.
    """
    with opened(path, "plain data", FETCH_AGAIN) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
