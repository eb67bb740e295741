"""Compute a teacher's targets for rows of a corpus, and write them into the shards of a store.

Rows go through the teacher in the same batches whether a capture was interrupted or not, and each row's random
numbers depend on the seed and its number alone: a resumed capture equals an uninterrupted one byte for byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_in
from safetensors.torch import save
from torch import Tensor

from potstill.errors import UserError
from potstill.io.atomic import write_whole, writing
from potstill.losses.targets import HiddenTargets, SparseTargets
from potstill.store.codecs import Codec, Row, TopK
from potstill.store.sampling import Uniforms
from potstill.store.shards import FileRecord, write_shard
from potstill.teachers.base import TeacherChanged
from potstill.types import Batch, Head, Rows, Targets, Teacher, answer

PLACES, ROW = "places_P", "row"


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
    teacher: Teacher,
    rows: Rows,
    numbers: Sequence[int],
    codec: Codec,
    seed: int,
    rows_per_batch: int,
    with_labels: bool = False,
) -> Iterator[Captured]:
    """The targets of the rows `numbers`, one row after the other.

    Args:
        teacher: one whose source names the kind of store.
        rows: of the corpus.
        numbers: which of them.
        codec: how targets are encoded.
        seed: of the draws of a sampling codec.
        rows_per_batch: rows that go through the teacher at once.
        with_labels: whether the labels are to be among the ids of a teacher that gives few: held-out rows have the
            teacher's cross-entropy measured on them.

    Raises:
        UserError: hidden states that are not finite.
    """
    parts = (numbers[start : start + rows_per_batch] for start in range(0, len(numbers), rows_per_batch))
    for batch, targets in _answers(teacher, map(rows.batch, parts)):
        T = batch.input_ids_BT.shape[1]
        if isinstance(targets, HiddenTargets) and not bool(targets.hidden_NE.isfinite().all()):
            raise UserError(
                f"teacher: its hidden states are not finite in rows {batch.rows_B.tolist()}. Set"
                " teacher.dtype: float32, or look at its checkpoint."
            )
        counts = torch.bincount(batch.positions_N // T, minlength=len(batch.rows_B)).tolist()
        end = 0
        for row, positions_P in zip(
            batch.rows_B.tolist(), torch.split(batch.positions_N, counts), strict=True
        ):
            places_P = positions_P % T
            first, end = end, end + len(places_P)
            labels_P = batch.labels_N[first:end] if with_labels else None
            yield Captured(row, places_P, _encoded(targets[first:end], codec, seed, row, places_P, labels_P))


def _answers(teacher: Teacher, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Targets]]:
    """Each batch with its targets; a teacher elsewhere is asked for the next while one is encoded and written."""
    if not teacher.is_elsewhere:
        for batch in batches:
            yield batch, answer(teacher, batch if teacher.model is None else batch.to(teacher.model.device))
        return
    asker = ThreadPoolExecutor(1)
    try:
        ahead: deque[tuple[Batch, Future[Targets]]] = deque()
        for batch in batches:
            ahead.append((batch, asker.submit(answer, teacher, batch)))
            if len(ahead) > 1:
                done, targets = ahead.popleft()
                yield done, targets.result()
        for done, targets in ahead:
            yield done, targets.result()
    finally:
        asker.shutdown(wait=False, cancel_futures=True)


def _encoded(
    targets: Targets, codec: Codec, seed: int, row: int, places_P: Tensor, labels_P: Tensor | None
) -> Row:
    if isinstance(targets, HiddenTargets):
        assert isinstance(targets.head, Head)
        uniforms = Uniforms(seed, row, places_P.numpy(), targets.hidden_NE.device)
        return codec.encode(targets.hidden_NE, targets.head, uniforms)
    assert isinstance(targets, SparseTargets) and isinstance(codec, TopK)  # `capture` refuses others
    return codec.encode_known(targets, labels_P)


def capture_shard(
    file: Path,
    teacher: Teacher,
    rows: Rows,
    numbers: Sequence[int],
    codec: Codec,
    seed: int,
    rows_per_batch: int,
    on_row: Callable[[Captured], None] = lambda row: None,
    on_kept: Callable[[int], None] = lambda rows: None,
    with_labels: bool = False,
) -> FileRecord:
    """Write the targets of the rows `numbers` as one file; `on_row` is called with each row that is captured, and
    before them `on_kept` with the number of those that an interrupted capture has kept. See `captured`.

    Rows of a teacher elsewhere, which cost the most, are kept one by one beside the file until it is whole: an
    interruption loses those that were being asked for.

    Raises:
        TeacherChanged: then no row is kept.
    """
    folder = file.with_suffix(".rows") if teacher.is_elsewhere else None
    kept = {} if folder is None else _rows_in(folder, numbers)
    on_kept(len(kept))
    missing = [number for number in numbers if number not in kept]
    todo = captured(teacher, rows, missing, codec, seed, rows_per_batch, with_labels)
    for number, row in zip(missing, todo, strict=True):
        kept[number] = row
        if folder is not None:
            with writing(folder):
                folder.mkdir(exist_ok=True)
            tensors = row.kept | {PLACES: row.places_P, ROW: torch.tensor([row.row])}
            content = save(tensors)
            write_whole(folder / f"{number}.{_hash(content)}.safetensors", content)
        on_row(row)
    try:
        teacher.require_unchanged()
    except TeacherChanged:
        forget_rows(file)  # those of the other one are among them
        raise
    shard = [kept[number] for number in numbers]
    T = rows.batch(numbers[:1]).input_ids_BT.shape[1]
    return write_shard(
        file, [row.row for row in shard], [row.places_P for row in shard], [row.kept for row in shard], T
    )


def forget_rows(file: Path) -> None:
    """Remove the rows that were kept beside a file, once its record is written."""
    shutil.rmtree(file.with_suffix(".rows"), ignore_errors=True)


def _rows_in(folder: Path, numbers: Sequence[int]) -> dict[int, Captured]:
    """The rows that an interrupted capture has kept; one that cannot be read is asked for again."""
    found, wanted = {}, set(numbers)
    for path in folder.glob("*.safetensors"):
        number, _, digest = path.stem.partition(".")
        with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError):
            content = path.read_bytes()
            if int(number) in wanted and _hash(content) == digest:
                tensors = tensors_in(content)
                places_P, row = tensors.pop(PLACES), int(tensors.pop(ROW))
                found[int(number)] = Captured(row, places_P, tensors)
    return found


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
