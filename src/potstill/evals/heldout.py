"""Held-out evaluation: always the same rows in the same batches, so that two results are comparable.

heldout/ce          next-token cross-entropy of the student, nats per supervised position
heldout/kl          KL(teacher || student) at temperature 1, nats per position
heldout/agreement   share of positions where student and teacher rank the same token first
heldout/loss        the recipe's own objective, by which the best step is chosen
heldout/teacher_ce  the teacher's cross-entropy, for reference
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from potstill.models.student import Student
from potstill.types import Rows, Teacher, answer


@torch.no_grad()
def heldout(
    student: Student,
    teacher: Teacher,
    rows: Rows,
    rows_per_batch: int,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Every row of `rows` once, in eval mode; sums over positions, divided once.

    `poll` is called before each batch and may raise, which leaves the student as it was.
    """
    sums: dict[str, float] = {}
    positions = 0
    for count, batch_sums in _batches(student, teacher, rows, rows_per_batch, poll):
        positions += count
        for name, value in batch_sums.items():
            sums[name] = sums.get(name, 0.0) + value
    return {f"heldout/{name}": value / positions for name, value in sums.items()}


@torch.no_grad()
def heldout_by_row(
    student: Student, teacher: Teacher, rows: Rows
) -> tuple[list[int], dict[str, list[float]]]:
    """The positions of each row, and each metric's mean over the positions of each row."""
    positions: list[int] = []
    means: dict[str, list[float]] = {}
    for count, row_sums in _batches(student, teacher, rows, 1, lambda: None):
        positions.append(count)
        for name, value in row_sums.items():
            means.setdefault(f"heldout/{name}", []).append(value / count)
    return positions, means


def _batches(
    student: Student, teacher: Teacher, rows: Rows, rows_per_batch: int, poll: Callable[[], None]
) -> Iterator[tuple[int, dict[str, float]]]:
    """Per batch, its positions and each metric's sum over them. The student is in eval mode throughout, and has the
    weights of the file that it is trained for.
    """
    was_training = student.training
    student.eval()
    try:
        with student.on_grid():
            for start in range(0, len(rows), rows_per_batch):
                poll()
                batch = rows.batch(range(start, min(start + rows_per_batch, len(rows))))
                batch = batch.to(student.model.device)
                sums = student.measure(batch, answer(teacher, batch))
                yield len(batch.positions_N), {name: float(value) for name, value in sums.items()}
    finally:
        student.train(was_training)
