"""Written-out gradients are those of autograd, whatever the logits, weights, temperature, head and chunk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from potstill import distill
from potstill.errors import Fault, UserError
from potstill.losses import objective as module
from potstill.losses.divergences import forward_kl, jsd, reverse_kl, skew_kl, tvd
from potstill.losses.fused import is_supported
from potstill.losses.objective import Objective
from potstill.losses.targets import HiddenTargets, SparseTargets
from potstill.types import Divergence, Head

OTHERS = [reverse_kl, partial(jsd, beta=0.3), jsd, skew_kl, partial(skew_kl, alpha=0.0), tvd]


def called(divergence: Divergence) -> str:
    options = getattr(divergence, "keywords", {})
    return " ".join([getattr(divergence, "func", divergence).__name__, *map(str, options.values())])


CASES = [(3, 47), (1, 2), (0, 5), (7, 123), (40, 1000)]
OBJECTIVES = [
    Objective(),
    Objective(kd_weight=1.0, ce_weight=0.0),
    Objective(kd_weight=0.0, ce_weight=1.0),
    Objective(temperature=2.0, kd_weight=0.3, ce_weight=0.7),
    Objective(temperature=0.5, chunk=2),
    Objective(partial(forward_kl), chunk=3),
    *(Objective(other, chunk=3) for other in OTHERS),
    *(Objective(other, temperature=2.5, kd_weight=0.6, ce_weight=0.4) for other in OTHERS),
]


def made(N: int, V: int, dtype: torch.dtype = torch.float64, spread: float = 3.0, **head: object) -> tuple:
    generator = torch.Generator().manual_seed(N * 1000 + V)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden_ND, weight_VD = normal(N, 8), normal(V, 8) * spread / 3
    targets = HiddenTargets(normal(N, 6), Head(normal(V, 6) * spread / 3))
    labels_N = torch.randint(V, (N,), generator=generator)
    return hidden_ND, Head(weight_VD, **head), labels_N, targets  # type: ignore[arg-type]


def run(
    objective: Objective, hidden_ND: Tensor, head: Head, labels_N: Tensor, targets: object
) -> list[Tensor]:
    """loss, ce, kd, and the gradients of hidden states, weights and bias."""
    hidden_ND = hidden_ND.clone().requires_grad_()
    weight_VD = head.weight_VD.clone().requires_grad_()
    bias_V = None if head.bias_V is None else head.bias_V.clone().requires_grad_()
    terms = objective(hidden_ND, replace(head, weight_VD=weight_VD, bias_V=bias_V), labels_N, targets)  # type: ignore[arg-type]
    (terms["loss"] * 1.7).backward()  # type: ignore[no-untyped-call]
    leaves = [hidden_ND, weight_VD, *([] if bias_V is None else [bias_V])]
    return [
        terms["loss"].detach(),
        terms["ce"],
        terms["kd"],
        *(leaf.grad for leaf in leaves if leaf.grad is not None),
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_two_engines_agree(objective: Objective, case: tuple[int, int]) -> None:
    given = made(*case)
    fused, reference = run(objective, *given), run(replace(objective, engine="reference"), *given)
    for one, other in zip(fused, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("knows_entropy", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("case", [(1, 2), (7, 123)])
def test_the_two_engines_agree_on_samples(
    case: tuple[int, int], temperature: float, knows_entropy: bool
) -> None:
    hidden_ND, head, labels_N, _ = made(*case)
    N, V = case
    ids_NK = torch.stack([torch.randperm(V)[: min(V, 5)] for _ in range(N)])
    logp_NK = torch.randn(ids_NK.shape, dtype=torch.float64).log_softmax(-1)
    ids_NK[0, 1:], logp_NK[0, 1:] = -1, -math.inf  # padded, beside one that is certain
    logp_NK[0, 0] = 0.0
    entropy_N = torch.rand(N, dtype=torch.float64) if knows_entropy else None
    targets = SparseTargets(ids_NK, logp_NK, temperature, has_bucket=False, entropy_N=entropy_N)
    given = hidden_ND, head, labels_N, targets
    objective = Objective(temperature=temperature, chunk=3)
    reference = run(replace(objective, engine="reference"), *given)
    for one, other in zip(run(objective, *given), reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match=rf"objective.temperature: is 3.0.*{temperature}"):
        Objective(temperature=3.0)(*given)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("K", [1, 5, 123])
@pytest.mark.parametrize("divergence", [forward_kl, *OTHERS], ids=called)
def test_the_two_engines_agree_on_top_k_with_a_bucket(
    divergence: Divergence, K: int, temperature: float
) -> None:
    hidden_ND, head, labels_N, teacher = made(7, 123, spread=6.0)
    logp_NV = (teacher.head(teacher.hidden_NE) / temperature).log_softmax(-1)
    logp_NK, ids_NK = logp_NV.topk(K)
    if K == 5:
        ids_NK[0, 2:], logp_NK[0, 2:] = -1, -math.inf  # padded
    targets = SparseTargets(ids_NK, logp_NK, temperature, has_bucket=True)
    objective = Objective(divergence, temperature=temperature, chunk=3)
    assert is_supported(divergence, targets)
    given = hidden_ND, head, labels_N, targets
    reference = run(replace(objective, engine="reference"), *given)
    for one, other in zip(run(objective, *given), reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("block", [1, 50, 3 * 123])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = made(7, 123)
    whole = run(Objective(), *given)
    monkeypatch.setattr("potstill.losses.fused.BLOCK_NUMBERS", block)
    for one, other in zip(run(Objective(), *given), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("divergence", [forward_kl, *OTHERS], ids=called)
def test_the_two_engines_agree_with_bias_scale_softcap_and_a_padded_end(divergence: Divergence) -> None:
    bias_V = torch.linspace(-1, 1, 50, dtype=torch.float64)
    capped = {"softcap": 5.0, "scale": 1.7}
    for options in ({"bias_V": bias_V, "scale": 0.3}, {"known": 41}, capped):
        hidden_ND, head, labels_N, targets = made(9, 50, **options)
        if head.known:
            labels_N = labels_N.clamp_max(40)
            targets = HiddenTargets(targets.hidden_NE, replace(targets.head, known=41))
        given = hidden_ND, head, labels_N, targets
        reference = run(Objective(divergence, engine="reference"), *given)
        for one, other in zip(run(Objective(divergence), *given), reference, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "divergence", [forward_kl, jsd, skew_kl, tvd], ids=called
)  # a reverse KL is infinite
def test_impossible_ids_and_large_logits_give_the_values_and_gradients_of_autograd(
    divergence: Divergence,
) -> None:
    generator = torch.Generator().manual_seed(3)
    student_NV = torch.randn(5, 20, generator=generator, dtype=torch.float64) * 1e3
    teacher_NV = torch.randn(5, 20, generator=generator, dtype=torch.float64) * 1e3
    teacher_NV[:, 7:9] = -math.inf
    identity = Head(torch.eye(20, dtype=torch.float64))
    given = student_NV, identity, torch.arange(5), HiddenTargets(teacher_NV, lambda hidden: hidden)
    before = teacher_NV.clone()
    reference = run(Objective(divergence, engine="reference"), *given)
    for one, other in zip(run(Objective(divergence), *given), reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.equal(teacher_NV, before)  # an identity head returns the teacher's own tensor


def test_equal_models_have_a_kd_and_a_gradient_of_exactly_zero() -> None:
    hidden_ND, head, labels_N, _ = made(11, 300, torch.float32)
    targets = HiddenTargets(hidden_ND, head)
    loss, _, kd, *gradients = run(Objective(kd_weight=1.0, ce_weight=0.0), hidden_ND, head, labels_N, targets)
    assert float(loss) == float(kd) == 0 and all(float(grad.abs().max()) == 0 for grad in gradients)


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_in_float32_it_is_as_close_to_float64_as_autograd(spread: float) -> None:
    exact = run(Objective(engine="reference"), *made(40, 1000, spread=spread))
    given = made(40, 1000, torch.float32, spread=spread)
    fused, reference = run(Objective(), *given), run(Objective(engine="reference"), *given)
    for truth, one, other in zip(exact, fused, reference, strict=True):
        far, further = ((x.double() - truth).abs().max() for x in (one, other))
        assert far <= 2 * further + 1e-6 * truth.abs().max(), (float(far), float(further))


def test_everything_between_the_products_of_a_chunk_compiles_to_one_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on CUDA, traced and not compiled: no break, no graph for each length of a last chunk, same bits."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(Objective._fused, backend="aot_eager", fullgraph=True)
    seen: list[torch.dtype] = []

    def noted(*given: object) -> object:
        values, grad_CV = compiled(*given)
        seen.append(grad_CV.dtype)
        return values, grad_CV

    monkeypatch.setattr(module, "is_compiling_faster", lambda device: True)
    monkeypatch.setattr(module, "compiled_fused", lambda: noted)
    objective = Objective(chunk=8, matmul_dtype=torch.bfloat16)
    for N in (15, 14, 13, 12, 11):
        given = made(N, 123, torch.float32, scale=1.1)
        compiled_run, plain = run(replace(objective, compiled=True), *given), run(objective, *given)
        assert all(torch.equal(one, other) for one, other in zip(compiled_run, plain, strict=True))
    assert seen == [torch.bfloat16] * 10
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("matmul", [None, torch.bfloat16])
def test_rows_of_a_padded_head_s_logits_begin_at_whole_16_bytes(
    matmul: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_ND, head, labels_N, targets = made(9, 200, torch.float32)
    labels_N = labels_N % 123
    wide = HiddenTargets(targets.hidden_NE, replace(targets.head, known=123))
    narrow = HiddenTargets(targets.hidden_NE, Head(targets.head.weight_VD[:123]))
    objective, strides = Objective(chunk=4, matmul_dtype=matmul), set()
    fused = Objective._fused

    def noted(self: Objective, product_CV: Tensor, *given: object) -> object:
        values, grad_CV = fused(self, product_CV, *given)  # type: ignore[arg-type]
        strides.update([product_CV.stride(0), grad_CV.stride(0), given[3].head(given[3].hidden_NE).stride(0)])  # type: ignore[attr-defined]
        return values, grad_CV

    monkeypatch.setattr(Objective, "_fused", noted)
    padded = run(objective, hidden_ND, replace(head, known=123), labels_N, wide)
    assert strides == {128}
    unpadded = run(objective, hidden_ND, Head(head.weight_VD[:123]), labels_N, narrow)
    assert not padded[-1][123:].any()
    for one, other in zip(padded, unpadded, strict=True):
        torch.testing.assert_close(one[:123] if one.ndim == 2 and len(one) == 200 else one, other)


def test_a_user_s_own_divergence_is_differentiated_by_autograd() -> None:
    def own(student_logp_NS: Tensor, teacher_logp_NS: Tensor) -> Tensor:
        return (student_logp_NS.exp() - teacher_logp_NS.exp()).square().sum(-1)

    given = made(7, 123)
    assert not is_supported(own, given[-1])
    for one, other in zip(
        run(Objective(own), *given), run(Objective(own, engine="reference"), *given), strict=True
    ):
        assert torch.equal(one, other)


def test_logits_that_are_not_finite_are_a_fault() -> None:
    hidden_ND, head, labels_N, targets = made(7, 123)
    hidden_ND[2, 1] = math.nan
    with pytest.raises(Fault, match="is nan"):
        Objective()(hidden_ND, head, labels_N, targets)


def test_a_recipe_chooses_the_engine(
    tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = module.with_gradient
    monkeypatch.setattr(module, "with_gradient", lambda *given: calls.append(1) or real(*given))
    fused = distill(tiny_recipe(), out=tmp_path / "fused")
    assert calls
    calls.clear()
    reference = distill(tiny_recipe(), overrides=["objective.engine=reference"], out=tmp_path / "reference")
    assert not calls
    first, second = fused.receipt()["heldout_last"], reference.receipt()["heldout_last"]
    assert first == pytest.approx(second, rel=1e-4)
