"""The formulas: independent golden values and gradients, and the laws that every divergence obeys."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from potstill.errors import UserError
from potstill.losses.divergences import forward_kl, jsd, reverse_kl, skew_kl, tvd
from potstill.registry import entries, options_type

Formula = Callable[[Tensor, Tensor], Tensor]
Pair = tuple[Tensor, Tensor]

STORED = json.loads((Path(__file__).parent.parent / "golden" / "divergences.json").read_text())
GOLDEN = STORED["golden"]
VARIANTS: dict[str, Formula] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "jsd 0.1": partial(jsd, beta=0.1),
    "jsd 0.9": partial(jsd, beta=0.9),
    "skew_kl": skew_kl,
    "skew_kl 0": partial(skew_kl, alpha=0.0),
    "skew_kl 0.7": partial(skew_kl, alpha=0.7),
    "tvd": tvd,
}
lawful = settings(max_examples=40, deadline=None)


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """Logits of a student and a teacher, [3, ids]."""
    ids = draw(st.integers(1, 7))
    rows = st.lists(st.floats(-20, 20), min_size=3 * ids, max_size=3 * ids)
    student, teacher = (torch.tensor(draw(rows), dtype=torch.float64).view(3, ids) for _ in range(2))
    return student, teacher


def each_variant() -> Iterator[Formula]:
    for name, formula in VARIANTS.items():
        note(name)  # the last one noted is the one that failed
        yield formula


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def value_and_gradient(formula: Formula, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    logits = student.clone().requires_grad_()
    values = formula(logits.log_softmax(-1), teacher.log_softmax(-1))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    return values.detach(), gradient


def golden_error(row: dict[str, Any], formula: Formula) -> float:
    """The largest error of value and gradient, in units of the larger of 1 and the value."""
    case = STORED["cases"][row["case"]]
    student, teacher = (torch.tensor([case[side]], dtype=torch.float64) for side in ("student", "teacher"))
    value, gradient = value_and_gradient(formula, student, teacher)
    actual = torch.cat([value, gradient[0]])
    golden = torch.tensor([row["value"], *row["gradient"]], dtype=torch.float64)
    return float((actual - golden).abs().max()) / max(1.0, row["value"])


@pytest.mark.parametrize("row", GOLDEN, ids=lambda r: f"{r['divergence']} {r['options'] or ''} {r['case']}")
def test_value_and_gradient_equal_the_golden_ones(row: dict[str, Any]) -> None:
    formula = partial(entries("divergence")[row["divergence"]], **row["options"])
    assert golden_error(row, formula) < 1e-13


def test_small_values_are_right_in_relative_terms() -> None:
    for row in GOLDEN:
        if row["case"] == "nearly equal":
            case = STORED["cases"][row["case"]]
            student, teacher = (
                torch.tensor([case[side]], dtype=torch.float64) for side in ("student", "teacher")
            )
            formula = partial(entries("divergence")[row["divergence"]], **row["options"])
            value = float(formula(student.log_softmax(-1), teacher.log_softmax(-1)))
            assert value == pytest.approx(row["value"], rel=1e-6)


def test_every_divergence_has_golden_rows() -> None:
    assert {row["divergence"] for row in GOLDEN} == set(entries("divergence"))


def test_a_reversed_kl_does_not_pass_the_golden_rows() -> None:
    rows = [row for row in GOLDEN if row["case"] in ("two ids", "five ids", "123 ids")]
    for right, wrong in ((forward_kl, reverse_kl), (reverse_kl, forward_kl)):
        chosen = [row for row in rows if row["divergence"] == right.__name__]
        assert len(chosen) == 3
        assert min(golden_error(row, wrong) for row in chosen) > 1e-4


@given(pair=pairs())
@lawful
def test_it_is_never_negative_and_one_value_per_position(pair: Pair) -> None:
    student, teacher = (logits.log_softmax(-1) for logits in pair)
    for formula in each_variant():
        values = formula(student, teacher)
        assert values.shape == (3,)
        assert float(values.min()) > -1e-14
        assert gap(values[1:2], formula(student[1:2], teacher[1:2])) < 1e-14


@given(pair=pairs())
@lawful
def test_it_and_its_gradient_are_zero_at_equality(pair: Pair) -> None:
    student, _ = pair
    for formula in each_variant():
        values, gradient = value_and_gradient(formula, student, student + 3.0)
        assert float(values.abs().max()) < 1e-13
        # The total variation has a kink at equality: its gradient is bounded there, not small.
        assert float(gradient.abs().max()) < (0.5 if formula is tvd else 1e-13)


@given(pair=pairs())
@lawful
def test_it_is_positive_where_the_distributions_differ(pair: Pair) -> None:
    student, teacher = (logits.log_softmax(-1) for logits in pair)
    apart = 0.5 * (student.exp() - teacher.exp()).abs().sum(-1)
    for formula in each_variant():
        # Pinsker's inequality, for the least sensitive variant here: 2 * 0.3^2 for skew_kl 0.7.
        assert bool((formula(student, teacher) >= 0.17 * apart**2 - 1e-14).all())


@given(pair=pairs(), by=st.floats(-1000, 1000))
@lawful
def test_a_constant_added_to_the_logits_changes_nothing(pair: Pair, by: float) -> None:
    student, teacher = pair
    for formula in each_variant():
        values, gradient = value_and_gradient(formula, student, teacher)
        for shifted in ((student + by, teacher), (student, teacher + by)):
            shifted_values, shifted_gradient = value_and_gradient(formula, *shifted)
            assert gap(shifted_values, values) < 1e-10
            # Where two probabilities are a rounding apart, the total variation's gradient may turn its sign.
            assert formula is tvd or gap(shifted_gradient, gradient) < 1e-10


@given(pair=pairs(), data=st.data())
@lawful
def test_the_order_of_ids_does_not_matter(pair: Pair, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(pair[0].shape[1])))
    for formula in each_variant():
        values, gradient = value_and_gradient(formula, *pair)
        permuted, permuted_gradient = value_and_gradient(formula, *(logits[:, order] for logits in pair))
        assert gap(permuted, values) < 1e-13
        assert formula is tvd or gap(permuted_gradient, gradient[:, order]) < 1e-13


@given(pair=pairs())
@lawful
def test_the_gradient_sums_to_zero_in_each_row(pair: Pair) -> None:
    for formula in each_variant():
        _, gradient = value_and_gradient(formula, *pair)
        assert float(gradient.sum(-1).abs().max()) < 1e-13


@given(pair=pairs(), padding=st.integers(1, 4))
@lawful
def test_ids_that_are_impossible_on_both_sides_change_nothing(pair: Pair, padding: int) -> None:
    padded = [torch.nn.functional.pad(logits, (padding, padding), value=-math.inf) for logits in pair]
    for formula in each_variant():
        values, gradient = value_and_gradient(formula, *padded)
        plain, plain_gradient = value_and_gradient(formula, *pair)
        assert gap(values, plain) < 1e-13
        assert formula is tvd or gap(gradient[:, padding:-padding], plain_gradient) < 1e-13
        assert not bool(gradient[:, :padding].any() or gradient[:, -padding:].any())
        assert bool(gradient.isfinite().all())


@given(pair=pairs())
@lawful
def test_jsd_at_one_half_and_total_variation_are_bounded(pair: Pair) -> None:
    student, teacher = (logits.log_softmax(-1) for logits in pair)
    assert float(jsd(student, teacher).max()) <= math.log(2) + 1e-14
    assert float(tvd(student, teacher).max()) <= 1 + 1e-14


@given(pair=pairs(), beta=st.floats(0.01, 0.99))
@lawful
def test_jsd_with_sides_swapped_is_jsd_with_the_other_beta(pair: Pair, beta: float) -> None:
    student, teacher = (logits.log_softmax(-1) for logits in pair)
    assert gap(jsd(student, teacher, beta=beta), jsd(teacher, student, beta=1 - beta)) < 1e-13


def test_jsd_weighs_the_kl_of_the_teacher_with_beta() -> None:
    student, teacher = (
        torch.tensor([logits]).double().log_softmax(-1) for logits in ([0.0, 1, 5], [2.0, 0, 0])
    )
    # As beta falls to 0 the mixture is the student, and jsd / beta becomes forward KL.
    assert gap(jsd(student, teacher, beta=1e-8) / 1e-8, forward_kl(student, teacher)) < 1e-6


def test_an_id_impossible_for_the_student_alone_makes_forward_kl_infinite() -> None:
    student = torch.tensor([[0.0, -math.inf]])
    teacher = torch.tensor([[0.5, 0.5]]).log()
    assert forward_kl(student, teacher).tolist() == [math.inf]
    assert reverse_kl(teacher, student).tolist() == [math.inf]
    assert forward_kl(teacher, student).tolist() == pytest.approx([math.log(2)])


@pytest.mark.parametrize(
    ("formula", "option", "values"),
    [(jsd, "beta", [0.0, 1.0, -0.1, 1.5, math.nan]), (skew_kl, "alpha", [1.0, -0.1, 2.0, math.nan])],
)
def test_an_option_out_of_range_is_refused(
    formula: Callable[..., Tensor], option: str, values: list[float]
) -> None:
    row = torch.zeros(1, 1)
    accepts = TypeAdapter(options_type(formula.__name__, formula)).validate_python
    assert getattr(accepts({option: 0.25}), option) == 0.25
    for value in values:
        with pytest.raises(UserError, match=rf"{formula.__name__}: {option} is {value}, wanted"):
            formula(row, row, **{option: value})
        with pytest.raises(ValidationError, match=option):
            accepts({option: value})


def test_formulas_are_registered_without_importing_torch() -> None:
    program = "import sys; from potstill.registry import entries as known; "
    program += "print(*known('divergence'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["forward_kl", "jsd", "reverse_kl", "skew_kl", "tvd", "False"]
