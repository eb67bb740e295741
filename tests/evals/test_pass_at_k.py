"""pass@k against its definition, Wilson against the score test that it inverts, the bootstrap against cases
whose answer is known.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest

from potstill.errors import UserError
from potstill.evals.intervals import wilson
from potstill.evals.pass_at_k import RESULT, compare, paired_difference, pass_at_k, scores

SETTINGS = {
    "task": "potstill-humaneval-1",
    "data_sha256": "ab" * 32,
    "problems": 3,
    "prompt": "base",
    "temperature": 0.0,
    "top_p": 1.0,
    "max_new_tokens": 512,
    "samples": 1,
}


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_pass(n: int) -> None:
    """By enumeration of every subset of k samples."""
    for passed, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = [*itertools.combinations([i < passed for i in range(n)], k)]
        assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize(
    ("n", "passed", "k"), [(200, 7, 10), (200, 1, 100), (200, 150, 1), (1000, 3, 100), (5, 5, 5)]
)
def test_pass_at_k_is_exact_where_n_is_large(n: int, passed: int, k: int) -> None:
    """The product form of the paper's own code, in fractions."""
    none = Fraction(1)
    for i in range(n - passed + 1, n + 1):
        none *= 1 - Fraction(k, i)
    assert pass_at_k(n, passed, k) == pytest.approx(float(1 - none), rel=1e-14)


