"""Held-out evaluation: always the same rows, in the same batches, so that two numbers may be compared.

heldout/ce          next-token cross-entropy of the student, nats per supervised position
heldout/kl          KL(teacher || student) at temperature 1, nats per position
heldout/agreement   share of positions where both rank the same token first
heldout/loss        the recipe's own objective; what "best" means
heldout/teacher_ce  the teacher's own cross-entropy, so that its level is known
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from potstill.students.student import Student
from potstill.types import Rows, Teacher


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
    was_training = student.training
    student.eval()
    try:
        sums, positions = _sums(student, teacher, rows, rows_per_batch, poll)
    finally:
        student.train(was_training)
    return {f"heldout/{name}": value / positions for name, value in sums.items()}


def _sums(
    student: Student, teacher: Teacher, rows: Rows, rows_per_batch: int, poll: Callable[[], None]
) -> tuple[dict[str, float], int]:
    sums: dict[str, float] = {}
    positions = 0
    for start in range(0, len(rows), rows_per_batch):
        poll()
        batch = rows.batch(range(start, min(start + rows_per_batch, len(rows)))).to(student.model.device)
        for name, value in student.measure(batch, teacher.targets(batch)).items():
            sums[name] = sums.get(name, 0.0) + float(value)
        positions += len(batch.positions_N)
    return sums, positions
