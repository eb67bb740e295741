"""Each divergence with its derivative by the student's log-probabilities, written out.

    slope_i = d D / d log q_i, every log q_i by itself        gradient in z    slope - q sum(slope)

The second is the softmax's part and the same for all, so that a divergence is one line of calculus here. One
that has none is left to autograd, as a user's own is. p and q of 0 add 0, as in `divergences.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from potstill.losses.divergences import forward_kl, jsd, reverse_kl, skew_kl, tvd
from potstill.types import Divergence

Slope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""student_logp_NS and teacher_logp_NS to values nats_N and slope_NS."""


def slope_of(divergence: Divergence) -> Slope | None:
    """What is known of a divergence, with its options; None where nothing is."""
    plain = getattr(divergence, "func", divergence)
    options = getattr(divergence, "keywords", {})
    if plain is skew_kl and options.get("alpha") == 0:
        return _forward_kl
    found = _KNOWN.get(plain)
    return None if found is None else partial(found, **options)


def is_forward_kl(divergence: Divergence) -> bool:
    return getattr(divergence, "func", divergence) is forward_kl


def _forward_kl(student_logp_NS: Tensor, teacher_logp_NS: Tensor) -> tuple[Tensor, Tensor]:
    p_NS = teacher_logp_NS.exp()
    return _times_log(p_NS, teacher_logp_NS - student_logp_NS).sum(-1), -p_NS


def _reverse_kl(student_logp_NS: Tensor, teacher_logp_NS: Tensor) -> tuple[Tensor, Tensor]:
    q_NS = student_logp_NS.exp()
    terms_NS = _times_log(q_NS, student_logp_NS - teacher_logp_NS)
    return terms_NS.sum(-1), terms_NS + q_NS


def _jsd(student_logp_NS: Tensor, teacher_logp_NS: Tensor, *, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    p_NS, q_NS = teacher_logp_NS.exp(), student_logp_NS.exp()
    log_m_NS = (beta * p_NS).add_(q_NS, alpha=1 - beta).log_()
    of_student_NS = _times_log(q_NS, student_logp_NS - log_m_NS).mul_(1 - beta)
    of_teacher_NS = _times_log(p_NS, teacher_logp_NS - log_m_NS)
    return beta * of_teacher_NS.sum(-1) + of_student_NS.sum(-1), of_student_NS


def _skew_kl(
    student_logp_NS: Tensor, teacher_logp_NS: Tensor, *, alpha: float = 0.1
) -> tuple[Tensor, Tensor]:
    p_NS, q_NS = teacher_logp_NS.exp(), student_logp_NS.exp()
    m_NS = (alpha * p_NS).add_(q_NS, alpha=1 - alpha)
    value_N = _times_log(p_NS, teacher_logp_NS - m_NS.log()).sum(-1)
    ratio_NS = (p_NS / m_NS).masked_fill_(p_NS == 0, 0.0)
    return value_N, ratio_NS.mul_(q_NS).mul_(alpha - 1)


def _tvd(student_logp_NS: Tensor, teacher_logp_NS: Tensor) -> tuple[Tensor, Tensor]:
    q_NS = student_logp_NS.exp()
    apart_NS = q_NS - teacher_logp_NS.exp()
    return 0.5 * apart_NS.abs().sum(-1), apart_NS.sign_().mul_(q_NS).mul_(0.5)


def _times_log(weight_NS: Tensor, log_NS: Tensor) -> Tensor:
    """Overwrites `log_NS`."""
    return log_NS.masked_fill_(weight_NS == 0, 0.0).mul_(weight_NS)


_KNOWN: dict[Divergence, Callable[..., tuple[Tensor, Tensor]]] = {
    forward_kl: _forward_kl,
    reverse_kl: _reverse_kl,
    jsd: _jsd,
    skew_kl: _skew_kl,
    tvd: _tvd,
}
