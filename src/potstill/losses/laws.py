"""The laws of a divergence, tried on random distributions before a plug-in's is used.

A sum or a mean in place of a value per position broadcasts without an error, and scales the loss by the number of
positions; a wrong sign drives the student away. Neither shows in a loss curve that happens to fall.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from potstill.errors import UserError, one_line
from potstill.types import Divergence

POSITIONS, IDS = 7, 23
ROUNDING = 1e-9
"""In float64, of values of about 1 nat."""


def is_plugin(divergence: Divergence) -> bool:
    """Whether its function comes from outside of this package."""
    function = divergence.func if isinstance(divergence, partial) else divergence
    return not str(getattr(function, "__module__", "")).startswith("potstill.")


def broken_laws(divergence: Divergence) -> list[str]:
    """What is wrong with the values and gradients of a divergence; empty where every law holds.

    Raises:
        UserError: it fails, or does not return one value per position that depends on that position alone: no loss
            can be made of it.
    """
    generator = torch.Generator().manual_seed(0)
    student_NS, teacher_NS = (
        (3 * torch.randn(POSITIONS, IDS, generator=generator, dtype=torch.float64)).log_softmax(-1)
        for _ in range(2)
    )
    nats_N = _values(divergence, student_NS, teacher_NS)
    each_N = torch.cat(
        [_values(divergence, student_NS[i : i + 1], teacher_NS[i : i + 1]) for i in range(POSITIONS)]
    )
    if not torch.allclose(nats_N, each_N, rtol=1e-6, atol=ROUNDING, equal_nan=True):
        raise UserError(
            f"a position's value depends on the other positions: {float(nats_N[0].detach()):.4g} nats among"
            f" {POSITIONS}, {float(each_N[0].detach()):.4g} alone. Return one value per position, without a sum or mean"
            " over them."
        )
    broken = []
    if not bool(nats_N.isfinite().all()):
        broken.append(
            f"its value is {float(nats_N[~nats_N.isfinite()][0])} where all probabilities are above 0"
        )
    elif float(nats_N.min()) < -ROUNDING:
        broken.append(f"it is negative: {float(nats_N.min()):.4g} nats")
    leaf_NS = student_NS.detach().requires_grad_()
    values_N = _values(divergence, leaf_NS.log_softmax(-1), teacher_NS)
    if not values_N.requires_grad:
        broken.append("it has no gradient with respect to the student")
    elif not bool(torch.autograd.grad(values_N.sum(), leaf_NS)[0].isfinite().all()):
        broken.append("its gradient is not finite")
    if (equal := float(_values(divergence, teacher_NS, teacher_NS).abs().max())) > ROUNDING:
        broken.append(f"where student and teacher are equal it is {equal:.4g} nats, not 0")
    return broken


def _values(divergence: Divergence, student_NS: Tensor, teacher_NS: Tensor) -> Tensor:
    try:
        nats_N = divergence(student_NS, teacher_NS)
    except UserError:
        raise
    except Exception as error:  # whatever the code of a user raises
        raise UserError(f"it fails on log-probabilities [{POSITIONS}, {IDS}]: {one_line(error)}") from error
    if not isinstance(nats_N, Tensor) or nats_N.shape != student_NS.shape[:1]:
        shape = list(nats_N.shape) if isinstance(nats_N, Tensor) else type(nats_N).__name__
        raise UserError(
            f"it returns {shape} for {len(student_NS)} positions, not [{len(student_NS)}]. Return one value per"
            " position, in nats, without a sum or mean over them."
        )
    return nats_N
