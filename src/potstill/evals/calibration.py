"""Whether the probabilities that a model gives its own answers are the shares of them that are right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BINS = 10


def calibration(probabilities: Sequence[float], correct: Sequence[bool]) -> dict[str, float]:
    """How answers' probabilities under the model that wrote them agree with the verdicts.

    Args:
        probabilities: for each answer, the product over its tokens, its end included.
        correct: for each answer.

    Returns:
        `probability`, their mean, which of a calibrated model is its accuracy; `brier`, the mean squared difference
        from the verdict (Brier 1950), 0 at best, 0.25 for one half always; `ece`, the expected calibration error over
        ten bins of equal width (Naeini et al. 2015).
    """
    of, right = np.asarray(probabilities, dtype=float), np.asarray(correct, dtype=float)
    bins = np.minimum((of * BINS).astype(int), BINS - 1)
    gaps = np.abs(np.bincount(bins, of - right, minlength=BINS))
    return {
        "probability": float(of.mean()),
        "brier": float(((of - right) ** 2).mean()),
        "ece": float(gaps.sum() / len(of)),
    }
