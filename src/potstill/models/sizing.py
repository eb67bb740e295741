"""Layers and MLP channels for a size: which of them the teacher misses least for the weights that they are.

From the whole teacher on, one move after the other: the layer whose own absence costs least goes, or a notch of the
channels of every MLP, those that add least. Each move is measured with what is out already, as KL(whole || without)
per weight that it saves, and the cheaper one is made, until the student is small enough. Channels that fit into what
is left are given back.

Minitron (Muralidharan et al. 2024, arXiv 2407.14679) tries the shapes of a size that somebody lists, and trains each.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import UserError
from potstill.io.terminal import short
from potstill.models.causal_lm import CausalLM
from potstill.models.layer_harm import Harm, Without, measured
from potstill.models.load import num_weights
from potstill.models.pruning import (
    channels_to_keep,
    cut_config,
    ffn_importance,
    ffn_width_of,
    matrix_out,
    mlp_of,
    stack_of,
)
from potstill.types import Batch

NOTCHES = 8
"""In which the channels of an MLP go."""
BLOCK = 32
"""Channels are a multiple of it, where the teacher's are: rows of a quantised file are whole blocks."""


@dataclass(frozen=True)
class Move:
    layer: int | None
    """The teacher's layer that goes; None: channels do."""
    ffn_width: int
    weights: int
    """Of the student after it."""
    kl: float
    """From the teacher to the student after it, nats per position."""


def choose_size(
    model: CausalLM,
    batches: Sequence[Batch],
    ranked_on: Sequence[Batch],
    most: int,
    note: Callable[[str], None],
) -> Harm:
    """Choose layers and channels of a student with at most `most` weights.

    Args:
        batches: calibration rows, of the training split.
        ranked_on: those by which channels are ranked.
        note: called with one line for each move.

    Raises:
        UserError: no student is so small, or layers cannot be measured.
    """
    stack, total = stack_of(model)
    without = Without(model, stack.removesuffix("."), batches)
    shape = _Shape(model, total)
    if (why_not := shape.width_is_known(stack)) is not None:
        note(f"student: only layers are left out: {why_not}")
    else:
        importance = _importance(model, stack, total, ranked_on)
        without.narrow = partial(_narrowed, model, importance)
        order = [
            of.sort(descending=True, stable=True).indices.tolist() for _, of in sorted(importance.items())
        ]
        without.ranking = hashlib.sha256(str(order).encode()).hexdigest()[:16]
    return measured(without, partial(_choose, shape=shape, most=most, note=note), note)


class _Shape:
    """How many weights a student has."""

    def __init__(self, model: CausalLM, total: int) -> None:
        self.config, self.total, self.width = model.hf.config, total, 0
        self.state = model.state()

    def width_is_known(self, stack: str) -> str | None:
        """Why channels cannot be cut; None where they can."""
        try:
            for number in range(self.total):
                mlp_of(self.state, f"{stack}{number}.mlp")
            self.width = ffn_width_of(self.config)
        except UserError as error:
            return str(error).partition(". Leave ffn_width out")[0].removeprefix("student.ffn_width: ")
        return None

    @property
    def notch(self) -> int:
        """Channels that go together; 0 where none can."""
        return self.width // NOTCHES // self.block * self.block or self.block if self.width else 0

    @property
    def block(self) -> int:
        return BLOCK if self.width % BLOCK == 0 else 1

    def weights(self, out: Sequence[int], width: int) -> int:
        keep = sorted({*range(self.total)} - {*out})
        return num_weights(cut_config(self.config, keep, self.total, width or None))


def _choose(
    without: Without, alone_L: list[float], *, shape: _Shape, most: int, note: Callable[[str], None]
) -> Harm:
    out: list[int] = []
    width, kl, moves = shape.width, 0.0, list[Move]()
    weights = shape.weights(out, width)
    while weights > most:
        candidates: list[tuple[int | None, list[int], int]] = []
        if (layer := _spared(shape, alone_L, out, width)) is not None:
            candidates.append((layer, [*out, layer], width))
        if shape.notch and width > shape.notch:
            candidates.append((None, out, width - shape.notch))
        if not candidates:
            of_width = f" of {width} channels" if width else ""
            raise UserError(
                f"student.weights: the smallest cut of this teacher has {short(weights)} weights, one layer{of_width}"
                f" beside its embeddings; {short(most)} were asked for. Give more."
            )
        tried = [
            Move(layer, its_width, shape.weights(its_out, its_width), _kl(without, its_out, its_width, shape))
            for layer, its_out, its_width in candidates
        ]
        best = min(tried, key=lambda move: (move.kl - kl) / (weights - move.weights))
        out = out if best.layer is None else [*out, best.layer]
        width, weights, kl = best.ffn_width, best.weights, best.kl
        moves.append(best)
        what = f"{width} channels of each MLP" if best.layer is None else f"without layer {best.layer}"
        note(f"student: {what}: {short(weights)} weights, KL {kl:.3f}")
    if moves and width < shape.width:
        wider = _widest(shape, out, width, most)
        if wider != width:
            width, kl = wider, _kl(without, out, wider, shape)
            moves.append(Move(None, width, shape.weights(out, width), kl))
    its_width = width if width < shape.width else None
    return Harm("weights", without.positions, alone_L, out, kl, its_width, [asdict(move) for move in moves])


def _spared(shape: _Shape, alone_L: Sequence[float], out: Sequence[int], width: int) -> int | None:
    """Of the layers that are left, the one whose own absence costs least and that this kind of config can lack."""
    left: list[int] = sorted({*range(shape.total)} - {*out}, key=lambda number: (alone_L[number], number))
    for layer in left if len(left) > 1 else []:
        with contextlib.suppress(UserError):
            shape.weights([*out, layer], width)
            return layer
    return None


def _kl(without: Without, out: Sequence[int], width: int, shape: _Shape) -> float:
    return without.kl(out, None if width == shape.width else width)


def _widest(shape: _Shape, out: Sequence[int], width: int, most: int) -> int:
    """The most channels that fit into what a last move has saved too much."""
    weights = shape.weights(out, width)
    per_channel = shape.weights(out, width + 1) - weights
    spare = (most - weights) // per_channel // shape.block * shape.block
    return int(min(width + spare, shape.width))


def _importance(model: CausalLM, stack: str, total: int, ranked_on: Sequence[Batch]) -> dict[str, Tensor]:
    """importance_C of each layer's MLP, by the name of the matrix out of it."""
    state = model.state()
    outs = {matrix_out(state, f"{stack}{number}.mlp") for number in range(total)}
    return ffn_importance(model, outs, ranked_on)


@contextlib.contextmanager
def _narrowed(model: CausalLM, importance: dict[str, Tensor], width: int) -> Iterator[None]:
    """Inside, every MLP has its `width` most important channels; a layer that is out has none."""

    def hook(mask_C: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * mask_C.to(args[0].dtype), *args[1:])

    hooks = []
    for name, importance_C in importance.items():
        mask_C = torch.zeros_like(importance_C)
        mask_C[channels_to_keep(importance_C, width)] = 1
        hooks.append(model.hf.get_submodule(name).register_forward_pre_hook(partial(hook, mask_C)))
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
