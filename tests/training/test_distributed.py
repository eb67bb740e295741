"""Several processes of one run, on the CPU: equal to one, resumed by other numbers of them, ended by a kill.

The first test and those of `make soak` start them by torchrun, the others by fork, with torchrun's environment.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_mixture, make_model
from ranks import launch, ranks
from safetensors.torch import load_file
from soak.forkserver import ForkServer

from potstill import distill
from potstill.runs.run_dir import RunDir

Recipe = Callable[..., Path]
# Five rows in micro-batches of two: three for two ranks, so that one rank has one without labels.
TRAIN = "{steps: 20, rows_per_step: 5, rows_per_micro_batch: 2, lr: 1e-2, device: cpu, save_every: 10, %s}"


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def assert_equal_runs(one: Path, other: Path, rel: float = 1e-5) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=rel)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    apart = {name: float((ours[name] - tensor).norm() / tensor.norm()) for name, tensor in theirs.items()}
    assert max(apart.values()) < rel, apart


def test_two_ranks_are_one_and_other_numbers_of_them_go_on(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """SGD, which knows the gradient's scale: DDP, resumed by one rank and by four. The student is measured and repaired."""
    recipe = tiny_recipe(
        train=TRAIN % "optimizer: sgd, parallel: ddp", student="{name: cut, layers: 2}", eval="{every: 10}"
    )
    alone = distill(recipe, out=tmp_path / "alone").path
    told = ranks(2, "distill", recipe, f"corpus.shards={tmp_path / 'shards'}", "--out", tmp_path / "two")
    assert told.count("step 20/20") == 1  # the first alone speaks
    assert_equal_runs(tmp_path / "two", alone)
    receipt = json.loads((tmp_path / "two" / "receipt.json").read_text())
    assert receipt["ranks"] == {"world": 2, "parallel": "ddp", "backend": "gloo"}
    assert receipt["teacher"]["unchanged_by_training"]

    back_to_step_10(tmp_path / "two", tmp_path / "on-1")
    assert_equal_runs(distill(recipe, resume=True, out=tmp_path / "on-1").path, alone)
    if os.environ.get("SOAK"):
        back_to_step_10(tmp_path / "two", tmp_path / "on-4")
        ranks(4, "distill", recipe, "--resume", "--out", tmp_path / "on-4")
        assert_equal_runs(tmp_path / "on-4", alone)


def back_to_step_10(of: Path, to: Path) -> None:
    """As a kill after the checkpoint of step 10 left it."""
    subprocess.run(["cp", "-r", of, to], check=True)
    subprocess.run(["rm", "-r", to / "checkpoints" / "00000020", to / "receipt.json"], check=True)
    (to / "status.json").write_text(json.dumps({"state": "running"}))


@pytest.mark.soak
def test_shards_of_student_and_teacher_are_the_whole(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """AdamW, an untied head, clipping, a sample before the receipt: FSDP2, and its checkpoint is any other's."""
    teacher = make_model(tmp_path / "untied", tie_word_embeddings=False)
    recipe = tiny_recipe(
        train=TRAIN % "clip: 0.5, parallel: fsdp",
        teacher=f"{{name: torch, model: {teacher}, sharded: true}}",
        eval="{every: 10, sample_prompt: the cat, sample_tokens: 4}",
    )
    alone = distill(recipe, out=tmp_path / "alone").path
    ranks(2, "distill", recipe, "--out", tmp_path / "two")
    assert_equal_runs(tmp_path / "two", alone)
    state, other = (
        load_file(folder / "checkpoints" / "00000020" / "tensors.safetensors")
        for folder in (tmp_path / "two", alone)
    )
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in other.items()}
    if not os.environ.get("SOAK"):
        return
    back_to_step_10(tmp_path / "two", tmp_path / "again")
    ranks(2, "distill", recipe, "--resume", "--out", tmp_path / "again")
    assert_equal_runs(tmp_path / "again", alone)


