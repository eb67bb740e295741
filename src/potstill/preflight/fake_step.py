"""Trace one training step on fake tensors, to know the memory that a run will need.

The trainer's own loop runs on PyTorch's fake tensors, with models built from the real configs, and every live
storage is counted. One step of two micro-batches reaches the peak of a whole run, if the optimizer's moments
exist before it: in the second micro-batch the first one's gradients are alive. No weight is read and no random
number is drawn.
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
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from potstill.build.resolve import Resolved
from potstill.build.setup import make_objective
from potstill.evals.heldout import heldout
from potstill.export.grid import Grid
from potstill.io.silence import quiet_transformers
from potstill.models.frozen import freeze
from potstill.models.load import without_data
from potstill.models.lora import LoraLM
from potstill.models.student import Student
from potstill.preflight.memory_tracker import Answers, FakeData, FakeRows, MemoryTracker, WatchedObjective
from potstill.preflight.rollouts import rollout_bytes, rows_of_block
from potstill.recipe.load import Recipe
from potstill.recipe.sections_training import TrainConfig
from potstill.training.loop import Hooks, train
from potstill.training.optim import make_optimizer, moments_like, update_average
from potstill.types import Teacher


@dataclass(frozen=True)
class Traced:
    """Live bytes by part of the memory: at the peak of their sum, and the largest of each at any time."""

    phase: str
    at_peak: Counter[str]
    largest: Counter[str]
    on_heap: int
    """Bytes at the peak in blocks that glibc takes from its heap."""
    libraries: int
    """Resident bytes of this process before the trace, the code that it imported included."""
    weights: int
    """Elements of the student's parameters, trained or not."""
    checkpoint: int
    """Bytes of the trained weights and of what the optimizer keeps of them."""


_known: dict[str, Traced] = {}


def trace(resolved: Resolved) -> Traced:
    """Run one step of the loop on fake tensors. A recipe that takes the same memory as one that was traced in this
    process, such as another arm of a comparison, is not traced again.
    """
    if (key := _key(resolved)) in _known:
        return dataclasses.replace(_known[key], libraries=resident_bytes())
    return _known.setdefault(key, _trace(resolved))


def _key(resolved: Resolved) -> str:
    """Everything that a trace depends on: sizes and types, but no rates, seeds or paths."""
    recipe = resolved.recipe
    train, guard, objective = _small(recipe), recipe.guard, recipe.objective
    heldout_rows = 0 if objective.kd_weight else min(recipe.corpus.all_heldout_rows, train.micro_batch_rows)
    parts = (
        dataclasses.replace(train, **UNSEEN),
        recipe.train.steps != 1,
        (recipe.corpus.tokens_per_row, heldout_rows, recipe.corpus.packing),
        (objective, recipe.lora, guard.policy, guard.loss_ceiling),
        (recipe.rollouts, rows_of_block(recipe)),
        resolved.teacher.plan_key(),
        [_shape(config) for config in (resolved.teacher_config, resolved.student.model_config)],
    )
    return f"{resolved.device} {resolved.planned_type} {parts!r}"


UNSEEN: dict[str, Any] = {
    "lr": 1.0,
    "final_lr_ratio": 1.0,
    "schedule": "cosine",
    "decay": 1.0,
    "weight_decay": 0.0,
    "beta1": 0.5,
    "beta2": 0.5,
    "return_memory": False,
    "seed": 0,
}
"""Fields of `train` that no tensor's size depends on."""


def _shape(config: Any) -> dict[str, Any] | None:
    """A model's config without the path that it was read from."""
    return None if config is None else config.to_dict() | {"_name_or_path": None}


def _small(recipe: Recipe) -> TrainConfig:
    """A step of two micro-batches, or of fewer where the recipe has no more."""
    config = recipe.train
    few = min(config.rows_per_step, 2 * config.micro_batch_rows)
    return dataclasses.replace(
        config,
        steps=1,
        epochs=None,
        warmup=0,
        rows_per_step=few,
        rows_per_micro_batch=min(config.micro_batch_rows, few),
        save_every=0,
        compile=False,
    )


