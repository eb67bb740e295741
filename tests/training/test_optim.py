"""Schedules, Muon beside AdamW, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cut_off import cut_off
from safetensors.torch import load_file, save_file
from soak.forkserver import ForkServer
from test_checkpoint import essence, rewrite_manifest
from test_distributed import TRAIN, assert_equal_runs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from potstill import UserError, distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import set_up
from potstill.cli.main import main
from potstill.runs.run_dir import RunDir
from potstill.training.optim import MuonWithAdamW, lr_at, make_optimizer

Recipe = Callable[..., Path]
TEN = "{steps: 13, rows_per_step: 1, lr: 1.0, warmup: 3, device: cpu, %s}"


def schedule(tiny_recipe: Recipe, options: str) -> list[float]:
    plan = load_recipe(tiny_recipe(train=TEN % options)).train
    return [lr_at(step, plan) for step in range(13)]


@pytest.mark.parametrize(
    ("options", "after"),
    [
        ("schedule: linear, final_lr_ratio: 0.1", [1 - 0.1 * n for n in range(10)]),
        ("schedule: linear, final_lr_ratio: 1.0", [1.0] * 10),
        ("schedule: cosine, final_lr_ratio: 0.0", [0.5 + 0.5 * math.cos(math.pi * n / 9) for n in range(10)]),
        # The last ten steps have nine intervals; a third of them is three.
        (
            "schedule: wsd, decay: 0.3333333333333333, final_lr_ratio: 0.0",
            [*[1.0] * 7, 1 - math.sqrt(1 / 3), 1 - math.sqrt(2 / 3), 0.0],
        ),
        ("schedule: wsd, decay: 1, final_lr_ratio: 0.5", [1 - 0.5 * math.sqrt(n / 9) for n in range(10)]),
    ],
)
def test_the_rate_falls_as_the_schedule_says(tiny_recipe: Recipe, options: str, after: list[float]) -> None:
    assert schedule(tiny_recipe, options) == pytest.approx([1 / 3, 2 / 3, 1.0, *after], abs=1e-7)


def test_wsd_is_stable_until_a_fifth_is_left(tiny_recipe: Recipe) -> None:
    plan = load_recipe(tiny_recipe(), ["train.steps=1001", "train.schedule=wsd"]).train
    rates = [lr_at(step, plan) for step in range(1001)]
    assert set(rates[:801]) == {plan.lr} and rates[801] < plan.lr
    assert rates[800:] == sorted(rates[800:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 * plan.lr)


@pytest.mark.parametrize("decay", ["0.001", "1e-17", "0.3333333333333333", "1"])
def test_the_last_step_of_wsd_has_the_last_rate(tiny_recipe: Recipe, decay: str) -> None:
    for floor in (0.0, 0.25):
        assert schedule(tiny_recipe, f"schedule: wsd, decay: {decay}, final_lr_ratio: {floor}")[-1] == floor


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        (["train.decay=0.5"], "train.decay"),
        (["train.schedule=linear", "train.decay=0.5"], "train.decay"),
        (["train.schedule=wsd", "train.decay=0"], "train.decay"),
        (["train.momentum=0.5"], "train.momentum"),
        (["train.optimizer=sgd", "train.momentum=0.5"], "train.momentum"),
        (["train.ema=1"], "train.ema"),
        (["train.schedule=constant"], "train.schedule"),
    ],
)
def test_a_field_that_nothing_would_read_is_refused(
    tiny_recipe: Recipe, changed: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distill", str(tiny_recipe()), *changed]) == 2
    told = capsys.readouterr().err
    assert field in told and "Traceback" not in told


def student_of(tiny_recipe: Recipe, *changed: str) -> tuple[nn.Module, Any]:
    setup = set_up(resolve(load_recipe(tiny_recipe(), list(changed))), lambda text: None)
    return setup.student, setup.recipe.train


def test_muon_is_for_the_matrices_of_layers(tiny_recipe: Recipe) -> None:
    student, train = student_of(tiny_recipe, "train.optimizer=muon")
    optimizer = make_optimizer(student, train)
    assert isinstance(optimizer, MuonWithAdamW)
    names = {id(p): name for name, p in student.named_parameters()}
    muon, decayed, kept = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert muon == {name for name in names.values() if "layers." in name and "norm" not in name}
    assert decayed == {name for name in names.values() if "embed_tokens" in name}
    assert muon | decayed | kept == set(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_a_step_of_muon_is_that_of_its_definition(tiny_recipe: Recipe) -> None:
    """In float64 by singular values, of which five Newton-Schulz iterations (Jordan et al. 2024) are a polynomial."""
    student, train = student_of(tiny_recipe, "train.optimizer=muon", "train.momentum=0.9")
    optimizer = make_optimizer(student, train)
    before = {name: p.detach().double().numpy().copy() for name, p in student.named_parameters()}
    torch.manual_seed(0)
    gradients = {}
    for name, parameter in student.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        gradients[name] = parameter.grad.double().numpy()
    optimizer.step()
    name = next(name for name in before if "up_proj" in name)
    old, gradient = before[name], gradients[name]
    # Nesterov's momentum of a mean that was 0.
    direction = gradient * (1 - 0.9) + 0.9 * (0.1 * gradient)
    left, values, right = np.linalg.svd(direction, full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    lr = train.lr
    expected = old * (1 - lr * 0.1) - lr * 0.2 * math.sqrt(max(old.shape)) * (left * values) @ right
    moved = dict(student.named_parameters())[name].detach().double().numpy() - old
    apart = np.linalg.norm(moved - (expected - old)) / np.linalg.norm(moved)
    assert apart < 0.02  # its products are in bfloat16


def test_a_step_of_the_rest_is_adamw_s(tiny_recipe: Recipe) -> None:
    """One step moves each weight of a vector by the rate, against its gradient's sign."""
    student, train = student_of(tiny_recipe, "train.optimizer=muon")
    optimizer = make_optimizer(student, train)
    norm = next(p for name, p in student.named_parameters() if "norm" in name)
    before = norm.detach().clone()
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.allclose(before - norm, torch.full_like(norm, train.lr), rtol=1e-3)


