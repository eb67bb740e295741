"""Render runs, or several side by side, as one HTML page without external resources.

Everything comes from the run directories, and what was not measured is shown as not run. The templates escape
every value, with hidden characters written out; the page's content security policy admits only its own style
sheet and script, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from potstill.io.terminal import clock, printable
from potstill.report import sections, tradeoff
from potstill.report.charts import COLORS, Series, bars, chart, grouped
from potstill.runs import answers, gains
from potstill.runs.gains import profile_of
from potstill.runs.run_dir import RunDir, repair_steps, stream_steps
from potstill.runs.summary import best_evaluation, summary

NATS = "nats per token"
CHARTS = [  # title, unit, training metric, held-out metric, constant, whether its axis may be logarithmic
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
MIXTURE_CHARTS = [  # of mixtures of experts alone
    ("Router loss", "balanced: the experts of a token", "train/router_loss", "", "", False),
    ("Most used expert", "share of its layer's assignments", "experts/share_max", "", "", False),
    ("Least used expert", "share of its layer's assignments", "experts/share_min", "", "", False),
]
ROLLOUT_CHARTS = [  # where the student writes rows itself
    (
        "Divergence on own text",
        "nats; held out: KL(student ‖ teacher)",
        "rollout/kd",
        "own/reverse_kl",
        "",
        False,
    ),
    ("Own text under the teacher", NATS, "", "own/teacher_nll", "", False),
    ("Own text under the student", NATS, "rollout/nll", "own/student_nll", "", False),
    ("Answers that end by themselves", "share", "rollout/ended", "own/ended", "", False),
    ("Length of an answer", "tokens", "rollout/tokens", "own/tokens", "", False),
    ("Distinct 4-grams", "share", "rollout/distinct_4", "own/distinct_4", "", False),
]
STATES = ("beginning", "running", "stopped", "finished", "failed")


@dataclass(frozen=True)
class Section:
    """`anchor` is also the name of its macro in `sections.html.j2`."""

    anchor: str
    link: str
    heading: str


SECTIONS = (
    Section("curves", "Curves", "Curves"),
    Section("gains", "Gains", "What was gained"),
    Section("sources", "Sources", "Sources of the mix"),
    Section("disagreement", "Disagreement", "Where the student disagrees with the teacher"),
    Section("humaneval", "HumanEval", "HumanEval"),
    Section("tasks", "Tasks", "Tasks with a verifier"),
    Section("arms", "Arms", "Arms under one budget"),
    Section("checks", "Checks", "Checks before the run"),
    Section("memory", "Memory", "Memory, predicted and measured"),
    Section("guard", "Guard", "Steps refused by the guard"),
    Section("samples", "Samples", "Samples"),
    Section("receipt", "Receipt", "Receipt"),
)


@dataclass(frozen=True)
class RunReport:
    """A run, and where its student disagrees with its teacher, or why that was not measured."""

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

    @cached_property
    def profile(self) -> dict[str, Any]:
        return profile_of(self.run)

    def section(self, name: str) -> dict[str, Any]:
        """A section of the receipt; empty where there is none."""
        value = self.receipt.get(name)
        return value if isinstance(value, dict) else {}

    def points(self, name: str) -> list[tuple[float, float]]:
        return [(line["step"], line[name]) for line in self.metrics if name in line]

    @property
    def last_step(self) -> int:
        return int(max((line["step"] for line in self.metrics), default=0))

    def last(self, name: str) -> float | None:
        return next((line[name] for line in reversed(self.metrics) if name in line), None)


@dataclass(frozen=True)
class Figure:
    """A headline figure; `value` is None where it was not measured, and `note` says why."""

    name: str
    value: str | None
    note: str
    unit: str = ""


def page(runs: Sequence[RunReport], comparisons: Mapping[Path, Mapping[str, Any]]) -> str:
    """The whole document.

    Raises:
        UserError: a file of a run is damaged, with its place.
    """
    names = _names([report.run.path for report in runs])
    optional = {
        "sources": any(report.section("sources") for report in runs),
        "gains": any(report.profile for report in runs),
    }
    shown = [section for section in SECTIONS if optional.get(section.anchor, True)]
    if comparisons:  # their section comes first, being what the page was made for
        shown.sort(key=lambda section: section.anchor != "arms")
        shown = shown if runs else shown[:1]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=", ".join([*names, *(path.name for path in comparisons)]),
            sections=shown,
            runs=[_run(report, name, i) for i, (report, name) in enumerate(zip(runs, names, strict=True))],
            charts=_charts(runs) if any(report.metrics for report in runs) else [],
            comparisons=[{"name": path.name} | sections.comparison(c) for path, c in comparisons.items()],
            style=_resource("report.css"),
            script=_resource("report.js"),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("potstill.report", "."),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["csp_hash"] = _csp_hash
    environment.globals["writers"] = answers.WRITERS
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment


def _resource(name: str) -> str:
    return (resources.files("potstill.report") / name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, or their whole paths where several share a name."""
    short = [path.resolve().name for path in paths]
    return [n if short.count(n) == 1 else str(path) for n, path in zip(short, paths, strict=True)]


