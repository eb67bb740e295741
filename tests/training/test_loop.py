"""The loop, through `distill`: the rate it sets, the weights it moves, the lines it writes, the student it
keeps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model, tiny_config
from safetensors.torch import load_file, save_file

from potstill import UserError, distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import set_up
from potstill.io.terminal import Display
from potstill.training.loop import Hooks, train
from potstill.training.optim import lr_at, make_optimizer

Recipe = Callable[..., Path]


def steps_of(run: Any) -> list[dict[str, float]]:
    return [line for line in run.metrics() if "train/loss" in line]


def test_the_learning_rate_read_back_is_the_schedule(tiny_recipe: Recipe, tmp_path: Path) -> None:
    train_section = "{steps: 9, rows_per_step: 1, lr: 2e-3, warmup: 3, final_lr_ratio: 0.25, device: cpu}"
    run = distill(tiny_recipe(train=train_section), out=tmp_path / "run")
    expected = [2e-3 * (i + 1) / 3 for i in range(3)]
    expected += [2e-3 * (0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * i / 5))) for i in range(6)]
    assert [line["train/lr"] for line in steps_of(run)] == pytest.approx(expected, rel=1e-12)
    assert expected[-1] == pytest.approx(5e-4)


def test_one_step_moves_every_trainable_tensor_and_keeps_ties(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(train="{steps: 1, rows_per_step: 4, lr: 1e-3, device: cpu}")
    setup = set_up(resolve(load_recipe(recipe)), lambda text: None)
    before = {name: p.detach().clone() for name, p in setup.student.model.hf.named_parameters()}
    run = distill(recipe, out=tmp_path / "run")
    after = load_file(run.student / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    hf = transformers.AutoModelForCausalLM.from_pretrained(run.student)
    assert hf.get_output_embeddings().weight is hf.get_input_embeddings().weight


def test_each_step_writes_one_line_whose_terms_add_up(tiny_recipe: Recipe, tmp_path: Path) -> None:
    objective = "{kd_weight: 0.7, ce_weight: 0.2, temperature: 2.0, chunk: 16}"
    run = distill(
        tiny_recipe(objective=objective), out=tmp_path / "run", overrides=["train.rows_per_micro_batch=3"]
    )
    lines = steps_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["train/loss"] == pytest.approx(0.2 * line["train/ce"] + 0.7 * line["train/kd"], rel=1e-6)
        assert line["train/kd"] > 0 and line["train/grad_norm"] > 0 and line["speed/tokens_per_s"] > 0
    setup = set_up(resolve(load_recipe(run.resolved)), lambda text: None)
    assert [line["train/positions"] for line in lines] == [
        sum(len(batch.positions_N) for batch in setup.data().step(step)) for step in range(4)
    ]


def test_held_out_rows_are_measured_at_the_start_at_intervals_and_at_the_end(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    run = distill(tiny_recipe(), out=tmp_path / "run", overrides=["train.steps=5", "eval.every=2"])
    assert [line["step"] for line in run.metrics() if "heldout/ce" in line] == [0, 2, 4, 5]


def test_the_same_recipe_gives_the_same_bits(tiny_recipe: Recipe, tmp_path: Path) -> None:
    runs = [distill(tiny_recipe(), out=tmp_path / name) for name in ("one", "two")]
    assert len({run.receipt()["student"]["weights_sha256_end"] for run in runs}) == 1
    other = distill(tiny_recipe(), out=tmp_path / "three", overrides=["train.seed=1"])
    assert (
        other.receipt()["student"]["weights_sha256_end"] != runs[0].receipt()["student"]["weights_sha256_end"]
    )


def test_best_is_the_lowest_held_out_loss_and_nothing_else(tiny_recipe: Recipe) -> None:
    """Four evaluations, the third one best; other metrics say otherwise and are not asked."""
    setup = set_up(resolve(load_recipe(tiny_recipe(), ["train.steps=3", "eval.every=1"])), lambda text: None)
    losses = iter([4.0, 3.0, 2.0, 2.5])
    kept: list[int] = []

    def evaluate(step: int) -> dict[str, float]:
        return {"heldout/loss": next(losses), "heldout/ce": -float(step)}

    hooks = Hooks(evaluate, lambda step, metrics: None, lambda step, metrics: kept.append(step))
    outcome = train(setup.student, setup.teacher, setup.data(), setup.recipe, hooks)
    assert kept == [0, 1, 2] and outcome.best_step == 2
    assert outcome.best["heldout/loss"] == 2.0 and outcome.last["heldout/loss"] == 2.5


def test_an_untouched_student_that_nothing_beats_is_kept_and_said_to_be(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Teacher and student are one model: nothing can be better than the start."""
    folder = make_model(tmp_path / "model")
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {folder}}}",
        student=f"{{name: checkpoint, model: {folder}}}",
        objective="{kd_weight: 1, ce_weight: 0}",
        train="{steps: 2, rows_per_step: 2, lr: 0.1, device: cpu}",
        allow_identical="true",
    )
    run = distill(recipe, out=tmp_path / "run", display=Display())
    assert run.receipt()["student_is_of_step"] == 0
    assert run.receipt()["allow_identical"] and "allowed by" in run.receipt()["check"]["weights"]
    assert run.receipt()["heldout_first"]["heldout/kl"] < 1e-6
    assert torch.equal(
        load_file(run.student / "model.safetensors")["model.norm.weight"],
        load_file(folder / "model.safetensors")["model.norm.weight"],
    )
    assert "the saved student is the untouched one" in capsys.readouterr().err


