"""Whether teacher and student are one model: names, files, formats and half precision do not make two.

Weights are compared tensor for tensor within what rounding can do to them, not by their hashes. What weights
cannot tell (heads that are stored twice, layers under other names) the KL of the first step does.
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
"""And its largest absolute error near 0: half of its smallest number."""
AT_ONCE = 2**22
"""Numbers compared at once: an embedding would take several copies of itself."""
SAME = 1e-6  # nats: below it, two models say the same whatever their precision

ADVICE_IDENTICAL = (
    "Teacher and student are the same model: the KD term is 0 and nothing would be learned from it."
    " Where that is meant, write allow_identical: true"
)


def same_weights(teacher: CausalLM, student: CausalLM) -> bool:
    """Whether each number of the one is the other's but for one rounding to bfloat16 and one to float16.

    Not equality of both rounded to bfloat16: what was rounded to float16 before is rounded twice, and one
    number in a few thousand then falls to the other side. A tied head counts as the copy of the embedding
    that it is.
    """
    theirs = dict(teacher.weights(remove_duplicate=False))
    seen = 0
    for name, tensor in student.weights(remove_duplicate=False):
        other = theirs.get(name)
        if other is None or other.shape != tensor.shape or len(parts_of(other)) > 1:
            return False  # of numbers with scales, too
        if not _is_rounded(other, tensor):
            return False
        seen += 1
    return seen == len(theirs)


@torch.no_grad()
def _is_rounded(one: Tensor, other: Tensor) -> bool:
    flat, other_flat = one.flatten(), other.flatten()
    for start in range(0, len(flat), AT_ONCE):
        a = flat[start : start + AT_ONCE].to(other.device, torch.float32)
        b = other_flat[start : start + AT_ONCE].float()
        allowed = (BF16 + F16) * torch.maximum(a.abs(), b.abs()) + F16_SMALLEST
        if not bool(((a - b).abs() <= allowed).all()):
            return False
    return True


def rounding_kl(teacher_logp_NV: Tensor) -> float:
    """The KL, in nats per position, that rounding to bfloat16 makes of two equal answers.

    Independent relative errors u of the logits z cost, to second order, u^2 / 2 times the variance of z under
    the teacher's own distribution p (z is log p up to a constant); a logit is made of products of two factors
    that are rounded, hence u^2. On SmolLM2-135M and Python source this says 8.5e-5; measured were 7.5e-5 with
    weights rounded to bfloat16 and 4.6e-6 with float16.
    """
    logp_NV = teacher_logp_NV.double()
    p_NV = logp_NV.exp()
    variance_N = (p_NV * logp_NV**2).sum(-1) - (p_NV * logp_NV).sum(-1) ** 2
    return max(SAME, float(BF16**2 * variance_N.mean()))