def _run(report: RunReport, name: str, number: int) -> dict[str, Any]:
    """What the templates lay out of one run."""
    state = str(report.status.get("state", "unknown"))
    receipt = report.receipt
    own_section = ("check", "plan", "samples")
    return {
        "name": name,
        "color": number % COLORS,
        "state": state,
        "state_class": state if state in STATES else "unknown",
        "state_notes": [x for x in (report.status.get("why"), receipt.get("objective")) if x],
        "figures": _figures(report),
        "gains": _gains(report),
        "sources": sections.sources(report.section("sources"), report.metrics),
        "disagreement": sections.disagreement(
            report.disagreement, report.section("heldout_best").get("heldout/kl")
        ),
        "humaneval": sections.humaneval(report.run.evals / "humaneval"),
        "tasks": sections.tasks(report.run.evals),
        "checks": report.section("check"),
        "memory": _memory(report.section("plan")),
        "faults": report.run.faults(),
        "answers": answers.side_by_side(report.run),
        "sampled": sections.by_prompt(report.run.samples()),
        "receipt": list(sections.flat({k: v for k, v in receipt.items() if k not in own_section})),
        "has_receipt": bool(receipt),
        "has_metrics": bool(report.metrics),
        "no_receipt": f"Not there: a run writes its receipt when it is finished, and this one is {state}.",
    }


def _gains(report: RunReport) -> dict[str, Any] | None:
    """The profile as a picture, a table and sentences; None where the student was not profiled."""
    if not (profile := report.profile):
        return None
    scores = sections.scores(report.run.evals)
    of = tradeoff.qualities(report.receipt, profile, scores)
    return {
        "picture": tradeoff.picture(of, tradeoff.gains(profile)),
        "rows": gains.rows(profile),
        "sentences": list(gains.sentences(profile)),
    }


def _figures(report: RunReport) -> list[Figure]:
    receipt, metrics, best = report.receipt, summary(report.run), best_evaluation(report.metrics)

    def heldout(label: str, name: str, unit: str, digits: int, scale: float = 1, more: str = "") -> Figure:
        of = metrics.get(name)
        if of is None:
            return Figure(label, None, f"not measured{more}")
        note = f"saved student, step {best.get('step', 0):g}; from {of['first'] * scale:.{digits}f} at step"
        note += f" {report.points(name)[0][0]:g}{more}"
        return Figure(label, f"{of.get('best', of['last']) * scale:.{digits}f}", note, unit)

    teacher = report.last("heldout/teacher_ce")
    steps = receipt.get("steps")
    seconds = receipt.get("training_seconds")
    speeds = [value for _, value in report.points("speed/tokens_per_s")]
    peak, plan = receipt.get("peak_memory_gib"), report.section("plan").get("predicted_peak_gib")
    return [
        heldout(
            "Held-out CE", "heldout/ce", "nats", 3, more="" if teacher is None else f"; teacher {teacher:.3f}"
        ),
        heldout("KL to the teacher", "heldout/kl", "nats", 3),
        heldout("Top-1 agreement", "heldout/agreement", "%", 1, 100),
        Figure("HumanEval pass@1", *sections.pass_at_1(report.run.evals / "humaneval"), "%"),
        Figure("Steps", grouped(report.last_step), f"of {grouped(steps)}" if steps else "no receipt yet"),
        Figure("Training time", None, "no receipt yet")
        if seconds is None
        else Figure("Training time", clock(seconds), "of steps alone"),
        Figure("Throughput", grouped(statistics.median(speeds)), "median step", "tokens/s")
        if speeds
        else Figure("Throughput", None, "not logged"),
        Figure("Peak memory", None, "no receipt yet")
        if peak is None
        else Figure(
            "Peak memory",
            f"{peak:.2f}",
            f"{plan:.2f} planned" if isinstance(plan, float) else "not planned",
            "GiB",
        ),
    ]


