"""The verb `potstill show`: what came out of a run, on one screen."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.io.terminal import Display, aligned, clock, printable, short, size

if TYPE_CHECKING:
    from potstill.runs.run_dir import RunDir
    from potstill.runs.summary import Summary

NAMED_FIRST = ("kl", "agreement", "ce", "teacher_ce", "loss")
"""Held-out metrics in the order in which they say what came out."""


def add_flags(show: argparse.ArgumentParser) -> None:
    show.add_argument("run", type=Path, metavar="RUN")
    show.add_argument("--receipt", action="store_true", help="print the whole receipt instead")


def run_show(options: argparse.Namespace, display: Display) -> None:
    from potstill.runs.gains import lines as gained
    from potstill.runs.gains import profile_of
    from potstill.runs.run_dir import RunDir
    from potstill.runs.summary import summary

    run = RunDir.open(options.run)
    status, receipt, metrics, profile = run.status(), run.receipt(), summary(run), profile_of(run)
    if options.json:
        found = {"status": status, "receipt": receipt, "metrics": metrics}
        display.result(json.dumps(found | ({"profile": profile} if profile else {}), indent=2))
        return
    if options.receipt:
        display.result(json.dumps(receipt, indent=2))
        return
    width = max(shutil.get_terminal_size().columns, 40)
    lines = [f"{run.path}: {status.get('state', 'unknown')} {status.get('why', '')}".rstrip()]
    lines += _metrics(metrics, receipt)
    lines += gained(profile, with_spread=False) if profile else []
    lines += [f"{label}: {text}" for label, text in _facts(run, receipt) if text]
    lines += [f"warning: {text}" for text in _warnings(receipt)]
    lines.append(
        f"potstill show {run.path} --receipt prints all of its receipt" if receipt else "no receipt yet"
    )
    display.result("\n".join(piece for line in lines for piece in _fitted(line, width)))


def _fitted(line: str, width: int) -> list[str]:
    """The line, as several that are no longer than the terminal; a table's row is cut."""
    line = printable(line, keep="")
    if len(line) <= width:
        return [line]
    if line.startswith("  "):
        return [f"{line[: width - 1]}…"]
    return textwrap.wrap(line, width, subsequent_indent="    ", break_on_hyphens=False)


def _metrics(metrics: Summary, receipt: Mapping[str, Any]) -> list[str]:
    """Held-out metrics at the start, of the saved student and at the end; then first and last of the steps."""
    heldout = {name: of for name, of in metrics.items() if "best" in of}
    steps = [name for name in metrics if name not in heldout]
    lines: list[str] = []
    for title, columns, names in (
        ("held-out rows", ("first", "best", "last"), sorted(heldout, key=_rank)),
        ("steps", ("first", "last"), steps),
    ):
        rows = [[name, *(f"{metrics[name][column]:.6g}" for column in columns)] for name in names]
        lines += aligned([title, *columns], rows).splitlines() if rows else []
        best = receipt.get("student_is_of_step")
        if names is not steps and rows and type(best) is int:
            lines.append(f"  best: the saved student's, of step {best}, by held-out loss")
    return lines


def _rank(name: str) -> tuple[bool, int, str]:
    """Those of all rows before those of a source."""
    _, *parts = name.split("/")
    known = NAMED_FIRST.index(parts[-1]) if parts[-1] in NAMED_FIRST else len(NAMED_FIRST)
    return len(parts) > 1, known, name


def _facts(run: RunDir, receipt: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the model is, what it learnt from, and what was made of it."""
    teacher, student = _section(receipt, "teacher"), _section(receipt, "student")
    yield "evaluations", "; ".join(_evaluations(receipt))
    if receipt:
        weights = _num_weights(run)
        yield (
            "student",
            ", ".join(
                [f"{short(weights)} weights"] * bool(weights)
                + [f"{name} {_brief(value)}" for name, value in student.items() if "sha256" not in name]
            ),
        )
        yield "teacher", _brief(teacher.get("source") or teacher.get("name"))
        yield "objective", _brief(receipt.get("objective"))
        yield "data", _data(run)
        peak = receipt.get("peak_memory_gib")
        yield (
            "took",
            ", ".join(
                [f"{clock(seconds)} of training" for seconds in _numbers(receipt.get("training_seconds"))]
                + [f"{size(gib * 2**30)} at most" for gib in _numbers(peak)]
                + [f"on {_brief(receipt.get('device'))}"]
            ),
        )
    if run.student.is_dir():
        yield "saved", str(run.student)
    for export in _list(receipt.get("exports")):
        paths = _list([*_section(export, "three_path").values()])
        of_paths = [_brief(path.get("status")) for path in paths]
        checked = f", round trip {' and '.join(sorted(set(of_paths)))}" if of_paths else ""
        yield f"export {_brief(export.get('format'))}", f"{run.path / str(export.get('file'))}{checked}"


def _evaluations(receipt: Mapping[str, Any]) -> Iterator[str]:
    for name, result in _section(receipt, "evaluations").items():
        figures = result.items() if isinstance(result, dict) else ()
        shown = [f"{key} {value:.4g}" for key, value in figures if type(value) in (int, float)]
        yield f"{name} {', '.join(shown[:6])}" if shown else f"{name} {_brief(result)}"


def _data(run: RunDir) -> str:
    corpus = run.corpus()
    files = corpus.get("files")
    counts = [f"{len(files)} files"] if isinstance(files, list) else []
    for name, what in (("train_rows", "training rows"), ("heldout_rows", "held-out rows")):
        counts += [f"{number:,} {what}" for number in _numbers(corpus.get(name))]
    return ", ".join(counts)


def _num_weights(run: RunDir) -> int:
    from potstill.errors import UserError
    from potstill.models.model_files import tensor_shapes

    try:
        return sum(math.prod(shape) for shape in tensor_shapes(run.student).values())
    except (UserError, OSError):  # the student may be elsewhere, and its receipt is still to be shown
        return 0


def _warnings(receipt: Mapping[str, Any]) -> Iterator[str]:
    if receipt.get("student_is_of_step") == 0:
        yield "no evaluation was better than that of the untouched student, which is the saved one"
    for name in _list(receipt.get("check_red"), str):
        yield f"the check {name} failed: {_brief(_section(receipt, 'check').get(name))}"
    if left_out := _list(receipt.get("steps_left_out"), int):
        yield f"{len(left_out)} steps were left out by the guard, the first of them step {left_out[0]}"
    if receipt.get("uncommitted_changes") is True:
        yield "the code had uncommitted changes, which are in code.diff"
    for export in _list(receipt.get("exports")):
        for path, result in _section(export, "three_path").items():
            if isinstance(result, dict) and result.get("status") == "failed":
                yield f"export {_brief(export.get('format'))} failed its round trip ({path})"


def _section(of: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping of a receipt, which a person may have edited."""
    found = of.get(name)
    return found if isinstance(found, dict) else {}


def _list(found: Any, kind: type = dict) -> list[Any]:
    return [each for each in found if isinstance(each, kind)] if isinstance(found, list) else []


def _numbers(found: Any) -> list[float]:
    return [found] if type(found) in (int, float) else []


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:199]}…"
