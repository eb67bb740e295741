"""Sums and gradients against a dense float64 reference, numeric differences, and the laws they obey."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from potstill.errors import UserError
from potstill.losses.divergences import forward_kl, jsd, reverse_kl, skew_kl, tvd
from potstill.losses.objective import Objective
from potstill.losses.targets import HiddenTargets
from potstill.types import Divergence, Head, Targets

Array = NDArray[np.float64]
Sums = dict[str, Tensor]

DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": partial(jsd, beta=0.3),
    "skew_kl": partial(skew_kl, alpha=0.2),
    "tvd": tvd,
}
each_divergence = pytest.mark.parametrize("name", DIVERGENCES)


@dataclass(frozen=True)
class Case:
    """A student and a teacher at N positions, drawn from a seed."""

    N: int = 7
    V: int = 123
    D: int = 6
    E: int = 5
    dtype: torch.dtype = torch.float64
    bias: bool = True
    scale: float = 1.7
    softcap: float | None = 3.0
    spread: float = 1.0
    hidden_ND: Tensor = field(init=False)
    head: Head = field(init=False)
    labels_N: Tensor = field(init=False)
    targets: HiddenTargets = field(init=False)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.N + 1000 * self.V)

        def draw(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=random, dtype=torch.float64) * self.spread
            return drawn.to(self.dtype)

        bias_V = draw(self.V).requires_grad_() if self.bias else None
        head = Head(draw(self.V, self.D).requires_grad_(), bias_V, self.scale, self.softcap)
        teacher = HiddenTargets(draw(self.N, self.E), Head(draw(self.V, self.E)))
        object.__setattr__(self, "hidden_ND", draw(self.N, self.D).requires_grad_())
        object.__setattr__(self, "head", head)
        object.__setattr__(self, "labels_N", torch.randint(self.V, (self.N,), generator=random))
        object.__setattr__(self, "targets", teacher)

    @property
    def leaves(self) -> list[Tensor]:
        leaves = [self.hidden_ND, self.head.weight_VD, self.head.bias_V]
        return [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]

    def sums(self, objective: Objective) -> Sums:
        return objective(self.hidden_ND, self.head, self.labels_N, self.targets)

    def gradients(self, objective: Objective) -> list[Tensor]:
        return list(torch.autograd.grad(self.sums(objective)["loss"], self.leaves))


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def divergence_and_gradient(name: str, p: Array, q: Array) -> tuple[Array, Array]:
    """Each formula written out, and its gradient in the student's logits by hand."""

    def total(x: Array) -> Array:
        return x.sum(-1, keepdims=True)

    if name == "forward_kl":
        return total(p * np.log(p / q)), q - p
    if name == "reverse_kl":
        value = total(q * np.log(q / p))
        return value, q * (np.log(q / p) - value)
    if name == "jsd":
        m = 0.3 * p + 0.7 * q
        kl_q = total(q * np.log(q / m))
        return 0.3 * total(p * np.log(p / m)) + 0.7 * kl_q, 0.7 * q * (np.log(q / m) - kl_q)
    if name == "skew_kl":
        m = 0.2 * p + 0.8 * q
        return total(p * np.log(p / m)), -0.8 * q * (p / m - total(q * p / m))
    g = -0.5 * np.sign(p - q)
    return 0.5 * total(np.abs(p - q)), q * (g - total(q * g))


@dataclass(frozen=True)
class Reference:
    """Dense, float64, numpy, no autograd: the whole [N, V] at once."""

    ce: float
    kd: float
    loss: float
    gradients: list[Array]


def reference(case: Case, name: str, kd_weight: float, ce_weight: float, T: float) -> Reference:
    def array(tensor: Tensor) -> Array:
        return tensor.detach().double().numpy()

    hidden, weight, labels = array(case.hidden_ND), array(case.head.weight_VD), case.labels_N.numpy()
    raw = hidden @ weight.T
    if case.head.bias_V is not None:
        raw = raw + array(case.head.bias_V)
    raw = raw * case.scale
    logits = raw if case.softcap is None else case.softcap * np.tanh(raw / case.softcap)
    teacher_logits = array(case.targets.hidden_NE) @ array(case.targets.head.weight_VD).T  # type: ignore[attr-defined]

    one_hot = np.eye(case.V)[labels]
    ce = -np.log((softmax(logits) * one_hot).sum(-1)).sum()
    value, gradient = divergence_and_gradient(name, softmax(teacher_logits / T), softmax(logits / T))
    kd = T**2 * value.sum()
    by_logits = ce_weight * (softmax(logits) - one_hot) + kd_weight * T**2 * gradient / T
    by_raw = by_logits if case.softcap is None else by_logits * (1 - np.tanh(raw / case.softcap) ** 2)
    by_product = by_raw * case.scale
    gradients = [by_product @ weight, by_product.T @ hidden, by_product.sum(0)]
    return Reference(ce, kd, ce_weight * ce + kd_weight * kd, gradients[: 3 if case.bias else 2])


