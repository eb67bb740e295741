"""One step is the step that plain autograd takes, however it is cut into micro-batches and chunks.

With plain SGD, because AdamW is blind to the scale of a gradient. Everything runs through `distill`, from a
recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model
from safetensors.torch import load_file
from torch.nn import functional as F

from potstill import distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import set_up
from potstill.io.terminal import Display
from potstill.losses.divergences import forward_kl, reverse_kl
from potstill.losses.objective import Objective
from potstill.losses.targets import HiddenTargets
from potstill.models.student import Student, from_checkpoint
from potstill.types import Batch

SGD = "{steps: 1, rows_per_step: 4, lr: 0.5, optimizer: sgd, weight_decay: 0.0, clip: null, final_lr_ratio: 1.0, device: cpu}"


def step_of(recipe: Path, out: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """Weights after the run's one step; the run keeps the better student, so the step must help."""
    run = distill(recipe, overrides=overrides, out=out, display=Display(quiet=True))
    assert run.receipt()["student_is_of_step"] == 1
    return load_file(run.student / "model.safetensors")


def plain_step(
    recipe: Path, kd: float, ce: float, temperature: float, reverse: bool
) -> dict[str, torch.Tensor]:
    """The same step by whole logits and autograd, in float64, on the library's own forward."""
    setup = set_up(resolve(load_recipe(recipe)), lambda text: None)
    batch = setup.corpus.train.batch(setup.corpus.order(0).rows(0, 4))
    teacher = transformers.AutoModelForCausalLM.from_pretrained(
        setup.recipe.teacher.model, dtype=torch.float64
    )
    student = setup.student.model.hf.double()
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids_BT,
        "position_ids": batch.position_ids_BT,
        "use_cache": False,
    }
    logits_NV = student(**inputs).logits.flatten(0, 1)[batch.positions_N]
    with torch.no_grad():
        teacher_NV = F.softmax(teacher(**inputs).logits.flatten(0, 1)[batch.positions_N] / temperature, -1)
    student_NV = F.softmax(logits_NV / temperature, -1)
    p_NV, q_NV = (student_NV, teacher_NV) if reverse else (teacher_NV, student_NV)
    kd_N = (p_NV * (p_NV / q_NV).log()).sum(-1) * temperature**2
    loss = (ce * F.cross_entropy(logits_NV, batch.labels_N, reduction="none") + kd * kd_N).sum() / len(
        batch.labels_N
    )
    loss.backward()
    return {name: (p - 0.5 * p.grad).float().detach() for name, p in student.named_parameters()}


def largest_gap(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    shared = ours.keys() & other.keys()
    assert shared == other.keys()
    return max(float((ours[name] - other[name]).abs().max()) for name in shared)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kd", "ce", "temperature", "divergence"),
    [(0.9, 0.1, 1.0, "forward_kl"), (0.25, 0.75, 2.0, "forward_kl"), (0.8, 0.2, 1.5, "reverse_kl")],
)
def test_a_step_is_plain_autograd_s(
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    tied: bool,
    kd: float,
    ce: float,
    temperature: float,
    divergence: str,
) -> None:
    teacher = make_model(tmp_path / "teacher", seed=3, tie_word_embeddings=tied)
    objective = f"{{divergence: {divergence}, kd_weight: {kd}, ce_weight: {ce}, temperature: {temperature}, chunk: 16}}"
    recipe = tiny_recipe(train=SGD, objective=objective, teacher=f"{{name: torch, model: {teacher}}}")
    ours = step_of(recipe, tmp_path / "run", "train.rows_per_micro_batch=3")
    assert largest_gap(ours, plain_step(recipe, kd, ce, temperature, divergence == "reverse_kl")) < 2e-6


