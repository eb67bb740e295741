"""The statistics of a comparison: means with 95 % intervals, paired differences, and a sentence that sums them up.

Two things are random: the seed of a run, and the rows of text (or the problems) that its student is evaluated on.
All arms share both, so differences are taken pair by pair before averaging, and what a pair has in common drops
out of the interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from potstill.evals.intervals import Values, student_t

UNTOUCHED, CE, KD, CORRECTED = "untouched", "CE only", "KD", "KD, corrected teacher"
SPOKEN = {UNTOUCHED: "the untouched student", CE: "plain training (CE only)"}
"""What a sentence calls an arm: `KD is ahead of CE only in …` could be read in two ways."""
NATS, SHARE = "nats", "share"
METRICS = {
    "heldout/kl": ("held-out KL to the teacher", NATS),
    "heldout/ce": ("held-out cross-entropy", NATS),
    "heldout/agreement": ("agreement with the teacher", SHARE),
    "pass@1": ("HumanEval pass@1", SHARE),
}
"""Each metric's name in a sentence, and its unit. Nats: lower is better. Shares: higher is better. A metric that is not
here is the accuracy in a task of the recipe's, under the task's label.
"""


def named(metric: str) -> tuple[str, str]:
    """A metric's name in a sentence, and its unit."""
    return METRICS.get(metric, (f"accuracy in {metric.removeprefix('task-')}", SHARE))


def in_order(metrics: Iterable[str]) -> list[str]:
    """The metrics in the order of `METRICS`, and tasks behind them."""
    known = [*METRICS]
    return sorted(metrics, key=lambda metric: known.index(metric) if metric in METRICS else len(known))


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def within(self, low: float, high: float) -> Estimate:
        """The interval without what the quantity cannot be."""
        return Estimate(self.mean, max(self.low, low), min(self.high, high))

    @property
    def shown(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def estimate(values_SU: Values, weights_U: Values) -> Estimate:
    """The weighted mean over U units (rows, problems), averaged over S seeds.

    The half-width is the root of the sum of two squares: the standard errors over seeds and over units, each
    times Student's t for its degrees of freedom, so that three seeds are trusted no more than three seeds
    deserve. Their interaction is counted in both, which errs on the wide side. With a single seed or unit that
    variance is unknown and left out: the caller has to warn of it.
    """
    S, U = values_SU.shape
    share_U = weights_U / weights_U.sum()
    means_S = values_SU @ share_U
    mean = float(means_S.mean())
    half2 = 0.0
    if S > 1:
        half2 += student_t(S - 1) ** 2 * float(means_S.var(ddof=1)) / S
    if U > 1:
        residual_U = share_U * (values_SU.mean(0) - mean)  # linearized error of a ratio of sums
        half2 += student_t(U - 1) ** 2 * float(residual_U @ residual_U) * U / (U - 1)
    return Estimate(mean, mean - math.sqrt(half2), mean + math.sqrt(half2))


@dataclass(frozen=True)
class Measured:
    """One metric of one arm: its value for each seed on each unit, and each unit's weight (a row's positions)."""

    values_SU: Values
    weights_U: Values

    def by_seed(self) -> Values:
        """The weighted mean of each seed."""
        means_S: Values = self.values_SU @ (self.weights_U / self.weights_U.sum())
        return means_S


def differences(arms: Mapping[str, Mapping[str, Measured]]) -> list[dict[str, Any]]:
    """Each arm minus each arm before it, per shared metric. `ahead` is the better arm, None if 0 is in the interval."""
    rows = []
    for against, arm in combinations(arms, 2):
        for metric in in_order(name for name in arms[arm] if name in arms[against]):
            minuend, subtrahend = arms[arm][metric], arms[against][metric]
            diff = estimate(minuend.values_SU - subtrahend.values_SU, minuend.weights_U)
            is_better = (diff.mean > 0) == (named(metric)[1] == SHARE)
            ahead = (arm if is_better else against) if diff.shown else None
            figures = {
                "mean": diff.mean,
                "low": diff.low,
                "high": diff.high,
                "shown": diff.shown,
                "ahead": ahead,
            }
            rows.append({"arm": arm, "against": against, "metric": metric, **figures})
    return rows


def sentence(differences: Sequence[Mapping[str, Any]], budget: str, seeds: int) -> str:
    """What the differences show, and what they do not."""
    over = f"{seeds} seeds" if seeds > 1 else "one seed"
    parts = [
        clause
        for pair in ((KD, CE), (CORRECTED, CE), (CORRECTED, KD), (KD, UNTOUCHED))
        if (clause := _describe_pair([row for row in differences if (row["arm"], row["against"]) == pair]))
    ]
    parts[1:] = [f"{part[0].upper()}{part[1:]}" for part in parts[1:]]  # each but the first begins a sentence
    asked = any(row["metric"] not in METRICS for row in differences)
    return (
        f"Under equal {budget}, over {over}: {' '.join(parts)} Shown for this pair, this budget and these"
        f" held-out rows{' and questions' if asked else ''}; not for other text, longer runs or other models."
    )


def _describe_pair(rows: Sequence[Mapping[str, Any]]) -> str:
    """The differences of two arms in words: where each is ahead, and where neither is shown to be."""
    if not rows:
        return ""
    arm, against = rows[0]["arm"], rows[0]["against"]
    spoken = {name: SPOKEN.get(name, name) for name in (arm, against)}
    clauses = []
    for leader, other in ((arm, against), (against, arm)):
        won = [f"{named(row['metric'])[0]} ({_margin(row)})" for row in rows if row["ahead"] == leader]
        if won:
            clauses.append(f"{spoken[leader]} is ahead of {spoken[other]} in {_join(won)}")
    if undecided := [named(row["metric"])[0] for row in rows if not row["shown"]]:
        clauses.append(f"no difference of {spoken[arm]} and {spoken[against]} is shown in {_join(undecided)}")
    return f"{'; '.join(clauses)}."


def _margin(row: Mapping[str, Any]) -> str:
    size = abs(row["mean"])
    return f"by {size:.3g} nats" if named(row["metric"])[1] == NATS else f"by {100 * size:.1f} points"


def _join(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