def gap(actual: Tensor, expected: Array | Tensor) -> float:
    """The largest difference, relative to the largest expected entry or to 1."""
    expected = torch.as_tensor(expected).double()
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((actual.detach().double() - expected).abs().max() / expected.abs().max().clamp(min=1.0))


SHAPES = [
    pytest.param(Case(N=1), 256, id="one position"),
    pytest.param(Case(N=7), 1, id="chunk 1"),
    pytest.param(Case(N=7), 3, id="chunk that does not divide N"),
    pytest.param(Case(N=7), 7, id="chunk N"),
    pytest.param(Case(N=7), 64, id="chunk above N"),
    pytest.param(Case(N=3, V=47, bias=False, scale=1.0, softcap=None), 2, id="plain head"),
    pytest.param(Case(N=5, V=2, D=1, softcap=None), 2, id="two ids, width 1"),
    pytest.param(Case(N=4, V=1, D=3), 2, id="one id"),
]


@each_divergence
@pytest.mark.parametrize("T", [1.0, 2.0, 0.5])
@pytest.mark.parametrize(("case", "chunk"), SHAPES)
def test_sums_and_gradients_equal_the_dense_reference(case: Case, chunk: int, T: float, name: str) -> None:
    objective = Objective(DIVERGENCES[name], 0.7, 0.2, T, chunk)
    expected = reference(case, name, 0.7, 0.2, T)
    sums = case.sums(objective)
    for term in ("loss", "ce", "kd"):
        assert sums[term].item() == pytest.approx(getattr(expected, term), rel=1e-12, abs=1e-12)
    assert [g.shape for g in case.gradients(objective)] == [leaf.shape for leaf in case.leaves]
    for gradient, exact in zip(case.gradients(objective), expected.gradients, strict=True):
        assert gap(gradient, exact) < 1e-12


