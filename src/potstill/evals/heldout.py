"""Held-out evaluation: always the same rows in the same batches, so that two results are comparable.

heldout/ce          next-token cross-entropy of the student, nats per supervised position
heldout/kl          KL(teacher || student) at temperature 1, nats per position
heldout/agreement   share of positions where student and teacher rank the same token first
heldout/loss        the recipe's own objective, by which the best step is chosen
heldout/teacher_ce  the teacher's cross-entropy, for reference
heldout/SOURCE/...  of a mix, the first three and the last of each source's own rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from potstill.models.student import Student
from potstill.types import Rows, Teacher, answer

OF_EACH = ("ce", "kl", "agreement", "teacher_ce")
"""Metrics of each source of a mix."""


@torch.no_grad()
def heldout(
    student: Student,
    teacher: Teacher,
    rows: Rows,
    rows_per_batch: int,
    poll: Callable[[], None] = lambda: None,
    sources: Mapping[str, range] | None = None,
) -> dict[str, float]:
    """Every row of `rows` once, in eval mode; sums over positions, divided once.

    Args:
        poll: called before each batch; it may raise, which leaves the student as it was.
        sources: of a mix, the rows of each source, one after the other: of each the figures by themselves, too, out
            of the same sums. No batch has rows of two.
    """
    sums: dict[str, dict[str, float]] = {}
    for name, part in (sources or {"": range(len(rows))}).items():
        own = sums[name] = {"positions": 0.0}
        for count, batch_sums in _batches(student, teacher, rows, part, rows_per_batch, poll):
            own["positions"] += count
            for metric, value in batch_sums.items():
                own[metric] = own.get(metric, 0.0) + value
    total = {metric: sum(own[metric] for own in sums.values()) for metric in next(iter(sums.values()))}
    metrics = {f"heldout/{metric}": value / total["positions"] for metric, value in total.items()}
    for name in sources or {}:
        own = sums[name]
        metrics |= {f"heldout/{name}/{metric}": own[metric] / own["positions"] for metric in OF_EACH}
    return {name: value for name, value in metrics.items() if name != "heldout/positions"}


@torch.no_grad()
def heldout_by_row(
    student: Student, teacher: Teacher, rows: Rows
) -> tuple[list[int], dict[str, list[float]]]:
    """The positions of each row, and each metric's mean over the positions of each row."""
    positions: list[int] = []
    means: dict[str, list[float]] = {}
    for count, row_sums in _batches(student, teacher, rows, range(len(rows)), 1, lambda: None):
        positions.append(count)
        for name, value in row_sums.items():
            means.setdefault(f"heldout/{name}", []).append(value / count)
    return positions, means


def _batches(
    student: Student,
    teacher: Teacher,
    rows: Rows,
    part: range,
    rows_per_batch: int,
    poll: Callable[[], None],
) -> Iterator[tuple[int, dict[str, float]]]:
    """Per batch of a part of the rows, its positions and each metric's sum over them. The student is in eval mode
    throughout, and has the weights of the file that it is trained for.
    """
    was_training = student.training
    student.eval()
    try:
        with student.on_grid():
            for start in range(part.start, part.stop, rows_per_batch):
                poll()
                batch = rows.batch(range(start, min(start + rows_per_batch, part.stop)))
                batch = batch.to(student.model.device)
                sums = student.measure(batch, answer(teacher, batch))
                yield len(batch.positions_N), {name: float(value) for name, value in sums.items()}
    finally:
        student.train(was_training)
