"""The balancing loss of a mixture of experts is Transformers', and its parts add up to that of the whole step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from potstill.losses.balance import balance, expert_counts, extreme_shares

M, X, LAYERS = 60, 5, 3


def some_routers(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(M, X, dtype=dtype, generator=generator).mul(2).requires_grad_() for _ in range(LAYERS)
    ]


def some_mask() -> Tensor:
    return torch.rand(M, generator=torch.Generator().manual_seed(4)) < 0.7


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_are_those_of_transformers(top_k: int, masked: bool) -> None:
    """Where all tokens of a step are in one micro-batch."""
    counted_M = some_mask() if masked else torch.ones(M, dtype=torch.bool)
    ours, other = some_routers(), some_routers()
    value = balance(ours, counted_M, expert_counts(ours, counted_M, top_k), top_k)
    expected = load_balancing_loss_func(tuple(other), X, top_k, counted_M.reshape(4, -1) if masked else None)
    # Transformers sums in float32 whatever the logits are.
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    value.backward()
    expected.backward()
    for one, two in zip(ours, other, strict=True):
        assert one.grad is not None and two.grad is not None and two.grad.abs().max() > 1e-4 * (top_k < X)
        assert torch.allclose(one.grad, two.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("sizes", [[60], [1, 59], [20, 20, 20], [7, 30, 23]])
def test_parts_add_up_whatever_the_cut(sizes: list[int]) -> None:
    """Against the definition, written out token by token in Python."""
    top_k, routers, counted_M = 2, some_routers(), some_mask()
    tokens = [(m, layer) for layer in range(LAYERS) for m in range(M) if counted_M[m]]
    assigned, probability = [0.0] * X, [0.0] * X
    for m, layer in tokens:
        p = routers[layer][m].detach().exp()
        p = (p / p.sum()).tolist()
        for expert in sorted(range(X), key=lambda i: -p[i])[:top_k]:
            assigned[expert] += 1 / len(tokens)
        for expert in range(X):
            probability[expert] += p[expert] / len(tokens)
    expected = X * sum(f * q for f, q in zip(assigned, probability, strict=True))

    whole_LX = expert_counts(routers, counted_M, top_k)
    parts = [
        ([logits_MX.detach()[start : start + size] for logits_MX in routers], counted_M[start : start + size])
        for start, size in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True)
    ]
    assert torch.equal(sum(expert_counts(*part, top_k) for part in parts), whole_LX)
    total = sum(balance(*part, whole_LX, top_k).item() for part in parts)
    assert total == pytest.approx(expected, rel=1e-12)
    # The mean of what each part would have alone is another number: it is what the counts of the whole are for.
    if len(sizes) > 1:
        alone = [float(balance(*part, expert_counts(*part, top_k), top_k)) for part in parts]
        weighted = sum(v * float(part[1].sum()) for v, part in zip(alone, parts, strict=True))
        assert abs(weighted / float(counted_M.sum()) - expected) > 1e-4 * expected


def test_shares_are_of_each_layer() -> None:
    """A layer whose every token goes to one expert is seen, though another layer makes up for it."""
    counts_LX = torch.tensor([[6, 2], [0, 8]])
    shares = {name: float(value) for name, value in extreme_shares(counts_LX).items()}
    assert shares == {"share_max": 1.0, "share_min": 0.0}