def test_without_kd_the_teacher_has_no_say(tiny_recipe: Recipe, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=9)
    student = make_model(tmp_path / "student", seed=4)
    hashes = []
    for number, teacher in enumerate((other, make_model(tmp_path / "third", seed=10))):
        recipe = tiny_recipe(
            teacher=f"{{name: torch, model: {teacher}}}",
            student=f"{{name: checkpoint, model: {student}}}",
            objective="{kd_weight: 0, ce_weight: 1}",
        )
        hashes.append(
            distill(recipe, out=tmp_path / f"run{number}").receipt()["student"]["weights_sha256_end"]
        )
    assert hashes[0] == hashes[1]


def test_bfloat16_products_stay_close_to_float32(tiny_recipe: Recipe, tmp_path: Path) -> None:
    full = distill(tiny_recipe(), out=tmp_path / "full")
    half = distill(tiny_recipe(), out=tmp_path / "half", overrides=["train.precision=bfloat16"])
    assert half.receipt()["weights_dtype"] == "float32"
    gaps = [
        abs(a["train/loss"] - b["train/loss"]) / a["train/loss"]
        for a, b in zip(steps_of(full), steps_of(half), strict=True)
    ]
    assert 0 < max(gaps) < 0.05


@pytest.mark.parametrize(
    "fault", [RuntimeError("the engine stalled"), ValueError("no such row"), OSError("disk gone")]
)
def test_a_teacher_that_fails_ends_the_run_by_name(tiny_recipe: Recipe, fault: Exception) -> None:
    setup = set_up(resolve(load_recipe(tiny_recipe())), lambda text: None)

    class Broken:
        reads_on_cpu = False

        def targets(self, batch: Any) -> Any:
            raise fault

    before = setup.student.weights_sha256()
    with pytest.raises(
        UserError, match=rf"step 1: the teacher failed on rows \[.*\]: {type(fault).__name__}: {fault}"
    ):
        run_loop(setup, Broken())
    assert setup.student.weights_sha256() == before


def test_a_teacher_that_answers_for_other_positions_ends_the_run(tiny_recipe: Recipe) -> None:
    setup = set_up(resolve(load_recipe(tiny_recipe())), lambda text: None)

    class Short:
        reads_on_cpu = False

        def targets(self, batch: Any) -> Any:
            return setup.teacher.targets(batch)[: len(batch.positions_N) - 1]

    with pytest.raises(UserError, match="the teacher gave targets for"):
        run_loop(setup, Short())


@pytest.mark.parametrize("where", ["teacher", "student"])
def test_logits_that_are_not_finite_stop_the_step_with_its_rows_and_touch_no_weight(
    tiny_recipe: Recipe, where: str
) -> None:
    setup = set_up(resolve(load_recipe(tiny_recipe())), lambda text: None)
    broken = (setup.teacher.model if where == "teacher" else setup.student.model).hf
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    before = setup.student.weights_sha256()
    with pytest.raises(UserError, match=r"step 1, rows \[\d+, \d+, \d+, \d+\]: objective: \w+ is nan over"):
        run_loop(setup, setup.teacher)
    assert setup.student.weights_sha256() == before


