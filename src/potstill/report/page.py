"""A run, or several beside one another, as one HTML page that needs nothing else: no network, no library.

Everything comes from the run directories; what is not in them is told as not run, never guessed. All text of
models, corpora and files is escaped, and the page's own content security policy lets nothing run or load
but its own style sheet and script, whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, Literal

from potstill.io.terminal import clock
from potstill.report import sections
from potstill.report.charts import COLOURS, Series, chart, grouped
from potstill.report.sections import flat, html, table
from potstill.runs.run_dir import RunDir, summary

NATS = "nats per token"
CHARTS = [  # title, unit, trained, held out, constant, whether it may be logarithmic
    ("Loss", "the objective, nats per token", "train/loss", "heldout/loss", "", False),
    ("Cross-entropy (CE)", NATS, "train/ce", "heldout/ce", "heldout/teacher_ce", False),
    ("Distillation term (KD)", NATS, "train/kd", "heldout/kd", "", False),
    ("KL to the teacher", NATS, "", "heldout/kl", "", False),
    ("Top-1 agreement with the teacher", "share of positions", "", "heldout/agreement", "", False),
    ("Learning rate", "", "train/lr", "", "", False),
    ("Gradient norm", "before clipping", "train/grad_norm", "", "", True),
    ("Throughput", "tokens/s", "speed/tokens_per_s", "", "", False),
    ("Memory", "GiB", "memory/peak_gib", "", "", False),
]
STATES = ("beginning", "running", "stopped", "finished", "failed")


@dataclass(frozen=True)
class Told:
    """A run, and where its student disagrees with its teacher, or why that is not known."""

    run: RunDir
    disagreement: Mapping[str, Any] | str

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        return self.run.metrics()

    @cached_property
    def receipt(self) -> dict[str, Any]:
        return self.run.receipt()

    @cached_property
    def status(self) -> dict[str, Any]:
        return self.run.status()

    def part(self, name: str) -> dict[str, Any]:
        """A section of the receipt; empty where there is none."""
        found = self.receipt.get(name)
        return found if isinstance(found, dict) else {}

    def points(self, name: str) -> list[tuple[float, float]]:
        return [(line["step"], line[name]) for line in self.metrics if name in line]

    @property
    def last_step(self) -> int:
        return int(max((line["step"] for line in self.metrics), default=0))

    def last(self, name: str) -> float | None:
        return next((line[name] for line in reversed(self.metrics) if name in line), None)


def page(runs: Sequence[Told], comparisons: Mapping[Path, Mapping[str, Any]]) -> str:
    """The whole document.

    Raises:
        UserError: a file of a run is damaged, with its place.
    """
    names = _names([told.run.path for told in runs])
    title = ", ".join([*names, *(path.name for path in comparisons)])
    arms = [(path.name, sections.comparison(found)) for path, found in comparisons.items()]
    sections = [  # anchor and name in the list of contents, heading, inner HTML
        ("Curves", "Curves", _curves(runs, names)),
        ("Disagreement", "Where the student disagrees with the teacher", _each(runs, names, _disagreement)),
        ("HumanEval", "HumanEval", _each(runs, names, _humaneval)),
        ("Arms", "Arms under one budget", _arms(arms)),
        ("Checks", "Checks before the run", _each(runs, names, _checks)),
        ("Memory", "Memory, predicted and measured", _each(runs, names, _memory)),
        ("Guard", "Steps refused by the guard", _each(runs, names, _faults)),
        ("Samples", "Samples", _each(runs, names, _samples)),
        ("Receipt", "Receipt", _each(runs, names, _receipt)),
    ]
    if comparisons:  # what the page was asked for
        sections.sort(key=lambda section: section[0] != "Arms")
        sections = sections if runs else sections[:1]
    links = "".join(f'<a href="#{short.lower()}">{short}</a>' for short, _, _ in sections)
    body = (
        f'<header><p class="eyebrow">potstill report</p><h1>{html(title)}</h1>'
        f"{_states(runs, names)}<nav>{links}</nav></header><main>{_figures(runs, names)}"
        + "".join(
            f'<section id="{short.lower()}"><h2>{name}</h2>{inner}</section>'
            for short, name, inner in sections
        )
        + "</main><footer>Read from the run directories by potstill. Losses are in nats.</footer>"
    )
    style, script, template = (_shipped(f"report.{kind}") for kind in ("css", "js", "html"))
    return Template(template).substitute(
        title=html(title),
        style=style,
        script=script,
        body=body,
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
    )


def _shipped(name: str) -> str:
    return (resources.files("potstill.report") / name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, or as much of their paths as tells them apart."""
    short = [path.resolve().name for path in paths]
    return [n if short.count(n) == 1 else str(path) for n, path in zip(short, paths, strict=True)]


