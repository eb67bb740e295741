"""The straight line: a recipe in, a run directory with a student and a receipt out."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from potstill import recipe as recipes
from potstill.assembly import Cast, assemble
from potstill.display import Display
from potstill.errors import Stopped, UserError
from potstill.evals.likelihood import heldout
from potstill.models.files import file_sha256
from potstill.proof.plan import Plan
from potstill.proof.preflight import Checked, require_sound
from potstill.recipe import Recipe
from potstill.runs.rundir import RunDir, code, default_path, environment, newest_path
from potstill.runs.sinks import require_sinks, telling
from potstill.students.generate import complete
from potstill.teachers.fixture import TableTeacher
from potstill.teachers.torch_teacher import TorchTeacher
from potstill.training.checkpoint import Checkpoints, Outcome
from potstill.training.loop import Hooks, Metrics, train
from potstill.training.watch import Watch


def distill(
    recipe: str | Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    resume: bool = False,
    display: Display | None = None,
) -> RunDir:
    """Run a recipe from its first line to its receipt.

    SIGTERM or SIGINT ends the step in hand, saves a checkpoint and returns a run whose status is `stopped`; a
    second one ends the process.

    Args:
        recipe: a YAML file, or a recipe already loaded.
        overrides: `a.b=value`, applied to a file.
        out: a folder that does not exist yet; default `runs/<name of the recipe>`.
        resume: go on with the run in `out` from its newest sound checkpoint, or from its start.

    Raises:
        UserError: whatever the user can mend; nearly all of it before the folder is made.
    """
    display = display or Display(quiet=True)
    recipe = Path(recipe) if isinstance(recipe, str) else recipe
    if isinstance(recipe, Recipe) and overrides:
        raise UserError("distill: overrides go with a recipe file; a loaded recipe is taken as it is.")
    loaded = recipe if isinstance(recipe, Recipe) else recipes.load(recipe, overrides)
    require_sinks(loaded.sinks)
    resolved = recipes.dump(loaded)
    given = resolved.encode() if isinstance(recipe, Recipe) else recipe.read_bytes()
    name = "run" if isinstance(recipe, Recipe) else recipe.stem
    if resume:
        run = RunDir.open(out or newest_path(name))
        _require_same_recipe(loaded, run)
        if run.status().get("state") == "finished":
            display.note(f"{run.path}: finished already")
            return run
        path = run.path
    else:
        path = out or default_path(name)
        RunDir.require_free(path)

    def on_stall(what: str, stacks: str) -> None:
        try:
            where = run.write_stacks(stacks)
            run.set_status("failed", what)
            display.error((f"{run.path}: {what}. Stacks of all threads: {where}. --resume goes on.",))
        finally:
            os._exit(2)  # whoever hangs cannot be asked to return

    with Watch(loaded.guard, on_stall) as watch:
        cast = assemble(loaded, display.note)
        checked = require_sound(cast, path)
        display.note(f"check: all {len(checked.findings)} cheap ones passed; `potstill check` has more")
        if resume:
            _require_same_corpus(cast.corpus.manifest, run)
            run.set_status("running")
        else:
            run = RunDir.create(path, recipe=given, resolved=resolved, corpus=cast.corpus.manifest)
        display.note(f"run: {run.path}")
        _guarded(cast, run, checked, display, watch)
    return run


def _guarded(cast: Cast, run: RunDir, checked: Checked, display: Display, watch: Watch) -> None:
    """The run, and whatever ends it in its status."""
    recipe = cast.recipe
    try:
        with telling(recipe.sinks, run, display.warn):
            _run(cast, run, checked, display, watch)
    except Stopped:
        run.set_status("stopped", "by a signal before the first step; --resume goes on")
    except torch.OutOfMemoryError as error:
        run.set_status("failed", "out of memory")
        rows = recipe.train.micro_batch_rows
        raise UserError(
            f"out of memory with {rows} rows per micro-batch and chunk {recipe.objective.chunk}. Try"
            f" train.rows_per_micro_batch={max(rows // 2, 1)},"
            f" objective.chunk={max(recipe.objective.chunk // 2, 1)} or"
            " train.activation_checkpointing=true; the result is the same."
        ) from error
    except BaseException as error:
        run.set_status("failed", f"{type(error).__name__}: {error}")
        raise


def smoke(recipe: Recipe, steps: int, display: Display | None = None) -> Metrics:
    """Exactly `steps` steps of the recipe's own run, and what they say of the whole; writes nothing.

    Returns the metrics of the last step, the median seconds of a step and of an evaluation, and the projected
    seconds of the full run.
    """
    if not 1 <= steps <= recipe.train.steps:
        raise UserError(f"--smoke {steps}: must be from 1 to the recipe's {recipe.train.steps} steps.")
    display = display or Display(quiet=True)
    cast = assemble(recipe, display.note)
    lines: list[Metrics] = []
    evaluations: list[float] = []

    def evaluate_student(step: int) -> Metrics:
        started = time.perf_counter()
        found = heldout(cast.student, cast.teacher, cast.corpus.heldout, recipe.train.micro_batch_rows)
        evaluations.append(time.perf_counter() - started)
        display.heldout_line(step, found)
        return found

    def on_step(step: int, metrics: Metrics) -> None:
        lines.append(metrics)
        left = statistics.median(line["speed/step_s"] for line in lines) * (steps - step)
        display.step_line(step, steps, metrics, left)

    hooks = Hooks(evaluate_student, on_step, lambda *_: None, should_stop=lambda: len(lines) == steps)
    teacher = cast.teacher if recipe.objective.kd_weight else None
    train(cast.student, teacher, cast.corpus.train, cast.corpus.order(recipe.train.seed), recipe, hooks)
    # The first step pays for allocations that no other does; a smoke of one step has no other.
    step_s = statistics.median(line["speed/step_s"] for line in lines[1:] or lines)
    num_evaluations = 2 + (recipe.train.steps - 1) // recipe.eval.every if recipe.eval.every else 2
    evaluation_s = statistics.median(evaluations)
    projected_s = recipe.train.steps * step_s + num_evaluations * evaluation_s
    return lines[-1] | {
        "smoke/steps": len(lines),
        "smoke/step_s": step_s,
        "smoke/evaluation_s": evaluation_s,
        "smoke/projected_s": projected_s,
    }


def evaluate(recipe: Recipe, model: str | Path, display: Display | None = None) -> Metrics:
    """Held-out metrics of a saved model, on the recipe's held-out rows and against its teacher."""
    cast = assemble(recipe, (display or Display(quiet=True)).note, saved_student=model)
    return heldout(cast.student, cast.teacher, cast.corpus.heldout, recipe.train.micro_batch_rows)


