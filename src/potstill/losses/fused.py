"""Cross-entropy and the divergence of a chunk with their gradient: what a step spends its time on.

With z and y the student's and the teacher's logits over T, q and p their softmaxes and l the label,

    ce = logsumexp z_1 - z_1[l]        gradient in z_1    q_1 - e_l
    kd = sum p (log p - log q)         gradient in z      q - p         (times T^2, and 1 / T for the chain)

Forward KL takes one exponential a logit and model; the others go through log-probabilities and the slopes of
`slopes.py`. Either way a few positions at a time, so that they stay in the cache, and the gradient takes the
place of the logits: no second pass over them, and nothing but a block beside. PyTorch's own log-softmax takes
as long as two such exponentials on a CPU. `objective.engine: reference` computes the same by autograd, and
tests hold both to each other. What a head does after its product is `objective.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from potstill.errors import UserError
from potstill.losses.gradients import Slope, is_forward_kl, slope_of
from potstill.losses.targets import HiddenTargets, SparseTargets
from potstill.types import Divergence, Targets

Block = Callable[..., tuple[Tensor, Tensor]]
IN_CACHE = 2**19
"""Numbers of a block, on a CPU; other devices take a chunk at once."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the loss: ce * CE + kd * T^2 * KL."""

    ce: float
    kd: float
    temperature: float


def is_known(divergence: Divergence, targets: Targets | None) -> bool:
    """Whether the divergence from such targets is written out here."""
    if isinstance(targets, SparseTargets) and not targets.has_bucket:
        return is_forward_kl(divergence)  # no other is unbiased
    return targets is None or (
        isinstance(targets, HiddenTargets | SparseTargets) and slope_of(divergence) is not None
    )