@pytest.mark.parametrize(
    ("parallel", "rows"),
    [
        ("ddp", 5),  # three micro-batches: one rank has one of the step's and one without labels
        pytest.param("ddp", 4, marks=pytest.mark.soak),  # one for each rank, which are counted as they go
        pytest.param("fsdp", 5, marks=pytest.mark.soak),
        pytest.param("fsdp", 4, marks=pytest.mark.soak),
    ],
)
def test_the_router_loss_is_that_of_all_ranks(
    tiny_recipe: Recipe, forks: ForkServer, tmp_path: Path, parallel: str, rows: int
) -> None:
    train = (TRAIN % f"optimizer: sgd, parallel: {parallel}").replace(
        "steps: 20, rows_per_step: 5", f"steps: 2, rows_per_step: {rows}"
    )
    recipe = tiny_recipe(
        student=f"{{name: checkpoint, model: {make_mixture(tmp_path / 'student')}}}", train=train
    )
    alone = distill(recipe, out=tmp_path / "alone").path
    forks.ranks(2, "distill", recipe, "--out", tmp_path / "two")
    assert_equal_runs(tmp_path / "two", alone)
    one, two = (RunDir(path).metrics() for path in (alone, tmp_path / "two"))
    for name in ("train/router_loss", "experts/share_max", "experts/share_min"):
        figures = [line[name] for line in one if name in line]
        assert len(figures) == 2 and figures == pytest.approx([x[name] for x in two if name in x], rel=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_adapters_of_experts_are_those_of_one_process(
    tiny_recipe: Recipe, tmp_path: Path, parallel: str
) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed; not run")
    student = f"{{name: checkpoint, model: {make_mixture(tmp_path / 'student')}, lora: {{rank: 4}}}}"
    recipe = tiny_recipe(student=student, train=TRAIN % f"optimizer: sgd, parallel: {parallel}")
    alone = distill(recipe, overrides=["train.steps=4"], out=tmp_path / "alone").path
    ranks(2, "distill", recipe, "train.steps=4", "--out", tmp_path / "two")
    assert_equal_runs(tmp_path / "two", alone)


@pytest.mark.soak
def test_a_killed_rank_ends_the_job_with_one_error_and_the_run_goes_on(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    train = TRAIN.replace("steps: 20", "steps: 400") % "parallel: ddp"
    recipe = tiny_recipe(train=train, eval="{}")
    process = launch(2, "distill", recipe, "--out", tmp_path / "run")
    while len(checkpoints(tmp_path / "run")) < 2:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.05)
    os.kill(child_of_rank(process.pid, 1), signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode != 0 and len(errors) == 1, err[-3000:]
    assert "another rank has ended" in errors[0] and "--resume" in errors[0]
    reached = len(losses(tmp_path / "run"))
    stopped = launch(2, "distill", recipe, "--resume", "--out", tmp_path / "run")
    while len(losses(tmp_path / "run")) < reached + 5:
        assert stopped.poll() is None, stopped.communicate()[1][-3000:]
        time.sleep(0.05)
    os.kill(
        child_of_rank(stopped.pid, 1), signal.SIGTERM
    )  # of any rank: all stop after the same step, and save
    stopped.communicate(timeout=100)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"
    # What was trained until here is what a run without a kill has trained.
    first = len(losses(tmp_path / "run"))
    whole = launch(2, "distill", recipe, "--out", tmp_path / "whole")
    while len(losses(tmp_path / "whole") if (tmp_path / "whole" / "metrics.jsonl").exists() else []) < first:
        assert whole.poll() is None, whole.communicate()[1][-3000:]
        time.sleep(0.05)
    os.kill(child_of_rank(whole.pid, 0), signal.SIGTERM)
    whole.communicate(timeout=100)
    assert losses(tmp_path / "whole")[:first] == losses(tmp_path / "run")


def checkpoints(run: Path) -> list[str]:
    folder = run / "checkpoints"
    return [name for name in os.listdir(folder) if name.isdecimal()] if folder.exists() else []


def child_of_rank(launcher: int, rank: int) -> int:
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{child}/environ').read_text()}":
            return int(child)
    raise AssertionError("no such rank")


@pytest.mark.soak
def test_adapters_in_shards_are_the_whole(tiny_recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed; not run")
    student = "{name: cut, layers: 2, lora: {rank: 4}}"
    recipe = tiny_recipe(train=TRAIN % "optimizer: sgd, parallel: fsdp", student=student)
    alone = distill(recipe, out=tmp_path / "alone").path
    ranks(2, "distill", recipe, "--out", tmp_path / "two")
    assert_equal_runs(tmp_path / "two", alone)


@pytest.mark.soak
def test_ranks_capture_one_store(tiny_recipe: Recipe, tmp_path: Path) -> None:
    capture: Any = "{name: topk, k: 5, rows_per_shard: 16}"
    recipe = tiny_recipe(capture=capture)
    ranks(2, "capture", recipe, "--out", tmp_path / "two")
    ranks(1, "capture", recipe, "--out", tmp_path / "one")
    for file in sorted((tmp_path / "one").glob("*.safetensors")):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes(), file.name
    assert (tmp_path / "two" / "manifest.json").read_bytes() == (
        tmp_path / "one" / "manifest.json"
    ).read_bytes()


@pytest.mark.soak
def test_what_every_rank_finds_wrong_is_said_once(tiny_recipe: Recipe, tmp_path: Path) -> None:
    process = launch(2, "distill", tiny_recipe(student="{name: cut, layers: 99}"), "--out", tmp_path / "run")
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert [line[:5] for line in err.splitlines() if "99" in line] == ["error"], err[-2000:]


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_two_ranks_write_what_one_writes(
    parallel: str, tiny_recipe: Recipe, forks: ForkServer, tmp_path: Path
) -> None:
    """Of five rows three are the student's: one rank writes two of them, under FSDP both write all."""
    recipe = tiny_recipe(
        train=TRAIN % f"optimizer: sgd, parallel: {parallel}",
        rollouts="{fraction: 0.6, max_new_tokens: 8, prompt_tokens: 6, every: 2}",
        eval="{every: 10}",
    )
    alone = distill(recipe, out=tmp_path / "alone").path
    forks.ranks(2, "distill", recipe, "--out", tmp_path / "two")
    assert_equal_runs(tmp_path / "two", alone)
    ids = [
        [load_file(path)["ids"].tolist() for path in sorted((folder / "rollouts").iterdir())]
        for folder in (tmp_path / "two", alone)
    ]
    assert ids[0] == ids[1] and len(ids[0]) == 10
