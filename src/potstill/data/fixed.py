"""A corpus as training data: which rows each step takes, and how they are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from potstill.errors import UserError
from potstill.types import Batch, Rows

MAX_EPOCHS_PER_STEP = 1000  # a step may see a row twice, but no one means this


class RowOrder(Protocol):
    """Which rows a step takes: a function of its number and of a seed, without state."""

    @property
    def seed(self) -> int: ...

    def rows(self, step: int, rows_per_step: int) -> list[int]:
        """The numbers of a step's rows.

        Raises:
            UserError: so many that a step would have the same ones over and over.
        """
        ...

    def epoch(self, step: int, rows_per_step: int) -> int:
        """Of the step's last row; the first epoch is 0."""
        ...

    def rows_read(self, steps: int, rows_per_step: int) -> dict[str, int]:
        """Rows of each source of a mix in the first steps; empty: there is one corpus."""
        ...

    def times_read(self, steps: int, rows_per_step: int) -> dict[str, float]:
        """How often these steps read all rows of each source."""
        ...


@dataclass(frozen=True)
class Order:
    """Every epoch all rows once, in an order of (seed, epoch) alone, and of the number of its source in a mix."""

    num_rows: int
    seed: int
    source: int | None = None

    def rows(self, step: int, rows_per_step: int) -> list[int]:
        if rows_per_step > MAX_EPOCHS_PER_STEP * self.num_rows:
            raise UserError(
                f"train.rows_per_step: {rows_per_step} rows in a step, of {self.num_rows} training rows: each"
                f" more than {MAX_EPOCHS_PER_STEP} times over. Set it lower."
            )
        first = step * rows_per_step
        return [self.row(position) for position in range(first, first + rows_per_step)]

    def epoch(self, step: int, rows_per_step: int) -> int:
        """Of the step's last row; the first epoch is 0."""
        return ((step + 1) * rows_per_step - 1) // self.num_rows

    def rows_read(self, steps: int, rows_per_step: int) -> dict[str, int]:
        return {}

    def times_read(self, steps: int, rows_per_step: int) -> dict[str, float]:
        return {}

    def row(self, position: int) -> int:
        """The row that is read after so many others, over all epochs."""
        epoch, place = divmod(position, self.num_rows)
        return int(self._permutation(epoch)[place])

    @cached_property
    def _permutation(self) -> Callable[[int], NDArray[np.int64]]:
        """The rows of an epoch in their order. Two are kept, as a step may end in the next epoch."""
        return _permutations(self.num_rows, self.seed, self.source)


@lru_cache(maxsize=64)
def _permutations(num_rows: int, seed: int, source: int | None) -> Callable[[int], NDArray[np.int64]]:
    """A cache for each source of a mix: in one for all, they would push each other out."""
    own = [] if source is None else [source]

    @lru_cache(maxsize=2)
    def permutation(epoch: int) -> NDArray[np.int64]:
        return np.random.Generator(np.random.PCG64([seed, epoch, *own])).permutation(num_rows)

    return permutation


@dataclass(frozen=True)
class FixedRows:
    """`Data` whose rows were there before training: a step's are a function of its number."""

    source: Rows
    order: RowOrder
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
        """How often each source of a mix has been read up to the end of the step; nothing of one corpus."""
        read = self.order.times_read(step + 1, self.rows_per_step)
        return {f"train/{name}/epochs": times for name, times in read.items()}

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