def _swatch(number: int) -> str:
    return f'<i class="swatch s{number % COLOURS}"></i>'


def _each(runs: Sequence[Told], names: Sequence[str], section: Callable[[Told], str]) -> str:
    """A section of one run as it is; of several, each under its name."""
    if len(runs) == 1:
        return section(runs[0])
    return "".join(
        f"<h3>{_swatch(i)}{html(name)}</h3>{section(told)}"
        for i, (told, name) in enumerate(zip(runs, names, strict=True))
    )


def _states(runs: Sequence[Told], names: Sequence[str]) -> str:
    lines = []
    for told, name in zip(runs, names, strict=True):
        state = str(told.status.get("state", "unknown"))
        kind = state if state in STATES else "unknown"
        objective = told.receipt.get("objective")
        said = [x for x in (told.status.get("why"), objective) if x]
        which = f"{html(name)} " if len(runs) > 1 else ""
        lines.append(
            f'<p>{which}<span class="state {kind}">{html(state)}</span>'
            f' <span class="soft">{html(" · ".join(map(str, said)))}</span></p>'
        )
    return "".join(lines)


def _figures(runs: Sequence[Told], names: Sequence[str]) -> str:
    """Headline figures: tiles for one run, a table with a row a run for several."""
    if not runs:
        return ""
    found = [_headline(told) for told in runs]
    if len(runs) == 1:
        tiles = (f"<div><dt>{html(n)}</dt><dd>{v}</dd><dd>{html(note)}</dd></div>" for n, v, note in found[0])
        return f'<dl class="figures">{"".join(tiles)}</dl>'
    columns = ["run", *(name for name, _, _ in found[0])]
    rows = [
        [f"{_swatch(i)}{html(name)}", *(value for _, value, _ in of)]
        for i, (name, of) in enumerate(zip(names, found, strict=True))
    ]
    grid = table(columns, rows, numbers=range(1, len(columns)), kind="tight")
    return f"<section><h2>Figures</h2>{grid}</section>"


def _headline(told: Told) -> list[tuple[str, str, str]]:
    """(name, value as HTML, note)."""
    receipt, none = told.receipt, '<span class="soft">–</span>'
    found = summary(told.run)

    def held(label: str, name: str, unit: str, digits: int, times: float = 1) -> tuple[str, str, str]:
        of = found.get(name)
        if of is None:
            return label, none, "not measured"
        value = f"{of['last'] * times:.{digits}f} <small>{unit}</small>"
        return label, value, f"from {of['first'] * times:.{digits}f} at step {told.points(name)[0][0]:g}"

    steps, asked = told.last_step, receipt.get("steps")
    speeds = [value for _, value in told.points("speed/tokens_per_s")]
    speed = grouped(statistics.median(speeds)) if speeds else ""
    peak, plan = receipt.get("peak_memory_gib"), told.part("plan").get("predicted_peak_gib")
    planned = f"{plan:.2f} planned" if isinstance(plan, float) else "not planned"
    teacher = told.last("heldout/teacher_ce")
    ce = held("Held-out CE", "heldout/ce", "nats", 3)
    seconds = receipt.get("training_seconds")
    return [
        (*ce[:2], ce[2] if teacher is None else f"{ce[2]}; teacher {teacher:.3f}"),
        held("KL to the teacher", "heldout/kl", "nats", 3),
        held("Top-1 agreement", "heldout/agreement", "%", 1, 100),
        ("HumanEval pass@1", *(sections.pass_at_1(told.run.evals / "humaneval") or (none, "not run"))),
        ("Steps", grouped(steps), f"of {grouped(asked)}" if asked else "no receipt yet"),
        (
            "Training time",
            *((none, "no receipt yet") if seconds is None else (clock(seconds), "of steps alone")),
        ),
        (
            "Throughput",
            *((f"{speed} <small>tokens/s</small>", "median step") if speeds else (none, "not logged")),
        ),
        (
            "Peak memory",
            *((none, "no receipt yet") if peak is None else (f"{peak:.2f} <small>GiB</small>", planned)),
        ),
    ]


