"""Divergences with their derivative by the student's log-probabilities, written out.

    g_i = d D / d log q_i, each log q_i taken as free        gradient in the logits z:    g - q sum(g)

The second step is the softmax's and the same for all, so that a divergence is one line of calculus here. One
without an entry, as a user's own, is differentiated by autograd. An id with p = 0 or q = 0 adds 0, as in
`divergences.py`. Options have the names and defaults of the formulas there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from potstill.losses.divergences import forward_kl, jsd, reverse_kl, skew_kl, tvd
from potstill.types import Divergence

ValueAndGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""student_logp_NS and teacher_logp_NS to nats_N and g_NS, a new tensor that the caller may overwrite."""


def value_and_gradient_of(divergence: Divergence) -> ValueAndGradient | None:
    """The written-out form of a divergence with its options; None where there is none."""
    plain = getattr(divergence, "func", divergence)
    options = getattr(divergence, "keywords", {})
    if plain is skew_kl and options.get("alpha") == 0:  # the formula takes forward KL there, exactly
        return _forward_kl
    written = _WRITTEN_OUT.get(plain)
    return None if written is None else partial(written, **options)


def is_forward_kl(divergence: Divergence) -> bool:
    """Also where it is wrapped in `functools.partial`, as a recipe's divergence is."""
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
    # dD / dq = (1 - beta) log(q / m): what m adds, -(beta p + (1 - beta) q) / m, cancels the 1 of q log q.
    student_terms_NS = _times_log(q_NS, student_logp_NS - log_m_NS).mul_(1 - beta)
    teacher_terms_NS = _times_log(p_NS, teacher_logp_NS - log_m_NS)
    return beta * teacher_terms_NS.sum(-1) + student_terms_NS.sum(-1), student_terms_NS


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
    """weight * log, and 0 where the weight is 0, whatever the logarithm. Overwrites `log_NS`."""
    return log_NS.masked_fill_(weight_NS == 0, 0.0).mul_(weight_NS)


_WRITTEN_OUT: dict[Divergence, Callable[..., tuple[Tensor, Tensor]]] = {
    forward_kl: _forward_kl,
    reverse_kl: _reverse_kl,
    jsd: _jsd,
    skew_kl: _skew_kl,
    tvd: _tvd,
}