@each_divergence
def test_in_float32_they_equal_it_within_1e_5(name: str) -> None:
    case = Case(N=9, dtype=torch.float32)
    objective = Objective(DIVERGENCES[name], 0.7, 0.2, 2.0, 4)
    expected = reference(case, name, 0.7, 0.2, 2.0)
    assert case.sums(objective)["loss"].item() == pytest.approx(expected.loss, rel=1e-5)
    for gradient, exact in zip(case.gradients(objective), expected.gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert gap(gradient, exact) < 1e-5


def test_swapped_weights_a_missing_square_and_a_reversed_kl_would_be_seen() -> None:
    case = Case()
    right = reference(case, "forward_kl", 0.7, 0.2, 2.0).loss
    wrong = [
        Objective(forward_kl, 0.2, 0.7, 2.0),
        Objective(forward_kl, 0.7 / 4, 0.2, 2.0),
        Objective(forward_kl, 0.7, 0.2, 1.0),
        Objective(reverse_kl, 0.7, 0.2, 2.0),
    ]
    assert min(abs(case.sums(objective)["loss"].item() - right) for objective in wrong) > 0.1


@each_divergence
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_the_gradient_is_that_of_the_logged_number(name: str, T: float) -> None:
    case = Case(N=3, V=5, D=2)
    objective = Objective(DIVERGENCES[name], 0.7, 0.2, T, 2)

    def logged(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        head = replace(case.head, weight_VD=weight_VD, bias_V=bias_V)
        return objective(hidden_ND, head, case.labels_N, case.targets)["loss"]

    assert torch.autograd.gradcheck(logged, case.leaves)


def test_loss_is_the_weighted_sum_and_the_only_one_with_a_gradient() -> None:
    sums = Case().sums(Objective(kd_weight=0.7, ce_weight=0.2))
    assert sums["loss"].item() == pytest.approx(0.7 * sums["kd"].item() + 0.2 * sums["ce"].item(), rel=1e-14)
    assert {name: value.requires_grad for name, value in sums.items()} == {
        "loss": True,
        "ce": False,
        "kd": False,
    }
    assert {value.shape for value in sums.values()} == {torch.Size([])}


def test_without_positions_the_loss_is_zero_and_still_reaches_the_weights() -> None:
    case = Case(N=0)
    sums = case.sums(Objective())
    assert {name: value.item() for name, value in sums.items()} == {"loss": 0.0, "ce": 0.0, "kd": 0.0}
    gradients = torch.autograd.grad(sums["loss"], case.leaves)
    assert [tuple(g.shape) for g in gradients] == [(0, 6), (123, 6), (123,)]
    assert not any(bool(g.any()) for g in gradients)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    case = Case()
    sums = Objective(kd_weight=0.0, ce_weight=2.0, chunk=3)(case.hidden_ND, case.head, case.labels_N, None)
    dense = torch.nn.functional.cross_entropy(case.head(case.hidden_ND), case.labels_N, reduction="sum")
    assert sums.keys() == {"loss", "ce"}
    assert sums["ce"].item() == pytest.approx(dense.item(), rel=1e-13)
    expected = torch.autograd.grad(2.0 * dense, case.leaves)
    for a, b in zip(torch.autograd.grad(sums["loss"], case.leaves), expected, strict=True):
        assert gap(a, b) < 1e-13


@pytest.mark.parametrize("upstream", [-3.7, 0.0])
def test_the_gradient_is_scaled_by_the_upstream_gradient(upstream: float) -> None:
    case = Case()
    plain = case.gradients(Objective())
    loss = case.sums(Objective())["loss"]
    for _ in range(2):  # twice: what the forward pass stored must not have been overwritten
        scaled = torch.autograd.grad(loss * upstream, case.leaves, retain_graph=True)
        for a, b in zip(scaled, plain, strict=True):
            assert gap(a, upstream * b) < 1e-15


def test_a_second_derivative_is_refused() -> None:
    case = Case(N=2)
    squared = case.sums(Objective())["loss"] ** 2
    (gradient, *_) = torch.autograd.grad(squared, case.leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2}])
def test_only_leaves_that_require_one_get_a_gradient(wanted: set[int]) -> None:
    case = Case()
    whole = case.gradients(Objective(chunk=3))
    for i, leaf in enumerate(case.leaves):
        leaf.requires_grad_(i in wanted)
    for a, i in zip(case.gradients(Objective(chunk=3)), sorted(wanted), strict=True):
        assert gap(a, whole[i]) < 1e-15


def test_sums_over_positions_add_up_and_positions_do_not_interact() -> None:
    case, objective = Case(), Objective(DIVERGENCES["jsd"], temperature=2.0, chunk=2)
    subset = torch.tensor([1, 4, 5])
    rest = torch.tensor([0, 2, 3, 6])

    def sums_of(positions: Tensor) -> Sums:
        targets = HiddenTargets(case.targets.hidden_NE[positions], case.targets.head)
        return objective(case.hidden_ND[positions], case.head, case.labels_N[positions], targets)

    parts, whole = [sums_of(subset), sums_of(rest)], case.sums(objective)
    for name, value in whole.items():
        assert value.item() == pytest.approx(sum(part[name].item() for part in parts), rel=1e-13)
    by_part = [torch.autograd.grad(part["loss"], case.leaves) for part in parts]
    for a, b, c in zip(case.gradients(objective), *by_part, strict=True):
        assert gap(a, b + c) < 1e-13
    assert not bool(by_part[0][0][rest].any())


@each_divergence
@pytest.mark.parametrize("T", [1.0, 3.0])
def test_a_student_equal_to_its_teacher_has_no_kd_and_no_gradient(name: str, T: float) -> None:
    case = Case()
    teacher = HiddenTargets(case.hidden_ND.detach(), case.head)
    objective = Objective(DIVERGENCES[name], kd_weight=1.0, ce_weight=0.0, temperature=T, chunk=7)
    sums = objective(case.hidden_ND, case.head, case.labels_N, teacher)
    assert abs(sums["kd"].item()) < 1e-12
    for gradient in torch.autograd.grad(sums["loss"], case.leaves):
        assert float(gradient.abs().max()) < 1e-12
    measured = objective.measure(case.hidden_ND, case.head, case.labels_N, teacher)
    assert (abs(measured["kl"].item()) < 1e-12, measured["agreement"].item()) == (True, 7)


