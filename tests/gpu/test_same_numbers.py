"""What must hold on a GPU, written once for every device: runs, teachers and resumes have the CPU's numbers.

On the CPU, where each test runs, too, a device is compared with itself: that tells whether the test can be run, and
that it fails where something is planted (tests/planted.py). `pytest -m gpu tests/gpu` runs them on a GPU alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model
from ranks import ranks
from safetensors.torch import load_file
from soak.forkserver import ForkServer

from potstill import CudaTrainerTeacher, TorchTeacher, distill
from potstill.runs.run_dir import RunDir
from potstill.types import Batch

Recipe = Callable[..., Path]
ON_GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; not run"),
    ],
)
DEVICES = ["cpu", ON_GPU]
TRAIN = "{steps: 10, rows_per_step: 4, rows_per_micro_batch: 2, lr: 1e-2, save_every: 5, device: %s%s}"


def run(recipe: Path, out: Path, *overrides: str, resume: bool = False) -> RunDir:
    return distill(recipe, overrides=[*overrides], out=out, resume=resume)


def losses(run: RunDir) -> list[float]:
    return [line["train/loss"] for line in run.metrics() if "train/loss" in line]


def student_of(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.student / "model.safetensors")


def furthest(one: RunDir, other: RunDir) -> float:
    """The largest distance of a tensor of the students, by its own size."""
    ours, theirs = student_of(one), student_of(other)
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_ten_steps_have_the_cpus_losses(
    device: str, precision: str, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    on_cpu = run(tiny_recipe(train=TRAIN % ("cpu", "")), tmp_path / "cpu")
    there = run(tiny_recipe(train=TRAIN % (device, f", precision: {precision}")), tmp_path / "there")
    assert len(losses(there)) == 10
    # Eight bits of a mantissa, and a model whose logits are some tens of nats apart.
    allowed = 1e-5 if precision == "float32" else 3e-2
    assert losses(there) == pytest.approx(losses(on_cpu), rel=allowed)
    assert str(there.receipt()["device"]).startswith(device)
    if precision == "float32":
        assert furthest(there, on_cpu) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_a_teachers_log_probabilities_are_the_librarys(device: str, teacher_folder: Path) -> None:
    """Each row's, in float32; in bfloat16 they are no further from these than the library's own are."""
    ids_BT = torch.randint(258, (5, 33), generator=torch.Generator().manual_seed(1)).to(device)
    exact = of_library(teacher_folder, ids_BT.cpu(), torch.float32)
    apart = {}
    for dtype in (torch.float32, torch.bfloat16):
        kind = CudaTrainerTeacher if device == "cuda" else TorchTeacher
        teacher = kind.for_inference(teacher_folder, device=device, dtype=dtype)
        ours = teacher.logits_per_position(ids_BT).float().cpu().log_softmax(-1)
        apart[dtype] = furthest_of_rows(ours, exact)
    assert apart[torch.float32].max() <= 1e-6
    theirs = furthest_of_rows(of_library(teacher_folder, ids_BT, torch.bfloat16), exact)
    assert (apart[torch.bfloat16] <= 1.5 * theirs).all(), (apart, theirs)


def of_library(folder: Path, ids_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(ids_BT.device)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids_BT).logits.float().cpu().log_softmax(-1)
    return found


def furthest_of_rows(one_BTV: torch.Tensor, other_BTV: torch.Tensor) -> torch.Tensor:
    return (one_BTV - other_BTV).abs().amax((1, 2)) / other_BTV.abs().amax((1, 2))


@pytest.mark.parametrize("device", DEVICES)
def test_a_packed_document_has_the_targets_that_it_has_alone(device: str, teacher_folder: Path) -> None:
    teacher = TorchTeacher.for_inference(teacher_folder, device=device, dtype=torch.float32)
    teacher.model.probe()
    assert not teacher.model.packing_fault
    ids_T = torch.randint(258, (48,), generator=torch.Generator().manual_seed(2))
    places_BT = torch.cat([torch.arange(17), torch.arange(31)])[None]
    together = hidden(teacher, ids_T[None], places_BT, device)
    apart = [
        hidden(teacher, part[None], torch.arange(len(part))[None], device)
        for part in (ids_T[:17], ids_T[17:])
    ]
    assert torch.allclose(together, torch.cat(apart), rtol=1e-5, atol=1e-5)


def hidden(teacher: Any, ids_BT: torch.Tensor, places_BT: torch.Tensor, device: str) -> torch.Tensor:
    N = ids_BT.numel()
    batch = Batch(torch.tensor([0]), ids_BT, places_BT, torch.arange(N), torch.zeros(N, dtype=torch.int64))
    found: torch.Tensor = teacher.targets(batch.to(torch.device(device))).hidden_NE
    return found.cpu()


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_that_goes_on_is_the_one_that_was_not_stopped(
    device: str, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe(train=TRAIN % (device, ""))
    whole = run(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "00000010")
    (tmp_path / "again" / "receipt.json").unlink()
    (tmp_path / "again" / "status.json").write_text(json.dumps({"state": "running"}))
    again = run(recipe, tmp_path / "again", resume=True)
    assert losses(again) == pytest.approx(losses(whole), rel=1e-6)
    assert furthest(again, whole) < (1e-6 if device == "cuda" else 1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_less_memory_is_the_same_run(device: str, tiny_recipe: Recipe, tmp_path: Path) -> None:
    plain = run(tiny_recipe(train=TRAIN % (device, "")), tmp_path / "plain")
    for kind in ("true", "selective"):
        lean = run(
            tiny_recipe(train=TRAIN % (device, f", activation_checkpointing: {kind}")), tmp_path / kind
        )
        assert losses(lean) == pytest.approx(losses(plain), rel=1e-6)


@pytest.mark.parametrize("device", [ON_GPU])
def test_compiled_steps_are_the_others(device: str, tiny_recipe: Recipe, tmp_path: Path) -> None:
    plain = run(tiny_recipe(train=TRAIN % (device, "")), tmp_path / "plain")
    compiled = run(tiny_recipe(train=TRAIN % (device, ", compile: true")), tmp_path / "compiled")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize("device", DEVICES)
def test_one_rank_of_fsdp_is_one_process(
    device: str, tiny_recipe: Recipe, forks: ForkServer, tmp_path: Path
) -> None:
    recipe = tiny_recipe(train=TRAIN % (device, ", parallel: fsdp"))
    alone = run(recipe, tmp_path / "alone")
    start = forks.ranks if device == "cpu" else ranks  # a fork has no GPU
    start(1, "distill", recipe, "--out", tmp_path / "rank")
    one = RunDir(tmp_path / "rank")
    assert losses(one) == pytest.approx(losses(alone), rel=1e-5)
    assert furthest(one, alone) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_a_student_with_padded_ids_learns_the_same_there(
    device: str, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """Both heads have more rows than the tokenizer has tokens, and their count is odd."""
    teacher = make_model(tmp_path / "padded", vocab_size=267)
    sections = {"teacher": f"{{name: torch, model: {teacher}}}"}
    on_cpu = run(tiny_recipe(train=TRAIN % ("cpu", ""), **sections), tmp_path / "cpu")
    there = run(tiny_recipe(train=TRAIN % (device, ""), **sections), tmp_path / "there")
    assert losses(there) == pytest.approx(losses(on_cpu), rel=1e-5)


def test_without_a_device_cuda_is_refused(tiny_recipe: Recipe, forks: ForkServer, tmp_path: Path) -> None:
    """On a machine that has one, too: it is hidden."""
    recipe = tiny_recipe(train=TRAIN % ("cuda", ""))
    end = forks.start(["distill", str(recipe), "--out", str(tmp_path / "run")])
    errors = [line for line in end.told.splitlines() if line.startswith("error: ")]
    assert end.code == 2 and len(errors) == 1 and "0 CUDA device" in errors[0], end.told
    assert "Traceback" not in end.told and not (tmp_path / "run").exists()