def _charts(runs: Sequence[RunReport]) -> list[str]:
    charts = []
    special = [*ROLLOUT_CHARTS, *MIXTURE_CHARTS]
    special = [entry for entry in special if any(report.points(entry[2] or entry[3]) for report in runs)]
    for title, unit, train, heldout, level, may_be_log in [*CHARTS, *special]:
        kinds: list[tuple[str, Literal["line", "points", "level"], str, int]] = [
            ("train" if heldout else "per step", "line", train, 0),
            ("held out", "points", heldout, 1),
            ("teacher, held out", "level", level, 5),
        ]
        lines = [
            # Colors tell runs apart; with a single run, they tell the kinds of line apart.
            Series(label, color if len(runs) == 1 else number, kind, points)
            for number, report in enumerate(runs)
            for label, kind, name, color in kinds
            if (points := report.points(name))
        ]
        charts.append(chart(title, unit, lines, may_be_log=may_be_log))
    for report in runs:
        whose = f" of {report.run.path.name}" if runs[1:] else ""
        if layers := report.run.layers():
            title = f"KL without each of the teacher's layers{whose}"
            charts.append(bars(title, "nats", "layer", layers["alone_L"], layers["left_out"], "left out"))
        if layers and (moves := layers.get("moves")):
            title = f"KL to the teacher after so many moves towards the size{whose}"
            inside = [number for number, move in enumerate(moves, 1) if move["layer"] is None]
            kls = [0.0, *(move["kl"] for move in moves)]
            charts.append(bars(title, "nats", "move", kls, inside, "channels or heads, not a layer"))
        for what, word, steps_of in (
            ("so many gaps", "gap", repair_steps),
            ("a narrower residual stream", "step", stream_steps),
        ):
            if steps := steps_of(report.run.folds() or {}):
                title = f"KL to the teacher with {what} made up for, before training{whose}"
                kls = [steps[0]["kl_before"], *(step["kl_after"] for step in steps)]
                without = [number for number, step in enumerate(steps, 1) if step["ridge"] is None]
                charts.append(bars(title, "nats", word, kls, without, "left as it is"))
    return charts


def _memory(plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan's parts beside the predicted and the measured peak; no rows where nothing was predicted."""
    if not plan:
        return None
    predicted, measured = plan.get("predicted_peak_gib"), plan.get("measured_peak_gib")
    if not isinstance(predicted, float):
        return {"rows": [], "predicted": predicted, "measured": measured}
    parts = [(name.replace("_", " "), size, "") for name, size in plan.get("parts_gib", {}).items()]
    peaks = [
        ("predicted peak", predicted, ""),
        *([("measured peak", measured, "measured")] if measured else []),
    ]
    longest = max(predicted, measured or 0.0)
    rows = [
        {
            "name": name,
            "gib": f"{gib:.2f}",
            "width": f"{100 * gib / longest:.2f}",
            "class": css_class,
            "is_first_sum": number == len(parts),
        }
        for number, (name, gib, css_class) in enumerate([*parts, *peaks])
    ]
    return {"rows": rows, "ratio": f"{plan['ratio']:.3f}" if "ratio" in plan else None}
