"""What a comparison of arms may say: means with 95 % intervals, differences, and a sentence made of them.

Two things are chance: the seed of a run, and the rows of text (or the problems) that its student was measured
on. Every arm has the same seeds and the same rows, so arms are subtracted pair by pair before anything is
averaged, and what pairs share is in no interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
CONFIDENCE = 0.95
UNTOUCHED, CE, KD, CORRECTED = "untouched", "CE only", "KD", "KD, corrected teacher"
NATS, SHARE = "nats", "share"
METRICS = {
    "heldout/kl": ("held-out KL to the teacher", NATS),
    "heldout/ce": ("held-out cross-entropy", NATS),
    "heldout/agreement": ("agreement with the teacher", SHARE),
    "pass@1": ("HumanEval pass@1", SHARE),
}
"""What is compared: its name in a sentence and its unit. Fewer nats are better, and larger shares."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether the interval leaves 0 out, on either side."""
        return self.low > 0 or self.high < 0


def estimate(values_SU: Values, weights_U: Values) -> Estimate:
    """The weighted mean over U units (rows, problems), averaged over S seeds.

    Half the interval's width is the root of the sum of two squares: a standard error over seeds and one over
    units, each times Student's t of its own degrees of freedom, so that three seeds are trusted no more than
    three seeds deserve. What belongs to both is counted twice, on the safe side. With one seed or one unit
    that part of the chance is unknown, and in no interval: whoever shows it has to say so.
    """
    S, U = values_SU.shape
    share_U = weights_U / weights_U.sum()
    means_S = values_SU @ share_U
    mean = float(means_S.mean())
    half2 = 0.0
    if S > 1:
        half2 += student_t(S - 1) ** 2 * float(means_S.var(ddof=1)) / S
    if U > 1:
        beside_U = share_U * (values_SU.mean(0) - mean)  # a ratio's error, to first order
        half2 += student_t(U - 1) ** 2 * float(beside_U @ beside_U) * U / (U - 1)
    return Estimate(mean, mean - math.sqrt(half2), mean + math.sqrt(half2))


@cache
def student_t(freedom: int) -> float:
    """t beyond which, on both sides together, 5 % of Student's distribution lie; `freedom` is 1 or more.

    With t = sqrt(freedom) tan(a), the density of a is that of cos(a)^(freedom - 1).
    """
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp(CONFIDENCE * below[-1], below, angles))
    return math.sqrt(freedom) * math.tan(angle)


@dataclass(frozen=True)
class Measured:
    """A metric of an arm: values_SU of each seed on each unit, and what a unit weighs (its positions)."""

    values_SU: Values
    weights_U: Values

    def by_seed(self) -> Values:
        """means_S: each seed's own."""
        means_S: Values = self.values_SU @ (self.weights_U / self.weights_U.sum())
        return means_S


def differences(arms: Mapping[str, Mapping[str, Measured]]) -> list[dict[str, Any]]:
    """Each arm minus each one before it, in each metric that both have; `ahead` is who is shown to be."""
    found = []
    for against, arm in combinations(arms, 2):
        for metric in (name for name in METRICS if name in arms[arm] and name in arms[against]):
            ours, theirs = arms[arm][metric], arms[against][metric]
            of = estimate(ours.values_SU - theirs.values_SU, ours.weights_U)
            is_better = (of.mean > 0) == (METRICS[metric][1] == SHARE)
            ahead = (arm if is_better else against) if of.shown else None
            told = {"mean": of.mean, "low": of.low, "high": of.high, "shown": of.shown, "ahead": ahead}
            found.append({"arm": arm, "against": against, "metric": metric, **told})
    return found


def sentence(found: Sequence[Mapping[str, Any]], budget: str, seeds: int) -> str:
    """What the differences show, and what they do not."""
    over = f"{seeds} seeds" if seeds > 1 else "one seed"
    parts = [
        said
        for arm, against in ((KD, CE), (CORRECTED, CE), (CORRECTED, KD), (KD, UNTOUCHED))
        if (said := _pair([one for one in found if (one["arm"], one["against"]) == (arm, against)]))
    ]
    return (
        f"Under equal {budget}, over {over}: {' '.join(parts)} Shown for this pair, this budget and these"
        " held-out rows; not for other text, longer runs or other models."
    )


def _pair(found: Sequence[Mapping[str, Any]]) -> str:
    """Two arms in words: where each is ahead, and where nothing is shown."""
    if not found:
        return ""
    arm, against = found[0]["arm"], found[0]["against"]
    clauses = []
    for who, other in ((arm, against), (against, arm)):
        won = [f"{METRICS[one['metric']][0]} ({_by(one)})" for one in found if one["ahead"] == who]
        if won:
            clauses.append(f"{who} is ahead of {other} in {_listed(won)}")
    if open_ := [METRICS[one["metric"]][0] for one in found if not one["shown"]]:
        clauses.append(f"no difference of {arm} and {against} is shown in {_listed(open_)}")
    return f"{'; '.join(clauses)}."


def _by(one: Mapping[str, Any]) -> str:
    size = abs(one["mean"])
    return f"by {size:.3g} nats" if METRICS[one["metric"]][1] == NATS else f"by {100 * size:.1f} points"


def _listed(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
