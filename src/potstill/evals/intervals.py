"""Intervals of 95 % of a share: of independent cases, and of cases that resemble each other in clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
Z_95 = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""
Values = NDArray[np.float64]


def wilson(passed: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): it stays inside 0 and 1, and is not empty at 0 of n.

    `passed` may be a mean over several runs, and `n` a number of cases that is no whole one.
    """
    if not (n > 0 and 0 <= passed <= n):
        raise ValueError(f"{passed} of {n}: must be from 0 to n, and n above 0")
    share, z2 = passed / n, z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def means_of(values: Sequence[float], clusters: Sequence[int]) -> tuple[Values, Values]:
    """The mean of each cluster, and how many values it has."""
    of = np.unique(clusters, return_inverse=True)[1]
    sizes_G = np.bincount(of).astype(np.float64)
    return np.bincount(of, np.asarray(values, dtype=np.float64)) / sizes_G, sizes_G


def clustered(shares_G: Values, sizes_G: Values) -> tuple[float, float]:
    """95 % interval of a share of cases that come in G clusters, of which some are easier than others.

    Wilson's, for the number of independent cases whose share would vary as much as this one does from cluster to
    cluster (the design effect, Kish 1965), with Student's t of G - 1 degrees of freedom. That number is at most that of
    the cases. Where all or none are right nothing says how alike a cluster's cases are, and each cluster counts as one
    case, which errs on the wide side. Where one cluster has most of the cases the interval is too narrow.

    Args:
        shares_G: share of the right ones in each cluster.
        sizes_G: cases in each cluster; all 1 where cases are independent, which gives Wilson's interval itself.
    """
    G, cases = len(sizes_G), float(sizes_G.sum())
    weights_G = sizes_G / cases
    # A mean of ones is not 1 to the last bit.
    share = float(shares_G[0] if (shares_G == shares_G[0]).all() else shares_G @ weights_G)
    if cases == G:
        effective, z = cases, Z_95
    else:
        if G == 1:
            raise ValueError("one cluster: nothing is known of others")
        residuals_G = weights_G * (shares_G - share)  # the linearized error of a ratio of sums
        variance = float(residuals_G @ residuals_G) * G / (G - 1)
        effective, z = cases, student_t(G - 1)
        if share in (0.0, 1.0):
            effective = G
        elif variance > 0:
            effective = min(share * (1 - share) / variance, cases)
    return wilson(min(share * effective, effective), effective, z)


@cache
def student_t(freedom: int) -> float:
    """The two-sided 95 % critical value of Student's t with `freedom` >= 1 degrees of freedom.

    Substituting t = sqrt(freedom) tan(a), a has a density proportional to cos(a)^(freedom - 1), which is
    integrated by the trapezoidal rule.
    """
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp(CONFIDENCE * cumulative[-1], cumulative, angles))
    return math.sqrt(freedom) * math.tan(angle)
