"""Layers, MLP channels and KV groups for a size: which of them the teacher misses least for the weights that they are.

From the whole teacher on, one move after the other: the layer whose own absence costs least goes, or a notch of the
channels of every MLP, or a KV group of every attention, those that add least. Each move is measured with what is out
already, as KL(whole || without) per weight that it saves, and the cheapest one is made, until the student is small
enough. Channels that fit into what is left are given back.

Minitron (Muralidharan et al. 2024, arXiv 2407.14679) tries the shapes of a size that somebody lists, and trains each.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from potstill.errors import UserError
from potstill.io.terminal import short
from potstill.models.causal_lm import CausalLM
from potstill.models.heads import attention_of, group_importance, heads_of
from potstill.models.layer_harm import Harm, Without, measured
from potstill.models.load import num_weights
from potstill.models.matrix_inputs import most_important
from potstill.models.pruning import (
    cut_config,
    ffn_importance,
    ffn_width_of,
    matrix_out,
    require_heads,
    stack_of,
)
from potstill.types import Batch

NOTCHES = 8
"""In which the channels of an MLP go."""
BLOCK = 32
"""Channels are a multiple of it, where the teacher's are: rows of a quantised file are whole blocks."""


@dataclass(frozen=True)
class Move:
    kind: Literal["layer", "channels", "heads"]
    layer: int | None
    """The teacher's layer that goes."""
    ffn_width: int
    """Of the student after it; 0 where the MLPs are not known."""
    kv_heads: int
    """The same, of the KV groups of each attention."""
    weights: int
    """Of the student after it."""
    kl: float
    """From the teacher to the student after it, nats per position."""


@dataclass(frozen=True)
class _Size:
    """A student: the teacher's layers that are out, in the order in which they went, and what the others keep."""

    out: tuple[int, ...]
    ffn_width: int
    kv_heads: int


def choose_size(
    model: CausalLM,
    batches: Sequence[Batch],
    ranked_on: Sequence[Batch],
    most: int,
    note: Callable[[str], None],
) -> Harm:
    """Choose layers, channels and KV groups of a student with at most `most` weights.

    Args:
        batches: calibration rows, of the training split.
        ranked_on: those by which channels and KV groups are ranked.
        note: called with one line for each move, and for what this model cannot lose.

    Raises:
        UserError: no student is so small, or layers cannot be measured.
    """
    stack, total = stack_of(model)
    without = Without(model, stack.removesuffix("."), batches)
    shape = _Shape(model, stack, total)
    channels = groups = _Ranked({})
    if (why_not := shape.know_channels()) is not None:
        note(f"student: no MLP loses channels: {why_not}")
    else:
        channels = _Ranked(ffn_importance(model, {*shape.mlps}, ranked_on))
    if (why_not := shape.know_heads()) is not None:
        note(f"student: no attention loses heads: {why_not}")
    else:
        heads = heads_of(model.hf.config)
        groups = _Ranked(group_importance(model, {*shape.attentions}, heads, ranked_on), heads.group_width)
    without.narrow = partial(_narrowed, model, channels, groups)
    without.channels_ranking, without.groups_ranking = channels.sha256(), groups.sha256()
    return measured(without, partial(_choose, shape=shape, most=most, note=note), note)


class _Shape:
    """How many weights a student has."""

    def __init__(self, model: CausalLM, stack: str, total: int) -> None:
        self.config, self.stack, self.total = model.hf.config, stack, total
        self.state = model.state()
        self.ffn_width = self.kv_heads = 0
        self.mlps: list[str] = []
        self.attentions: list[str] = []
        """Names of the matrices out of them."""
        self.fewer: list[int] = []
        """Numbers of KV groups that this kind of config can have, rising; not all of them."""
        self._weights: dict[tuple[Any, ...], int] = {}

    def know_channels(self) -> str | None:
        """Why channels cannot be cut; None where they can."""
        try:
            mlps = [matrix_out(self.state, f"{self.stack}{number}.mlp") for number in range(self.total)]
            self.ffn_width = ffn_width_of(self.config)
        except UserError as error:
            return _reason(error, "ffn_width")
        self.mlps = mlps
        return None

    def know_heads(self) -> str | None:
        """Why KV groups cannot be cut; None where they can."""
        try:
            heads = heads_of(self.config)
            attentions = [
                attention_of(self.state, f"{self.stack}{number}", heads).out for number in range(self.total)
            ]
            if heads.kv_heads == 1:
                return "there is one KV group in each"
            for count in range(1, heads.kv_heads):
                with contextlib.suppress(UserError):
                    cut_config(self.config, range(self.total), self.total, None, count)
                    self.fewer.append(count)
            require_heads(self.config, max(self.fewer, default=heads.kv_heads - 1))
        except UserError as error:
            return _reason(error, "kv_heads")
        self.attentions, self.kv_heads = attentions, heads.kv_heads
        return None

    @property
    def whole(self) -> _Size:
        return _Size((), self.ffn_width, self.kv_heads)

    @property
    def notch(self) -> int:
        """Channels that go together; 0 where none can."""
        return self.ffn_width // NOTCHES // self.block * self.block or self.block if self.ffn_width else 0

    @property
    def block(self) -> int:
        return BLOCK if self.ffn_width % BLOCK == 0 else 1

    def weights(self, size: _Size) -> int:
        key = (frozenset(size.out), *self.kept(size))
        if key not in self._weights:
            keep = sorted({*range(self.total)} - {*size.out})
            self._weights[key] = num_weights(cut_config(self.config, keep, self.total, *self.kept(size)))
        return self._weights[key]

    def kept(self, size: _Size) -> tuple[int | None, int | None]:
        """Channels and KV groups of each layer; None: all."""
        return (
            None if size.ffn_width == self.ffn_width else size.ffn_width,
            None if size.kv_heads == self.kv_heads else size.kv_heads,
        )

    def smaller(self, size: _Size, alone_L: Sequence[float]) -> Iterator[tuple[Move, _Size]]:
        """What a student can lose next; the moves have no KL yet."""
        if (layer := _spared(self, alone_L, size)) is not None:
            yield self.move("layer", replace(size, out=(*size.out, layer)))
        if self.notch and size.ffn_width > self.notch:
            yield self.move("channels", replace(size, ffn_width=size.ffn_width - self.notch))
        if fewer := [count for count in self.fewer if count < size.kv_heads]:
            yield self.move("heads", replace(size, kv_heads=fewer[-1]))

    def move(self, kind: Literal["layer", "channels", "heads"], size: _Size) -> tuple[Move, _Size]:
        """To a student, without its KL."""
        layer = size.out[-1] if kind == "layer" else None
        return Move(kind, layer, size.ffn_width, size.kv_heads, self.weights(size), 0.0), size


