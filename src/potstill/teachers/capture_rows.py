"""A teacher asked once: its targets for rows of a corpus, into the shards of a store.

Rows go through the teacher in the same batches whether a capture was cut off or not, and each row's draw is a
function of the seed and its number: so a resumed capture is the uninterrupted one, byte for byte.
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
    """One row's targets, as they are kept."""

    row: int
    """Its number over both splits, the key of its targets."""
    places_P: Tensor
    kept: Row


@torch.no_grad()
def captured(
    teacher: Teacher, rows: Rows, numbers: Sequence[int], codec: Codec, seed: int, rows_per_batch: int
) -> Iterator[Captured]:
    """Targets of these rows, one after the other; `rows_per_batch` go through the teacher at once."""
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
    """The rows' targets as one file."""
    found = []
    for one in captured(teacher, rows, numbers, codec, seed, rows_per_batch):
        found.append(one)
        on_row(one)
    T = rows.batch(numbers[:1]).input_ids_BT.shape[1]
    return write_shard(
        file, [one.row for one in found], [one.places_P for one in found], [one.kept for one in found], T
    )