def with_gradient(
    logits_CV: Tensor,
    labels_C: Tensor,
    targets: Targets | None,
    divergence: Divergence,
    weights: Weights,
) -> tuple[Tensor, Tensor | None]:
    """Values per position, ce_C and kd_C (None without targets); the gradient of the loss with respect to the
    logits is left in `logits_CV`.
    """
    C, V = logits_CV.shape
    taught: Tensor | SparseTargets | None = None
    if isinstance(targets, SparseTargets):
        targets.require_temperature(weights.temperature)
        taught = targets
    elif isinstance(targets, HiddenTargets):
        taught = targets.head(targets.hidden_NE).to(logits_CV.dtype)
        require_same_ids(V, taught.shape[-1])
    has_bucket = isinstance(taught, SparseTargets) and taught.has_bucket
    block: Block = _forward_kl_block
    if taught is not None and (has_bucket or not is_forward_kl(divergence)):
        slope = slope_of(divergence)
        assert slope is not None
        block = partial(_slope_block, slope=slope)
    if logits_CV.device.type != "cpu" or torch.compiler.is_compiling():  # it would unroll a loop for each C
        ce_C, kd_C = block(logits_CV, labels_C[:, None], taught, weights)
        return ce_C, None if targets is None else kd_C
    size = max(IN_CACHE // V, 1)
    ce, kd = [logits_CV.new_zeros(0)], [logits_CV.new_zeros(0)]
    for start in range(0, C, size):
        part = slice(start, min(start + size, C))
        of_part = None if taught is None else taught[part]
        ce_C, kd_C = block(logits_CV[part], labels_C[part, None], of_part, weights)
        ce.append(ce_C)
        kd.append(kd_C)
    return torch.cat(ce), None if targets is None else torch.cat(kd)


def _forward_kl_block(
    logits_CV: Tensor, labels_C1: Tensor, taught: Tensor | SparseTargets | None, weights: Weights
) -> tuple[Tensor, Tensor]:
    shifted_CV = logits_CV - logits_CV.amax(-1, keepdim=True)
    label_C1 = shifted_CV.gather(-1, labels_C1)
    q_CV = torch.exp(shifted_CV, out=logits_CV)
    sum_C1 = q_CV.sum(-1, keepdim=True)
    ce_C = kd_C = (sum_C1.log() - label_C1).squeeze(-1)
    T = weights.temperature
    if taught is None:
        q_CV.mul_(weights.ce / sum_C1)
    elif T == 1:
        q_CV.mul_((weights.ce + weights.kd) / sum_C1)
        kd_C = _forward_kl(shifted_CV, sum_C1, taught, weights.kd, q_CV)
    else:
        tempered_CV = shifted_CV.div_(T)
        softened_CV = tempered_CV.exp()
        softened_C1 = softened_CV.sum(-1, keepdim=True)
        q_CV.mul_(weights.ce / sum_C1).add_(softened_CV.mul_(T * weights.kd / softened_C1))
        taught = taught if isinstance(taught, SparseTargets) else taught / T
        kd_C = T**2 * _forward_kl(tempered_CV, softened_C1, taught, T * weights.kd, q_CV)
    _take_off(q_CV, labels_C1, weights.ce)
    return ce_C, kd_C


def _slope_block(
    logits_CV: Tensor, labels_C1: Tensor, taught: Tensor | SparseTargets, weights: Weights, *, slope: Slope
) -> tuple[Tensor, Tensor]:
    T = weights.temperature
    logq_CV = logits_CV.log_softmax(-1)
    ce_C = -logq_CV.gather(-1, labels_C1).squeeze(-1)
    # As the teacher's are made: where both are equal, no rounding may tell them apart.
    tempered_CV = logq_CV if T == 1 else (logits_CV / T).log_softmax(-1)
    q_CV = torch.exp(logq_CV, out=logits_CV)
    softened_CV = q_CV if T == 1 else tempered_CV.exp()
    if isinstance(taught, SparseTargets):
        student_CS, teacher_CS = taught.on_support(tempered_CV, T)
        kd_C, slope_CS = slope(student_CS, teacher_CS)
        slope_CV = taught.over_all_ids(slope_CS, student_CS, softened_CV)
    else:
        kd_C, slope_CV = slope(tempered_CV, (taught / T).log_softmax(-1))
    slope_CV.sub_(softened_CV * slope_CV.sum(-1, keepdim=True)).mul_(T * weights.kd)
    q_CV.mul_(weights.ce).add_(slope_CV)
    _take_off(q_CV, labels_C1, weights.ce)
    return ce_C, T**2 * kd_C


def _take_off(gradient_CV: Tensor, labels_C1: Tensor, weight: float) -> None:
    """At the labels. A compiled comparison is part of the kernel around it, a scatter has one of its own."""
    if torch.compiler.is_compiling():
        ids_V = torch.arange(gradient_CV.shape[-1], device=gradient_CV.device)
        gradient_CV.sub_(torch.where(ids_V == labels_C1, weight, 0.0))
    else:
        gradient_CV.scatter_add_(-1, labels_C1, torch.full_like(labels_C1, -weight, dtype=gradient_CV.dtype))


def _forward_kl(
    student_CV: Tensor, sum_C1: Tensor, taught: Tensor | SparseTargets, weight: float, gradient_CV: Tensor
) -> Tensor:
    """KL per position from logits of which the student's are shifted to a largest of 0 and `sum_C1` their
    exponentials' sum. Takes `weight` times the teacher's probabilities off the gradient.
    """
    if isinstance(taught, SparseTargets):
        ids_CK, p_CK = taught.ids_NK.clamp_min(0), taught.logp_NK.exp().to(student_CV.dtype)
        student_CK = (student_CV.gather(-1, ids_CK) - sum_C1.log()).masked_fill(p_CK == 0, 0.0)
        gradient_CV.scatter_add_(-1, ids_CK, p_CK * -weight)
        cross_C: Tensor = -(p_CK * student_CK).sum(-1)
        return cross_C - taught.entropy()
    taught_CV = taught - taught.amax(-1, keepdim=True)
    p_CV = taught_CV.exp()
    total_C1 = p_CV.sum(-1, keepdim=True)
    # An id that the teacher rules out adds 0, whatever the student says of it, and not 0 * inf.
    apart_CV = taught_CV.sub_(student_CV).masked_fill_(p_CV == 0, 0.0)
    mean_C1 = torch.linalg.vecdot(p_CV, apart_CV).unsqueeze(-1) / total_C1
    gradient_CV.sub_(p_CV.mul_(weight / total_C1))
    kl_C1: Tensor = mean_C1 - total_C1.log() + sum_C1.log()
    return kl_C1.squeeze(-1)


def require_same_ids(student: int, teacher: int) -> None:
    if student != teacher:
        ids = f"the student has {student} ids and the teacher {teacher}"
        raise UserError(f"objective: {ids}. Both must speak one vocabulary.")
