"""Compute a teacher's targets for rows of a corpus, and write them into the shards of a store.

Rows go through the teacher in the same batches whether a capture was interrupted or not, and each row's random
numbers depend on the seed and its number alone: a resumed capture equals an uninterrupted one byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from potstill.errors import UserError
from potstill.losses.targets import HiddenTargets
from potstill.store.codecs import Codec, Row
from potstill.store.sampling import Uniforms
from potstill.store.shards import FileRecord, write_shard
from potstill.types import Rows, Teacher


@dataclass(frozen=True)
class Captured:
    """The encoded targets of one row."""

    row: int
    """Its number, counted over both splits: the key of its targets in a store."""
    places_P: Tensor
    """int64, the supervised positions within the row."""
    kept: Row


@torch.no_grad()
def captured(
    teacher: Teacher, rows: Rows, numbers: Sequence[int], codec: Codec, seed: int, rows_per_batch: int
) -> Iterator[Captured]:
    """The targets of the rows `numbers`, one row after the other.

    Args:
        teacher: a model in this process.
        rows: of the corpus.
        numbers: which of them.
        codec: how targets are encoded.
        seed: of the draws of a sampling codec.
        rows_per_batch: rows that go through the teacher at once.

    Raises:
        UserError: hidden states that are not finite.
    """
    model = teacher.model
    assert model is not None  # `capture` refuses others
    for start in range(0, len(numbers), rows_per_batch):
        batch = rows.batch(numbers[start : start + rows_per_batch])
        T = batch.input_ids_BT.shape[1]
        targets = teacher.targets(batch.to(model.device))
        assert isinstance(targets, HiddenTargets)
        if not bool(targets.hidden_NE.isfinite().all()):
            raise UserError(
                f"teacher: its hidden states are not finite in rows {batch.rows_B.tolist()}. Set"
                " teacher.dtype: float32, or look at its checkpoint."
            )
        counts = torch.bincount(batch.positions_N // T, minlength=len(batch.rows_B)).tolist()
        split = zip(
            batch.rows_B.tolist(),
            torch.split(batch.positions_N, counts),
            torch.split(targets.hidden_NE, counts),
            strict=True,
        )
        for row, positions_P, hidden_PE in split:
            places_P = positions_P % T
            uniforms = Uniforms(seed, row, places_P.numpy(), hidden_PE.device)
            yield Captured(row, places_P, codec.encode(hidden_PE, model.head, uniforms))


def capture_shard(
    file: Path,
    teacher: Teacher,
    rows: Rows,
    numbers: Sequence[int],
    codec: Codec,
    seed: int,
    rows_per_batch: int,
    on_row: Callable[[Captured], None] = lambda row: None,
) -> FileRecord:
    """Write the targets of the rows `numbers` as one file; `on_row` is called with each row. See `captured`."""
    shard = []
    for row in captured(teacher, rows, numbers, codec, seed, rows_per_batch):
        shard.append(row)
        on_row(row)
    T = rows.batch(numbers[:1]).input_ids_BT.shape[1]
    return write_shard(
        file, [row.row for row in shard], [row.places_P for row in shard], [row.kept for row in shard], T
    )
