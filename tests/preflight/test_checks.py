"""Each check goes red on its own planted fault, and on nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import signal
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import make_model
from safetensors.torch import load_file, save_file
from test_malformed import gguf_file, gguf_tensors
from tokenizers import processors

from potstill import UserError, distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.cli.main import main
from potstill.losses.targets import HiddenTargets
from potstill.models.student import Student
from potstill.preflight.bos_probe import texts_begin_as_the_teacher_reads_them
from potstill.preflight.checks import (
    cheap,
    machine_has_room,
    parameters_are_on_the_device,
    plan_of,
    weights_differ,
    window,
)
from potstill.preflight.same_model import SAME, rounding_kl
from potstill.preflight.trial_steps import check, trial
from potstill.training.optim import rates, set_lr
from potstill.types import Batch

Recipe = Callable[..., Path]
NOWHERE = Path("runs/not-there")


def red(setup: RunSetup) -> list[str]:
    return [finding.name for finding in check(setup, NOWHERE) if not finding.ok]


def setup_of(recipe: Path) -> RunSetup:
    return set_up(resolve(load_recipe(recipe)), lambda text: None)


def test_a_sound_recipe_has_no_red_line(tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tiny_recipe())]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "26 of 26 checks passed" and all(line.startswith("ok ") for line in told[:-1])


def test_check_ends_with_what_the_run_will_take(
    tiny_recipe: Recipe, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In units that show them, and after a red line, too."""
    number = r"\d+(\.\d+)? [KMG]iB"
    assert main(["check", str(tiny_recipe())]) == 0
    time, memory, disk, _ = capsys.readouterr().out.splitlines()[-4:]
    assert re.fullmatch(r"ok   projected time: \d+:\d\d for 4 steps of .* s, evaluations not counted", time)
    wanted = f"ok   projected memory: {number} at the peak, {number} measured so far, {number} available"
    assert re.fullmatch(wanted, memory)
    wanted = f"ok   projected disk: {number} at the most, {number} after it, {number} free"
    assert re.fullmatch(wanted, disk)
    identical = tiny_recipe(student=f"{{name: checkpoint, model: {teacher_folder}}}")
    assert main(["check", str(identical)]) == 2
    time, memory, disk, _ = capsys.readouterr().out.splitlines()[-4:]
    assert "projected time: not measured" in time
    assert "projected memory" in memory and "projected disk" in disk


