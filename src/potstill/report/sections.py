"""The report's parts that are evidence of their own: disagreement with the teacher, HumanEval, the arms."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from potstill.io.safe_open import read_object
from potstill.io.terminal import printable
from potstill.report.charts import grouped, intervals
from potstill.runs.run_dir import READABLE, read_lines

BINS = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Nats at which the colour of a token changes: k0 below the first, k6 from the last on."""
WORST = 12


def html(value: object) -> str:
    """Text of unknown origin, safe between tags and in quoted attributes; hidden characters written out."""
    return escape(printable(str(value)), quote=True)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Sequence[int] = (),
    wide: Sequence[int] = (),
    sums: int = 0,
    kind: str = "",
) -> str:
    """Cells are HTML. `numbers` are columns to the right, the last `sums` rows stand below a rule."""

    def kind_of(column: int) -> str:
        return ' class="n"' if column in numbers else ' class="wide"' if column in wide else ""

    head = "".join(f'<th scope="col"{kind_of(i)}>{html(name)}</th>' for i, name in enumerate(columns))
    body = []
    for number, row in enumerate(rows):
        row_kind = ' class="sum"' if sums and number == len(rows) - sums else ""
        body.append(
            f"<tr{row_kind}>" + "".join(f"<td{kind_of(i)}>{c}</td>" for i, c in enumerate(row)) + "</tr>"
        )
    shape = f' class="{kind}"' if kind else ""
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table{shape}>{inside}</table></div>'


def bin_of(kl: float | None) -> int:
    """Number of its colour; None is infinite, where the student rules out what the teacher does not."""
    return len(BINS) if kl is None else sum(kl >= limit for limit in BINS)


def _nats(kl: float | None) -> float:
    return math.inf if kl is None else kl


def disagreement(found: Mapping[str, Any] | str, overall_kl: float | None) -> str:
    """Held-out text, coloured by KL(teacher || student) at each token; `overall_kl` is that of all rows."""
    if isinstance(found, str):
        return f'<p class="none">{html(found[:1].upper() + found[1:])}.</p>'.replace("..", ".")
    tokens = [token for row in found["rows"] for token in row]
    valued = [token for token in tokens if "kl" in token]
    if not valued:
        return '<p class="none">Not run: no held-out token bears loss.</p>'
    differ = sum(token["teacher"][0][0] != token["student"][0][0] for token in valued)
    of_all = "" if overall_kl is None else f" ({overall_kl:.3f} over all held-out rows)"
    lead = (
        f"<p>KL(teacher ‖ student) before each of {grouped(len(valued))} held-out tokens: mean"
        f" {found['mean_kl']:.3f} nats{of_all}. The first choices differ at {differ} tokens"
        f" ({100 * differ / len(valued):.1f} %). Point at a token, touch it, or use the arrow keys.</p>"
    )
    edges = ["0", *(f"{limit:g}" for limit in BINS)]
    names = [*(f"{a}–{b}" for a, b in pairwise(edges)), f"{edges[-1]} and more"]
    legend = "".join(f'<li class="k{i}">{name}</li>' for i, name in enumerate(names))
    texts, number = [], 0
    for row in found["rows"]:
        spans = []
        for token in row:
            visible = html(token["text"]).replace("\n", "<i>↵</i>\n")
            if "kl" not in token:
                spans.append(visible)
            else:
                kinds = f"t k{bin_of(token['kl'])}{'' if token['text'].strip() else ' w'}"
                first = 0 if number == 0 else -1  # one stop for the tab key; the arrows lead on from there
                spans.append(f'<span class="{kinds}" data-i="{number}" tabindex="{first}">{visible}</span>')
                number += 1
        texts.append(f'<p class="text">{"".join(spans)}</p>')
    island = json.dumps(valued, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'{lead}<ul class="legend"><li class="word">KL, nats</li>{legend}</ul>'
        f'<div class="reader"><div>{"".join(texts)}</div><aside class="panel" aria-live="polite">'
        '<p class="soft">Without scripts, see the table below.</p></aside>'
        f'<script type="application/json">{island}</script></div>{_worst(found["rows"])}'
    )


