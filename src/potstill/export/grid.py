"""The numbers that a GGUF file can hold, for a student that is trained to be shipped as one.

A step's forward and backward passes run on the weights as the file would round them, and the optimizer moves the
unrounded ones by the gradient at the rounded: the straight-through estimator (Bengio et al. 2013, arXiv 1308.3432),
without a node in the graph. Which tensor gets which type is the exporter's own choice, and the rounding its
quantiser's, to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from torch.distributed.tensor import DTensor

from potstill.errors import UserError
from potstill.export.gguf_architectures import require_known
from potstill.export.gguf_model import quantised, require_quantiser, tensor_types
from potstill.models.causal_lm import CausalLM

Type = GGMLQuantizationType
OWN = (Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0)
"""Rounded here, by PyTorch; the others by llama.cpp's quantiser."""
BLOCK = 32
AT_ONCE = 2**22
"""Weights that are rounded together: memory, not results."""


@dataclass
class Grid:
    """`types` has those of the parameters that the file rounds, by Transformers' names."""

    types: dict[str, GGMLQuantizationType]
    is_applied: bool = False

    @classmethod
    def of(cls, model: CausalLM, quantize: str) -> Grid:
        """That of the student's file.

        Raises:
            UserError: a model that has no GGUF file, or a type whose quantiser is not installed.
        """
        try:
            require_known(model)
            require_quantiser(model, [quantize])
        except UserError as error:
            raise UserError(f"train.quantize: {quantize}: {error}") from error
        return cls(
            {name: type_ for name, type_ in tensor_types(model, quantize).items() if type_ != Type.F32}
        )

    def without_data(self) -> Grid:
        """One that takes as much memory, and no values: llama.cpp's quantiser reads them, Q8_0 can do without."""
        return Grid({n: t if t in OWN else Type.Q8_0 for n, t in self.types.items()})

    @contextlib.contextmanager
    def applied(self, model: CausalLM) -> Iterator[None]:
        """Inside, the model's weights are rounded, those in shards on each rank; afterwards they are as before.
        Inside another such block it does nothing.
        """
        if self.is_applied:
            yield
            return
        unrounded: list[tuple[Tensor, Tensor]] = []
        self.is_applied = True
        try:
            with torch.no_grad():
                for name, parameter in model.hf.named_parameters():
                    if name in self.types:
                        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
                        unrounded.append((own, own.clone()))
                        round_to(own, self.types[name])
            yield
        finally:
            with torch.no_grad():
                for own, before in unrounded:
                    own.copy_(before)
            self.is_applied = False


def round_to(tensor: Tensor, to: GGMLQuantizationType) -> None:
    """Round each row of a float32 tensor, in place, to numbers of that type."""
    if not tensor.numel():
        return  # a rank's share of a short tensor
    row = tensor.shape[-1]
    for part_NR in torch.split(tensor.view(-1, row), max(AT_ONCE // row, 1)):
        part_NR.copy_(_rounded(part_NR, to))


def _rounded(rows_NR: Tensor, to: GGMLQuantizationType) -> Tensor:
    if to is Type.F16:
        return rows_NR.half().float()
    if to is Type.BF16:
        return rows_NR.bfloat16().float()
    if to is Type.Q8_0:
        return _q8_0(rows_NR.view(-1, BLOCK)).view_as(rows_NR)
    if to is Type.Q4_0:
        return _q4_0(rows_NR.view(-1, BLOCK)).view_as(rows_NR)
    blocks = gguf.quants.dequantize(quantised(to.name, rows_NR, to), to)
    return torch.from_numpy(blocks).to(rows_NR.device).view_as(rows_NR)


def _q8_0(blocks_NB: Tensor) -> Tensor:
    """On the device, the operations of gguf's `Q8_0`, in their order."""
    largest_N1 = blocks_NB.abs().amax(-1, keepdim=True)
    # By a tensor: a GPU multiplies by the reciprocal of a number, which is another scale in the last bit.
    scale_N1 = largest_N1 / torch.full_like(largest_N1, 127.0)
    steps_NB = blocks_NB * _inverse(scale_N1)
    whole_NB = steps_NB.abs().floor()
    rounded_NB = whole_NB + (2 * (steps_NB.abs() - whole_NB)).floor()  # halves away from 0
    return steps_NB.sign() * rounded_NB * scale_N1.half().float()


def _q4_0(blocks_NB: Tensor) -> Tensor:
    """The same of `Q4_0`: the number furthest from 0 is -8 steps."""
    extreme_N1 = blocks_NB.gather(-1, blocks_NB.abs().argmax(-1, keepdim=True))
    scale_N1 = extreme_N1 / -8
    steps_NB = (blocks_NB * _inverse(scale_N1) + 8.5).trunc().clamp(0, 15) - 8
    return steps_NB * scale_N1.half().float()


def _inverse(scale_N1: Tensor) -> Tensor:
    return torch.where(scale_N1 == 0, 0.0, 1 / scale_N1)