def test_ids_padded_on_both_sides_have_no_probability_and_no_gradient() -> None:
    plain = Case(V=20, softcap=None)
    padding = torch.full((4,), -math.inf, dtype=torch.float64)
    for name, formula in DIVERGENCES.items():
        case = Case(V=24, softcap=None)
        with torch.no_grad():
            for padded_leaf, leaf in zip(case.leaves, plain.leaves, strict=True):
                padded_leaf[: len(leaf)] = leaf
            case.head.bias_V[20:] = padding  # type: ignore[index]
        weight_VE = torch.cat([plain.targets.head.weight_VD, torch.ones(4, 5).double()])  # type: ignore[attr-defined]
        teacher = Head(weight_VE, torch.cat([torch.zeros(20).double(), padding]))
        objective = Objective(formula, temperature=2.0, chunk=3)
        targets = HiddenTargets(plain.targets.hidden_NE, teacher)
        sums = objective(case.hidden_ND, case.head, plain.labels_N, targets)
        assert sums["loss"].item() == pytest.approx(plain.sums(objective)["loss"].item(), rel=1e-13), name
        padded = torch.autograd.grad(sums["loss"], case.leaves)
        for gradient, unpadded in zip(padded, plain.gradients(objective), strict=True):
            assert gap(gradient[: len(unpadded)], unpadded) < 1e-13
            assert not bool(gradient[len(unpadded) :].any())


@each_divergence
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_it_is_finite_at_logits_of_ten_thousand_in_bfloat16(name: str, T: float) -> None:
    hidden_ND = torch.eye(4, dtype=torch.bfloat16).requires_grad_()
    weight_VD = torch.tensor(
        [[1e4, -1e4, 1e4, 0], [-1e4, 1e4, 1e4, 0], [0, 1e4, -1e4, 1]], dtype=torch.bfloat16
    )
    head = Head(weight_VD.requires_grad_())
    targets = HiddenTargets(torch.eye(4, dtype=torch.bfloat16), Head(weight_VD.detach().flip(0)))
    objective = Objective(DIVERGENCES[name], temperature=T, chunk=3)
    loss = objective(hidden_ND, head, torch.tensor([1, 0, 2, 1]), targets)["loss"]
    assert loss.item() > 1e3  # the cross-entropy alone is far off
    for gradient in torch.autograd.grad(loss, [hidden_ND, weight_VD]):
        assert gradient.dtype == torch.bfloat16
        assert bool(gradient.isfinite().all())


def naive(case: Case, formula: Divergence, T: float) -> tuple[Tensor, list[Tensor]]:
    """Everything in the dtype of the case, the whole [N, V] at once: the straightforward implementation."""
    head = case.head
    logits = (case.hidden_ND @ head.weight_VD.T) * head.scale
    student = (logits / T).log_softmax(-1)
    teacher = ((case.targets.hidden_NE @ case.targets.head.weight_VD.T) / T).log_softmax(-1)  # type: ignore[attr-defined]
    ce = -logits.log_softmax(-1).gather(-1, case.labels_N[:, None]).sum()
    loss = 0.1 * ce + 0.9 * T**2 * formula(student, teacher).sum()
    return loss.detach(), list(torch.autograd.grad(loss, case.leaves))


@each_divergence
@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize(("N", "V"), [(3, 47), (33, 123), (64, 1000)])
def test_in_bfloat16_it_is_as_close_to_float64_as_naive_bfloat16(N: int, V: int, T: float, name: str) -> None:
    case = Case(N=N, V=V, D=16, E=16, dtype=torch.bfloat16, bias=False, softcap=None, scale=1.0, spread=0.8)
    objective = Objective(DIVERGENCES[name], temperature=T, chunk=16)
    exact = reference(case, name, 0.9, 0.1, T)
    naive_loss, naive_gradients = naive(case, DIVERGENCES[name], T)
    loss_error = abs(case.sums(objective)["loss"].item() - exact.loss)
    assert loss_error <= abs(naive_loss.item() - exact.loss) + 2.0**-8 * exact.loss
    if name == "tvd":
        return  # its gradient jumps where p = q: whether one rounding or another crosses that is luck
    for gradient, naive_gradient, right in zip(
        case.gradients(objective), naive_gradients, map(torch.as_tensor, exact.gradients), strict=True
    ):
        error, naive_error = ((x.double() - right).abs() for x in (gradient, naive_gradient))
        # Both start from logits rounded to bfloat16, and single elements of the naive result are right by
        # luck: two roundings of the largest element are allowed, but none for the whole.
        excess = error - naive_error - 2 * 2.0**-8 * right.abs().max()
        worst = int(excess.argmax())
        entries = [x.flatten()[worst].item() for x in (gradient, naive_gradient, right)]
        assert float(excess.max()) <= 0, f"chunked, naive, float64: {entries}"
        assert float(error.norm()) <= float(naive_error.norm())


