"""Held-out KL over the seconds of a whole run, drawn from the lines that bench/quality.py appended.

    python bench/quality_picture.py bench/results.jsonl PICTURE.svg [--kl 1.10]

One line a seed, one colour an arm; of an arm and a seed measured twice the last. The dots are the evaluations.
"""

from __future__ import annotations

import argparse
import html
import json
import math
from pathlib import Path

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 58, 190, 22, 46
COLOURS = ["#0b6e4f", "#58a05c", "#c2410c", "#3b5bdb", "#9c36b5", "#b8860b", "#5f6b7a", "#000000"]
KLS = (0.4, 0.5, 0.7, 1, 1.5, 2, 3, 5)
STEPS_S = (10, 20, 30, 60, 120, 300, 600)
LABEL = 15
"""Pixels between two names at the end of lines."""
Curves = dict[str, dict[int, list[list[float]]]]
"""Of each arm and seed: step, seconds, KL."""


def curves(file: Path) -> Curves:
    found: Curves = {}
    for line in map(json.loads, file.read_text().splitlines()):
        if line["bench"] == "quality" and line.get("curve"):
            found.setdefault(line["arm"], {})[line["seed"]] = line["curve"]
    return found


def picture(found: Curves, wanted: float) -> str:
    points = [point for of in found.values() for curve in of.values() for point in curve]
    most_s = max(seconds for _, seconds, *_ in points) * 1.02
    low, high = min(kl for _, _, kl, *_ in points) * 0.93, max(kl for _, _, kl, *_ in points) * 1.08
    plot_w, plot_h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(seconds: float) -> float:
        return round(LEFT + plot_w * seconds / most_s, 1)

    def y(kl: float) -> float:
        return round(TOP + plot_h * math.log(high / kl) / math.log(high / low), 1)

    def text(at_x: float, at_y: float, words: str, more: str = "") -> str:
        return f'<text x="{at_x}" y="{at_y}" {more}>{html.escape(words)}</text>'

    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        ' font-family="system-ui, sans-serif" font-size="12" fill="#333">',
        "<title>Held-out KL to the teacher over the seconds of a whole run</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for kl in (kl for kl in KLS if low <= kl <= high):
        drawn.append(f'<path d="M{LEFT} {y(kl)}H{LEFT + plot_w}" stroke="#e4e4e4"/>')
        drawn.append(text(LEFT - 8, y(kl) + 4, f"{kl:g}", 'text-anchor="end"'))
    every = next((s for s in STEPS_S if most_s / s <= 10), STEPS_S[-1])
    for seconds in range(0, int(most_s) + 1, every):
        drawn.append(text(x(seconds), TOP + plot_h + 18, f"{seconds}", 'text-anchor="middle"'))
    middle = LEFT + plot_w / 2
    drawn.append(
        text(middle, HEIGHT - 8, "seconds since the start, evaluations left out", 'text-anchor="middle"')
    )
    drawn.append(text(10, 14, "held-out KL, nats (log scale)"))
    drawn.append(f'<path d="M{LEFT} {y(wanted)}H{LEFT + plot_w}" stroke="#333" stroke-dasharray="5 4"/>')
    names: list[tuple[float, float, str, str]] = []
    for number, (arm, of) in enumerate(found.items()):
        colour = COLOURS[number % len(COLOURS)]
        for curve in of.values():
            line = " ".join(f"{x(seconds)},{y(kl)}" for _, seconds, kl, *_ in curve)
            drawn.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
            drawn += [
                f'<circle cx="{x(seconds)}" cy="{y(kl)}" r="2.6" fill="{colour}"/>'
                for _, seconds, kl, *_ in curve
            ]
        last = max(of.values(), key=lambda curve: curve[-1][1])[-1]
        names.append((y(last[2]), x(last[1]), arm, colour))
    lowest = -math.inf
    for at_y, at_x, arm, colour in sorted(names):
        lowest = max(at_y, lowest + LABEL)
        drawn.append(
            f'<path d="M{at_x + 5} {at_y}L{LEFT + plot_w + 8} {lowest}" stroke="{colour}" opacity="0.35"/>'
        )
        drawn.append(text(LEFT + plot_w + 12, lowest + 4, arm, f'fill="{colour}"'))
    return "\n".join([*drawn, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lines", type=Path)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--kl", type=float, default=1.10)
    options = parser.parse_args()
    options.svg.write_text(picture(curves(options.lines), options.kl))


if __name__ == "__main__":
    main()
