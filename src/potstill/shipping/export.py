"""A run's student as a Hugging Face folder and as GGUF files, each read back by three independent paths.

Nothing is guessed: an architecture or a pre-tokenizer that is not known here by name is refused, and a file
takes its place only when it is whole. What was written, and what each path found, goes into the run's receipt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Record = dict[str, Any]
QUANTIZE = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q6_k")
FORMATS = ("hf", *QUANTIZE)
"""`hf` is the folder; each other name is a GGUF file of that type."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What `export_run` wrote: the records that it put into the receipt under `exports`, in order of `formats`."""

    out: Path
    records: list[Record]


def export_run(
    run: Path,
    out: Path | None = None,
    formats: Sequence[str] = ("hf", "f16"),
    *,
    check: bool = True,
    note: Callable[[str], None] = lambda _: None,
) -> Exported:
    """The run's best student in each of `formats`, in `out`; default `RUN/exports`.

    Args:
        run: a run directory with a student.
        formats: of `FORMATS`. One that lies there already is replaced.
        check: read each back on three paths; without it they are recorded as not run.

    Raises:
        UserError: no student there; an unknown format, architecture or pre-tokenizer; a quantiser that is not
            installed. Nothing is left half-written.
    """
    raise NotImplementedError


def verdict(record: Record) -> Literal["passed", "failed", "not run"]:
    """Of a record's three paths: `failed` if one did, `not run` if none ran, else `passed`."""
    found = {path["status"] for path in record["three_path"].values()}
    return "failed" if "failed" in found else "passed" if "passed" in found else "not run"
