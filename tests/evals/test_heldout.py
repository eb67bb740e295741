"""Held-out numbers are those of whole logits in float64, however the rows are cut into batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill import load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import set_up
from potstill.evals.heldout import heldout


def by_hand(setup: Any, temperature: float) -> dict[str, float]:
    batch = setup.corpus.heldout.batch(range(len(setup.corpus.heldout)))
    inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
    with torch.no_grad():
        student_NV, teacher_NV = (
            model.hf(**inputs).logits.double().flatten(0, 1)[batch.positions_N]
            for model in (setup.student.model, setup.teacher.model)
        )
    labels_N = batch.labels_N[:, None]

    def kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
        p, q = p_logits.softmax(-1), q_logits.softmax(-1)
        return (p * (p / q).log()).sum(-1).mean()

    ce = -student_NV.softmax(-1).gather(1, labels_N).log().mean()
    kd = kl(teacher_NV / temperature, student_NV / temperature) * temperature**2
    found = {
        "ce": ce,
        "kd": kd,
        "loss": 0.3 * ce + 0.6 * kd,
        "kl": kl(teacher_NV, student_NV),
        "agreement": (student_NV.argmax(-1) == teacher_NV.argmax(-1)).double().mean(),
        "teacher_ce": -teacher_NV.softmax(-1).gather(1, labels_N).log().mean(),
    }
    return {f"heldout/{name}": float(value) for name, value in found.items()}


@pytest.mark.parametrize("rows_per_batch", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_held_out_numbers_are_those_of_whole_logits(
    tiny_recipe: Callable[..., Path], rows_per_batch: int, temperature: float
) -> None:
    objective = f"{{kd_weight: 0.6, ce_weight: 0.3, temperature: {temperature}, chunk: 7}}"
    setup = set_up(resolve(load_recipe(tiny_recipe(objective=objective))), lambda text: None)
    found = heldout(setup.student, setup.teacher, setup.corpus.heldout, rows_per_batch)
    expected = by_hand(setup, temperature)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["heldout/kl"] > 0.1


def test_measuring_leaves_the_student_as_it_was(tiny_recipe: Callable[..., Path]) -> None:
    setup = set_up(resolve(load_recipe(tiny_recipe())), lambda text: None)
    setup.student.train()
    before = setup.student.weights_sha256()
    heldout(setup.student, setup.teacher, setup.corpus.heldout, 2)
    assert setup.student.training and setup.student.weights_sha256() == before
    assert all(p.grad is None for p in setup.student.parameters())
