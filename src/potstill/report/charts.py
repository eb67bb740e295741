"""Curves as inline SVG: axes with round ticks, several runs over one another, nothing that needs a script.

A chart's numbers are in its own units, 420 by 220, and it scales with its column. Colors and fonts come from
`report.css` by class: `s0`, `s1` … . What is not finite is not drawn, and is counted in the
chart's caption.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from typing import Literal

from potstill.io.terminal import printable

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 34
MOST_POINTS = 300
"""Columns that a longer line is thinned to; each keeps its lowest and its highest value."""
LOG_FROM = 30.0
"""Ratio of the highest to the lowest value from which an axis is logarithmic."""
COLORS = 6
Point = tuple[float, float]


def escape(text: str) -> str:
    """Text of unknown origin, safe between tags and in quoted attributes; hidden characters written out."""
    return escape_html(printable(text), quote=True)


@dataclass(frozen=True)
class Series:
    """A metric of one run. `line` joins the points, `points` also marks them, `level` is a constant."""

    label: str
    color: int
    kind: Literal["line", "points", "level"]
    points: Sequence[Point]


def chart(title: str, unit: str, series: Sequence[Series], *, may_be_log: bool = False) -> str:
    """A figure with its title, a key, and the curves over the steps, or a note that nothing was logged."""
    kept = [Series(s.label, s.color, s.kind, [p for p in s.points if math.isfinite(p[1])]) for s in series]
    lost = sum(len(s.points) for s in series) - sum(len(s.points) for s in kept)
    kept = [s for s in kept if s.points]
    head = f"<b>{escape(title)}</b> <span>{escape(unit)}</span>"
    if not kept:
        why = f"{lost} values, none finite" if lost else "not logged"
        return f'<figure class="chart none"><figcaption>{head}</figcaption><p>{why}</p></figure>'
    values = [y for s in kept for _, y in s.points]
    is_log = may_be_log and min(values) > 0 and max(values) / min(values) >= LOG_FROM
    y_ticks = log_ticks(min(values), max(values)) if is_log else ticks(min(values), max(values))
    x_ticks = [t for t in ticks(0, max(1.0, max(x for s in kept for x, _ in s.points))) if t == int(t)]
    last = max(x for s in kept for x, _ in s.points)
    scale = Scale(max(last, 1.0), y_ticks[0], y_ticks[-1], is_log)
    parts = [scale.grid(y_ticks, x_ticks), *(scale.draw(s) for s in kept)]
    notes = [*(["log scale"] if is_log else []), *([f"{lost} values not finite"] if lost else [])]
    key = "".join(f'<li class="{k}">{escape(label)}</li>' for k, label in _key(kept))
    label = escape(f"{title}, {unit}, over {last:g} steps: {_ends(kept)}")
    return (
        f'<figure class="chart"><figcaption>{head}<ul class="key">{key}'
        + "".join(f"<li>{escape(note)}</li>" for note in notes)
        + '</ul></figcaption><svg role="img" tabindex="0" '
        + f'viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="{label}">'
        + "".join(parts)
        + "</svg></figure>"
    )


def bars(title: str, unit: str, of: str, values: Sequence[float], marked: Collection[int], mark: str) -> str:
    """A figure with a bar for each of `values`, numbered from 0; those of `marked` in another color, named `mark`."""
    y_ticks = ticks(0, max(*values, 1e-9))
    scale = Scale(float(len(values)), 0.0, y_ticks[-1], is_log=False)
    parts = [scale.grid(y_ticks, [], of)]
    width = scale.x(0.8) - scale.x(0)
    for at, value in enumerate(values):
        x, y, color = scale.x(at + 0.1), scale.y(max(value, 0.0)), "s1" if at in marked else "s0"
        shown = f"{of} {at}: {value:.4g}{f', {mark}' if at in marked else ''}"
        parts.append(
            f'<rect class="fill {color}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}"'
            f' height="{HEIGHT - BOTTOM - y:.1f}"><title>{escape(shown)}</title></rect>'
        )
        if len(values) <= 16 or at % 5 == 0:
            parts.append(f'<text class="x" x="{x + width / 2:.1f}" y="{HEIGHT - BOTTOM + 16}">{at}</text>')
    listed = "; ".join(f"{at} {value:.4g}" for at, value in enumerate(values))
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> <span>{escape(unit)}</span><ul class="key">'
        f'<li class="s1">{escape(mark)}</li></ul></figcaption><svg role="img" tabindex="0"'
        f' viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="{escape(f"{title}, {unit}: {listed}")}">{"".join(parts)}'
        "</svg></figure>"
    )


def intervals(title: str, arms: Sequence[tuple[str, tuple[float, float, float] | None]]) -> str:
    """A figure with a row for each arm: a dot at its mean, a line across its interval."""
    known = [value for _, value in arms if value is not None]
    head = f"<figcaption><b>{escape(title)}</b></figcaption>"
    if not known:
        return f'<figure class="chart none">{head}<p>not run</p></figure>'
    # A distant arm without an interval would squeeze those of the others to a point: it is written as text.
    wide = [value for value in known if value[1] < value[2]] or known
    lowest, highest = min(low for _, low, _ in wide), max(high for _, _, high in wide)
    reach = 2 * (highest - lowest)
    near = [v for v in known if v in wide or lowest - reach <= v[0] <= highest + reach]
    marks = ticks(min(low for _, low, _ in near), max(high for _, _, high in near), 4)
    left, bottom = 120, 26 * len(arms) + 8
    per_unit = (WIDTH - left - 24) / (marks[-1] - marks[0])
    parts = []
    for mark in marks:
        x = round(left + (mark - marks[0]) * per_unit, 1)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="4" y2="{bottom}"/>')
        parts.append(f'<text class="x" x="{x}" y="{bottom + 15}">{number(mark)}</text>')
    for row, (name, value) in enumerate(arms):
        y, color = 20 + 26 * row, f"s{row % COLORS}"
        short = name if len(name) <= 18 else f"{name[:17]}…"
        parts.append(f'<text class="y" x="{left - 10}" y="{y + 4}">{escape(short)}</text>')
        if value is None:
            parts.append(f'<text x="{left + 4}" y="{y + 4}">not run</text>')
            continue
        if value not in near:
            where = f"◂ {value[0]:.4g}" if value[0] < marks[0] else f"{value[0]:.4g} ▸"
            x = left + 4 if value[0] < marks[0] else WIDTH - 24
            kind = "near" if value[0] < marks[0] else "far"
            parts.append(f'<text class="{kind}" x="{x}" y="{y + 4}">{where}</text>')
            continue
        mean, low, high = (round(left + (v - marks[0]) * per_unit, 1) for v in value)
        parts.append(f'<line class="whisker {color}" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot {color}" cx="{mean}" cy="{y}" r="4"/>')
    values = "; ".join(f"{n} {v[0]:.4g} from {v[1]:.4g} to {v[2]:.4g}" for n, v in arms if v is not None)
    return (
        f'<figure class="arms">{head}<svg role="img" viewBox="0 0 {WIDTH} {bottom + 22}"'
        f' aria-label="{escape(title)}: {escape(values)}">{"".join(parts)}</svg></figure>'
    )


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose `low` to `high`."""
    if high - low < 1e-12 * max(abs(high), abs(low), 1e-300):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose `low` to `high`, fewer where the range is wide."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    known = [m * 10.0**power for power in range(first, last + 1) for m in steps]
    under = max((t for t in known if t <= low), default=known[0])
    over = min((t for t in known if t >= high), default=known[-1])
    return [t for t in known if under <= t <= over]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most twice MOST_POINTS points, the lowest and the highest of each column: spikes stay."""
    if len(points) <= 2 * MOST_POINTS:
        return list(points)
    kept: list[Point] = []
    for column in range(MOST_POINTS):
        part = points[column * len(points) // MOST_POINTS : (column + 1) * len(points) // MOST_POINTS]
        ends = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        kept += sorted({*ends})
    return kept


def number(value: float) -> str:
    """Short, for an axis: 0.0003, 1 500, 2.5e-7."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        mantissa, power = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    return grouped(value) if abs(value) >= 1e4 else f"{value:.6g}"


