"""Cross-entropy and the divergence of one chunk together with their gradient, written out: most of a step's
time beside the models themselves.

With z and y the student's and the teacher's logits divided by T, q and p their softmaxes, z_1 and q_1 the
student's at temperature 1, and l the label,

    ce = logsumexp z_1 - z_1[l]        gradient in z_1    q_1 - e_l
    kd = sum p (log p - log q)         gradient in z      q - p         (times T^2, and 1 / T for the chain)

Forward KL needs one exponential per logit and model. The other divergences go through log-probabilities and
the derivatives of `gradients.py`. On a CPU both take a few positions at a time, so that a block stays in the
cache: PyTorch's log-softmax alone takes as long there as two such exponentials. The gradient overwrites the
logits, so that a chunk needs one buffer and no second pass. `objective.engine: reference` computes the same
by autograd, and tests hold the two to each other. The head is applied in `objective.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from potstill.errors import UserError
from potstill.losses.gradients import ValueAndGradient, is_forward_kl, value_and_gradient_of
from potstill.losses.targets import HiddenTargets, SparseTargets
from potstill.types import Divergence, Targets

Block = Callable[..., tuple[Tensor, Tensor]]
EachOf = Callable[[Block, int], Block]
"""What is called for each of so many blocks of a chunk."""
BLOCK_NUMBERS = 2**19
"""Logits of a block on a CPU, 2 MiB in float32; other devices take a chunk at once."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the terms: loss = ce * CE + kd * T^2 * D."""

    ce: float
    kd: float
    temperature: float


def is_supported(divergence: Divergence, targets: Targets | None) -> bool:
    """Whether the gradient of this divergence on targets of this type is written out here."""
    if isinstance(targets, SparseTargets) and not targets.has_bucket:
        return is_forward_kl(divergence)  # on samples no other divergence is unbiased
    return targets is None or (
        isinstance(targets, HiddenTargets | SparseTargets) and value_and_gradient_of(divergence) is not None
    )


