"""Which layers a model can spare: the KL from the whole model to the one without them, measured on a few rows.

A layer adds to the residual stream, so without it the stream goes on as it came. That is measured for each layer
alone, as in ShortGPT (Men et al. 2024, arXiv 2403.03853), which ranks by the cosine of a layer's input and output;
here it is by what the loss of a distillation sees, the KL of the distributions at the end.

    least_harm    the layers whose own absence costs least; one pass a layer
    greedy        one after the other, each measured where the ones before it are out already

A pass reads the beginning of a few rows, and compares logits at positions spread over it: the head of a small model
is as much work as all of its layers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from potstill.errors import UserError, one_line
from potstill.io.user_cache import recall, remember
from potstill.losses.divergences import forward_kl
from potstill.losses.objective import Objective
from potstill.models.causal_lm import CausalLM
from potstill.models.load import weights_sha256
from potstill.models.skipping import beside, skipping
from potstill.types import Batch

RULES = ("least_harm", "greedy")
CACHE = "layers"
MAX_TOKENS = 256
"""Of a row that are read; as many more as it takes to the first `MIN_POSITIONS` that bear loss, up to `MOST_TOKENS`."""
MOST_TOKENS = 1024
MIN_POSITIONS = 16
MAX_POSITIONS = 64
"""Of a row at which distributions are compared."""
NOTE_SECONDS = 10
PLAIN = Objective()
"""For the dtypes and the chunks of its logits alone."""


@dataclass(frozen=True)
class Harm:
    """What leaving layers out costs, in nats per position, and which ones to keep."""

    rule: str
    positions: int
    """At which distributions were compared."""
    alone_L: list[float]
    """KL of the model without each layer alone."""
    left_out: list[int]
    """In the order in which they were chosen."""
    kl: float
    """Of the model without all of them."""
    ffn_width: int | None = None
    """Channels of each MLP that are kept, where these were chosen, too; None: all."""
    kv_heads: int | None = None
    """The same, of the KV groups of each attention."""
    moves: list[dict[str, Any]] = field(default_factory=list)
    """How a size was reached: see `models.sizing`."""

    @property
    def keep(self) -> list[int]:
        """The other layers, rising."""
        return sorted({*range(len(self.alone_L))} - {*self.left_out})

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def choose_layers(
    model: CausalLM, stack: str, batches: Sequence[Batch], count: int, rule: str, note: Callable[[str], None]
) -> Harm:
    """Choose the `count` layers to keep. What was measured is remembered: see `io.user_cache`.

    Args:
        stack: name of the list of layers in the Transformers model.
        batches: calibration rows, of the training split.
        rule: one of `RULES`.
        note: called with a line before the measurement, and with one for each layer that `greedy` leaves out.

    Raises:
        UserError: fewer than one or more than all, or a KL that is not finite.
    """
    total = len(model.hf.get_submodule(stack))
    if not 1 <= count <= total:
        raise UserError(
            f"student.layers: {count} layers cannot be kept of the teacher's {total}. Give 1 to {total}."
        )

    def choose(without: Without, alone_L: list[float]) -> Harm:
        if rule == "least_harm":
            left_out = sorted(range(total), key=lambda number: (alone_L[number], number))[: total - count]
        else:
            left_out = _one_after_the_other(without, alone_L, total - count, note)
        kl = without.kl(left_out) if left_out else 0.0
        return Harm(rule, without.positions, alone_L, left_out, kl)

    return measured(Without(model, stack, batches), choose, note)


def measured(
    without: Without, choose: Callable[[Without, list[float]], Harm], note: Callable[[str], None]
) -> Harm:
    """Measure each layer alone, and call `choose` with what each costs. What was measured is remembered.

    Raises:
        UserError: no position to compare at, a KL that is not finite, or a model that does not run without a layer.
    """
    model, total = without.model, len(without.layers)
    if not without.positions:
        raise UserError(
            f"student.rule: no training row that was looked at bears loss at its first {MOST_TOKENS} positions, so that"
            " layers cannot be compared. Use first_last, or name the layers in student.keep."
        )
    key = without.sha256()
    without.known |= (known := recall(CACHE, key))
    before = " (known from an earlier run)" if {str(number) for number in range(total)} <= {*known} else ""
    note(f"student: what each of {total} layers is worth, on {without.positions} positions{before}")
    try:
        chosen = choose(without, _each_alone(without, note))
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"student.rule: {type(model.hf).__name__} does not run without one of its layers: {one_line(error)} Use"
            " first_last, or name the layers in student.keep."
        ) from error
    if without.known != known:
        remember(CACHE, key, without.known)
    return chosen


def _each_alone(without: Without, note: Callable[[str], None]) -> list[float]:
    costs: list[float] = []
    total, last = len(without.layers), time.monotonic()
    for number in range(total):
        costs.append(without.kl([number]))
        if time.monotonic() - last > NOTE_SECONDS:
            note(f"student: {number + 1} of {total} layers measured")
            last = time.monotonic()
    return costs


def whole_logp_NV(model: CausalLM, batch: Batch) -> Tensor:
    """The model's log-probabilities at a batch's positions."""
    return torch.cat([logits_CV.log_softmax(-1) for _, logits_CV in _logits(model, batch)])


def summed_kl(model: CausalLM, batch: Batch, whole_logp_NV: Tensor) -> float:
    """Nats, summed over a batch's positions, from the distributions of a whole model to this one's."""
    return sum(
        float(forward_kl(logits_CV.log_softmax(-1), whole_logp_NV[part]).sum())
        for part, logits_CV in _logits(model, batch)
    )


def _logits(model: CausalLM, batch: Batch) -> Iterator[tuple[slice, Tensor]]:
    hidden_BTD = model.hidden(batch.input_ids_BT, batch.position_ids_BT)
    return PLAIN.logits(hidden_BTD.flatten(0, 1)[batch.positions_N], model.head)


def calibration(batch: Batch) -> Batch:
    """The beginning of some rows, with positions spread over each: see `MAX_TOKENS` and `MAX_POSITIONS`."""
    B, T = batch.input_ids_BT.shape
    rows_N, places_N = batch.positions_N // T, batch.positions_N % T
    first = [places_N[rows_N == row][:MIN_POSITIONS] for row in range(B)]
    wanted = max([MAX_TOKENS, *(int(places[-1]) + 1 for places in first if len(places))])
    end = min(T, wanted, MOST_TOKENS)
    own = [torch.nonzero((rows_N == row) & (places_N < end)).flatten() for row in range(B)]
    chosen_N = torch.cat([numbers[_spread(len(numbers), MAX_POSITIONS)] for numbers in own])
    return replace(
        batch,
        input_ids_BT=batch.input_ids_BT[:, :end],
        position_ids_BT=batch.position_ids_BT[:, :end],
        positions_N=rows_N[chosen_N] * end + places_N[chosen_N],
        labels_N=batch.labels_N[chosen_N],
        lengths_B=None if batch.lengths_B is None else batch.lengths_B.clamp_max(end),
    )


def _spread(total: int, most: int) -> Tensor:
    return torch.linspace(0, total - 1, min(total, most)).round().long()


def _one_after_the_other(
    without: Without, alone_L: Sequence[float], count: int, note: Callable[[str], None]
) -> list[int]:
    left_out: list[int] = []
    costs = dict(enumerate(alone_L))
    for turn in range(count):
        number = min(costs, key=lambda number: (costs[number], number))
        left_out.append(number)
        note(
            f"student: without {len(left_out)} of {len(alone_L)} layers, {number} the last: KL {costs[number]:.3f}"
        )
        if turn + 1 < count:
            costs = {other: without.kl([*left_out, other]) for other in costs if other != number}
    return left_out


class Without:
    """A model, and what it says without some of its layers.

    Layers below the first that is out give what they gave before, and are not computed again: half of the work.
    """

    def __init__(self, model: CausalLM, stack: str, batches: Sequence[Batch]) -> None:
        layers: Any = model.hf.get_submodule(stack)
        self.model, self.layers = model, [*layers]
        self._batches = [calibration(batch).to(model.device) for batch in batches]
        self.positions = sum(len(batch.positions_N) for batch in self._batches)
        self.known: dict[str, float] = {}
        """KL by the layers that are out: their numbers, rising, with a space between; and what of the others is."""
        self.narrow: Callable[[int | None, int | None], contextlib.AbstractContextManager[None]] = (
            lambda ffn_width, kv_heads: contextlib.nullcontext()
        )
        """Inside what it returns, every MLP has so many channels, and every attention so many KV groups; None: all."""
        self.channels_ranking = self.groups_ranking = ""
        """Which ones, as a hash."""

    def sha256(self) -> str:
        """Of all that the KLs depend on: weights, rows, positions."""
        digest = hashlib.sha256(f"1 {weights_sha256(self.model)} {self.model.hf.config}".encode())
        for batch in self._batches:
            for tensor in (batch.input_ids_BT, batch.position_ids_BT, batch.positions_N):
                digest.update(f"{list(tensor.shape)} {tensor.tolist()}".encode())
        return digest.hexdigest()

    def kl(self, out: Sequence[int], ffn_width: int | None = None, kv_heads: int | None = None) -> float:
        """Nats per position, from the whole model to the one without the layers `out`, and with so many channels of
        each MLP and KV groups of each attention; None: all.

        Raises:
            UserError: it is not finite.
        """
        name = " ".join(map(str, sorted(out)))
        name += "" if ffn_width is None else f" of {ffn_width} {self.channels_ranking}"
        name += "" if kv_heads is None else f" with {kv_heads} {self.groups_ranking}"
        if name not in self.known:
            self.known[name] = self._measured(out, ffn_width, kv_heads)
        return self.known[name]

    @functools.cached_property
    def _whole(self) -> list[tuple[Tensor, list[Tensor], tuple[Any, ...] | None]]:
        return [self._observed(batch) for batch in self._batches]

    @torch.no_grad()
    def _measured(self, out: Sequence[int], ffn_width: int | None, kv_heads: int | None) -> float:
        total = 0.0
        # Of narrow layers the lowest gives something else already.
        first = min(out) if ffn_width is None and kv_heads is None else -1
        for batch, (whole_logp_NV, inputs, other) in zip(self._batches, self._whole, strict=True):
            with (
                self.narrow(ffn_width, kv_heads),
                skipping(self.layers, first, inputs[first], other, set(out)),
            ):
                total += summed_kl(self.model, batch, whole_logp_NV)
        if not total < float("inf"):
            raise UserError(
                f"student.rule: without layers {sorted(out)} the KL to the whole model is {total}. Use first_last."
            )
        return total / self.positions

    @torch.no_grad()
    def _observed(self, batch: Batch) -> tuple[Tensor, list[Tensor], tuple[Any, ...] | None]:
        """Of the whole model: logp_NV at the end, each layer's input, and what a layer gives beside its output."""
        inputs: list[Tensor] = []
        others: list[tuple[Any, ...] | None] = []

        def observe(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
            inputs.append(args[0] if args else kwargs["hidden_states"])
            others.append(beside(output))

        hooks = [layer.register_forward_hook(observe, with_kwargs=True) for layer in self.layers]
        try:
            logp_NV = whole_logp_NV(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        lengths = {None if other is None else len(other) for other in others}
        if len(inputs) != len(self.layers) or len(lengths) != 1:
            raise UserError(
                f"student.rule: {type(self.model.hf).__name__} does not call its {len(self.layers)} layers once each,"
                " one after the other. Use first_last, or name the layers in student.keep."
            )
        return logp_NV, inputs, others[0]
