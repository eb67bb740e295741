"""Divergences between the student's and the teacher's next-token distributions: formulas and nothing else.

Each takes log-probabilities `[positions, support]` whose rows sum to one, the student's first, and returns
one value per position in nats, never a mean. An id with probability 0 on both sides, as in the padded end of
a vocabulary, contributes 0 and no gradient. An option out of its range raises `UserError`. Recipes name these
through the registry, without importing torch; `objective.py` calls them and handles chunks, temperature and
weights.

    student, teacher = (torch.randn(5, 100).log_softmax(-1) for _ in range(2))
    nats = forward_kl(student, teacher)                    # shape [5]

In the formulas p is the teacher, q the student, and sums run over the support.
"""

import math
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from potstill.errors import UserError
from potstill.registry import register

if TYPE_CHECKING:
    from torch import Tensor

OpenUnit = Annotated[float, Interval(gt=0, lt=1)]
HalfOpenUnit = Annotated[float, Interval(ge=0, lt=1)]


@register("divergence")
def forward_kl(student_logp_NS: "Tensor", teacher_logp_NS: "Tensor") -> "Tensor":
    """KL(teacher || student) = sum p log(p / q). Hinton et al. 2015 (arXiv 1503.02531).

    Its gradient is that of the cross-entropy with p. Infinite where the student rules out what the teacher
    does not.
    """
    return _kl(teacher_logp_NS, student_logp_NS)


@register("divergence")
def reverse_kl(student_logp_NS: "Tensor", teacher_logp_NS: "Tensor") -> "Tensor":
    """KL(student || teacher) = sum q log(q / p). Gu et al. 2024 (MiniLLM, arXiv 2306.08543).

    Infinite where the teacher rules out what the student does not.
    """
    return _kl(student_logp_NS, teacher_logp_NS)


@register("divergence")
def jsd(student_logp_NS: "Tensor", teacher_logp_NS: "Tensor", *, beta: OpenUnit = 0.5) -> "Tensor":
    """beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta p + (1 - beta) q.

    At most ln 2 for beta = 1/2, and symmetric there only. It tends to 0 at both ends of beta, which are
    refused: to define them as KLs would make it discontinuous. Agarwal et al. 2024 (GKD, arXiv 2306.13649).
    """
    if not 0 < beta < 1:
        raise UserError(
            f"jsd: beta is {beta}, wanted above 0 and below 1. For KLs use forward_kl or reverse_kl."
        )
    mixture_logp_NS = _mix(teacher_logp_NS, student_logp_NS, beta)
    return beta * _kl(teacher_logp_NS, mixture_logp_NS) + (1 - beta) * _kl(student_logp_NS, mixture_logp_NS)


@register("divergence")
def skew_kl(student_logp_NS: "Tensor", teacher_logp_NS: "Tensor", *, alpha: HalfOpenUnit = 0.1) -> "Tensor":
    """KL(teacher || m) with m = alpha p + (1 - alpha) q. Ko et al. 2024 (DistiLLM, arXiv 2402.03898).

    alpha = 0 is forward KL; alpha = 1, which is refused, would be 0 for every student.
    """
    if not 0 <= alpha < 1:
        raise UserError(
            f"skew_kl: alpha is {alpha}, wanted 0 or more and below 1. At 1 it is 0 for every student."
        )
    if alpha == 0:
        return _kl(teacher_logp_NS, student_logp_NS)
    return _kl(teacher_logp_NS, _mix(teacher_logp_NS, student_logp_NS, alpha))


@register("divergence")
def tvd(student_logp_NS: "Tensor", teacher_logp_NS: "Tensor") -> "Tensor":
    """Total variation, 1/2 sum |p - q|, from 0 to 1. Wen et al. 2023 (f-distill, arXiv 2307.15190)."""
    return 0.5 * (teacher_logp_NS.exp() - student_logp_NS.exp()).abs().sum(-1)


def _kl(of_logp_NS: "Tensor", to_logp_NS: "Tensor") -> "Tensor":
    """KL(of || to). Where `of` has probability 0 the term is 0, not 0 * -inf."""
    ratio_NS = (of_logp_NS - to_logp_NS).masked_fill(of_logp_NS.isneginf(), 0.0)
    return (of_logp_NS.exp() * ratio_NS).sum(-1)


def _mix(one_logp_NS: "Tensor", other_logp_NS: "Tensor", weight: float) -> "Tensor":
    """log(weight one + (1 - weight) other)."""
    # logaddexp(-inf, -inf) is -inf, as it should be, but its gradient is NaN: the pair is masked before it.
    nowhere_NS = one_logp_NS.isneginf() & other_logp_NS.isneginf()
    weighted_NS = (one_logp_NS + math.log(weight)).masked_fill(nowhere_NS, 0.0)
    rest_NS = (other_logp_NS + math.log1p(-weight)).masked_fill(nowhere_NS, 0.0)
    return weighted_NS.logaddexp(rest_NS).masked_fill(nowhere_NS, -math.inf)