def test_the_cut_into_micro_batches_and_chunks_changes_nothing(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(train=SGD)
    whole = step_of(recipe, tmp_path / "whole")
    cuts = [("1", "16"), ("2", "16"), ("3", "16"), ("4", "1"), ("4", "7"), ("4", "100000")]
    for rows, chunk in cuts:
        out = tmp_path / f"{rows}-{chunk}"
        cut = step_of(recipe, out, f"train.rows_per_micro_batch={rows}", f"objective.chunk={chunk}")
        assert largest_gap(cut, whole) < 1e-6, (rows, chunk)


def student_of(folder: Path, objective: Objective) -> Student:
    student = Student(from_checkpoint(folder, torch.device("cpu")), objective)
    return student.double().eval()


def batch_of(ids_BT: torch.Tensor) -> Batch:
    rows, length = ids_BT.shape
    places = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()
    positions_BT = torch.arange(length).expand(rows, -1)
    return Batch(torch.arange(rows), ids_BT, positions_BT, places, ids_BT[:, 1:].flatten())


def gradient(student: Student, batch: Batch, targets: HiddenTargets) -> torch.Tensor:
    student.zero_grad()
    (student(batch, targets)["loss"] / len(batch.positions_N)).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def test_every_row_trains_so_opposite_rows_cancel(teacher_folder: Path) -> None:
    student = student_of(teacher_folder, Objective(forward_kl, kd_weight=1.0, ce_weight=0.0, chunk=5))
    row = torch.randint(0, 258, (1, 8), generator=torch.Generator().manual_seed(5))
    one, two = batch_of(row), batch_of(row.repeat(2, 1))
    with torch.no_grad():
        hidden = student.model.hidden(one.input_ids_BT, one.position_ids_BT).flatten(0, 1)[one.positions_N]
        q_NV = student.model.head(hidden).softmax(-1)
    # Teachers p and 2q - p pull the student in opposite directions: the gradient of forward KL in its logits
    # is q - p.
    tilt_NV = torch.linspace(-0.5, 0.5, 258, dtype=torch.float64) * q_NV
    tilt_NV = tilt_NV - q_NV * tilt_NV.sum(-1, keepdim=True)
    first = HiddenTargets((q_NV + tilt_NV).log(), lambda logits: logits)
    both = HiddenTargets(torch.cat([(q_NV + tilt_NV).log(), (q_NV - tilt_NV).log()]), lambda logits: logits)
    alone = gradient(student, one, first)
    assert alone.norm() > 1e-3
    assert gradient(student, two, both).norm() < 1e-9 * alone.norm()


def test_a_repeated_row_is_that_row(teacher_folder: Path) -> None:
    student = student_of(teacher_folder, Objective(reverse_kl, kd_weight=0.7, ce_weight=0.3, chunk=5))
    row = torch.randint(0, 258, (1, 8), generator=torch.Generator().manual_seed(6))
    teacher_NV = torch.randn(7, 258, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    once = gradient(student, batch_of(row), HiddenTargets(teacher_NV, lambda logits: logits))
    thrice = gradient(
        student, batch_of(row.repeat(3, 1)), HiddenTargets(teacher_NV.repeat(3, 1), lambda logits: logits)
    )
    assert (once - thrice).norm() < 1e-6 * once.norm()


def test_a_position_outside_the_loss_moves_nothing(teacher_folder: Path) -> None:
    student = student_of(teacher_folder, Objective(forward_kl, chunk=3))
    ids_BT = torch.randint(0, 258, (2, 8), generator=torch.Generator().manual_seed(8))
    whole = batch_of(ids_BT)
    teacher_NV = torch.randn(14, 258, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    keep = torch.tensor([0, 2, 3, 9, 13])
    subset = Batch(whole.rows_B, ids_BT, whole.position_ids_BT, whole.positions_N[keep], whole.labels_N[keep])
    ours = student(subset, HiddenTargets(teacher_NV[keep], lambda logits: logits))
    by_hand = [
        student(
            Batch(
                whole.rows_B,
                ids_BT,
                whole.position_ids_BT,
                whole.positions_N[i : i + 1],
                whole.labels_N[i : i + 1],
            ),
            HiddenTargets(teacher_NV[i : i + 1], lambda logits: logits),
        )["loss"]
        for i in keep.tolist()
    ]
    assert torch.allclose(ours["loss"], sum(by_hand), rtol=1e-12)


def test_a_zero_upstream_gradient_moves_no_weight(teacher_folder: Path) -> None:
    student = student_of(teacher_folder, Objective(forward_kl))
    batch = batch_of(torch.randint(0, 258, (1, 6), generator=torch.Generator().manual_seed(4)))
    teacher_NV = torch.randn(5, 258, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (student(batch, HiddenTargets(teacher_NV, lambda logits: logits))["loss"] * 0).backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_a_student_equal_to_its_teacher_has_no_kl_and_no_gradient(teacher_folder: Path) -> None:
    student = student_of(teacher_folder, Objective(forward_kl, kd_weight=1.0, ce_weight=0.0))
    batch = batch_of(torch.randint(0, 258, (2, 9), generator=torch.Generator().manual_seed(3)))
    with torch.no_grad():
        hidden_ND = student.model.hidden(batch.input_ids_BT, batch.position_ids_BT).flatten(0, 1)[
            batch.positions_N
        ]
    targets = HiddenTargets(hidden_ND, student.model.head)
    assert abs(float(student(batch, targets)["kd"])) < 1e-10
    assert gradient(student, batch, targets).norm() < 1e-10