def test_muon_of_adapters_and_of_a_head_alone(tiny_recipe: Recipe, teacher_folder: Path) -> None:
    student = f"{{name: checkpoint, model: {teacher_folder}, lora: {{rank: 2}}}}"
    train = "{steps: 3, rows_per_step: 2, lr: 1e-2, device: cpu, optimizer: muon}"
    recipe = tiny_recipe(student=student, train=train, allow_identical="true")
    assert distill(recipe, out=recipe.parent / "lora").receipt()["heldout_best"]["heldout/loss"] > 0
    head, train = nn.Linear(4, 4), load_recipe(tiny_recipe(), ["train.optimizer=muon"]).train
    with pytest.raises(UserError, match="matrices of layers"):
        make_optimizer(head, train)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("optimizer: muon", marks=pytest.mark.soak),
        pytest.param("ema: 0.9", marks=pytest.mark.soak),
        "optimizer: sgd, ema: 0.5",
        "optimizer: muon, ema: 0.9, schedule: wsd",
    ],
)
def test_a_resumed_run_is_the_run_that_was_not_cut_off(
    tiny_recipe: Recipe, tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first checkpoint, and after its second."""
    train = f"{{steps: 10, rows_per_step: 2, lr: 1e-2, warmup: 2, save_every: 3, device: cpu, {options}}}"
    recipe = tiny_recipe(train=train, eval="{every: 4}")
    whole = essence(distill(recipe, out=tmp_path / "whole").path)
    for after in (1, 8):
        cut = tmp_path / f"cut-{after}"
        cut_off(recipe, cut, after, monkeypatch)
        distill(recipe, out=cut, resume=True)
        assert essence(cut) == whole, after


def test_a_checkpoint_without_its_average_is_damaged(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(train="{steps: 4, rows_per_step: 2, lr: 1e-2, save_every: 2, device: cpu, ema: 0.9}")
    cut_off(recipe, tmp_path / "cut", 3, monkeypatch)
    place = tmp_path / "cut" / "checkpoints" / "00000002"
    tensors = load_file(place / "tensors.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.endswith("/average")}, place / "tensors.safetensors")
    rewrite_manifest(place)
    with pytest.raises(UserError, match=r"optimizer/0/average: missing"):
        distill(recipe, out=tmp_path / "cut", resume=True)


def test_evaluations_and_the_saved_student_are_of_the_average_and_training_is_not(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average, from the weights of every step, in float64."""
    from potstill.training import loop

    seen: list[dict[str, torch.Tensor]] = []
    real = loop.update_average

    def watched(optimizer: Any, step: int) -> None:
        parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
        if not isinstance(parameters[0], FakeTensor):  # of the plan
            seen.append({str(number): p.double() for number, p in enumerate(parameters)})
        real(optimizer, step)

    monkeypatch.setattr(loop, "update_average", watched)
    train = "{steps: 15, rows_per_step: 2, lr: 3e-2, device: cpu, weight_decay: 0.0, optimizer: sgd, clip: null, %s}"
    objective = "{kd_weight: 0, ce_weight: 1}"
    run = distill(tiny_recipe(train=train % "ema: 0.6", objective=objective), out=tmp_path / "averaged")
    steps, averages = seen[:], seen[0]
    plain = distill(tiny_recipe(train=train % "ema: null", objective=objective), out=tmp_path / "plain")
    for step, weights in list(enumerate(steps))[1:]:
        decay = min(0.6, (1 + step) / (10 + step))
        averages = {n: decay * averages[n] + (1 - decay) * weights[n] for n in averages}

    def losses(of: Any) -> list[float]:
        return [line["train/loss"] for line in RunDir(of.path).metrics() if "train/loss" in line]

    assert losses(run) == losses(plain)
    assert run.receipt()["student_is_of_step"] == 15
    assert run.receipt()["heldout_best"] != plain.receipt()["heldout_best"]
    saved = sorted(
        tensor.double().sum().item()
        for tensor in load_file(run.path / "student" / "model.safetensors").values()
    )
    expected = sorted(tensor.sum().item() for tensor in averages.values())
    last = sorted(tensor.sum().item() for tensor in steps[-1].values())
    assert saved == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert saved != pytest.approx(last, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_ranks_have_one_muon_and_one_average(
    tiny_recipe: Recipe, forks: ForkServer, tmp_path: Path, parallel: str
) -> None:
    train = (TRAIN % f"parallel: {parallel}, optimizer: muon, ema: 0.9").replace("lr: 1e-2", "lr: 1e-3")
    recipe = tiny_recipe(train=train, eval="{every: 10}")
    alone = distill(recipe, out=tmp_path / "alone").path
    forks.ranks(2, "distill", recipe, "--out", tmp_path / "two")
    # Muon's products are in bfloat16, where the last bit of a float32 gradient may become one of its 8.
    assert_equal_runs(tmp_path / "two", alone, rel=2e-4)
