"""Whether teacher and student are the same model under other names, file formats or in half precision.

Weights are compared tensor by tensor, up to rounding, not by hash. A copy that this cannot recognise (layers
under other names, say) has a KL that rounding alone could make, see `rounding_kl`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.models.causal_lm import CausalLM
from potstill.models.quantization import parts_of

BF16 = 2.0**-8
"""Largest relative error of rounding to bfloat16, which keeps 8 bits."""
F16 = 2.0**-11
"""Of rounding to float16, which keeps 11 bits."""
F16_SMALLEST = 2.0**-25
"""Its largest absolute error near 0: half of the smallest subnormal."""
AT_ONCE = 2**22
"""Elements compared at once: a whole embedding would need several temporary copies of itself."""
SAME = 1e-6
"""Nats: outputs closer than this are equal whatever the precision."""

ADVICE_IDENTICAL = (
    "Teacher and student are the same model: the KD term is 0 and nothing would be learned from it."
    " Where that is meant, write allow_identical: true"
)


def same_weights(teacher: CausalLM, student: CausalLM) -> bool:
    """Whether all weights are equal up to one rounding to bfloat16 and one to float16.

    Comparing both after rounding to bfloat16 would not do: a weight that was rounded to float16 before is rounded
    twice, and one in a few thousand ends up at the neighbouring number. A tied head is compared as the copy of
    the embedding that it is. A quantized teacher is never the same.
    """
    teacher_weights = dict(teacher.weights(remove_duplicate=False))
    compared = 0
    for name, tensor in student.weights(remove_duplicate=False):
        other = teacher_weights.get(name)
        if other is None or other.shape != tensor.shape or len(parts_of(other)) > 1:
            return False  # several parts: quantized values and their scales
        if not _equal_up_to_rounding(other, tensor):
            return False
        compared += 1
    return compared == len(teacher_weights)


@torch.no_grad()
def _equal_up_to_rounding(one: Tensor, other: Tensor) -> bool:
    flat, other_flat = one.flatten(), other.flatten()
    for start in range(0, len(flat), AT_ONCE):
        a = flat[start : start + AT_ONCE].to(other.device, torch.float32)
        b = other_flat[start : start + AT_ONCE].float()
        allowed = (BF16 + F16) * torch.maximum(a.abs(), b.abs()) + F16_SMALLEST
        if not bool(((a - b).abs() <= allowed).all()):
            return False
    return True


def rounding_kl(teacher_logp_NV: Tensor) -> float:
    """The KL, in nats per position, between a model and its copy rounded to bfloat16: an estimate.

    Independent relative errors u of the logits z cost, to second order, u^2 / 2 times the variance of z under
    the teacher's own distribution p (z is log p up to a constant); a logit is a sum of products of two rounded
    factors, hence u^2. For SmolLM2-135M on Python source the estimate is 8.5e-5; measured were 7.5e-5 with
    weights rounded to bfloat16 and 4.6e-6 with float16.
    """
    logp_NV = teacher_logp_NV.double()
    p_NV = logp_NV.exp()
    variance_N = (p_NV * logp_NV**2).sum(-1) - (p_NV * logp_NV).sum(-1) ** 2
    return max(SAME, float(BF16**2 * variance_N.mean()))