def _worst(rows: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """The tokens at which the models are furthest apart, in words: readable without pointing at anything."""
    places = [(row, at) for row in rows for at, token in enumerate(row) if "kl" in token]
    places.sort(key=lambda place: -_nats(place[0][place[1]]["kl"]))
    cells = []
    for row, at in places[:WORST]:
        token, before = row[at], "".join(other["text"] for other in row[max(at - 8, 0) : at])[-28:]
        choices = (
            f"{_token(text)} {100 * share:.0f}\u00a0%"
            for _, text, share in (token["teacher"][0], token["student"][0])
        )
        cells.append(
            [
                f"{_nats(token['kl']):.2f}",
                f'<span class="before mono">{html(_marked(before))}</span>{_token(token["text"])}',
                *choices,
            ]
        )
    head = ["KL", "before · what came", "teacher's first choice", "student's first choice"]
    return f"<h3>Furthest apart</h3>{table(head, cells, numbers=(0,), kind='worst')}"


def _marked(text: str) -> str:
    return text.replace("\n", "↵").replace("\t", "→")


def _token(text: str) -> str:
    shown = _marked(text)
    shown = "␣" * (len(shown) - len(shown.lstrip(" "))) + shown.lstrip(" ") if not shown.strip() else shown
    return f'<span class="tok">{html(shown)}</span>'


def pass_at_1(folder: Path) -> tuple[str, str] | None:
    """(value as HTML, interval) of a run's first HumanEval score; None where it was not run."""
    results = _results(folder)
    for _, result, _ in results:
        if score := _score(result):
            return f"{100 * score['value']:.1f} <small>%</small>", _interval(score)
    return ('<span class="soft">–</span>', "no score") if results else None


def humaneval(folder: Path) -> str:
    """Every problem with its verdict and its completion, of each result there."""
    found = _results(folder)
    if not found:
        return '<p class="none">Not run.</p>'
    return "".join(_problems(name, result, samples) for name, result, samples in found)


def _results(folder: Path) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """(name, result, samples) of each NAME.json, with the lines of its NAME.samples.jsonl."""
    found = []
    for path in sorted(folder.glob("*.json")) if os.path.isdir(folder) else []:
        lines = path.with_suffix(".samples.jsonl")
        samples = read_lines(lines) if os.path.lexists(lines) else []
        samples = [line for line in samples if "task_id" in line]  # the first line has the settings
        found.append((path.stem, read_object(path, READABLE), samples))
    return found


def _score(result: Mapping[str, Any]) -> dict[str, Any] | None:
    scores = result.get("scores")
    found = scores.get("pass@1") if isinstance(scores, dict) else None
    return found if isinstance(found, dict) else None


def _interval(score: Mapping[str, Any]) -> str:
    return f"95 % interval {100 * score['low']:.1f}–{100 * score['high']:.1f} %"


def _said(result: Mapping[str, Any]) -> str:
    """The score in words, or why there is none."""
    if score := _score(result):
        return f"pass@1 {100 * score['value']:.1f} %, {_interval(score)}"
    if subset := result.get("subset"):
        return (
            f"{subset['samples_passed']} of {subset['samples']} samples pass, of a subset of"
            f" {subset['problems']} problems, which is no score of HumanEval"
        )
    return f"no score: {result.get('status', 'unknown')}: {result.get('why', 'it says no reason')}"


def _problems(name: str, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """A grid of verdicts that leads to a list, which can be filtered, of what the model wrote."""
    key = hashlib.sha256(json.dumps([name, result], sort_keys=True).encode()).hexdigest()[:8]
    verdicts = [str(sample.get("verdict", "none")) for sample in samples]
    counts = ", ".join(f"{v} {verdicts.count(v)}" for v in sorted({*verdicts})) or "no samples kept"
    lead = html(f"{_said(result)}; {counts}.")
    cells, items = [], []
    for number, (sample, verdict) in enumerate(zip(samples, verdicts, strict=True)):
        task, anchor, passed = str(sample["task_id"]), f"he-{key}-{number}", sample.get("passed") is True
        kind = ' class="pass"' if passed else ' class="other"' if verdict != "failed" else ""
        label = f'title="{html(task)}: {html(verdict)}"'
        cells.append(f'<li{kind}><a href="#{anchor}" {label}>{html(task.split("/")[-1])}</a></li>')
        items.append(
            f'<details id="{anchor}" data-verdict="{html(verdict)}"><summary>{html(task)}'
            f' <span class="{"ok" if passed else "red"}">{html(verdict)}</span>'
            f' <span class="soft">{html(sample.get("detail") or "")}</span></summary>'
            f"<p>Completion</p><pre>{html(sample.get('completion', ''))}</pre>"
            f"<p>Program that was judged</p><pre>{html(sample.get('program', ''))}</pre></details>"
        )
    options = "".join(f'<option value="{html(v)}">{html(v)}</option>' for v in sorted({*verdicts}))
    left = {n: value for n, value in result.items() if n != "passed_by_problem"}  # the grid has them
    rows = [[html(n), f"<code>{html(value)}</code>"] for n, value in flat(left)]
    return (
        f'<div><h3>{html(name)}</h3><p>{lead}</p><ul class="cells">{"".join(cells)}</ul><p class="filter">'
        '<label>Find <input type="search"></label><label>Verdict <select><option value="">all</option>'
        f'{options}</select></label><output class="soft"></output></p>'
        f'<div class="list">{"".join(items)}</div>'
        f"<details><summary>Settings and hashes of {html(name)}</summary>"
        f"{table(['entry', 'value'], rows, wide=(1,))}</details></div>"
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of a JSON object, in words."""
    words = {True: "yes", False: "no", None: "none"}
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield f"{prefix}{name}", " ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{name}", words[value] if value is None or isinstance(value, bool) else str(value)


def comparison(found: Mapping[str, Any]) -> str:
    """The arms under one budget: the sentence that they allow, a table, and a plot with intervals."""
    arms = [arm for arm in found.get("arms", []) if isinstance(arm, dict)]
    names = [str(arm.get("name", "?")) for arm in arms]
    metrics = list(dict.fromkeys(name for arm in arms for name in arm.get("metrics", {})))
    columns, rows, plots = ["arm", "steps", "seconds", *metrics], [], []
    for arm, name in zip(arms, names, strict=True):
        values = [_estimate(arm.get("metrics", {}).get(metric)) for metric in metrics]
        spent = [html(arm.get("steps", "–")), html(arm.get("training_seconds", "–"))]
        rows.append([html(name), *spent, *("not run" if v is None else _spread(*v) for v in values)])
    for metric in metrics:
        values = [_estimate(arm.get("metrics", {}).get(metric)) for arm in arms]
        plots.append(intervals(metric.removeprefix("heldout/"), list(zip(names, values, strict=True))))
    differences = _differences(found.get("differences", []))
    told = ("arms", "sentence", "warnings", "differences")
    said = found.get("sentence", "")
    warnings = "".join(f'<p class="red">{html(warning)}</p>' for warning in found.get("warnings", []))
    left = {name: value for name, value in found.items() if name not in told}
    settings = [[html(n), f"<code>{html(value)}</code>"] for n, value in flat(left)]
    return (
        f"<p>{html(said)}</p>{warnings}"
        f"{table(columns, rows, numbers=range(1, len(columns)), kind='tight')}"
        f'<div class="charts">{"".join(plots)}</div>{differences}'
        "<details><summary>Budget, seeds and hashes</summary>"
        f"{table(['entry', 'value'], settings, wide=(1,))}</details>"
    )


def _differences(found: Sequence[Mapping[str, Any]]) -> str:
    """Arm by arm: an interval that leaves 0 out shows who is ahead, any other shows nothing."""
    rows = [
        [
            html(f"{one['arm']} − {one['against']}"),
            html(one["metric"]),
            f"{one['mean']:+.4g} <small>[{one['low']:+.4g}, {one['high']:+.4g}]</small>",
            f'<span class="ok">{html(one["ahead"])} ahead</span>' if one.get("shown") else "not shown",
        ]
        for one in found
    ]
    head = ["difference", "metric", "mean and interval", "verdict"]
    return f"<h3>Differences</h3>{table(head, rows, numbers=(2,), kind='tight')}" if rows else ""


def _estimate(value: Any) -> tuple[float, float, float] | None:
    """(mean, low, high) of a metric; a number alone is an interval of no width."""
    if isinstance(value, dict) and "mean" in value:
        mean = float(value["mean"])
        return mean, float(value.get("low", mean)), float(value.get("high", mean))
    return (float(value),) * 3 if isinstance(value, int | float) else None


def _spread(mean: float, low: float, high: float) -> str:
    return f"{mean:.4g}" if low == high else f"{mean:.4g} <small>[{low:.4g}, {high:.4g}]</small>"