def test_many_small_contributions_to_the_head_do_not_vanish() -> None:
    hidden_ND = torch.ones(2000, 2, dtype=torch.bfloat16)
    weight_VD = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    objective = Objective(kd_weight=0.0, ce_weight=1.0, chunk=1)
    loss = objective(hidden_ND, Head(weight_VD), torch.zeros(2000, dtype=torch.int64), None)["loss"]
    (gradient,) = torch.autograd.grad(loss, weight_VD)
    # Each position gives (-2/3, 1/3, 1/3). In bfloat16 a sum stops growing at 256 times one contribution.
    expected = 2000 * torch.tensor([[-2.0], [1.0], [1.0]]).expand(3, 2) / 3
    assert gap(gradient, expected) < 0.01


def test_only_products_are_rounded_to_the_matmul_dtype() -> None:
    bias_V = torch.zeros(3, requires_grad=True)
    objective = Objective(kd_weight=0.0, ce_weight=1.0, chunk=4, matmul_dtype=torch.bfloat16)
    head = Head(torch.zeros(3, 2), bias_V)
    objective(torch.ones(10, 2), head, torch.zeros(10, dtype=torch.int64), None)["loss"].backward()
    assert bias_V.grad is not None
    assert (
        gap(bias_V.grad, torch.tensor([-20.0, 10.0, 10.0]) / 3) < 1e-6
    )  # a third, in bfloat16, is off by 1e-3


