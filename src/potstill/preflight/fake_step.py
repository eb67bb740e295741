"""A step on tensors without data: what `plan` knows of memory.

The trainer's own loop runs on PyTorch's fake tensors, with models made of the real configs, and every storage
that lives is counted. One step of two micro-batches sees all that can be alive at once, if the optimizer's
moments are there before it: the second micro-batch has the first one's gradients. No weight is read and no
random number is drawn.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from potstill.build.setup import make_objective
from potstill.errors import UserError, one_line
from potstill.evals.heldout import heldout
from potstill.io.silence import quiet_transformers
from potstill.models.causal_lm import CausalLM
from potstill.models.load import choose_dtype, local_copy
from potstill.models.lora import LoraLM
from potstill.models.quantization import pack_for_plan
from potstill.models.safetensors_files import check_safetensors
from potstill.models.student import Student
from potstill.preflight.memory_tracker import (
    Answers,
    FakeData,
    FakeRows,
    FakeStore,
    Ledger,
    WatchedObjective,
)
from potstill.recipe.load import Recipe
from potstill.store.reader import read_manifest
from potstill.teachers.backends import FULL
from potstill.teachers.hf import TorchTeacher
from potstill.teachers.toy import FixtureTeacher, TableTeacher
from potstill.training.loop import Hooks, train
from potstill.types import Teacher


@dataclass(frozen=True)
class Traced:
    """What lived when the sum of all was largest, and the most of each at any time, in bytes by part."""

    phase: str
    at_peak: Counter[str]
    largest: Counter[str]
    libraries: int
    """This process before the trace, with the code that it imported."""
    weights: int
    """Numbers in the student, trained or not."""
    trained: int
    trained_tensors: int


_known: dict[str, Traced] = {}


def trace(recipe: Recipe, teacher: Any, student: Any, device: torch.device) -> Traced:
    """Run the loop without data, of the configs of both models. What another run of this process has asked
    already, an arm of a comparison say, is not traced again.
    """
    if (key := _key(recipe, teacher, student, device)) in _known:
        return dataclasses.replace(_known[key], libraries=resident_bytes())
    return _known.setdefault(key, _trace(recipe, teacher, student, device))


def _key(recipe: Recipe, teacher: Any, student: Any, device: torch.device) -> str:
    """All that a trace depends on: sizes and kinds, and no rate, seed or place."""
    rates = {"lr": 1.0, "final_lr_ratio": 1.0, "weight_decay": 0.0, "beta1": 0.5, "beta2": 0.5, "seed": 0}
    match recipe.teacher.name:
        case "torch":
            of_teacher: Any = _bytes_of(recipe.teacher.model)
        case "table":
            of_teacher = check_safetensors(Path(recipe.teacher.path))
        case "store":
            of_teacher = read_manifest(Path(recipe.teacher.path))
        case _:
            of_teacher = recipe.teacher
    parts = (
        dataclasses.replace(_small(recipe), **rates),
        recipe.train.steps > 1,
        (recipe.corpus.tokens_per_row, recipe.corpus.heldout_rows),
        (recipe.objective, recipe.lora, recipe.guard, recipe.eval.every),
        [getattr(recipe.teacher, name, None) for name in ("name", "dtype", "weights", "backend")],
        of_teacher,
        [None if config is None else config.to_dict() for config in (teacher, student)],
    )
    return f"{device} {parts!r}"


def _small(recipe: Recipe) -> Any:
    """A step of two micro-batches, or of fewer where the recipe has no more."""
    asked = recipe.train
    few = min(asked.rows_per_step, 2 * asked.micro_batch_rows)
    return dataclasses.replace(asked, steps=1, warmup=0, rows_per_step=few, save_every=0, compile=False)


def _trace(recipe: Recipe, teacher_config: Any, student_config: Any, device: torch.device) -> Traced:
    ledger, asked = Ledger(), recipe.train
    rows = asked.micro_batch_rows
    recipe = dataclasses.replace(recipe, train=_small(recipe))
    precision = torch.bfloat16 if asked.precision == "bfloat16" else None
    libraries = resident_bytes()
    with quiet_transformers(), torch.random.fork_rng(devices=[]), FakeTensorMode(), ledger, Answers():
        ledger.phase = "loading"
        with ledger.part("store" if recipe.teacher.name == "store" else "teacher"):
            teacher = _teacher(recipe, teacher_config, device, ledger)
        with ledger.part("student"):
            model = _model(student_config, torch.float32, device, "student")
            model = model if recipe.lora is None else LoraLM(model, recipe.lora)
            if asked.activation_checkpointing:
                model.checkpoint_activations(selective=asked.activation_checkpointing == "selective")
        ids = min(teacher.vocab_size, model.vocab_size)
        for of in (model, teacher.model) if isinstance(teacher, TorchTeacher) else (model,):
            of.mask_from(ids)  # one side may have a padded end
        if recipe.teacher.name == "torch" and recipe.teacher.weights != FULL:
            ledger.phase = "measuring the teacher's bits"
            with ledger.part("teacher"):
                full = _full_teacher(recipe.teacher, teacher_config, device)
            full.targets(FakeRows(recipe.corpus.tokens_per_row, 2).batch(range(2)))
            del full
        # Transformers imports a model's code when it first makes one, as the run will.
        ledger.libraries = max(libraries, resident_bytes())
        made = make_objective(recipe, precision)
        options = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
        student = Student(model, WatchedObjective(**options, part=ledger.part), precision)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(ledger.gradient)  # type: ignore[no-untyped-call]
        fake_rows = FakeRows(recipe.corpus.tokens_per_row, min(recipe.corpus.heldout_rows, rows))

        def evaluate(step: int) -> dict[str, float]:
            # It needs less than a step does, unless it alone asks the teacher; most so beside the moments.
            if step == 0 or recipe.objective.kd_weight:
                return {"heldout/loss": 0.0}
            ledger.phase = "held-out evaluation"
            return heldout(student, teacher, fake_rows, rows)

        def watch(optimizer: torch.optim.Optimizer) -> None:
            optimizer.register_step_pre_hook(lambda *_: ledger.switch("optimizer"))
            optimizer.register_step_post_hook(lambda *_: ledger.switch("activations"))
            if asked.steps > 1:
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            ledger.phase = "training step"

        def save(step: int, metrics: dict[str, float]) -> None:
            if isinstance(model, LoraLM) and device.type == "cpu":  # the merged matrices are copies there
                ledger.phase = "saving the merged student"
                model.state()
                ledger.phase = "training step"

        hooks = Hooks(evaluate, lambda *_: None, save, resume=watch)
        asked_teacher = teacher if recipe.objective.kd_weight else None
        few = recipe.train.rows_per_step
        train(student, asked_teacher, FakeData(fake_rows, few, min(rows, few)), recipe, hooks)
    return Traced(
        ledger.peak_phase,
        ledger.at_peak,
        ledger.largest,
        ledger.libraries,
        sum(parameter.numel() for parameter in student.parameters()),
        sum(parameter.numel() for parameter in trained),
        len(trained),
    )


def _teacher(recipe: Recipe, config: Any, device: torch.device, ledger: Ledger) -> Teacher:
    asked = recipe.teacher
    match asked.name:
        case "torch":
            made = _full_teacher(asked, config, device)
            if asked.weights != FULL:
                pack_for_plan(made.model, asked.weights, _bytes_of(asked.model))
            return made
        case "table":
            ((_, (size, _)),) = check_safetensors(Path(asked.path)).values()
            return TableTeacher(torch.zeros(size, size, device=device))
        case "store":
            return FakeStore.of(read_manifest(Path(asked.path)), device, ledger.part)
        case _:
            return FixtureTeacher(asked.vocab_size)


def _full_teacher(asked: Any, config: Any, device: torch.device) -> TorchTeacher:
    return TorchTeacher(_model(config, choose_dtype(asked.dtype), device, "teacher"), None)


def _model(config: Any, dtype: torch.dtype, device: torch.device, name: str) -> CausalLM:
    """The model of a config, its weights without data."""
    try:
        with no_init_weights(), device:
            hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        hf.tie_weights()
    except Exception as error:  # Transformers raises what it likes over a config that fits no causal LM
        raise UserError(f"{name}: no causal LM can be made of its config: {one_line(error)}") from error
    return CausalLM(hf, name)


def _bytes_of(source: str) -> int:
    path = local_copy(source)
    return path.stat().st_size if path.is_file() else 0


def resident_bytes() -> int:
    """Memory of this process now; where there is no /proc, the most that it ever was."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