def _run(cast: Cast, run: RunDir, checked: Checked, display: Display, watch: Watch) -> None:
    recipe, student = cast.recipe, cast.student
    started = time.perf_counter()
    running = code()  # now, while it is what was loaded
    before = _hashes(cast)
    samples = {"before": _sample(cast)}
    clock = _Clock(recipe.train.steps)
    inputs = before | {
        "corpus": cast.corpus.fingerprint,
        "tokenizer": cast.corpus.manifest["tokenizer_sha256"],
    }
    checkpoints = Checkpoints(run.checkpoints, inputs, display.note)

    def evaluate_student(step: int) -> Metrics:
        size = recipe.train.micro_batch_rows
        found = heldout(student, cast.teacher, cast.corpus.heldout, size, watch.poll)
        run.log(step, found)
        display.heldout_line(step, found)
        return found

    def on_step(step: int, metrics: Metrics) -> None:
        watch.stepped()
        run.log(step, metrics)
        display.step_line(step, recipe.train.steps, metrics, clock.left(step, metrics["speed/step_s"]))

    def on_best(step: int, metrics: Metrics) -> None:
        run.replace_student(lambda folder: student.save(folder, cast.tokenizer))

    def resume(optimizer: Optimizer) -> Outcome | None:
        outcome = checkpoints.load(student, optimizer)
        run.repair()
        run.rewind(*((-1, -1) if outcome is None else (outcome.step, outcome.evaluated)))
        return outcome

    def on_fault(step: int, what: str) -> None:
        run.log_fault(step, what)
        display.warn(f"{what} guard.policy: {recipe.guard.policy}")

    def save(optimizer: Optimizer, outcome: Outcome) -> None:
        checkpoints.save(student, optimizer, outcome)

    hooks = Hooks(
        evaluate_student, on_step, on_best, resume, save, lambda: watch.stopping, on_fault, watch.beat
    )
    teacher = cast.teacher if recipe.objective.kd_weight else None  # no answer is asked that nobody reads
    order = cast.corpus.order(recipe.train.seed)
    watch.begin()
    outcome = train(student, teacher, cast.corpus.train, order, recipe, hooks)
    watch.end()
    if outcome.evaluated < recipe.train.steps:
        run.set_status("stopped", f"by a signal after step {outcome.step}; --resume goes on")
        display.note(
            f"stopped after step {outcome.step}, checkpoint saved; the same command with"
            f" --resume --out {run.path} goes on"
        )
        return
    samples["after"] = _sample(cast)
    receipt = _receipt(cast, run, outcome, before, samples, time.perf_counter() - started)
    receipt["commit"] = running["commit"] or "not a git checkout"
    receipt["uncommitted_changes"] = bool(running["diff"])
    receipt["plan"] = _compared(checked.planned, receipt["peak_memory_gib"])
    receipt["check"] = {finding.name: finding.figure for finding in checked.findings}
    run.write_receipt(receipt)
    run.set_status("finished")
    _tell(cast, run, outcome, samples, display)