def test_matmul_dtype_is_what_the_products_run_in() -> None:
    case = Case(N=8, dtype=torch.float32, bias=False)
    exact = reference(case, "forward_kl", 0.9, 0.1, 1.0)
    low = Objective(matmul_dtype=torch.bfloat16, chunk=3)
    for gradient, expected in zip(case.gradients(low), exact.gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert 1e-5 < gap(gradient, expected) < 2e-2
    assert case.sums(low)["loss"].dtype == torch.float32


@dataclass
class CountedTargets:
    """Delegates to `inner` and records the size and temperature of each call."""

    inner: Targets
    calls: list[tuple[int, float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, positions: slice) -> CountedTargets:
        return CountedTargets(self.inner[positions], self.calls)

    def on_support(self, student_logp_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        self.calls.append((len(student_logp_NV), temperature))
        return self.inner.on_support(student_logp_NV, temperature)

    def beyond_support(self) -> Tensor | None:
        return self.inner.beyond_support()


def test_targets_are_evaluated_once_a_chunk() -> None:
    case, targets = Case(), CountedTargets(Case().targets)
    Objective(temperature=2.0, chunk=3)(case.hidden_ND, case.head, case.labels_N, targets)["loss"].backward()
    assert targets.calls == [(3, 2.0), (3, 2.0), (1, 2.0)]
    targets.calls.clear()
    Objective(chunk=4).measure(case.hidden_ND, case.head, case.labels_N, targets)
    assert targets.calls == [(4, 1.0), (3, 1.0)]


class Recorder(TorchDispatchMode):
    """Records the name of every operation and the size of each tensor that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.made.append((func.name(), tensor.numel()))
        return out

    @property
    def largest(self) -> int:
        return max(numel for _, numel in self.made)


def test_no_tensor_of_positions_times_vocabulary_is_made() -> None:
    N, V, chunk = 512, 20_000, 64
    case = Case(N=N, V=V, D=4, E=4, dtype=torch.float32)
    for objective in (
        Objective(chunk=chunk),
        Objective(partial(jsd, beta=0.5), temperature=2.0, chunk=chunk),
    ):
        with Recorder() as recorder:
            case.sums(objective)["loss"].backward()
        assert recorder.largest == chunk * V
    with Recorder() as recorder:
        Objective(chunk=chunk).measure(case.hidden_ND, case.head, case.labels_N, case.targets)
    assert recorder.largest == chunk * V
    with Recorder() as recorder, torch.no_grad():
        case.head(case.hidden_ND)
    assert recorder.largest == N * V  # so the recorder does see a large one


def test_the_head_is_cast_once_a_call_and_not_once_a_chunk() -> None:
    case = Case(N=8, V=50, D=6, dtype=torch.float32, bias=False)
    with Recorder() as recorder:
        case.sums(Objective(matmul_dtype=torch.bfloat16, chunk=1))["loss"].backward()
    assert recorder.made.count(("aten::_to_copy", 50 * 6)) == 1


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_every_product_is_computed_once(T: float) -> None:
    N, V, D, E = 10, 50, 6, 5
    case = Case(N=N, V=V, D=D, E=E)

    def flops(act: Callable[[], object]) -> int:
        # The counter knows addmm, but not the one that adds in place.
        in_place = {torch.ops.aten.addmm_: lambda into, a, b, **_: 2 * math.prod(a) * b[1]}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            act()
        return counter.get_total_flops()

    objective = Objective(temperature=T, chunk=3)
    assert flops(lambda: case.sums(objective)["loss"].backward()) == N * V * (6 * D + 2 * E)
    with torch.no_grad():
        assert flops(lambda: case.sums(objective)) == N * V * (2 * D + 2 * E)
    case.head.weight_VD.requires_grad_(False)
    assert flops(lambda: case.sums(objective)["loss"].backward()) == N * V * (4 * D + 2 * E)


def test_without_gradients_the_sums_are_the_same() -> None:
    case = Case()
    with torch.no_grad():
        evaluated = case.sums(Objective(chunk=2))
    assert not any(value.requires_grad for value in evaluated.values())
    trained = case.sums(Objective(chunk=2))
    assert evaluated.keys() == trained.keys()
    for name, value in evaluated.items():  # by the formula, and written out beside its gradient
        torch.testing.assert_close(value, trained[name].detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_measuring_gives_the_sums_of_training_and_kl_agreement_and_teacher_ce(T: float) -> None:
    case = Case(N=40, V=5)
    objective = Objective(DIVERGENCES["jsd"], 0.7, 0.2, T, 7)
    measured = objective.measure(case.hidden_ND, case.head, case.labels_N, case.targets)
    for name, value in case.sums(objective).items():
        assert measured.pop(name).item() == pytest.approx(value.item(), rel=1e-13)
    student, teacher = case.head(case.hidden_ND).detach(), case.targets.head(case.targets.hidden_NE)
    agreement = int((student.argmax(-1) == teacher.argmax(-1)).sum())
    assert 0 < agreement < 40
    assert measured.pop("agreement").item() == agreement
    assert measured.pop("kl").item() == pytest.approx(reference(case, "forward_kl", 1, 0, 1.0).kd, rel=1e-12)
    teacher_ce = torch.nn.functional.cross_entropy(teacher, case.labels_N, reduction="sum")
    assert measured.pop("teacher_ce").item() == pytest.approx(float(teacher_ce), rel=1e-12)
    assert measured == {}


def test_what_is_measured_is_the_sum_of_what_each_position_has() -> None:
    case, objective = Case(), Objective(jsd, chunk=3, temperature=2.0)
    given = (case.hidden_ND, case.head, case.labels_N, case.targets)
    each, sums = objective.per_position(*given), objective.measure(*given)
    assert each.keys() == sums.keys()
    for name, values_N in each.items():
        assert values_N.shape == (case.N,)
        torch.testing.assert_close(values_N.sum(), sums[name])
    whole = objective.per_position(*given)
    for n in range(case.N):  # and a position's value is its own
        alone = objective.per_position(
            *(part[n : n + 1] if part is not case.head else part for part in given)
        )
        assert all(torch.isclose(alone[name][0], whole[name][n]) for name in whole)


def test_an_autocast_around_it_rounds_nothing() -> None:
    case = Case(N=40, V=60, dtype=torch.float32)

    def results() -> list[Tensor]:
        hidden_ND = case.hidden_ND.detach().clone().requires_grad_()
        sums = Objective(chunk=16)(hidden_ND, case.head, case.labels_N, case.targets)
        sums["loss"].backward()
        measured = Objective(chunk=16).measure(hidden_ND, case.head, case.labels_N, case.targets)
        assert hidden_ND.grad is not None
        return [*sums.values(), *measured.values(), hidden_ND.grad]

    plain = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results()
    assert [torch.equal(one, other) for one, other in zip(plain, inside, strict=True)] == [True] * len(plain)


def test_measuring_no_positions_gives_zeros() -> None:
    case = Case(N=0)
    measured = Objective().measure(case.hidden_ND, case.head, case.labels_N, case.targets)
    assert {value.item() for value in measured.values()} == {0.0}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"temperature": 0.0}, "objective.temperature: is 0.0, must be"),
        ({"temperature": -1.0}, "objective.temperature: is -1.0, must be"),
        ({"temperature": math.nan}, "objective.temperature: is nan, must be"),
        ({"temperature": math.inf}, "objective.temperature: is inf, must be"),
        ({"kd_weight": -0.1}, "objective.kd_weight: is -0.1, must be"),
        ({"kd_weight": math.inf}, "objective.kd_weight: is inf, must be"),
        ({"ce_weight": -0.1}, "objective.ce_weight: is -0.1, must be"),
        ({"ce_weight": math.nan}, "objective.ce_weight: is nan, must be"),
        ({"ce_weight": 0.0, "kd_weight": 0.0}, "objective.kd_weight: is 0 and so is objective.ce_weight"),
        ({"chunk": 0}, "objective.chunk: is 0, must be"),
    ],
)
def test_a_setting_out_of_range_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Objective(**options)


@pytest.mark.parametrize("act", [Objective.__call__, Objective.measure], ids=["training", "measuring"])
def test_mismatched_inputs_are_refused_with_both_numbers(act: Callable[..., Sums]) -> None:
    case = Case(N=4, V=9)
    hidden_ND, head, labels_N, targets = case.hidden_ND, case.head, case.labels_N, case.targets

    def refused(complaint: str, *args: Any) -> None:
        with pytest.raises(UserError, match=complaint) as caught:
            act(Objective(chunk=3), *args)
        said.append(str(caught.value))

    said: list[str] = []
    for label in (-1, -100, 9):
        wrong_N = labels_N.clone()
        wrong_N[2] = label
        refused(f"label {label} is outside the student's 9 ids, 0 to 8", hidden_ND, head, wrong_N, targets)
        assert ("to_batch" in said[-1]) == (label == -100)
    refused("4 hidden states and 3 labels", hidden_ND, head, labels_N[:3], targets)
    refused("4 hidden states and 3 targets", hidden_ND, head, labels_N, targets[:3])
    refused("3 hidden states and 4 labels", hidden_ND[:3], head, labels_N, targets)
    other = HiddenTargets(targets.hidden_NE, Head(torch.ones(8, 5).double()))
    refused("the student has 9 ids and the teacher 8", hidden_ND, head, labels_N, other)
    refused("objective.kd_weight: is 0.9 and there is no teacher", hidden_ND, head, labels_N, None)


@pytest.mark.parametrize("act", [Objective.__call__, Objective.measure], ids=["training", "measuring"])
def test_a_sum_that_is_not_finite_is_refused_by_name(act: Callable[..., Sums]) -> None:
    case = Case(N=4, V=9, softcap=None)
    hidden_ND, head, labels_N, targets = case.hidden_ND.detach(), case.head, case.labels_N, case.targets

    def refused(complaint: str, *args: Any) -> None:
        with pytest.raises(UserError, match=complaint):
            act(Objective(chunk=3), *args)

    damaged_ND = hidden_ND.clone()
    damaged_ND[3, 0] = math.nan
    refused("objective: ce is nan over 4 positions", damaged_ND, head, labels_N, targets)
    damaged_NE = targets.hidden_NE.clone()
    damaged_NE[0, 0] = math.nan
    refused(
        "objective: kd is nan over 4 positions",
        hidden_ND,
        head,
        labels_N,
        HiddenTargets(damaged_NE, targets.head),
    )
    excluded_V = torch.zeros(9, dtype=torch.float64)
    excluded_V[labels_N[1]] = -math.inf
    excluding = replace(head, bias_V=excluded_V)
    refused("objective: ce is inf over 4 positions", hidden_ND, excluding, labels_N, targets)
    others_N = torch.full_like(labels_N, (int(labels_N[1]) + 1) % 9)
    refused("objective: kd is inf over 4 positions", hidden_ND, excluding, others_N, targets)
