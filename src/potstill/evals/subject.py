"""What an evaluation is given: a finished student as others will load it, and where results go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Subject:
    """A finished student. Load `folder` to evaluate what was saved, and not what is still in memory."""

    folder: Path
    """The student as a Hugging Face folder."""
    out: Path
    """A folder of the evaluation's own, not made yet."""
    device: str
    """auto, cpu, cuda or cuda:N, as the recipe says."""
    tokenizer: Any | None
    note: Callable[[str], None]
    """Logs one line."""