def test_the_disk_check_counts_the_last_student_beside_the_one_before_and_each_checkpoint(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the files of a run that was planned: two students and a third checkpoint are there for a moment."""
    recipe = tiny_recipe(train="{steps: 6, rows_per_step: 2, lr: 1e-3, device: cpu, save_every: 2}")
    run = distill(recipe, out=tmp_path / "run")
    student, state = (
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in (run.student, run.checkpoints / "00000006")
    )
    setup = setup_of(recipe)
    planned = plan_of(setup)
    needed = max(2 * student + 2 * state, student + 3 * state)
    for free, enough in ((needed * 0.8, False), (needed * 1.2, True)):
        monkeypatch.setattr("potstill.preflight.checks.available", lambda recipe, folder, f=free: (2**40, f))
        _, disk = machine_has_room(setup, planned, NOWHERE)
        assert disk.ok == enough
        parts = r"a student of [\d.]+ KiB, .* checkpoints of [\d.]+ KiB each"
        assert re.fullmatch(rf"1\.\d+ MiB needed \({parts}\), [\d.]+ [KM]iB free", disk.figure)


def test_a_teacher_that_knows_no_more_than_chance_fails_the_check_and_warns_the_run(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(tiny_recipe(allow_weak_teacher="false"))
    assert main(["check", recipe]) == 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("RED")]
    assert "teacher's knowledge" in line and "allow_weak_teacher" in line
    assert re.search(r"cross-entropy is \d\.\d+ nats, chance is 5\.553", line)
    assert main(["distill", recipe, "--out", str(tmp_path / "run")]) == 0
    assert "warning: check: teacher's knowledge" in capsys.readouterr().err
    receipt = json.loads((tmp_path / "run/receipt.json").read_text())
    assert receipt["check_red"] == ["teacher's knowledge"]


def test_teacher_and_student_in_each_others_place_fail_the_check(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The better of two models as the student: here one that has learnt the corpus, against a random teacher."""
    learn = "{steps: 60, rows_per_step: 8, lr: 3e-3, device: cpu}"
    run = distill(tiny_recipe(train=learn, objective="{kd_weight: 0, ce_weight: 1}"), out=tmp_path / "good")
    model = make_model(tmp_path / "bad", seed=3)
    both = {"good": run.student, "bad": model}
    for teacher, student, code in (("good", "bad", 0), ("bad", "good", 2)):
        recipe = tiny_recipe(
            teacher=f"{{name: torch, model: {both[teacher]}}}",
            student=f"{{name: checkpoint, model: {both[student]}}}",
            allow_weak_teacher="false",
        )
        assert main(["check", str(recipe)]) == code
        red = [line for line in capsys.readouterr().out.splitlines() if line.startswith("RED")]
        assert [line.split(":")[0].split()[1] for line in red] == ["teacher's"] * (code == 2)


def test_check_leaves_nothing_behind_and_speaks_json(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*")}
    assert main(["check", str(recipe), "--json"]) == 0
    assert {path for path in tmp_path.rglob("*")} == before
    assert all(finding["ok"] and finding["figure"] for finding in json.loads(capsys.readouterr().out))


def test_a_check_that_is_stopped_removes_its_copy_of_the_student(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    save = Student.save
    saved: list[Path] = []

    def stopped(self: Student, folder: Path, tokenizer: Any) -> None:
        save(self, folder, tokenizer)
        saved.extend(folder.iterdir())
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Student, "save", stopped)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("nobody took the signal"))
    try:
        assert main(["check", str(recipe)]) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert saved and (tmp_path / "temporary") in saved[0].parents
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    "disguise", ["same folder", "another name and format", "all layers cut", "another precision"]
)
def test_a_teacher_that_is_its_student_is_red_under_any_name(
    disguise: str,
    tiny_recipe: Recipe,
    teacher_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dtype = "bfloat16" if disguise == "another precision" else "float32"
    student = f"{{name: checkpoint, model: {teacher_folder}}}"
    if disguise == "another name and format":
        hf = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
        hf.save_pretrained(tmp_path / "renamed", max_shard_size="40KB")
        student = f"{{name: checkpoint, model: {tmp_path / 'renamed'}}}"
    elif disguise == "all layers cut":
        student = "{name: cut, layers: 4}"
    elif disguise == "another precision":
        half = {
            name: tensor.bfloat16()
            for name, tensor in load_file(teacher_folder / "model.safetensors").items()
        }
        shutil.copytree(teacher_folder, tmp_path / "half")
        save_file(half, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
        student = f"{{name: checkpoint, model: {tmp_path / 'half'}}}"
    recipe = tiny_recipe(student=student, teacher=f"{{name: torch, model: {teacher_folder}, dtype: {dtype}}}")
    assert red(setup_of(recipe))[0] == "weights"
    before = set(tmp_path.iterdir())
    assert main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert set(tmp_path.iterdir()) == before
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told[0].startswith("error: check: weights: ") and "allow_identical: true" in told[0]
    allowed = distill(recipe, overrides=["allow_identical=true"], out=tmp_path / "run").receipt()
    assert allowed["allow_identical"] is True and "allowed by allow_identical" in allowed["check"]["weights"]


@pytest.mark.parametrize("teacher_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("copy", ["float16", "bfloat16", "a head of its own", "float16 in GGUF"])
def test_a_student_that_is_a_rounded_copy_of_its_teacher_is_refused(
    copy: str,
    teacher_dtype: str,
    tiny_recipe: Recipe,
    teacher_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher, student = teacher_folder, tmp_path / "copy"
    if copy == "float16 in GGUF":
        tensors = gguf_tensors()
        half = {n: t.astype(np.float16) if t.ndim > 1 else t for n, t in tensors.items()}
        teacher = gguf_file(tmp_path / "t.gguf", tensors, {})
        student = gguf_file(tmp_path / "s.gguf", half, {})
    else:
        hf = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
        if copy == "a head of its own":
            hf.lm_head.weight = torch.nn.Parameter(hf.model.embed_tokens.weight.detach().clone())
            hf.config.tie_word_embeddings = False
        else:
            hf.to(getattr(torch, copy))
        hf.save_pretrained(student)
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {teacher}, dtype: {teacher_dtype}}}",
        student=f"{{name: checkpoint, model: {student}}}",
    )
    assert main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told[0].startswith("error: check: weights: ") and "allow_identical: true" in told[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("by", [2.0**-7, 2.0**-10])
def test_a_student_one_number_or_one_step_beside_its_teacher_is_another_model(
    by: float, tiny_recipe: Recipe, teacher_folder: Path, tmp_path: Path
) -> None:
    """A tensor that rounding cannot have made; and an optimizer's step, which is small but not relative."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
    with torch.no_grad():
        if by == 2.0**-7:
            hf.model.layers[0].mlp.up_proj.weight[0, 0] *= 1 + by
        else:
            for parameter in hf.parameters():
                parameter += by * torch.randn_like(parameter).sign()
    hf.save_pretrained(tmp_path / "beside")
    setup = setup_of(tiny_recipe(student=f"{{name: checkpoint, model: {tmp_path / 'beside'}}}"))
    assert weights_differ(setup).ok


def test_what_weights_cannot_tell_the_first_kl_does(tiny_recipe: Recipe, teacher_folder: Path) -> None:
    """A model that is its teacher under other names: what is red is the KL, at the level of rounding."""
    setup = setup_of(tiny_recipe(student=f"{{name: checkpoint, model: {teacher_folder}}}"))
    with torch.no_grad():  # more than rounding can do to one number
        setup.student.model.hf.model.layers[0].mlp.up_proj.weight[0, 0] *= 1.1
    found = {finding.name: finding for finding in cheap(setup, plan_of(setup), NOWHERE)}
    assert found["weights"].ok and not found["KD term"].ok
    assert "rounding alone makes" in found["KD term"].figure
    with torch.no_grad():
        setup.student.model.hf.model.layers[0].mlp.up_proj.weight *= 1.3
    assert {finding.name: finding for finding in cheap(setup, plan_of(setup), NOWHERE)}["KD term"].ok


def test_the_kl_of_rounding_is_the_squared_error_times_the_variance() -> None:
    """Of two tokens with p and 1 - p the variance of the logit is p (1 - p) log(p / (1 - p))^2."""
    wanted = 2.0**-16 * 0.9 * 0.1 * math.log(9) ** 2
    assert rounding_kl(torch.tensor([[0.9, 0.1]]).log()) == pytest.approx(wanted, rel=1e-5)
    assert rounding_kl(torch.zeros(2, 8).log_softmax(-1)) == SAME


def test_an_identical_pair_is_no_fault_where_nothing_is_asked_of_the_teacher(
    tiny_recipe: Recipe, teacher_folder: Path
) -> None:
    student = f"{{name: checkpoint, model: {teacher_folder}}}"
    assert red(setup_of(tiny_recipe(student=student, objective="{kd_weight: 0, ce_weight: 1}"))) == []


def test_a_constant_teacher_is_red(tiny_recipe: Recipe) -> None:
    setup = setup_of(tiny_recipe())

    def constant(batch: Any) -> HiddenTargets:
        return HiddenTargets(torch.ones(len(batch.positions_N), 258), lambda logits: logits * 2)

    setup.teacher.targets = constant  # type: ignore[method-assign]
    assert red(setup) == ["teacher"]


def test_a_student_that_does_not_read_is_red(tiny_recipe: Recipe) -> None:
    setup = setup_of(tiny_recipe())
    body = setup.student.model.hf.base_model.forward

    def blind(input_ids: torch.Tensor, **inputs: Any) -> Any:
        return body(input_ids=torch.zeros_like(input_ids), **inputs)

    setup.student.model.hf.base_model.forward = blind
    assert "student" in red(setup)


def test_a_loss_that_reads_masked_positions_is_red(tiny_recipe: Recipe) -> None:
    setup = setup_of(tiny_recipe())

    def leaking(batch: Any) -> torch.Tensor:
        hidden_ND = setup.student.model.hidden(batch.input_ids_BT, batch.position_ids_BT).flatten(0, 1)
        return hidden_ND[batch.positions_N] + 1e-3 * hidden_ND.mean(0)

    setup.student.hidden_ND = leaking  # type: ignore[method-assign]
    assert "mask" in red(setup)


@pytest.mark.parametrize("blind_to", [0, 1])
def test_a_row_that_does_not_train_is_red(tiny_recipe: Recipe, blind_to: int) -> None:
    setup = setup_of(tiny_recipe())

    def one_row(batch: Any) -> torch.Tensor:
        hidden_BTD = setup.student.model.hidden(batch.input_ids_BT, batch.position_ids_BT)
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.positions_N]
        of_row_N = batch.positions_N // hidden_BTD.shape[1]
        return torch.where((of_row_N == blind_to)[:, None], hidden_ND.detach(), hidden_ND)

    setup.student.hidden_ND = one_row  # type: ignore[method-assign]
    assert {"mask", "rows"} <= set(red(setup))


def test_a_corpus_with_an_id_that_is_not_shared_is_red(tiny_recipe: Recipe) -> None:
    setup = setup_of(tiny_recipe())
    assert "vocabulary" in red(dataclasses.replace(setup, shared=dataclasses.replace(setup.shared, ids=60)))


def test_a_file_that_was_not_read_to_its_end_is_red(tiny_recipe: Recipe) -> None:
    setup = setup_of(tiny_recipe())
    setup.corpus.manifest["files"][3]["sha256"] = None
    assert "files" in red(setup)


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_a_run_that_does_not_fit_is_red_and_not_begun(
    what: str, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = (2**20, 2**40) if what == "memory" else (2**40, 2**10)
    monkeypatch.setattr("potstill.preflight.checks.available", lambda recipe, folder: there)
    assert red(setup_of(tiny_recipe())) == [what]
    with pytest.raises(
        UserError, match=f"check: {what}: .* (needed|planned).*, 1.0[0 ]*[KM]iB (free|available)"
    ):
        distill(tiny_recipe(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_planned_runs_and_says_so(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise NotImplementedError("aten::nonzero without data")

    monkeypatch.setattr("potstill.preflight.checks.plan", fails)
    receipt = distill(tiny_recipe(), out=tmp_path / "run").receipt()
    assert receipt["plan"]["predicted_peak_gib"] == "not planned: aten::nonzero without data."


def test_the_plan_is_in_the_receipt_beside_what_was_measured(tiny_recipe: Recipe, tmp_path: Path) -> None:
    compared = distill(tiny_recipe(), out=tmp_path / "run").receipt()["plan"]
    assert compared["measured_peak_gib"] > 0 and compared["ratio"] > 0
    assert sum(compared["parts_gib"].values()) == pytest.approx(compared["predicted_peak_gib"], abs=0.01)


def test_a_first_step_past_its_deadline_is_red(tiny_recipe: Recipe) -> None:
    assert red(setup_of(tiny_recipe(guard="{first_step_s: 1e-6}"))) == ["first step"]


def test_the_cheap_half_leaves_weights_and_random_state_as_they_were(tiny_recipe: Recipe) -> None:
    setup = setup_of(tiny_recipe())
    weights, state = setup.student.weights_sha256(), torch.get_rng_state()
    assert all(finding.ok for finding in cheap(setup, plan_of(setup), NOWHERE))
    assert setup.student.weights_sha256() == weights and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in setup.student.parameters())


def test_what_a_run_checked_is_in_its_receipt(tiny_recipe: Recipe, tmp_path: Path) -> None:
    checked = distill(tiny_recipe(), out=tmp_path / "run").receipt()["check"]
    assert {"vocabulary", "weights", "KD term", "mask", "rows"} <= checked.keys()


@pytest.mark.parametrize("first", [0, 5, 40, 90])
def test_a_window_of_a_batch_keeps_its_labels(first: int) -> None:
    """From the first supervised position on, at most 64 columns, the same ids under the same labels."""
    T, B = 100, 2
    ids_BT = torch.arange(B * T).view(B, T)
    positions_N = torch.cat([torch.arange(first, T - 1), T + torch.arange(first + 2, T - 1)])
    batch = Batch(torch.arange(B), ids_BT, ids_BT % T, positions_N, positions_N + 1)
    seen = window(batch)
    assert seen.input_ids_BT.shape == (B, 64) and len(seen.positions_N) > 0
    assert torch.equal(seen.input_ids_BT.flatten()[seen.positions_N] + 1, seen.labels_N)
    assert first in seen.position_ids_BT[0]


def test_shifted_labels_are_red(tiny_recipe: Recipe) -> None:
    setup = setup_of(tiny_recipe())
    setup.corpus.train.ids[1:] = setup.corpus.train.ids[:-1].copy()
    batch = type(setup.corpus.train).batch

    def shifted(self: Any, rows: Any) -> Any:
        found = batch(self, rows)
        return type(found)(
            found.rows_B, found.input_ids_BT, found.position_ids_BT, found.positions_N, found.labels_N.roll(1)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(setup.corpus.train), "batch", shifted)
        assert "labels" in red(setup)


def test_a_frozen_embedding_is_red(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.optim.AdamW

    def without_embedding(groups: Any, **options: Any) -> Any:
        for group in groups:
            group["params"] = [p for p in group["params"] if len(p) != 258]
        return make(groups, **options)

    monkeypatch.setattr("potstill.training.optim.AdamW", without_embedding)
    assert red(setup_of(tiny_recipe())) == ["weights move"]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_embedding_without_a_gradient_is_red_though_decay_moves_it(
    weight_decay: float, tiny_recipe: Recipe
) -> None:
    train = f"{{steps: 4, rows_per_step: 4, lr: 1e-3, weight_decay: {weight_decay}, device: cpu}}"
    setup = setup_of(tiny_recipe(train=train))
    up_proj = setup.student.model.hf.model.layers[0].mlp.up_proj.weight
    up_proj.register_hook(torch.zeros_like)
    assert red(setup) == ["weights move"]


def test_a_long_warm_up_starts_too_slowly_to_move_a_norm_and_is_not_red(tiny_recipe: Recipe) -> None:
    train = "{steps: 100000, rows_per_step: 4, lr: 1e-4, warmup: 50000, device: cpu}"
    setup = setup_of(tiny_recipe(train=train))
    (moved,) = [finding for finding in check(setup, NOWHERE) if finding.name == "weights move"]
    assert moved.ok and "the rate is too low for the others" in moved.figure


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_tensor_elsewhere_is_red_and_named(who: str, tiny_recipe: Recipe) -> None:
    """One is enough, of either model."""
    setup = setup_of(tiny_recipe())
    assert parameters_are_on_the_device(setup).ok
    model: Any = setup.teacher if who == "teacher" else setup.student
    layer = model.model.hf.model.layers[1].mlp
    layer.up_proj.to("meta")
    found = parameters_are_on_the_device(setup)
    assert not found.ok and "up_proj.weight" in found.advice
    total = sum(1 for of in (setup.teacher, setup.student) for _ in of.model.named_parameters())  # type: ignore[attr-defined]
    assert found.figure == f"{total - 1} of {total} tensors on cpu"


def test_only_the_first_of_the_ten_steps_take_every_row(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    setup = setup_of(tiny_recipe(train="{steps: 12, rows_per_step: 4, lr: 1e-3, device: cpu}"))
    real = setup.corpus.train.batch
    monkeypatch.setattr(
        type(setup.corpus.train), "batch", lambda self, rows: seen.append(len(rows)) or real(rows)
    )
    found = {finding.name: finding for finding in trial(setup)}
    assert seen[1:] == [4, 4, 4, *[1] * 7]  # after a held-out row
    assert "10 real steps, the last 7 with a quarter of the rows" in found["steps"].figure


def test_a_rate_that_is_not_the_schedule_s_is_red(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.training.loop.lr_at", lambda step, plan: plan.lr)
    assert red(setup_of(tiny_recipe())) == ["learning rate"]


def test_a_rate_that_reaches_only_the_first_group_is_red_and_not_logged(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second group has the norms: a run that leaves it at the first rate looks as it should."""

    def first_alone(optimizer: torch.optim.Optimizer, lr: float) -> float:
        optimizer.param_groups[0]["lr"] = lr
        return lr

    monkeypatch.setattr("potstill.training.loop.set_lr", first_alone)
    assert main(["check", str(tiny_recipe())]) == 2
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("RED")]
    assert len(told) == 1 and "learning rate: 0.001 in group 1 at step 2, 0.0" in told[0]


def test_the_logged_rate_is_of_the_group_that_is_furthest_off() -> None:
    class Deaf(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            pass

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    assert set_lr(optimizer, 0.25) == 0.25
    optimizer.param_groups.append(Deaf(optimizer.param_groups[0], lr=0.5))
    assert set_lr(optimizer, 0.125) == 0.5 and rates(optimizer) == [0.125, 0.5]


def test_a_head_that_changed_after_it_was_probed_is_red(tiny_recipe: Recipe) -> None:
    setup = setup_of(tiny_recipe())
    setup.student.model.hf.config.logit_scale = 3.0  # config drifted: our head scales, the model does not
    assert "cross-entropy" in red(setup)


def test_opposite_rows_that_do_not_cancel_are_red(tiny_recipe: Recipe) -> None:
    """A gradient of which the second row's counts one and a half times."""
    setup = setup_of(tiny_recipe())

    def lopsided(batch: Any) -> torch.Tensor:
        hidden_BTD = setup.student.model.hidden(batch.input_ids_BT, batch.position_ids_BT)
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.positions_N]
        more_N = 0.5 * (batch.positions_N >= hidden_BTD.shape[1])[:, None]
        return hidden_ND + more_N * (hidden_ND - hidden_ND.detach())

    setup.student.hidden_ND = lopsided  # type: ignore[method-assign]
    assert red(setup) == ["rows"]


def test_a_student_far_above_chance_is_red(tiny_recipe: Recipe, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "loud", seed=8, initializer_range=1.0)
    assert "chance" in red(setup_of(tiny_recipe(student=f"{{name: checkpoint, model: {folder}}}")))


def test_a_student_that_saves_something_else_is_red(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of(tiny_recipe())
    save = type(setup.student).save

    def lossy(self: Any, folder: Path, tokenizer: Any) -> None:
        kept = self.model.hf.model.norm.weight.clone()
        with torch.no_grad():
            self.model.hf.model.norm.weight[0] += 1
        save(self, folder, tokenizer)
        with torch.no_grad():
            self.model.hf.model.norm.weight.copy_(kept)

    monkeypatch.setattr(type(setup.student), "save", lossy)
    assert red(setup) == ["save and reload"]


def test_a_red_line_is_exit_code_two_with_its_advice(
    tiny_recipe: Recipe, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(student=f"{{name: checkpoint, model: {teacher_folder}}}")
    assert main(["check", str(recipe)]) == 2
    told = capsys.readouterr().out
    assert "RED  KD term: KL to the teacher" in told and "nothing would be learned" in told


@pytest.mark.parametrize(
    ("verb", "flags"), [("distill", ["--smoke", "2"]), ("plan", ["--measure"]), ("demo", ["--smoke", "1"])]
)
def test_no_step_is_tried_past_a_red_line(
    verb: str,
    flags: list[str],
    tiny_recipe: Recipe,
    teacher_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tiny_recipe(student=f"{{name: checkpoint, model: {teacher_folder}}}")
    if verb == "demo":
        monkeypatch.setattr("potstill.cli.distill.resources.files", lambda package: recipe.parent)
        recipe.rename(recipe.with_name("demo.yaml"))
    assert main([verb, *([] if verb == "demo" else [str(recipe)]), *flags]) == 2
    told = capsys.readouterr()
    assert "error: check: weights: " in told.err and "step 1/" not in told.err and not told.out


def test_steps_that_leave_the_numbers_are_red(tiny_recipe: Recipe) -> None:
    train = "{steps: 10, rows_per_step: 4, lr: 1e30, clip: null, device: cpu}"
    assert red(setup_of(tiny_recipe(train=train))) == ["steps"]


def test_the_worth_of_a_bos_is_shown_where_the_tokenizer_has_one(tmp_path: Path, tiny_recipe: Recipe) -> None:
    """The same labels with and without; the independent value is Transformers' own loss on each document."""
    teacher = make_model(tmp_path / "T")
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    tokenizer.bos_token = "<pad>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", tokenizer.convert_tokens_to_ids("<pad>"))]
    )
    tokenizer.save_pretrained(teacher)
    found = {}
    for bos in ("null", "false"):
        recipe = tiny_recipe(
            corpus=f"{{name: text, path: {tmp_path / 'text'}, tokens_per_row: 64, heldout_rows: 2, bos: {bos}}}",
            teacher=f"{{name: torch, model: {teacher}}}",
        )
        (tmp_path / "text").mkdir(exist_ok=True)
        for number in range(20):
            (tmp_path / "text" / f"{number}.txt").write_text(f"the cat sat {number} on it")
        setup = setup_of(recipe)
        (finding,) = texts_begin_as_the_teacher_reads_them(setup)
        found[bos] = [float(number) for number in re.findall(r"\d+\.\d{3}", finding.figure)]
        rows = setup.corpus.heldout
        hf = transformers.AutoModelForCausalLM.from_pretrained(teacher).eval()
        begin = [tokenizer.bos_token_id]
        for place, before in enumerate((begin, [])):
            nats, count = 0.0, 0
            for start, end in list(pairwise([*rows.starts.tolist(), len(rows.ids)]))[:2]:
                ids = rows.ids[start:end].tolist()
                ids = before + (ids[1:] if bos == "null" else ids)
                with torch.no_grad():
                    logp_TV = hf(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                for at in range(len(before) + 1, len(ids)):
                    nats, count = nats - float(logp_TV[at - 1, ids[at]]), count + 1
            assert found[bos][place] == pytest.approx(nats / count, abs=6e-4)
    assert "texts begin without it" in finding.figure