def _choose(
    without: Without, alone_L: list[float], *, shape: _Shape, most: int, note: Callable[[str], None]
) -> Harm:
    size, moves = shape.whole, list[Move]()
    kl, weights = 0.0, shape.weights(size)

    def measure(move: Move, to: _Size) -> tuple[Move, _Size]:
        return replace(move, kl=without.kl(to.out, *shape.kept(to))), to

    while weights > most:
        tried = [measure(*candidate) for candidate in shape.smaller(size, alone_L)]
        if not tried:
            raise UserError(
                f"student.weights: the smallest cut of this teacher has {short(weights)} weights, one layer{_of(size)}"
                f" beside its embeddings; {short(most)} were asked for. Give more."
            )
        best, size = min(tried, key=lambda each: (each[0].kl - kl) / (weights - each[0].weights))
        weights, kl = best.weights, best.kl
        moves.append(best)
        what = {
            "layer": f"without layer {best.layer}",
            "channels": f"{size.ffn_width} channels of each MLP",
            "heads": f"{size.kv_heads} KV groups of each attention",
        }[best.kind]
        note(f"student: {what}: {short(weights)} weights, KL {kl:.3f}")
    if moves and size.ffn_width < shape.ffn_width:
        wider = _widest(shape, size, most)
        if wider != size.ffn_width:
            move, size = measure(*shape.move("channels", replace(size, ffn_width=wider)))
            moves.append(move)
            kl = move.kl
    table = [asdict(move) for move in moves]
    return Harm("weights", without.positions, alone_L, [*size.out], kl, *shape.kept(size), table)


def _of(size: _Size) -> str:
    parts = [f"{size.ffn_width} channels"] if size.ffn_width else []
    parts += [f"{size.kv_heads} KV group{'s' if size.kv_heads > 1 else ''}"] if size.kv_heads else []
    return f" of {' and '.join(parts)}" if parts else ""


def _spared(shape: _Shape, alone_L: Sequence[float], size: _Size) -> int | None:
    """Of the layers that are left, the one whose own absence costs least and that this kind of config can lack."""
    left: list[int] = sorted(
        {*range(shape.total)} - {*size.out}, key=lambda number: (alone_L[number], number)
    )
    for layer in left if len(left) > 1 else []:
        with contextlib.suppress(UserError):
            shape.weights(replace(size, out=(*size.out, layer)))
            return layer
    return None


def _widest(shape: _Shape, size: _Size, most: int) -> int:
    """The most channels that fit into what a last move has saved too much."""
    weights = shape.weights(size)
    per_channel = shape.weights(replace(size, ffn_width=size.ffn_width + 1)) - weights
    spare = (most - weights) // per_channel // shape.block * shape.block
    return int(min(size.ffn_width + spare, shape.ffn_width))


def _reason(error: UserError, field: str) -> str:
    return str(error).partition(f" Leave {field} out")[0].removesuffix(".").removeprefix(f"student.{field}: ")


@dataclass(frozen=True)
class _Ranked:
    """What is kept of a part of each layer: the inputs of a matrix, one by one or in runs of `width`."""

    importance: dict[str, Tensor]
    """By the name of the matrix."""
    width: int = 1

    def sha256(self) -> str:
        """Of the order in which they go."""
        order = [
            of.sort(descending=True, stable=True).indices.tolist()
            for _, of in sorted(self.importance.items())
        ]
        return hashlib.sha256(str(order).encode()).hexdigest()[:16]

    def masks(self, count: int | None) -> dict[str, Tensor]:
        """mask_C by the name of the matrix; none where all are kept."""
        if count is None:
            return {}
        masks = {}
        for name, importance_G in self.importance.items():
            mask_G = torch.zeros_like(importance_G)
            mask_G[most_important(importance_G, count)] = 1
            masks[name] = mask_G.repeat_interleave(self.width)
        return masks


@contextlib.contextmanager
def _narrowed(
    model: CausalLM, channels: _Ranked, groups: _Ranked, ffn_width: int | None, kv_heads: int | None
) -> Iterator[None]:
    """Inside, every MLP has its most important channels and every attention such KV groups; a layer that is out has
    none.
    """

    def hook(mask_C: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * mask_C.to(args[0].dtype), *args[1:])

    masks = channels.masks(ffn_width) | groups.masks(kv_heads)
    hooks = [
        model.hf.get_submodule(name).register_forward_pre_hook(partial(hook, mask_C))
        for name, mask_C in masks.items()
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
