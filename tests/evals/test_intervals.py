"""Intervals of cases in clusters, against cases of which the answer is known, and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from potstill.evals.intervals import clustered, means_of, student_t, wilson
from potstill.evals.pass_at_k import scores


@pytest.mark.parametrize("size", [2, 5])
def test_clusters_that_pass_or_fail_whole_are_one_case_each(size: int) -> None:
    """Of G such clusters, equally large, a share varies as that of G - 1 cases does."""
    shares_G = np.array([1.0] * 14 + [0.0] * 6)
    found = clustered(shares_G, np.full(20, float(size)))
    assert found == pytest.approx(wilson(0.7 * 19, 19, student_t(19)), abs=1e-12)


def test_clusters_that_are_alike_are_no_fewer_cases() -> None:
    found = clustered(np.full(10, 0.5), np.full(10, 2.0))
    assert found == pytest.approx(wilson(10, 20, student_t(9)), abs=1e-12)


@pytest.mark.parametrize("cases", [9, 18, 20, 25, 164])
def test_clusters_of_one_are_cases(cases: int) -> None:
    """At all counts whose mean is rounded to more or less than it is, too."""
    for right in (0, 1, cases // 2, cases):
        shares = np.array([1.0] * right + [0.0] * (cases - right))
        assert clustered(shares, np.ones(cases)) == pytest.approx(wilson(right, cases), abs=1e-12)
    passed = [1] * (cases - 1) + [0]
    one, other = scores(passed, 1, [*range(cases)])["pass@1"], scores(passed, 1)["pass@1"]
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=1e-12)


@pytest.mark.parametrize("sizes", [[1.0, 3.0, 2.0, 3.0, 1.0], [3.0, 1.0, 1.0, 1.0, 1.0]])
def test_where_all_are_right_there_are_as_many_cases_as_clusters(sizes: list[float]) -> None:
    """The mean of so many ones is more than 1 by rounding, or less."""
    sizes_G, G = np.array(sizes), len(sizes)
    assert np.ones(G) @ (sizes_G / sizes_G.sum()) != 1
    assert clustered(np.ones(G), sizes_G) == pytest.approx(wilson(G, G, student_t(G - 1)), abs=1e-12)
    assert clustered(np.zeros(G), sizes_G) == pytest.approx(wilson(0, G, student_t(G - 1)), abs=1e-12)


def test_one_cluster_has_no_interval() -> None:
    with pytest.raises(ValueError, match="one cluster"):
        clustered(np.array([0.5]), np.array([4.0]))


@pytest.mark.parametrize("clusters", [4, 8, 30])
def test_the_interval_holds_the_truth_19_times_in_20(clusters: int) -> None:
    """Clusters of five whose rates differ: at most a point less in 4,000 draws. As if the cases were independent it is
    less than five times in six.
    """
    rng = np.random.default_rng(clusters)
    held = naive = 0
    for _ in range(4000):
        rates = rng.beta(1.6, 0.4, size=clusters)
        right = rng.binomial(5, rates)
        low, high = clustered(right / 5, np.full(clusters, 5.0))
        held += low <= 0.8 <= high
        low, high = wilson(int(right.sum()), 5 * clusters)
        naive += low <= 0.8 <= high
    assert held / 4000 > 0.94
    assert naive / 4000 < 5 / 6


def test_means_of_clusters_in_any_order() -> None:
    shares_G, sizes_G = means_of([1.0, 0.0, 0.5, 1.0], [2, 0, 2, 0])
    assert shares_G.tolist() == [0.5, 0.75] and sizes_G.tolist() == [2.0, 2.0]