def _trace(resolved: Resolved) -> Traced:
    full = resolved.recipe.train
    resolved = resolved.with_recipe(dataclasses.replace(resolved.recipe, train=_small(resolved.recipe)))
    recipe, tracker = resolved.recipe, MemoryTracker()
    written = resolved.with_recipe(dataclasses.replace(recipe, train=full))
    libraries = resident_bytes()
    with quiet_transformers(), torch.random.fork_rng(devices=[]), FakeTensorMode(), tracker, Answers():
        teacher, student = _fake_models(resolved, tracker)
        # Measured again: Transformers imports a model's code when it first builds one, as the run will.
        tracker.libraries = max(libraries, resident_bytes())
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(tracker.gradient)  # type: ignore[no-untyped-call]
        hooks = _tracking_hooks(resolved, teacher, student, trained, tracker, has_moments=full.steps != 1)
        rows, small = FakeRows(recipe.corpus.tokens_per_row, 1), recipe.train
        data = FakeData(
            rows, small.rows_per_step, small.micro_batch_rows, lambda: _write_rollouts(written, tracker)
        )
        train(student, teacher if recipe.objective.kd_weight else None, data, recipe, hooks)
    return Traced(
        tracker.peak_phase,
        tracker.at_peak,
        tracker.largest,
        tracker.on_heap_at_peak,
        tracker.libraries,
        sum(parameter.numel() for parameter in student.parameters()),
        sum(parameter.nbytes for parameter in trained)
        + sum(m.nbytes for moments in moments_like(make_optimizer(student, full)) for m in moments.values()),
    )


def _fake_models(resolved: Resolved, tracker: MemoryTracker) -> tuple[Teacher, Student]:
    """Both models on fake tensors, after the models that the teacher's own checks load besides them."""
    recipe, device, source = resolved.recipe, resolved.device, resolved.teacher
    tracker.phase = "loading"
    with tracker.part(source.part):
        teacher = source.double(tracker.part)
    with tracker.part("student"):
        model = without_data(resolved.student.model_config, torch.float32, device, "student")
        model = model if recipe.lora is None else LoraLM(model, recipe.lora)
        freeze(model, recipe.train.freeze)
        if recipe.train.activation_checkpointing:
            model.checkpoint_activations(selective=recipe.train.activation_checkpointing == "selective")
    teacher.use_rows(recipe.corpus.packing)
    model.rows_are_packed = recipe.corpus.packing
    ids = min(teacher.vocab_size, model.vocab_size)  # one side may have a padded end
    teacher.share_ids(ids)
    model.mask_from(ids)
    tracker.phase = "checking the teacher"
    # Loaded, used and freed before training, as in a run: its peak may be higher than that of a step.
    with tracker.part("teacher"):
        beside = source.measured_double()
    if beside is not None:
        beside.targets(FakeRows(recipe.corpus.tokens_per_row, 2).batch(range(2)))
    del beside
    precision = torch.bfloat16 if recipe.train.precision == "bfloat16" else None
    objective = make_objective(recipe, precision)
    options = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
    student = Student(model, WatchedObjective(**options, part=tracker.part), precision)
    if recipe.train.quantize is not None:
        student.grid = Grid.of(model, recipe.train.quantize).without_data()
    return teacher, student


def _write_rollouts(resolved: Resolved, tracker: MemoryTracker) -> None:
    """Take what a cache and logits take, and free it: all rows of a step are written before its first micro-batch."""
    if rows_of_block(resolved.recipe):
        phase, tracker.phase = tracker.phase, "rollouts"
        torch.empty(rollout_bytes(resolved), dtype=torch.uint8, device=resolved.device)
        tracker.phase = phase


def _tracking_hooks(
    resolved: Resolved,
    teacher: Teacher,
    student: Student,
    trained: list[nn.Parameter],
    tracker: MemoryTracker,
    *,
    has_moments: bool,
) -> Hooks:
    """Hooks of the loop that tell the tracker what runs. With `has_moments` the optimizer has stepped before, as in
    every step but the first.
    """
    recipe, rows = resolved.recipe, resolved.recipe.train.micro_batch_rows
    heldout_rows = FakeRows(recipe.corpus.tokens_per_row, min(recipe.corpus.all_heldout_rows, rows))

    def evaluate(step: int) -> dict[str, float]:
        # It needs less than a step does, unless only it uses the teacher; and most once there are moments.
        if step == 0 or recipe.objective.kd_weight:
            return {"heldout/loss": 0.0}
        tracker.phase = "held-out evaluation"
        return heldout(student, teacher, heldout_rows, rows)

    def on_optimizer(optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(lambda *_: tracker.switch("optimizer"))
        optimizer.register_step_post_hook(lambda *_: tracker.switch("activations"))
        if has_moments:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            update_average(optimizer, 0)
            optimizer.zero_grad(set_to_none=True)
        tracker.phase = "training step"

    def save(step: int, metrics: dict[str, float]) -> None:
        is_lora = isinstance(student.model, LoraLM)
        if is_lora and resolved.device_type == "cpu":  # the merged matrices are copies there
            tracker.phase = "saving the merged student"
            student.model.state()
            tracker.phase = "training step"

    # `resume` is where a real run loads its moments: after the optimizer is made, before the first step.
    # And the teacher is ahead as on the device that a CPU stands for.
    is_ahead = True if resolved.planned_type == "cuda" else None
    return Hooks(evaluate, lambda *_: None, save, resume=on_optimizer, is_ahead=is_ahead)


def resident_bytes() -> int:
    """Resident bytes of this process; where there is no /proc, the most that it ever had."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
