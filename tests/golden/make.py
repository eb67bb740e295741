"""Golden values of every divergence and of its gradient in the student's logits, for divergences.json.

Each is computed from the written definition with mpmath, a gradient by central differences of the value
itself: nothing is shared with the code under test, not even a closed form. Run by hand only, after the
definitions below have been read against the papers:

    python tests/golden/make.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from mpmath import mp, mpf

# Differences at a step of 1e-40 with 130 digits leave more than 50 correct digits.
mp.dps = 130
STEP = mpf(10) ** -40
IMPOSSIBLE = float("-inf")

Row = list[mpf]


def softmax(logits: Row) -> Row:
    weights = [mpf(0) if z == IMPOSSIBLE else mp.exp(z) for z in logits]
    return [w / mp.fsum(weights) for w in weights]


def kl(p: Row, q: Row) -> mpf:
    """Kullback and Leibler 1951, with 0 log 0 = 0, and infinite where q excludes what p has."""
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return mp.inf
    return mp.fsum(a * mp.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mixture(p: Row, q: Row, weight_of_p: float) -> Row:
    w = mpf(weight_of_p)
    return [w * a + (1 - w) * b for a, b in zip(p, q, strict=True)]


def jsd(p: Row, q: Row, beta: float) -> mpf:
    m = mixture(p, q, beta)
    return mpf(beta) * kl(p, m) + (1 - mpf(beta)) * kl(q, m)


# p is the teacher, q the student.
DEFINITIONS: list[tuple[str, dict[str, float], Callable[[Row, Row], mpf]]] = [
    ("forward_kl", {}, lambda p, q: kl(p, q)),
    ("reverse_kl", {}, lambda p, q: kl(q, p)),
    ("jsd", {}, lambda p, q: jsd(p, q, 0.5)),
    ("jsd", {"beta": 0.1}, lambda p, q: jsd(p, q, 0.1)),
    ("jsd", {"beta": 0.9}, lambda p, q: jsd(p, q, 0.9)),
    ("skew_kl", {}, lambda p, q: kl(p, mixture(p, q, 0.1))),
    ("skew_kl", {"alpha": 0.0}, lambda p, q: kl(p, q)),
    ("skew_kl", {"alpha": 0.7}, lambda p, q: kl(p, mixture(p, q, 0.7))),
    ("tvd", {}, lambda p, q: mp.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2),
]

# name: logits of the student, logits of the teacher. But for "one id", p and q differ at every possible id.
CASES: dict[str, tuple[list[float], list[float]]] = {
    "one id": ([0.7], [-2.0]),
    "two ids": ([0.3, -1.1], [2.0, 0.25]),
    "five ids": ([1.0, -0.5, 0.25, 2.0, -3.0], [-1.0, 0.75, 3.0, 0.5, 0.125]),
    "five ids, sharp": ([30.0, -12.5, 0.0, 28.0, 3.0], [25.0, 27.5, -40.0, 10.0, 26.0]),
    "five ids, shifted far": (
        [1001.0, 999.5, 1000.25, 1002.0, 997.0],
        [-501.0, -499.25, -497.0, -499.5, -499.875],
    ),
    "peaked apart": ([1e4, 0.0, -1e4, 3.0, -7.0], [-1e4, 1e4, 2.0, -5.0, 11.0]),
    "peaked together": ([1e4, 0.0, -1e4], [1e4, 9998.0, -1e4]),
    "nearly equal": ([0.5, -0.25, 1.0, 0.0], [0.5001, -0.25, 1.0, 0.0]),
    "padded on both sides": (
        [0.5, 2.0, IMPOSSIBLE, -1.0, IMPOSSIBLE],
        [1.5, -0.5, IMPOSSIBLE, 0.25, IMPOSSIBLE],
    ),
    "impossible for the student": ([0.5, 2.0, IMPOSSIBLE, -1.0], [1.5, -0.5, 0.75, 0.25]),
    "impossible for the teacher": ([0.5, 2.0, 0.75, -1.0], [1.5, -0.5, IMPOSSIBLE, 0.25]),
    "123 ids": (
        [round(3.0 * float(mp.sin(1.7 * i)), 6) for i in range(123)],
        [round(2.0 * float(mp.cos(2.3 * i + 0.5)) + i / 40, 6) for i in range(123)],
    ),
}


def gradient(value: Callable[[Row], mpf], logits: Row) -> Row:
    def difference(i: int) -> mpf:
        if logits[i] == IMPOSSIBLE:
            return mpf(0)
        up, down = list(logits), list(logits)
        up[i] += STEP
        down[i] -= STEP
        return (value(up) - value(down)) / (2 * STEP)

    return [difference(i) for i in range(len(logits))]


def main() -> None:
    lines = []
    for case, (student, teacher) in CASES.items():
        p = softmax([mpf(z) for z in teacher])
        for name, options, definition in DEFINITIONS:

            def value(logits: Row, p: Row = p, definition: Callable[[Row, Row], mpf] = definition) -> mpf:
                return definition(p, softmax(logits))

            logits = [mpf(z) for z in student]
            if value(logits) == mp.inf:
                continue
            row = {
                "divergence": name,
                "options": options,
                "case": case,
                "value": float(value(logits)),
                "gradient": [float(g) for g in gradient(value, logits)],
            }
            lines.append(json.dumps(row))
    cases = [f"{json.dumps(k)}: {json.dumps({'student': s, 'teacher': t})}" for k, (s, t) in CASES.items()]
    text = '{\n"cases": {\n' + ",\n".join(cases) + '\n},\n"golden": [\n' + ",\n".join(lines) + "\n]\n}\n"
    Path(__file__).with_name("divergences.json").write_text(text)


if __name__ == "__main__":
    main()