def grouped(value: float) -> str:
    """Digits in groups of three, with narrow non-breaking spaces."""
    return f"{value:,.0f}".replace(",", "\u202f")


@dataclass(frozen=True)
class Scale:
    """From values to the units of a chart, whose horizontal axis begins at 0 and ends at `last`."""

    last: float
    low: float
    high: float
    is_log: bool

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / self.last

    def y(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        share = ((math.log(value) if self.is_log else value) - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def grid(self, y_ticks: Iterable[float], x_ticks: Iterable[float], name: str = "step") -> str:
        bottom, parts = HEIGHT - BOTTOM, []
        for tick in y_ticks:
            y = round(self.y(tick), 1)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 3.5:.1f}">{number(tick)}</text>')
        for tick in x_ticks:
            if tick <= self.last:
                x = round(self.x(tick), 1)
                parts.append(f'<line class="tick" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
                parts.append(f'<text class="x" x="{x}" y="{bottom + 16}">{number(tick)}</text>')
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(f'<text class="x name" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}">{escape(name)}</text>')
        return "".join(parts)

    def draw(self, series: Series) -> str:
        at = [(self.x(x), self.y(y)) for x, y in thinned(series.points)]
        color = f"s{series.color % COLORS}"
        if series.kind == "level":
            y = round(at[-1][1], 1)
            return f'<line class="level {color}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        values = " ".join(f"{x:g}:{y:.4g}" for x, y in thinned(series.points))
        label = escape(series.label)
        data = f'points="{joined}" data-name="{label}" data-at="{values}"'
        line = f'<polyline class="{series.kind} {color}" {data}/>'
        if series.kind == "points":
            line += "".join(
                f'<circle class="{color}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3.2">'
                f"<title>{label}, step {x:g}: {y:.6g}</title></circle>"
                for x, y in thinned(series.points)
            )
        elif len(at) == 1:
            line += f'<circle class="dot {color}" cx="{at[0][0]:.1f}" cy="{at[0][1]:.1f}" r="2.4"/>'
        return line


def _key(series: Sequence[Series]) -> list[tuple[str, str]]:
    """(CSS class, label) of each kind of line, in its color where that is the same for all runs."""
    keys = []
    for kind, label in dict.fromkeys((s.kind, s.label) for s in series):
        colors = {s.color for s in series if s.kind == kind}
        keys.append((f"k-{kind} s{colors.pop() % COLORS}" if len(colors) == 1 else f"k-{kind}", label))
    return keys


def _ends(series: Sequence[Series]) -> str:
    return "; ".join(f"{s.label} from {s.points[0][1]:.4g} to {s.points[-1][1]:.4g}" for s in series)
