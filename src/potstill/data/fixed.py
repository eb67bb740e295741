"""A corpus as training data: which rows each step takes, and how they are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from potstill.errors import UserError
from potstill.types import Batch, Rows

MAX_EPOCHS_PER_STEP = 1000  # a step may see a row twice, but no one means this


@dataclass(frozen=True)
class Order:
    """Which rows a step takes: every epoch all of them once, in an order of (seed, epoch) alone."""

    num_rows: int
    seed: int

    def rows(self, step: int, rows_per_step: int) -> list[int]:
        if rows_per_step > MAX_EPOCHS_PER_STEP * self.num_rows:
            raise UserError(
                f"train.rows_per_step: {rows_per_step} rows in a step, of {self.num_rows} training rows: each"
                f" more than {MAX_EPOCHS_PER_STEP} times over. Set it lower."
            )
        first = step * rows_per_step
        return [self._row(position) for position in range(first, first + rows_per_step)]

    def epoch(self, step: int, rows_per_step: int) -> int:
        """Of the step's last row; the first epoch is 0."""
        return ((step + 1) * rows_per_step - 1) // self.num_rows

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        return int(_permutation(self.num_rows, self.seed, epoch)[place])


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)


@dataclass(frozen=True)
class FixedRows:
    """`Data` whose rows were there before training: a step's are a function of its number."""

    source: Rows
    order: Order
    rows_per_step: int
    rows_per_micro_batch: int
    world: int = 1
    """Ranks that share the step."""

    fixed = True

    def step(self, step: int) -> list[Batch]:
        return self.pack(self.rows(step))

    def epoch(self, step: int) -> int:
        return self.order.epoch(step, self.rows_per_step)

    def figures(self, step: int) -> dict[str, float]:
        """Nothing: the rows were there before."""
        return {}

    def rows(self, step: int) -> list[int]:
        return self.order.rows(step, self.rows_per_step)

    @property
    def micro_batch_size(self) -> int:
        """Rows, few enough that a whole step has a micro-batch for every rank."""
        return min(self.rows_per_micro_batch, -(-self.rows_per_step // self.world))

    def pack(self, rows: Sequence[int]) -> list[Batch]:
        """Micro-batches of these rows."""
        size = self.micro_batch_size
        return [self.source.batch(rows[i : i + size]) for i in range(0, len(rows), size)]