def _curves(runs: Sequence[Told], names: Sequence[str]) -> str:
    if not any(told.metrics for told in runs):
        return '<p class="none">No step is logged yet.</p>'
    items = (f"<li>{_swatch(i)}{html(name)}</li>" for i, name in enumerate(names))
    head = f'<ul class="runs">{"".join(items)}</ul>' if len(runs) > 1 else ""
    figures = []
    for title, unit, train, heldout, level, may_be_log in CHARTS:
        kinds: list[tuple[str, Literal["line", "points", "level"], str, int]] = [
            ("train" if heldout else "per step", "line", train, 0),
            ("held out", "points", heldout, 1),
            ("teacher, held out", "level", level, 5),
        ]
        lines = [
            # A colour is a run; where there is one run alone, it is a kind of line.
            Series(label, colour if len(runs) == 1 else run, kind, points)
            for run, told in enumerate(runs)
            for label, kind, name, colour in kinds
            if (points := told.points(name))
        ]
        figures.append(chart(title, unit, lines, may_be_log=may_be_log))
    return f'{head}<div class="charts">{"".join(figures)}</div>'


def _disagreement(told: Told) -> str:
    overall = told.part("heldout_best").get("heldout/kl")
    return sections.disagreement(told.disagreement, overall)


def _humaneval(told: Told) -> str:
    return sections.humaneval(told.run.evals / "humaneval")


def _arms(arms: Sequence[tuple[str, str]]) -> str:
    if not arms:
        return '<p class="none">Not run: give the folder that <code>potstill compare</code> made.</p>'
    return "".join(f"<h3>{html(name)}</h3>{inner}" for name, inner in arms)


def _checks(told: Told) -> str:
    """A run begins only where every check passed; the receipt has their figures."""
    found = told.part("check")
    if not found:
        return f'<p class="none">{_no_receipt(told)}</p>'
    rows = [['<span class="ok">ok</span>', html(name), html(figure)] for name, figure in found.items()]
    return table(["verdict", "check", "figure"], rows, wide=(2,))


def _memory(told: Told) -> str:
    plan = told.part("plan")
    if not plan:
        return f'<p class="none">{_no_receipt(told)}</p>'
    predicted, measured = plan.get("predicted_peak_gib"), plan.get("measured_peak_gib")
    if not isinstance(predicted, float):
        return f"<p>Not predicted: {html(predicted)}. Measured: {html(measured)} GiB.</p>"
    longest = max(predicted, measured or 0.0)

    def bar(size: float, kind: str = "") -> str:
        width = f"{100 * size / longest:.2f}"
        return (
            '<svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="{kind}" width="{width}" height="4"/></svg>'
        )

    rows = [
        [html(n.replace("_", " ")), f"{size:.2f}", bar(size)] for n, size in plan.get("parts_gib", {}).items()
    ]
    rows += [["predicted peak", f"{predicted:.2f}", bar(predicted)]]
    rows += [["measured peak", f"{measured:.2f}", bar(measured, "measured")]] if measured else []
    ratio = f"<p>Predicted / measured: {plan['ratio']:.3f}.</p>" if "ratio" in plan else ""
    return table(["part", "GiB", ""], rows, numbers=(1,), sums=2 if measured else 1, kind="memory") + ratio


def _faults(told: Told) -> str:
    faults = told.run.faults()
    if not faults:
        return '<p class="none">None.</p>' if told.metrics else '<p class="none">No step is logged yet.</p>'
    rows = [[html(fault.get("step", "?")), html(fault.get("what", "?"))] for fault in faults]
    return table(["step", "why its update was refused"], rows, numbers=(0,), wide=(1,))


def _samples(told: Told) -> str:
    samples = told.part("samples")
    if not samples:
        why = "Not run: the recipe has no eval.sample_prompt." if told.receipt else _no_receipt(told)
        return f'<p class="none">{why}</p>'
    prompt = html(samples.get("prompt", ""))
    both = "".join(
        f"<div><h3>{when.capitalize()} training</h3>"
        f'<pre><span class="soft">{prompt}</span>{html(samples.get(when, ""))}</pre></div>'
        for when in ("before", "after")
    )
    return f'<div class="pair">{both}</div>'


def _receipt(told: Told) -> str:
    told_elsewhere = ("check", "plan", "samples")
    left = {name: value for name, value in told.receipt.items() if name not in told_elsewhere}
    if not left:
        return f'<p class="none">{_no_receipt(told)}</p>'
    rows = [[html(name), f"<code>{html(value)}</code>"] for name, value in flat(left)]
    half = -(-len(rows) // 2)
    tables = (table(["entry", "value"], part) for part in (rows[:half], rows[half:]))
    return f'<div class="receipt">{"".join(tables)}</div>'


def _no_receipt(told: Told) -> str:
    state = html(told.status.get("state", "unknown"))
    return f"Not there: a run writes its receipt when it is finished, and this one is {state}."
