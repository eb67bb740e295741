"""Rollouts by a vLLM engine: the real one where `POTSTILL_VLLM` names its Python, and what goes wrong with any."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_model

from potstill import UserError, distill, load_recipe
from potstill.data.prompts import Prompt
from potstill.models.causal_lm import CausalLM
from potstill.models.student import from_checkpoint
from potstill.recipe.sections_rollouts import RolloutsConfig
from potstill.training.engines import OwnEngine, VllmEngine, gap

Recipe = Callable[..., Path]
OWN = "max_new_tokens: 8, prompt_tokens: 6"
REAL = os.environ.get("POTSTILL_VLLM")


def python_with(folder: Path, vllm: str) -> Path:
    """A Python whose module `vllm` is this text."""
    (folder / "modules").mkdir(parents=True)
    (folder / "modules" / "vllm.py").write_text(vllm)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder / "modules"} exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


# What vLLM is asked for, answered by the student's own folder through Transformers.
DOUBLE = """
import os
from types import SimpleNamespace as Of

import torch
import transformers

__version__ = "a double"


class SamplingParams(Of):
    pass


class LLM:
    def __init__(self, model, **options):
        self.folder, self.options = model, options

    def collective_rpc(self, what):
        if what == "pack_again":
            return
        assert what == "reload_weights"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32")

    def generate(self, prompts, rows, use_tqdm):
        {before}
        return [self.one(prompt["prompt_token_ids"], row) for prompt, row in zip(prompts, rows)]

    def one(self, ids, row):
        generator, new, logps = torch.Generator().manual_seed(row.seed), [], []
        while len(new) < row.max_tokens and not (new and new[-1] in row.stop_token_ids):
            with torch.no_grad():
                logp = self.model(torch.tensor([[*ids, *new]])).logits[0, -1].log_softmax(-1)
            token = int(torch.multinomial((logp / row.temperature).softmax(-1), 1, generator=generator))
            new.append(token)
            logps.append({{token: Of(logprob=float(logp[token]) + {shift})}})
        return Of(outputs=[Of(token_ids=new, logprobs=logps)])
"""


def double(folder: Path, before: str = "pass", shift: float = 0.0) -> Path:
    return python_with(folder, DOUBLE.format(before=before, shift=shift))


def recipe_with(tiny_recipe: Recipe, python: Path | str, more: str = "") -> Path:
    return tiny_recipe(rollouts=f"{{{OWN}, engine: vllm, vllm_python: {python}{more}}}")


def test_an_engine_gets_the_weights_of_each_step_and_what_it_wrote_is_read_again(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """Its log-probabilities are the trainer's at every step, which those of older weights would not be."""
    recipe = recipe_with(tiny_recipe, double(tmp_path / "env"), ", max_engine_gap: 1e-4")
    changed = ["train.lr=1e-2", "train.save_every=2"]
    run = distill(recipe, out=tmp_path / "run", overrides=changed)
    gaps = [line["rollout/engine_gap"] for line in run.metrics() if "rollout/engine_gap" in line]
    assert len(gaps) == 4 and max(gaps) < 1e-4
    written = {path.name: path.read_bytes() for path in run.rollouts.iterdir()}
    shutil.rmtree(run.checkpoints / "00000004")
    (run.path / "receipt.json").unlink()
    (run.path / "status.json").write_text('{"state": "running"}')
    weights = run.student / "model.safetensors"
    before = weights.read_bytes()
    # The engine is not needed for what there is.
    (tmp_path / "env" / "modules" / "vllm.py").write_text("raise ImportError('gone')")
    again = distill(recipe, out=run.path, resume=True, overrides=changed)
    assert {path.name: path.read_bytes() for path in again.rollouts.iterdir()} == written
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"shift": 0.2},
            r"step 1: the engine's log-probabilities .* 0\.2 nats .* rollouts.max_engine_gap \(0\.05\)",
        ),
        pytest.param(
            {"before": "os._exit(7)"},
            r"the vLLM process has ended: it says no error. Start .* --resume",
            marks=pytest.mark.soak,
        ),
        ({"before": "raise ValueError('no room')"}, r"the vLLM process has ended: ValueError: no room"),
    ],
)
def test_an_engine_that_goes_wrong_ends_the_run_in_one_line(
    fault: dict[str, object], message: str, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = recipe_with(tiny_recipe, double(tmp_path / "env", **fault))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message) as caught:
        distill(recipe, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "rollouts").exists()  # what it wrote is not kept


def test_a_python_without_vllm_is_named(tiny_recipe: Recipe, tmp_path: Path) -> None:
    python = python_with(tmp_path / "env", "raise ImportError('no module named vllm')")
    with pytest.raises(
        UserError, match=r"rollouts.engine: vllm: .*env/python has no vLLM .* rollouts.vllm_python"
    ):
        distill(recipe_with(tiny_recipe, python), out=tmp_path / "run")
    with pytest.raises(UserError, match=r"rollouts.vllm_python: no file or folder"):
        load_recipe(recipe_with(tiny_recipe, tmp_path / "gone"))
    (tmp_path / "text").write_text("")
    with pytest.raises(UserError, match=r"rollouts.vllm_python: .*text: cannot be started"):
        distill(recipe_with(tiny_recipe, tmp_path / "text"), out=tmp_path / "other")


def test_the_gap_of_the_student_itself_is_rounding(teacher_folder: Path) -> None:
    from potstill.losses.objective import Objective
    from potstill.models.student import Student

    model: CausalLM = from_checkpoint(teacher_folder, device_of("cpu"))
    student, config = Student(model, Objective()), RolloutsConfig(max_new_tokens=8)
    prompts = [(f"row {n}", Prompt(n, [40 + n] * (3 + n))) for n in range(5)]
    written = OwnEngine(config, frozenset({0})).write(student, prompts, 0, lambda: None)
    assert gap(student, written, lambda: None) < 1e-5


def device_of(name: str):  # type: ignore[no-untyped-def]
    import torch

    return torch.device(name)


@pytest.mark.skipif(REAL is None, reason="POTSTILL_VLLM names no Python with vLLM")
def test_vllm_itself_writes_with_the_weights_of_the_step(tiny_recipe: Recipe, tmp_path: Path) -> None:
    assert REAL is not None
    # Its attention on a CPU has heads of 32 and more.
    model = make_model(tmp_path / "wide", hidden_size=128)
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {model}}}",
        rollouts=f"{{{OWN}, engine: vllm, vllm_python: {REAL}, max_engine_gap: 1e-3}}",
    )
    run = distill(recipe, out=tmp_path / "run", overrides=["train.lr=1e-2"])
    gaps = [line["rollout/engine_gap"] for line in run.metrics() if "rollout/engine_gap" in line]
    assert len(gaps) == 4 and max(gaps) < 1e-3
    assert VllmEngine.is_other
