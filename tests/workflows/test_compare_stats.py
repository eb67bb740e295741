"""Intervals of a comparison against independent computations, and what its sentence may say."""

from __future__ import annotations

import math
import statistics

import mpmath
import numpy as np
import pytest

from potstill.workflows.compare import _with_interval
from potstill.workflows.compare_stats import (
    CE,
    CORRECTED,
    KD,
    UNTOUCHED,
    Measured,
    differences,
    estimate,
    sentence,
    student_t,
)


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 12, 163, 4000])
def test_t_is_where_student_s_distribution_has_two_and_a_half_percent_left(freedom: int) -> None:
    t = mpmath.mpf(student_t(freedom))
    beyond = mpmath.betainc(mpmath.mpf(freedom) / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True)
    assert float(beyond) == pytest.approx(0.05, abs=1e-6)


def test_one_unit_gives_the_textbook_interval_over_seeds() -> None:
    values = [3.0, 4.0, 8.0]
    found = estimate(np.array(values)[:, None], np.ones(1))
    half = 4.302652729911275 * statistics.stdev(values) / math.sqrt(3)  # t of two degrees of freedom
    assert (found.mean, found.low, found.high) == pytest.approx((5.0, 5.0 - half, 5.0 + half))


def test_one_seed_gives_the_textbook_interval_over_units() -> None:
    values = [3.0, 4.0, 8.0, 5.0, 9.5]
    found = estimate(np.array([values]), np.full(5, 7.0))
    half = 2.7764451051977987 * statistics.stdev(values) / math.sqrt(5)
    assert (found.mean, found.high - found.mean) == pytest.approx((5.9, half))


def test_a_row_weighs_as_much_as_it_has_positions() -> None:
    values_SU = np.array([[1.0, 4.0], [2.0, 6.0]])
    found = estimate(values_SU, np.array([30.0, 10.0]))
    assert found.mean == pytest.approx(((30 * 1 + 10 * 4) / 40 + (30 * 2 + 10 * 6) / 40) / 2)
    assert Measured(values_SU, np.array([30.0, 10.0])).by_seed() == pytest.approx([1.75, 3.0])


@pytest.mark.parametrize(("seed_sd", "unit_sd"), [(1.0, 0.2), (0.2, 3.0), (1.0, 3.0), (0.0, 1.0), (1.0, 1.0)])
def test_the_interval_holds_the_truth_nineteen_times_in_twenty(seed_sd: float, unit_sd: float) -> None:
    """Three seeds and 16 rows, each with an effect of its own, in 2,000 comparisons of a known difference."""
    generator, held, truth = np.random.default_rng(0), 0, 0.7
    for _ in range(2000):
        seeds_S, units_U = seed_sd * generator.normal(size=3), unit_sd * generator.normal(size=16)
        values_SU = truth + seeds_S[:, None] + units_U + 0.3 * generator.normal(size=(3, 16))
        found = estimate(values_SU, np.ones(16))
        held += found.low <= truth <= found.high
    assert held / 2000 >= 0.94


def test_what_two_arms_share_is_in_no_interval_of_their_difference() -> None:
    hardness_U = np.random.default_rng(1).normal(0, 5, 40)
    noise_SU = np.random.default_rng(2).normal(0, 0.01, (3, 40))
    ce, kd = Measured(9 + hardness_U + noise_SU, np.ones(40)), Measured(8.9 + hardness_U, np.ones(40))
    (found,) = differences({CE: {"heldout/kl": ce}, KD: {"heldout/kl": kd}})
    alone = estimate(kd.values_SU[None].reshape(1, 40), np.ones(40))
    assert alone.high - alone.low > 1
    assert found["high"] - found["low"] < 0.05
    assert found["ahead"] == KD and found["mean"] == pytest.approx(-0.1, abs=0.01)


def arm(**means: float) -> dict[str, Measured]:
    noise_SU = np.random.default_rng(0).normal(0, 1e-3, (3, 8))
    names = {"kl": "heldout/kl", "ce": "heldout/ce", "agreement": "heldout/agreement", "pass1": "pass@1"}
    return {names[name]: Measured(mean + noise_SU, np.ones(8)) for name, mean in means.items()}


def test_fewer_nats_and_larger_shares_are_ahead() -> None:
    found = differences({CE: arm(kl=2.0, ce=3.0, agreement=0.2), KD: arm(kl=1.0, ce=3.1, agreement=0.3)})
    assert {one["metric"]: one["ahead"] for one in found} == {
        "heldout/kl": KD,
        "heldout/ce": CE,
        "heldout/agreement": KD,
    }


def test_the_sentence_tells_a_lost_comparison_as_it_is() -> None:
    one = {UNTOUCHED: arm(kl=5, ce=7), CE: arm(kl=2.0, ce=3.0), KD: arm(kl=2.5, ce=3.5)}
    said = sentence(differences(one), "steps", 3)
    assert "plain training (CE only) is ahead of KD in held-out KL to the teacher (by 0.5 nats)" in said
    assert "KD is ahead of plain" not in said and "CE only in" not in said
    assert "KD is ahead of the untouched student in held-out KL to the teacher (by 2.5 nats)" in said
    assert said.startswith("Under equal steps, over 3 seeds: ")


def test_what_an_interval_does_not_show_is_not_claimed() -> None:
    noisy = Measured(np.random.default_rng(3).normal(1.9, 2.0, (3, 8)), np.ones(8))
    found = differences({CE: arm(kl=2.0), KD: {"heldout/kl": noisy}})
    assert found[0]["shown"] is False and found[0]["ahead"] is None
    assert "no difference of KD and plain training (CE only) is shown in held-out KL" in sentence(
        found, "steps", 3
    )
    assert "ahead" not in sentence(found, "steps", 3)


def test_a_metric_that_an_arm_lacks_is_not_compared() -> None:
    found = differences({CE: arm(kl=2.0), KD: arm(kl=1.0, pass1=0.1), CORRECTED: arm(pass1=0.1)})
    assert [(one["arm"], one["against"], one["metric"]) for one in found] == [
        (KD, CE, "heldout/kl"),
        (CORRECTED, KD, "pass@1"),
    ]


def test_an_interval_has_nothing_that_the_quantity_cannot_be() -> None:
    one = Measured(np.asarray([[0.0, 0.02], [0.03, 0.0], [0.0, 0.0]]), np.ones(2))
    assert estimate(one.values_SU, one.weights_U).low < 0
    found = _with_interval("heldout/agreement", one)
    assert found.low == 0 < found.mean < found.high
    near_1 = _with_interval("heldout/agreement", Measured(1 - one.values_SU, one.weights_U))
    assert near_1.high == 1 > near_1.mean > near_1.low
    kl = _with_interval("heldout/kl", Measured(1.5 + one.values_SU, one.weights_U))
    assert kl.high > kl.mean == pytest.approx(1.5 + one.values_SU.mean())
    assert _with_interval("heldout/kl", one).low == 0
