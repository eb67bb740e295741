"""Cross-entropy and forward KL of a chunk with their gradient, written out: what a step spends its time on.

With z and y the student's and the teacher's logits over T, q and p their softmaxes and l the label,

    ce = logsumexp z_1 - z_1[l]        gradient in z_1    q_1 - e_l
    kd = sum p (log p - log q)         gradient in z      q - p         (times T^2, and 1 / T for the chain)

One exponential a logit and model, a few positions at a time so that they stay in the cache, and the gradient
takes the place of the logits: no second pass over them, and nothing but a block beside. PyTorch's own
log-softmax takes as long as two such exponentials on a CPU. `objective.engine: reference` computes the same
by autograd, and tests hold both to each other. Bias and scale of a head change nothing here; its softcap and
other divergences go the other way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.errors import UserError
from potstill.types import HiddenTargets, Targets

IN_CACHE = 2**19
"""Numbers of a block, on a CPU; other devices take a chunk at once."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the loss: ce * CE + kd * T^2 * KL."""

    ce: float
    kd: float
    temperature: float


def with_gradient(
    logits_CV: Tensor, labels_C: Tensor, targets: Targets | None, weights: Weights
) -> tuple[Tensor, Tensor | None]:
    """Values per position, ce_C and kd_C (None without targets); the gradient of the loss with respect to the
    logits is left in `logits_CV`.
    """
    C, V = logits_CV.shape
    taught_CV = None if targets is None else _logits(targets).to(logits_CV.dtype)
    if taught_CV is not None:
        require_same_ids(V, taught_CV.shape[-1])
    size = max(IN_CACHE // V, 1) if logits_CV.device.type == "cpu" else max(C, 1)
    ce, kd = [], []
    for start in range(0, C, size):
        part = slice(start, min(start + size, C))
        taught = None if taught_CV is None else taught_CV[part]
        ce_C, kd_C = _block(logits_CV[part], labels_C[part, None], taught, weights)
        ce.append(ce_C)
        kd.append(kd_C)
    nothing_C = logits_CV.new_zeros(0)
    return torch.cat([nothing_C, *ce]), None if taught_CV is None else torch.cat([nothing_C, *kd])


def _block(
    logits_CV: Tensor, labels_C1: Tensor, taught_CV: Tensor | None, weights: Weights
) -> tuple[Tensor, Tensor]:
    shifted_CV = logits_CV - logits_CV.amax(-1, keepdim=True)
    label_C1 = shifted_CV.gather(-1, labels_C1)
    q_CV = torch.exp(shifted_CV, out=logits_CV)
    sum_C1 = q_CV.sum(-1, keepdim=True)
    ce_C = (sum_C1.log() - label_C1).squeeze(-1)
    of_label_C1 = torch.full_like(label_C1, -weights.ce)
    T = weights.temperature
    if taught_CV is None:
        q_CV.mul_(weights.ce / sum_C1).scatter_add_(-1, labels_C1, of_label_C1)
        return ce_C, ce_C
    if T == 1:
        kd_C, p_CV, total_C1 = _forward_kl(shifted_CV, sum_C1, taught_CV)
        q_CV.mul_((weights.ce + weights.kd) / sum_C1).sub_(p_CV.mul_(weights.kd / total_C1))
    else:
        tempered_CV = shifted_CV.div_(T)
        softened_CV = tempered_CV.exp()
        softened_C1 = softened_CV.sum(-1, keepdim=True)
        kd_C, p_CV, total_C1 = _forward_kl(tempered_CV, softened_C1, taught_CV / T)
        kd_C = T**2 * kd_C
        q_CV.mul_(weights.ce / sum_C1)
        q_CV.add_(softened_CV.mul_(T * weights.kd / softened_C1)).sub_(p_CV.mul_(T * weights.kd / total_C1))
    q_CV.scatter_add_(-1, labels_C1, of_label_C1)
    return ce_C, kd_C


def _forward_kl(student_CV: Tensor, sum_C1: Tensor, taught_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """kd_C of logits of which the student's are shifted to a largest of 0 and their exponentials summed;
    exp of the teacher's shifted logits, and their sum.
    """
    taught_CV = taught_CV - taught_CV.amax(-1, keepdim=True)
    p_CV = taught_CV.exp()
    total_C1 = p_CV.sum(-1, keepdim=True)
    # An id that the teacher rules out adds 0, whatever the student says of it, and not 0 * inf.
    apart_CV = taught_CV.sub_(student_CV).masked_fill_(p_CV == 0, 0.0)
    mean_C1 = torch.linalg.vecdot(p_CV, apart_CV).unsqueeze(-1) / total_C1
    return (mean_C1 - total_C1.log() + sum_C1.log()).squeeze(-1), p_CV, total_C1


def require_same_ids(student: int, teacher: int) -> None:
    if student != teacher:
        ids = f"the student has {student} ids and the teacher {teacher}"
        raise UserError(f"objective: {ids}. Both must speak one vocabulary.")


def _logits(targets: Targets) -> Tensor:
    assert isinstance(targets, HiddenTargets)
    return targets.head(targets.hidden_NE)