def test_pass_at_k_is_unbiased_and_the_plug_in_form_is_not() -> None:
    """The mean over all outcomes of n samples at rate p is 1 - (1 - p)^k."""
    n, k, p = 8, 4, Fraction(1, 5)
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    true = float(1 - (1 - p) ** k)
    assert sum(float(w) * pass_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(true, abs=1e-12)
    plug_in = sum(float(w) * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
    assert abs(plug_in - true) > 0.03


@pytest.mark.parametrize(("n", "passed", "k"), [(1, 0, 2), (5, 1, 0), (5, 6, 1), (5, -1, 1), (0, 0, 1)])
def test_what_has_no_pass_at_k_is_refused(n: int, passed: int, k: int) -> None:
    with pytest.raises(ValueError, match="k must be from 1 to n"):
        pass_at_k(n, passed, k)


@pytest.mark.parametrize(
    ("passed", "n"), [(0, 164), (1, 164), (23, 164), (82, 164), (163, 164), (164, 164), (1, 2), (3, 10)]
)
def test_wilsons_interval_is_where_the_score_test_turns(passed: int, n: int) -> None:
    """Rates whose score test (share - p)^2 n = z^2 p (1 - p) is just met: polynomial roots at 40 digits."""
    with mpmath.workdps(40):
        z2 = (mpmath.sqrt(2) * mpmath.erfinv(mpmath.mpf("0.95"))) ** 2
        share = mpmath.mpf(passed) / n
        roots = mpmath.polyroots([n + z2, -(2 * n * share + z2), n * share**2])
        low, high = sorted(float(mpmath.re(root)) for root in roots)
    assert wilson(passed, n) == pytest.approx((low, high), abs=1e-12)


def test_wilsons_interval_holds_the_published_example() -> None:
    """Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (passed, n), interval in published.items():
        assert wilson(passed, n) == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize(("passed", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_more_passes_than_problems_have_no_interval(passed: int, n: int) -> None:
    with pytest.raises(ValueError, match="must be from 0 to n"):
        wilson(passed, n)


def test_one_sample_gives_pass_at_1_alone_with_wilsons_interval() -> None:
    found = scores([1, 0, 0, 1], 1)
    assert [*found] == ["pass@1"]
    assert (found["pass@1"].low, found["pass@1"].high) == wilson(2, 4)
    assert found["pass@1"].value == 0.5


def test_more_samples_give_each_k_up_to_their_number() -> None:
    assert [*scores([1, 0, 4], 4)] == ["pass@1"]
    assert [*scores([1, 0, 7], 10)] == ["pass@1", "pass@5", "pass@10"]
    found = scores([1, 0, 7], 10)["pass@5"]
    assert found.value == pytest.approx((pass_at_k(10, 1, 5) + pass_at_k(10, 7, 5)) / 3)
    assert 0 <= found.low < found.value < found.high <= 1
    assert "bootstrap" in found.interval


def test_no_pass_in_many_samples_still_has_an_interval() -> None:
    """Problems that are all alike stay so however they are drawn: the bootstrap would say 0 to 0."""
    found = scores([0] * 164, 5)["pass@1"]
    assert (found.low, found.high) == wilson(0, 164)
    assert found.high > 0.02


def test_the_bootstrap_has_the_width_of_the_normal_interval() -> None:
    """For a mean over many problems the two agree (to the 2 % that 10,000 resamples leave)."""
    rng = np.random.default_rng(5)
    passed = rng.binomial(10, rng.uniform(size=400))
    found = scores(passed.tolist(), 10)["pass@1"]
    half = 1.96 * float(np.std(passed / 10)) / math.sqrt(len(passed))
    assert found.high - found.value == pytest.approx(half, rel=0.05)
    assert found.value - found.low == pytest.approx(half, rel=0.05)


def test_the_paired_bootstrap_holds_the_true_difference_19_times_in_20() -> None:
    """200 pairs of results, drawn from rates that differ by 0.1; three standard errors of the share."""
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(200):
        easy = rng.uniform(size=120) * 0.9
        first, second = rng.uniform(size=120) < easy, rng.uniform(size=120) < easy + 0.1
        found = paired_difference(first.astype(float).tolist(), second.astype(float).tolist())
        held += found.low <= 0.1 <= found.high
    assert held / 200 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 200))


def test_pairing_shows_what_two_intervals_apart_do_not() -> None:
    first = [float(i % 2) for i in range(164)]
    second = [1.0 if i < 20 else value for i, value in enumerate(first)]
    found = paired_difference(first, second)
    assert (found.gained, found.lost, found.problems) == (10, 0, 164)
    assert found.difference == pytest.approx(10 / 164)
    assert 0 < found.low < found.difference < found.high
    assert wilson(82, 164)[1] > wilson(92, 164)[0]


def test_a_draw_is_not_called_a_win() -> None:
    first = [float(i < 20) for i in range(164)]
    second = [float(5 <= i < 26) for i in range(164)]
    found = paired_difference(first, second)
    assert (found.gained, found.lost) == (6, 5)
    assert found.low < 0 < found.high


def test_the_bootstrap_says_the_same_each_time() -> None:
    first, second = [0.0, 1.0, 0.5, 0.25] * 20, [0.5, 1.0, 0.0, 0.75] * 20
    assert paired_difference(first, second) == paired_difference(first, second)
    backwards = paired_difference(second, first)
    assert backwards.difference == -paired_difference(first, second).difference


def result_file(folder: Path, passed: dict[str, int], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    settings = SETTINGS | {name: value for name, value in changes.items() if name in SETTINGS}
    left = {name: value for name, value in changes.items() if name not in SETTINGS}
    content = {"status": "finished", "settings": settings, "passed_by_problem": passed} | left
    (folder / RESULT).write_text(json.dumps(content))
    return folder


def test_two_results_are_paired_difference_problem_by_problem_whatever_their_order(tmp_path: Path) -> None:
    one = result_file(tmp_path / "one", {"HumanEval/0": 1, "HumanEval/1": 0, "HumanEval/2": 0})
    two = result_file(tmp_path / "two", {"HumanEval/2": 4, "HumanEval/0": 3, "HumanEval/1": 0}, samples=4)
    found = compare(one, two / RESULT)
    assert found.difference == pytest.approx((-0.25 + 0 + 1) / 3)
    assert (found.gained, found.lost, found.problems) == (1, 1, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", "potstill-humaneval-2"),
        ("data_sha256", "cd" * 32),
        ("problems", 164),
        ("prompt", "chat"),
        ("temperature", 0.8),
        ("top_p", 0.95),
        ("max_new_tokens", 64),
    ],
)
def test_results_of_another_test_are_not_paired_difference(name: str, value: Any, tmp_path: Path) -> None:
    passed = {f"HumanEval/{i}": 1 for i in range(3)}
    one, two = result_file(tmp_path / "one", passed), result_file(tmp_path / "two", passed, **{name: value})
    with pytest.raises(UserError) as refused:
        compare(one, two)
    (line,) = refused.value.mistakes
    assert f"its {name} is {value}, that of {one} is {SETTINGS[name]}" in line


def damaged(file: Path) -> None:
    file.write_text('{"status": "finished", "settings": [], "passed_by_problem": {}}')


def failed(file: Path) -> None:
    file.write_text('{"status": "inference_failed", "why": "NaN"}')


def another_file(file: Path) -> None:
    file.write_text('{"step": 1}')


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (damaged, "damaged"),
        (failed, "inference_failed. Nothing to compare"),
        (another_file, "Nothing to compare"),
        (Path.unlink, "no such file"),
    ],
)
def test_what_is_no_finished_result_is_refused_in_one_line(
    fault: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    one = result_file(tmp_path / "one", {"HumanEval/0": 1})
    two = result_file(tmp_path / "two", {"HumanEval/0": 1})
    fault(two / RESULT)
    with pytest.raises(UserError) as refused:
        compare(one, two)
    (line,) = refused.value.mistakes
    assert message in line and str(two / RESULT) in line and "\n" not in line
