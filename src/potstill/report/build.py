"""`potstill report`: measure where each run's student disagrees with its teacher, then render the page."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.errors import UserError
from potstill.io.terminal import Display
from potstill.report.page import RunReport, page
from potstill.runs.comparison import read_comparison
from potstill.runs.run_dir import RunDir, write_whole

if TYPE_CHECKING:
    from potstill.build.setup import RunSetup

FORMAT = 1
"""Of `disagreement.json`; raised when its content changes."""


def report(folders: list[Path], out: Path | None, tokens: int, with_models: bool, display: Display) -> Path:
    """Write one page about all `folders`, runs or comparisons; returns its path.

    Raises:
        UserError: a folder is neither, a file in it is damaged, or the page cannot be written.
    """
    if tokens < 1:
        raise UserError(
            f"--tokens {tokens}: must be 1 or more. To measure no disagreement, give --no-models."
        )
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        what = "a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise UserError(f"--out {out}: {what}. Give the name of an HTML file in an existing folder.")
    comparisons = {folder: result for folder in folders if (result := read_comparison(folder)) is not None}
    runs = [RunDir.open(folder) for folder in folders if folder not in comparisons]
    reports = [RunReport(run, measured(run, tokens, with_models, display)) for run in runs]
    reports += [arm for folder, result in comparisons.items() for arm in _arms(folder, result)]
    place = out or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    write_whole(place, page(reports, comparisons).encode("utf-8", "backslashreplace"))
    return place


def _arms(folder: Path, comparison: dict[str, Any]) -> list[RunReport]:
    """The runs of a comparison's first seed, for their curves."""
    seed = comparison.get("seeds", [""])[0]
    names = [name for name in comparison.get("runs", []) if str(name).endswith(f"-{seed}")]
    why = "not run: it is measured in the report of this run's own folder"
    return [RunReport(RunDir.open(folder / Path(name).name), why) for name in names]


def measured(run: RunDir, tokens: int, with_models: bool, display: Display) -> dict[str, Any] | str:
    """Where the run's student disagrees with its teacher, or why that was not measured.

    The result is cached in the run directory, with all that it depends on.
    """
    if not run.student.is_dir():
        return "not run: the run has no student yet"
    key = _cache_key(run, tokens)
    try:
        cached = run.disagreement()
    except UserError:  # a damaged cache is measured again
        cached = {}
    if cached.get("of") == key:
        return cached
    if not with_models:
        return "not run: --no-models"
    try:
        result = {"of": key, **_measure(run, tokens, display)}
    except UserError as error:  # the rest of the page does not depend on it
        display.warn(f"{run.path}: disagreement not measured: {error.mistakes[0]}")
        return f"not run: {error.mistakes[0]}"
    run.write_disagreement(result)
    return result


def _cache_key(run: RunDir, tokens: int) -> dict[str, Any]:
    """What a measurement depends on. The teacher is the receipt's, which `_measure` verifies."""
    from potstill.io.hashing import file_sha256

    files = sorted(file for file in run.student.iterdir() if file.suffix in (".json", ".safetensors"))
    return {
        "format": FORMAT,
        "tokens": tokens,
        "recipe": file_sha256(run.resolved),
        "corpus": run.corpus().get("fingerprint"),
        "teacher": run.receipt().get("teacher", {}).get("weights_sha256"),
        "student": {file.name: file_sha256(file) for file in files},
    }


def _measure(run: RunDir, tokens: int, display: Display) -> dict[str, Any]:
    from potstill.build.resolve import resolve
    from potstill.build.setup import process_of, set_up
    from potstill.recipe import load as recipes

    resolved = resolve(recipes.load(run.resolved), saved_student=run.whole_student())
    with process_of(resolved.recipe):
        setup = set_up(resolved, display.note, answers=run.heldout_answers)
        with contextlib.closing(setup.teacher):
            return _disagreement(run, setup, tokens)


def _disagreement(run: RunDir, setup: RunSetup, tokens: int) -> dict[str, Any]:
    from potstill.evals.disagreement import disagreement

    recorded = run.receipt().get("teacher", {}).get("weights_sha256")
    setup.require_made_of(run.path, run.corpus().get("fingerprint"), recorded)
    rows = disagreement(setup.student, setup.teacher, setup.corpus.heldout, tokens, setup.tokenizer)
    values = [token["kl"] for row in rows for token in row if "kl" in token]
    return {
        "rows": [[_rounded(token) for token in row] for row in rows],
        "positions": len(values),
        "mean_kl": math.fsum(values) / len(values) if values else None,
        "held_out": setup.teacher.describe().get("held_out"),
    }


def _rounded(value: Any) -> Any:
    """Six decimals, of which the page shows three; None for infinity, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
