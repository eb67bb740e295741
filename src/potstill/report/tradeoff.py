"""What was gained against what was kept, as one picture: each measure of quality at the student's size and speed.

Both axes have the teacher at 1. A measure is a horizontal line from the student's size to its speeds, so that a better
student's lines are higher and longer; the untouched student's are dashed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.report.charts import COLORS, HEIGHT, LEFT, RIGHT, WIDTH, Scale, escape, ticks

SIZE = "■"
"""The mark of the student's size; speeds are numbered."""


@dataclass(frozen=True)
class Quality:
    """A share of the teacher's own, from 0 to 1; `before` is the untouched student's, where it was measured."""

    name: str
    value: float
    before: float | None = None


def qualities(
    receipt: Mapping[str, Any], profile: Mapping[str, Any], scores: Mapping[str, float]
) -> list[Quality]:
    """Of the saved student, what was measured.

    Args:
        scores: of tasks, each from 0 to 1.
    """
    best, first = (receipt.get(name) or {} for name in ("heldout_best", "heldout_first"))
    found = []
    for name, key, share in (
        ("top-1 agreement", "heldout/agreement", float),
        ("exp(-KL)", "heldout/kl", lambda kl: math.exp(-kl)),
    ):
        if key in best:
            found.append(Quality(name, share(best[key]), share(first[key]) if key in first else None))
    expected = profile["acceptance"]["expected"]
    if isinstance(expected, dict):
        found.append(Quality("expected acceptance", expected["mean"]))
    return [*found, *(Quality(name, value) for name, value in scores.items())]


def gains(profile: Mapping[str, Any]) -> dict[str, float]:
    """The student's size and speeds as shares of the teacher's, by what they are of, with their spread; those that are
    known.
    """
    models = profile["models"]
    if not all(isinstance(model, dict) for model in models.values()):
        return {}
    found = {"weights": models["student"]["parameters"] / models["teacher"]["parameters"]}
    for speed in profile["speeds"]:
        if ratio := speed.get("ratios", {}).get("decoding_tokens_per_s"):
            spread = f"from {ratio['low']:.3g} to {ratio['high']:.3g}"
            found[f"decoding in {speed['runtime']}, {speed['weights']} ({spread})"] = ratio["median"]
    return found


def picture(of: Sequence[Quality], shares: Mapping[str, float]) -> str:
    """The figure; empty where nothing can be compared with a teacher."""
    if not of or not shares:
        return ""
    x_ticks = ticks(0, max(1.0, *shares.values()))
    scale = Scale(x_ticks[-1], 0.0, 1.0, is_log=False)
    parts = [scale.grid(ticks(0, 1), x_ticks, "share of the teacher's"), _teacher(scale)]
    for number, quality in enumerate(of):
        parts += _measure(scale, quality, [*shares.values()], f"s{number % COLORS}")
    key = [f'<li class="s{n % COLORS}">{escape(_said(quality))}</li>' for n, quality in enumerate(of)]
    key += [
        f"<li>{number or SIZE} {escape(name)}: {share:.3g}</li>"
        for number, (name, share) in enumerate(shares.items())
    ]
    label = f"Quality against size and speed, the teacher's own being 1. {_words(of, shares)}"
    return (
        '<figure class="chart"><figcaption><b>Quality kept against size and speed</b>'
        f' <span>the teacher is at 1, 1</span><ul class="key">{"".join(key)}</ul></figcaption>'
        f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="{escape(label)}">{"".join(parts)}</svg></figure>'
    )


def _teacher(scale: Scale) -> str:
    x, y = round(scale.x(1.0), 1), round(scale.y(1.0), 1)
    return (
        f'<line class="level s5" x1="{x}" x2="{x}" y1="{y}" y2="{scale.y(0.0):.1f}"/>'
        f'<line class="level s5" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
    )


def _measure(scale: Scale, quality: Quality, shares: Sequence[float], color: str) -> Iterator[str]:
    """The student's line with its marks, and the untouched student's."""
    xs = [round(scale.x(share), 1) for share in shares]
    for value, kind in ((quality.before, "level"), (quality.value, "whisker")):
        if value is not None:
            y = round(scale.y(min(max(value, 0.0), 1.0)), 1)
            yield f'<line class="{kind} {color}" x1="{min(xs)}" x2="{max(xs)}" y1="{y}" y2="{y}"/>'
    yield f'<rect class="fill {color}" x="{xs[0] - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    for number, x in enumerate(xs[1:], 1):
        yield f'<text class="mark {color}" x="{x}" y="{y + 4:.1f}">{number}</text>'


def _said(quality: Quality) -> str:
    before = "" if quality.before is None else f" (untouched {quality.before:.3f})"
    return f"{quality.name} {quality.value:.3f}{before}"


def _words(of: Sequence[Quality], shares: Mapping[str, float]) -> str:
    sizes = "; ".join(f"{name} {share:.3g}" for name, share in shares.items())
    return f"Kept: {'; '.join(_said(quality) for quality in of)}. The student has: {sizes}."