def run_loop(setup: Any, teacher: Any) -> None:
    hooks = Hooks(lambda step: {"heldout/loss": 1.0}, lambda step, metrics: None, lambda step, metrics: None)
    train(setup.student, teacher, setup.data(), setup.recipe, hooks)


def test_norms_and_biases_do_not_decay(tiny_recipe: Recipe) -> None:
    setup = set_up(resolve(load_recipe(tiny_recipe())), lambda text: None)
    decayed, kept = make_optimizer(setup.student, setup.recipe.train).param_groups
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(setup.student.parameters()))


def test_a_schedule_without_decay_is_constant(tiny_recipe: Recipe) -> None:
    plan = load_recipe(tiny_recipe(), ["train.final_lr_ratio=1.0", "train.lr=0.5"]).train
    assert {lr_at(step, plan) for step in range(plan.steps)} == {0.5}


def table_recipe(tiny_recipe: Recipe, tmp_path: Path, zeroed: bool) -> tuple[Path, torch.Tensor]:
    """A first-order Markov chain over 16 ids as the teacher, uniform random ids as the corpus, a random
    small student.
    """
    vocabulary = 16
    table_VV = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0)) * 2
    save_file({"logits": table_VV}, tmp_path / "table.safetensors")
    ids = torch.randint(0, vocabulary, (20000,), generator=torch.Generator().manual_seed(1))
    (tmp_path / "ids.bin").write_bytes(ids.numpy().astype("<u2").tobytes())
    tiny_config(
        vocab_size=vocabulary,
        num_hidden_layers=1,
        initializer_range=0.1,
        eos_token_id=None,
        pad_token_id=None,
    ).save_pretrained(tmp_path / "config")
    recipe = tiny_recipe(
        corpus=f"{{name: tokens, path: {tmp_path / 'ids.bin'}, dtype: uint16, tokens_per_row: 32, heldout_rows: 8}}",
        teacher=f"{{name: table, path: {tmp_path / 'table.safetensors'}}}",
        student=f"{{name: config, model: {tmp_path / 'config'}}}",
        objective="{kd_weight: 0, ce_weight: 1}" if zeroed else "{kd_weight: 1, ce_weight: 0}",
        train="{steps: 200, rows_per_step: 8, lr: 1e-2, warmup: 10, weight_decay: 0.0, final_lr_ratio: 0.02, device: cpu}",
    )
    return recipe, table_VV


def test_a_student_recovers_a_known_teacher_and_without_its_signal_it_does_not(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe, table_VV = table_recipe(tiny_recipe, tmp_path, zeroed=False)
    run = distill(recipe, out=tmp_path / "taught")
    receipt = run.receipt()
    assert receipt["heldout_first"]["heldout/kl"] > 1
    assert receipt["heldout_last"]["heldout/kl"] < 0.01

    hf = transformers.AutoModelForCausalLM.from_pretrained(run.student)
    with torch.no_grad():
        logp_VV = hf(torch.arange(16)[:, None]).logits[:, 0].log_softmax(-1)
    truth_VV = table_VV.log_softmax(-1)
    assert float((truth_VV.exp() * (truth_VV - logp_VV)).sum(-1).mean()) < 0.05

    recipe, _ = table_recipe(tiny_recipe, tmp_path, zeroed=True)
    assert distill(recipe, out=tmp_path / "untaught").receipt()["heldout_last"]["heldout/kl"] > 0.5


def test_status_says_how_a_run_ended(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert distill(tiny_recipe(), out=tmp_path / "good").status() == {"state": "finished"}

    def stall(*args: Any) -> Any:
        raise RuntimeError("the engine stalled")

    with monkeypatch.context() as patch:
        patch.setattr("potstill.teachers.hf.TorchTeacher.targets", stall)
        with pytest.raises(UserError, match=r"step 0: the teacher failed on rows .*the engine stalled"):
            distill(tiny_recipe(), out=tmp_path / "not begun")
    assert not (tmp_path / "not begun").exists()
    monkeypatch.setattr("potstill.workflows.distill.heldout", stall)
    with pytest.raises(RuntimeError, match="the engine stalled"):
        distill(tiny_recipe(), out=tmp_path / "bad")
    status = json.loads((tmp_path / "bad" / "status.json").read_text())
    assert status["state"] == "failed" and "the engine stalled" in status["why"]
