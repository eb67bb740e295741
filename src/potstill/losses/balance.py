"""The load-balancing loss of a mixture of experts (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6), of a
whole step.

    f_i  = assignments of expert i / tokens          P_i = mean over tokens of the router's probability of expert i
    loss = X * sum over experts of f_i * P_i         top_k where all experts are used alike

Both are means over the tokens of all layers, as in Transformers' `load_balancing_loss_func`. The loss is a product
of two means, and no sum over tokens: of the micro-batches of a step one by one it would be another number for each
cut. Only P has a gradient, though, and P is a sum over tokens. So `balance` takes the assignments of the whole step,
which must be counted before (`expert_counts`), and gives the part of some of its tokens; parts add up to the loss.

M = B * T tokens of a micro-batch, L layers with experts, X experts of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def expert_counts(routers: Sequence[Tensor], counted_M: Tensor, top_k: int) -> Tensor:
    """counts_LX, int64: how many of the counted tokens each expert is chosen for.

    Args:
        routers: logits_MX of each layer.
        counted_M: bool.
        top_k: experts that a token is sent to.
    """
    weight_A = counted_M.long().repeat_interleave(top_k)
    counts = []
    for logits_MX in routers:
        # Of the probabilities, as in Transformers: softmax may make equal what were different logits.
        chosen_A = _probabilities(logits_MX.detach()).topk(top_k, dim=-1).indices.flatten()
        counts.append(weight_A.new_zeros(logits_MX.shape[-1]).scatter_add_(0, chosen_A, weight_A))
    return torch.stack(counts)


def balance(routers: Sequence[Tensor], counted_M: Tensor, counts_LX: Tensor, top_k: int) -> Tensor:
    """These tokens' part of the loss, with a gradient through P; the whole of it where `counts_LX` is of these
    tokens.

    Args:
        routers: logits_MX of each layer.
        counted_M: bool.
        counts_LX: of all tokens of the step, from `expert_counts`.
        top_k: experts that a token is sent to.
    """
    num_experts = counts_LX.shape[1]
    probability_X = torch.stack(
        [(_probabilities(logits_MX) * counted_M[:, None]).sum(0) for logits_MX in routers]
    ).sum(0)
    assigned = counts_LX.sum().to(probability_X.dtype)  # top_k for each token in each layer
    f_X = counts_LX.sum(0) * (top_k / assigned)
    return num_experts * (f_X * probability_X).sum() * (top_k / assigned)


def extreme_shares(counts_LX: Tensor) -> dict[str, Tensor]:
    """The largest and smallest share of a layer's assignments that one expert has, over all layers. 1/X each where
    experts are used alike, and a smallest share of 0 where one is never used.
    """
    shares_LX = counts_LX / counts_LX.sum(-1, keepdim=True)
    return {"share_max": shares_LX.max(), "share_min": shares_LX.min()}


def _probabilities(logits_MX: Tensor) -> Tensor:
    return logits_MX.to(torch.promote_types(logits_MX.dtype, torch.float32)).softmax(-1)