def _require_same_recipe(recipe: Recipe, run: RunDir) -> None:
    """A run goes on as it began: its schedule and its data are functions of the recipe."""
    began, now = dataclasses.asdict(recipes.load(run.resolved)), dataclasses.asdict(recipe)
    _require_equal(_flat(began), _flat(now), "recipe", run)


def _require_same_corpus(manifest: dict[str, Any], run: RunDir) -> None:
    """Before the first checkpoint, too: the run's record of its corpus was written at its start."""

    def by_file(of: dict[str, Any]) -> dict[str, Any]:
        return of | {file["path"]: file["sha256"][:12] for file in of["files"]} | {"files": len(of["files"])}

    _require_equal(by_file(run.corpus()), by_file(manifest), "corpus", run)


def _require_equal(began: dict[str, Any], now: dict[str, Any], what: str, run: RunDir) -> None:
    differing = sorted(name for name in began | now if began.get(name) != now.get(name))
    if differing:
        shown = [f"{name} ({began.get(name)!r} -> {now.get(name)!r})" for name in differing[:8]]
        rest = [f"and {len(differing) - 8} more"] if differing[8:] else []
        raise UserError(
            f"{run.path}: begun with another {what}: {', '.join([*shown, *rest])}."
            " Resume with the same, or start a new run."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _receipt(
    cast: Cast, run: RunDir, outcome: Outcome, before: dict[str, str], samples: dict[str, str], seconds: float
) -> dict[str, Any]:
    """What truly ran, read back from the objects that ran it."""
    recipe, after = cast.recipe, _hashes(cast)
    if after.get("teacher") != before.get("teacher"):
        raise RuntimeError(
            f"the teacher's weights changed during training: {before['teacher']} -> {after['teacher']}"
        )
    head = cast.student.model.head.weight_VD
    return {
        "potstill": environment()["libraries"]["potstill"],
        "recipe_sha256": file_sha256(run.path / "recipe.yaml"),
        "corpus_fingerprint": cast.corpus.fingerprint,
        "tokenizer_sha256": cast.corpus.manifest["tokenizer_sha256"],
        "teacher": {"name": recipe.teacher.name, "source": getattr(recipe.teacher, "model", None)}
        | {
            "weights_sha256": before.get("teacher"),
            "unchanged_by_training": True if "teacher" in before else None,
        },
        "student": {
            **cast.origin,
            "weights_sha256_start": before["student"],
            "weights_sha256_end": after["student"],
        },
        "allow_identical": recipe.allow_identical,
        "vocabulary": vars(cast.shared),
        "objective": f"{recipe.objective.ce_weight} * CE + {recipe.objective.kd_weight} * T^2 *"
        f" {recipe.objective.divergence.name}, T = {recipe.objective.temperature}",
        "seed": recipe.train.seed,
        "device": str(cast.device),
        "weights_dtype": str(head.dtype).removeprefix("torch."),
        "precision": recipe.train.precision,
        "steps": recipe.train.steps,
        "steps_left_out": outcome.left_out,
        "positions": outcome.positions,
        "heldout_first": outcome.first,
        "heldout_last": outcome.last,
        "heldout_best": outcome.best,
        "student_is_of_step": outcome.best_step,
        "training_seconds": round(outcome.seconds, 3),
        "total_seconds": round(seconds, 3),
        "peak_memory_gib": _peak_gib(cast.device),
        "output": {p.name: file_sha256(p) for p in sorted(run.student.iterdir()) if p.is_file()},
        "samples": {"prompt": recipe.eval.sample_prompt, **samples}
        if recipe.eval.sample_prompt is not None
        else None,
        "environment": environment(),
    }


def _compared(planned: Plan | str, measured_gib: float) -> dict[str, Any]:
    """The plan beside what was measured; a run that was resumed measures its last process alone."""
    if isinstance(planned, str):
        return {"predicted_peak_gib": planned, "measured_peak_gib": measured_gib}
    predicted = planned.peak_bytes / 2**30
    return {
        "predicted_peak_gib": round(predicted, 3),
        "measured_peak_gib": measured_gib,
        "ratio": round(predicted / measured_gib, 3),
        "parts_gib": {name: round(size / 2**30, 3) for name, size in planned.parts.items()},
    }


def _tell(cast: Cast, run: RunDir, outcome: Outcome, samples: dict[str, str], display: Display) -> None:
    """The end of a run, for a person."""
    names = sorted(outcome.first)
    table = [[n, *(f"{m[n]:.4f}" for m in (outcome.first, outcome.last, outcome.best))] for n in names]
    display.table("held-out rows", ["metric", "step 0", f"step {cast.recipe.train.steps}", "best"], table)
    prompt = cast.recipe.eval.sample_prompt
    if prompt is not None:
        for when, text in samples.items():
            display.note(f"sample {when}: {prompt}{text}")
    if outcome.best_step == 0:
        display.warn(
            "no evaluation was better than the untouched student: the saved student is the untouched one."
        )
    display.note(f"student (of step {outcome.best_step}, best held-out loss): {run.student}")
    display.note(f"receipt: {run.path / 'receipt.json'}")


class _Clock:
    """Time left, from the median step so far: one slow step does not move it."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seen: list[float] = []

    def left(self, step: int, seconds: float) -> float:
        self.seen = [*self.seen[-100:], seconds]
        return (self.steps - step) * statistics.median(self.seen)


def _hashes(cast: Cast) -> dict[str, str]:
    hashes = {"student": cast.student.weights_sha256()}
    if isinstance(cast.teacher, TorchTeacher):
        hashes["teacher"] = cast.teacher.weights_sha256()
    elif isinstance(cast.teacher, TableTeacher):
        hashes["teacher"] = hashlib.sha256(cast.teacher.logits_VV.numpy().tobytes()).hexdigest()
    return hashes


def _sample(cast: Cast) -> str:
    plan = cast.recipe.eval
    if plan.sample_prompt is None or cast.tokenizer is None:
        return ""
    return complete(cast.student.model, cast.tokenizer, plan.sample_prompt, plan.sample_tokens)


def _peak_gib(device: torch.device) -> float:
    """Peak of the device's allocator on CUDA, of the process elsewhere (Linux counts KiB)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
