"""One optimizer step: its micro-batches, what they came to, and the figures that are logged of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from potstill.errors import UserError
from potstill.losses.balance import extreme_shares
from potstill.models.student import Student
from potstill.training.checkpoint import Metrics
from potstill.training.distributed import Ranks, full
from potstill.types import Batch, Data


class Step:
    """`number` counts from 0; messages and logs count from 1."""

    def __init__(self, number: int, batches: list[Batch], ranks: Ranks) -> None:
        self.number, self.batches, self.ranks = number, batches, ranks
        self.share = ranks.share(batches)
        """This rank's micro-batches."""
        self.positions = sum(len(batch.positions_N) for batch in batches)
        """Supervised positions of all ranks: the divisor of the loss, known before any backward."""
        self.rollout_positions = sum(len(batch.positions_N) for batch in batches if batch.is_rollout)
        """Those of them whose labels the student wrote."""
        self._terms: list[dict[str, Tensor]] = []
        self._counts: list[Tensor] = []

    @property
    def num_rows(self) -> int:
        return sum(len(batch.rows_B) for batch in self.batches)

    @property
    def is_at_last_batch(self) -> bool:
        return len(self._terms) + 1 == len(self.share)

    def require_labels(self, student: Student) -> None:
        for batch in self.share:
            with error_context(self.number, batch):
                student.require_labels(batch)

    def expert_counts(self, student: Student, beat: Callable[[], None]) -> tuple[Tensor, ...]:
        """counts_LX of all micro-batches and ranks, which the balancing loss of a mixture of experts needs before the
        first backward: an additional forward of the student's body for each micro-batch. Nothing where each rank has
        one and can count as it goes, and for other students.
        """
        if student.routing is None or student.routing.coefficient is None:
            return ()
        if len(self.batches) == self.ranks.world:
            return ()
        device, counts = student.model.device, []
        # So that dropout and a router's noise are the same in the step itself.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for batch in self.share:
                counts.append(student.expert_counts(batch.to(device)))
                beat()
        return (self.ranks.sum(torch.stack(counts).sum(0)),)

    def add(self, terms: dict[str, Tensor]) -> None:
        """Keep the sums of a micro-batch, on the device: nothing waits for them before `totals`."""
        terms = {name: value.detach() for name, value in terms.items()}
        if (counts_LX := terms.pop("expert_counts", None)) is not None:
            self._counts.append(counts_LX)
        self._terms.append(terms)

    def totals(self, student: Student) -> Totals:
        """Of all micro-batches and ranks. The step waits for its device here, and nowhere else."""
        parameters = [p for p in student.parameters() if p.grad is not None]
        total_norm = norm_of_gradients(parameters)
        shares = extreme_shares(self.ranks.sum(torch.stack(self._counts).sum(0))) if self._counts else {}
        of_batches, (grad_norm, *numbers) = read(self._terms, [total_norm, *shares.values()])
        sums: Metrics = {}
        for of_batch in of_batches:
            for name, value in of_batch.items():
                sums[name] = sums.get(name, 0.0) + value
        if self.rollout_positions:  # a rank's own share may be of one kind alone
            names = ["rollout_nll", "rollout_kd"] + ["ce"] * (self.rollout_positions < self.positions)
            sums = {name: sums.get(name, 0.0) for name in sorted({*sums, *names})}
        experts = dict(zip(shares, numbers, strict=True))
        return Totals(of_batches, self.ranks.total(sums), experts, grad_norm, total_norm, parameters)

    def metrics(self, totals: Totals, lr: float, data: Data, seconds: float) -> Metrics:
        of_rollouts = {name.removeprefix("rollout_") for name in totals.sums if name.startswith("rollout_")}
        rollouts = {
            f"rollout/{name}": totals.sums[f"rollout_{name}"] / self.rollout_positions for name in of_rollouts
        }
        bear = {"ce": self.positions - self.rollout_positions}
        means = {
            name: value / bear.get(name, self.positions)
            for name, value in totals.sums.items()
            if not name.startswith("rollout_")
        }
        if "router_loss" in means:  # its parts add up to a mean over tokens
            means["router_loss"] = totals.sums["router_loss"]
        losses = {f"train/{name}": value for name, value in means.items()}
        experts = {f"experts/{name}": value for name, value in totals.experts.items()}
        return (
            losses
            | experts
            | rollouts
            | {
                "train/lr": lr,
                "train/grad_norm": totals.grad_norm,
                "train/positions": self.positions,
                "train/epoch": data.epoch(self.number),
                "speed/tokens_per_s": sum(batch.input_ids_BT.numel() for batch in self.batches) / seconds,
                "speed/step_s": seconds,
            }
            | data.figures(self.number)
        )


@dataclass(frozen=True)
class Totals:
    """What a step came to."""

    of_batches: list[Metrics]
    """Sums over each of this rank's micro-batches, in nats."""
    sums: Metrics
    """Over all positions of the step, on all ranks."""
    experts: Metrics
    """`extreme_shares` of a mixture of experts, on all ranks."""
    grad_norm: float
    total_norm: Tensor
    """The same on the device, where clipping needs it."""
    parameters: list[nn.Parameter]
    """Those that have a gradient."""

    def clip(self, limit: float | None) -> None:
        """Scale the gradients down to a norm of `limit`, None for no limit."""
        if limit is not None:
            clip_grads_with_norm_(self.parameters, limit, self.total_norm)


def norm_of_gradients(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Of all of them together, on the device, and in shards where they are."""
    return get_total_norm(p.grad for p in parameters if p.grad is not None)


def read(terms: list[dict[str, Tensor]], others: Sequence[Tensor]) -> tuple[list[Metrics], list[float]]:
    """The terms of each micro-batch, and other scalars, as numbers, in one transfer from the device."""
    on_device = [value.detach() for of_batch in terms for value in of_batch.values()]
    numbers = iter(torch.stack([full(value).double() for value in (*on_device, *others)]).tolist())
    return [{name: next(numbers) for name in of_batch} for of_batch in terms], list(numbers)


@contextlib.contextmanager
def error_context(number: int, *batches: Batch) -> Iterator[None]:
    """Say which step and which rows an error is about."""
    try:
        yield
    except UserError as error:
        rows = [row for batch in batches for row in batch.rows_B.tolist()]
        raise type(error)(f"step {number + 1}, rows [{abbreviated(rows)}]: {error}") from error


def abbreviated(numbers: list[int]) -> str:
    """At most 16 of them."""
    return ", ".join(map(str, numbers[:16])) + (f", … {len(numbers)} in all" if numbers[16:] else "")