def with_gradient(
    logits_CV: Tensor,
    labels_C: Tensor,
    targets: Targets | None,
    divergence: Divergence,
    weights: Weights,
    each_of: EachOf = lambda block, blocks: block,
) -> tuple[Tensor, Tensor | None]:
    """Values per position, in nats: ce_C, and kd_C with its factor T^2 (None without targets).

    `logits_CV`, in float32 or float64, is overwritten by the gradient of the weighted sum of both.

    Raises:
        UserError: targets of another temperature or of another number of ids.
    """
    C, V = logits_CV.shape
    teacher: Tensor | SparseTargets | None = None
    if isinstance(targets, SparseTargets):
        targets.require_temperature(weights.temperature)
        teacher = targets
    elif isinstance(targets, HiddenTargets):
        teacher = targets.head(targets.hidden_NE).to(logits_CV.dtype)
        require_same_ids(V, teacher.shape[-1])
    has_bucket = isinstance(teacher, SparseTargets) and teacher.has_bucket
    block: Block = _forward_kl_block
    if teacher is not None and (has_bucket or not is_forward_kl(divergence)):
        value_and_gradient = value_and_gradient_of(divergence)
        assert value_and_gradient is not None
        block = partial(_divergence_block, value_and_gradient=value_and_gradient)
    # A compiler would unroll the loop below, with a graph for every C.
    if logits_CV.device.type != "cpu" or torch.compiler.is_compiling():
        ce_C, kd_C = block(logits_CV, labels_C[:, None], teacher, weights)
        return ce_C, None if targets is None else kd_C
    size = max(BLOCK_NUMBERS // V, 1)
    block = each_of(block, -(-C // size))
    ce, kd = [logits_CV.new_zeros(0)], [logits_CV.new_zeros(0)]
    for start in range(0, C, size):
        part = slice(start, min(start + size, C))
        teacher_part = None if teacher is None else teacher[part]
        ce_C, kd_C = block(logits_CV[part], labels_C[part, None], teacher_part, weights)
        ce.append(ce_C)
        kd.append(kd_C)
    return torch.cat(ce), None if targets is None else torch.cat(kd)


def _forward_kl_block(
    logits_CV: Tensor, labels_C1: Tensor, teacher: Tensor | SparseTargets | None, weights: Weights
) -> tuple[Tensor, Tensor]:
    """Forward KL from the logits themselves. `teacher` has logits at temperature 1, or ids at T."""
    shifted_CV = logits_CV - logits_CV.amax(-1, keepdim=True)
    # The label's logit is read before `shifted_CV` is divided by T below, in place.
    label_C1 = shifted_CV.gather(-1, labels_C1)
    q_CV = torch.exp(shifted_CV, out=logits_CV)
    sum_C1 = q_CV.sum(-1, keepdim=True)
    ce_C = kd_C = (sum_C1.log() - label_C1).squeeze(-1)
    T = weights.temperature
    if teacher is None:
        q_CV.mul_(weights.ce / sum_C1)
    elif T == 1:  # one softmax serves both terms
        q_CV.mul_((weights.ce + weights.kd) / sum_C1)
        kd_C = _forward_kl(shifted_CV, sum_C1, teacher, weights.kd, q_CV)
    else:
        tempered_CV = shifted_CV.div_(T)
        softened_CV = tempered_CV.exp()
        softened_C1 = softened_CV.sum(-1, keepdim=True)
        # T^2 of the term times 1 / T of the chain rule: T.
        q_CV.mul_(weights.ce / sum_C1).add_(softened_CV.mul_(T * weights.kd / softened_C1))
        teacher = teacher if isinstance(teacher, SparseTargets) else teacher / T
        kd_C = T**2 * _forward_kl(tempered_CV, softened_C1, teacher, T * weights.kd, q_CV)
    _subtract_at_labels(q_CV, labels_C1, weights.ce)
    return ce_C, kd_C


def _divergence_block(
    logits_CV: Tensor,
    labels_C1: Tensor,
    teacher: Tensor | SparseTargets,
    weights: Weights,
    *,
    value_and_gradient: ValueAndGradient,
) -> tuple[Tensor, Tensor]:
    """Any divergence with a derivative in `gradients.py`."""
    T = weights.temperature
    logq_CV = logits_CV.log_softmax(-1)
    ce_C = -logq_CV.gather(-1, labels_C1).squeeze(-1)
    # From the logits, as the teacher's below: equal models must get equal bits, and so a divergence of 0.
    tempered_CV = logq_CV if T == 1 else (logits_CV / T).log_softmax(-1)
    # Only now may the logits be overwritten: both log-softmaxes have been taken of them.
    q_CV = torch.exp(logq_CV, out=logits_CV)
    softened_CV = q_CV if T == 1 else tempered_CV.exp()
    if isinstance(teacher, SparseTargets):
        student_CS, teacher_CS = teacher.on_support(tempered_CV, T)
        kd_C, grad_logq_CS = value_and_gradient(student_CS, teacher_CS)
        grad_logq_CV = teacher.over_all_ids(grad_logq_CS, student_CS, softened_CV)
    else:
        kd_C, grad_logq_CV = value_and_gradient(tempered_CV, (teacher / T).log_softmax(-1))
    # Through the softmax, before q_CV, which `softened_CV` may be, takes the weight of the cross-entropy.
    grad_logq_CV.sub_(softened_CV * grad_logq_CV.sum(-1, keepdim=True)).mul_(T * weights.kd)
    q_CV.mul_(weights.ce).add_(grad_logq_CV)
    _subtract_at_labels(q_CV, labels_C1, weights.ce)
    return ce_C, T**2 * kd_C


def _subtract_at_labels(gradient_CV: Tensor, labels_C1: Tensor, weight: float) -> None:
    """gradient_CV -= weight * e_l. Compiled, a comparison joins the kernel around it; a scatter would not."""
    if torch.compiler.is_compiling():
        ids_V = torch.arange(gradient_CV.shape[-1], device=gradient_CV.device)
        gradient_CV.sub_(torch.where(ids_V == labels_C1, weight, 0.0))
    else:
        gradient_CV.scatter_add_(-1, labels_C1, torch.full_like(labels_C1, -weight, dtype=gradient_CV.dtype))


def _forward_kl(
    student_CV: Tensor, sum_C1: Tensor, teacher: Tensor | SparseTargets, weight: float, gradient_CV: Tensor
) -> Tensor:
    """KL per position, kl_C; subtracts `weight` times the teacher's probabilities from gradient_CV.

    Args:
        student_CV: logits, shifted so that the largest of each row is 0.
        sum_C1: the sum of their exponentials.
        teacher: logits, or probabilities on few ids, at the same temperature.
    """
    if isinstance(teacher, SparseTargets):
        ids_CK, p_CK = teacher.ids_NK.clamp_min(0), teacher.logp_NK.exp().to(student_CV.dtype)
        student_CK = (student_CV.gather(-1, ids_CK) - sum_C1.log()).masked_fill(p_CK == 0, 0.0)
        gradient_CV.scatter_add_(-1, ids_CK, p_CK * -weight)
        cross_C: Tensor = -(p_CK * student_CK).sum(-1)
        return cross_C - teacher.entropy()
    # Out of place: with a head that is the identity these are the teacher's own numbers.
    shifted_CV = teacher - teacher.amax(-1, keepdim=True)
    p_CV = shifted_CV.exp()
    total_C1 = p_CV.sum(-1, keepdim=True)
    # An id that is impossible for the teacher adds 0, whatever the student's logit, and not 0 * inf.
    apart_CV = shifted_CV.sub_(student_CV).masked_fill_(p_CV == 0, 0.0)
    mean_C1 = torch.linalg.vecdot(p_CV, apart_CV).unsqueeze(-1) / total_C1
    # Last, as it overwrites p_CV.
    gradient_CV.sub_(p_CV.mul_(weight / total_C1))
    kl_C1: Tensor = mean_C1 - total_C1.log() + sum_C1.log()
    return kl_C1.squeeze(-1)


def require_same_ids(student: int, teacher: int) -> None:
    """UserError where the two sides have different numbers of ids."""
    if student != teacher:
        raise UserError(
            f"objective: the student has {student} ids and the teacher {teacher}. Both need one vocabulary."
        )
