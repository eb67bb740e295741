"""The straight line: a recipe in, a run directory with a student and a receipt out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from potstill.build.setup import Cast, assemble
from potstill.errors import Stopped, UserError
from potstill.evals.heldout import heldout
from potstill.io.memory import peak_gib
from potstill.io.terminal import Display
from potstill.models.complete import complete
from potstill.models.load import choose_device
from potstill.models.lora import LoraLM
from potstill.preflight.auto import as_begun, choose, choose_multiplier, settled, with_chunk, with_matmul
from potstill.preflight.checks import Checked, require_sound
from potstill.recipe import load as recipes
from potstill.recipe.load import Recipe
from potstill.runs.inputs import file_hashes
from potstill.runs.run_dir import RunDir, code, default_path, newest_path
from potstill.runs.trackers import require_sinks, telling
from potstill.teachers.hf import TorchTeacher
from potstill.training.checkpoint import Checkpoints, Metrics, Outcome
from potstill.training.distributed import Ranks, process_group
from potstill.training.loop import Hooks, train
from potstill.training.watchdog import Watchdog
from potstill.workflows.receipt import hashes, receipt_of

Json = dict[str, Any]


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
    second one ends the process. A run that hangs beyond its guard's deadline ends the process with code 2.

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
    if loaded.compare is not None:
        raise UserError(
            "distill: the recipe has a section `compare`; compare() runs its arms. Or leave it out."
        )
    require_sinks(loaded.sinks)
    with process_group(loaded.train.parallel, choose_device(loaded.train.device)) as ranks:
        return _distill(recipe, loaded, out, resume, display, ranks)


def _distill(
    recipe: Path | Recipe, loaded: Recipe, out: Path | None, resume: bool, display: Display, ranks: Ranks
) -> RunDir:
    given = recipes.dump(loaded).encode() if isinstance(recipe, Recipe) else recipe.read_bytes()
    name = "run" if isinstance(recipe, Recipe) else recipe.stem
    if resume:
        run = RunDir.open(ranks.broadcast(out or newest_path(name)))
        began = recipes.load(run.resolved)
        loaded = as_begun(loaded, began)
        # Its schedule and its data are functions of the recipe.
        theirs, ours = (_flat(dataclasses.asdict(of.without_places())) for of in (began, loaded))
        _require_equal(theirs, ours, "recipe", run)
        if run.status().get("state") == "finished":
            run.whole_student()
            display.note(f"{run.path}: finished already")
            return run
        path = run.path
    else:
        path = ranks.broadcast(out or default_path(name))
        ranks.on_first(lambda: RunDir.require_free(path))
        chunk = ranks.broadcast(choose(loaded, display.note))
        by = ranks.broadcast(choose_multiplier(loaded, display.note))
        loaded = with_matmul(with_chunk(loaded, chunk.used), by)

    locked: list[RunDir] = []

    def on_stall(what: str, stacks: str) -> None:
        try:
            if locked:
                where = f"{run.write_stacks(stacks)}. --resume goes on"
                run.set_status("failed", what)
            else:  # there is no folder yet, or it may be another process's
                os.write(2, stacks.encode())
                where = "above"
            display.error((f"{path}: {what}. Stacks of all threads: {where}.",))
        finally:
            os._exit(2)  # whoever hangs cannot be asked to return

    with Watchdog(loaded.guard, on_stall) as watch, _advised(loaded):

        def note(text: str) -> None:
            watch.beat()
            display.note(text)

        cast = assemble(loaded, note, beat=watch.beat)
        inputs = hashes(cast) | file_hashes(loaded)
        if resume:
            _require_same_corpus(cast.corpus.manifest, run)
            _require_equal(run.inputs(), inputs, "input", run)
        checked = require_sound(cast, path)
        note(f"check: all {len(checked.findings)} cheap ones passed; `potstill check` has more")
        if not resume:
            kept: Json = {"resolved": recipes.dump(loaded), "corpus": cast.corpus.manifest, "inputs": inputs}
            made = partial(RunDir.create, path, recipe=given, **kept, chunk=chunk.as_dict())
            ranks.on_first(made)
            run = RunDir(path)
        note(f"run: {run.path}")
        with contextlib.ExitStack() as held:
            if ranks.is_first:
                held.enter_context(run.locked())
                held.enter_context(_recorded(run))
                held.enter_context(telling(loaded.sinks, run, display.warn))
                locked.append(run)
            if resume:
                ranks.on_first(lambda: run.set_status("running"))
            _Running(cast, run, display, watch, inputs, ranks, is_resumed=resume).to_its_receipt(checked)
    return run


@contextlib.contextmanager
def _advised(recipe: Recipe) -> Iterator[None]:
    """What to do when a device has no more memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows, chunk = recipe.train.micro_batch_rows, recipe.objective.positions_at_once
        raise UserError(
            f"out of memory with {rows} rows per micro-batch and chunk {chunk}. Try"
            f" train.rows_per_micro_batch={max(rows // 2, 1)}, objective.chunk={max(chunk // 2, 1)} or"
            " train.activation_checkpointing=true; the result is the same."
        ) from error


@contextlib.contextmanager
def _recorded(run: RunDir) -> Iterator[None]:
    """Whatever ends a run goes into its status, where the disk lets it."""
    try:
        yield
    except Stopped:
        run.set_status("stopped", "by a signal before the first step; --resume goes on")
    except BaseException as error:
        with contextlib.suppress(UserError):
            run.set_status("failed", f"{type(error).__name__}: {error}")
        raise


def evaluate(recipe: Recipe, model: str | Path, display: Display | None = None) -> Metrics:
    """Held-out metrics of a saved model, on the recipe's held-out rows and against its teacher."""
    note = (display or Display(quiet=True)).note
    cast = assemble(settled(recipe, note), note, saved_student=model)
    return heldout(cast.student, cast.teacher, cast.corpus.heldout, recipe.train.micro_batch_rows)


class _Running:
    """A run from its first step to its receipt: what the loop calls beside the mathematics."""

    def __init__(
        self,
        cast: Cast,
        run: RunDir,
        display: Display,
        watch: Watchdog,
        inputs: dict[str, str],
        ranks: Ranks,
        *,
        is_resumed: bool,
    ) -> None:
        self.cast, self.run, self.display, self.watch, self.ranks = cast, run, display, watch, ranks
        self.clock = _Clock(cast.recipe.train.steps)
        self.inputs, self.is_resumed = inputs, is_resumed
        of_corpus = {
            "corpus": cast.corpus.fingerprint,
            "tokenizer": cast.corpus.manifest["tokenizer_sha256"],
        }
        self.checkpoints = Checkpoints(run.checkpoints, inputs | of_corpus, display.note, ranks)
        self.begun = False

    def to_its_receipt(self, checked: Checked) -> None:
        cast, run, recipe = self.cast, self.run, self.cast.recipe
        begun = time.perf_counter()
        running = code()  # now, while it is what was loaded
        samples = {"before": _sample(cast)}
        if isinstance(cast.teacher, TorchTeacher) and getattr(recipe.teacher, "sharded", False):
            self.ranks.shard_teacher(cast.teacher.model)
        outcome = self.train()
        if outcome.evaluated < recipe.train.steps:
            said = f"by a signal after step {outcome.step}; --resume goes on"
            self.ranks.on_first(lambda: run.set_status("stopped", said))
            self.display.note(
                f"stopped after step {outcome.step}, checkpoint saved; the same command with"
                f" --resume --out {run.path} goes on"
            )
            return
        with contextlib.ExitStack() as whole:
            for module in (cast.student, getattr(cast.teacher, "model", None)):
                if module is not None:
                    whole.enter_context(self.ranks.gathered(module))
            samples["after"] = _sample(cast)
            self.ranks.on_first(lambda: self.write_receipt(checked, outcome, running, samples, begun))
        _tell(cast, run, outcome, samples, self.display)

    def write_receipt(
        self, checked: Checked, outcome: Outcome, running: Json, samples: dict[str, str], begun: float
    ) -> None:
        self.run.whole_student()
        receipt = receipt_of(
            self.cast,
            self.run,
            outcome,
            checked=checked,
            inputs=self.inputs,
            running=running,
            samples=samples,
            seconds=time.perf_counter() - begun,
        )
        self.run.write_receipt(receipt | {"ranks": self.ranks.described()})
        self.run.set_status("finished")

    def train(self) -> Outcome:
        cast, recipe = self.cast, self.cast.recipe
        hooks = Hooks(
            self.evaluate,
            self.on_step,
            self.on_best,
            self.resume,
            self.save,
            should_stop=lambda: self.watch.stopping,
            on_fault=self.on_fault,
            beat=self.watch.beat,
        )
        teacher = cast.teacher if recipe.objective.kd_weight else None  # no answer is asked that nobody reads
        self.watch.enter_loop()
        data = cast.data(self.ranks.world)
        outcome = train(cast.student, teacher, data, recipe, hooks, self.ranks)
        self.watch.leave_loop()
        return outcome

    def evaluate(self, step: int) -> Metrics:
        cast, size = self.cast, self.cast.recipe.train.micro_batch_rows
        try:
            # One of several stops with all the others, after the evaluation.
            poll = self.watch.poll if self.ranks.world == 1 else self.watch.beat
            found = heldout(cast.student, cast.teacher, cast.corpus.heldout, size, poll)
        except UserError as error:
            raise UserError(f"evaluation after step {step}: {error}") from error
        self.log(step, found)
        self.display.heldout_line(step, found)
        return found

    def log(self, step: int, metrics: Metrics) -> None:
        if self.ranks.is_first:
            self.run.log(step, metrics)

    def on_step(self, step: int, metrics: Metrics) -> None:
        self.watch.stepped()
        self.log(step, metrics | {"memory/peak_gib": peak_gib(self.cast.device)})
        left_s = self.clock.left(step, metrics["speed/step_s"])
        self.display.step_line(step, self.cast.recipe.train.steps, metrics, left_s)

    def on_best(self, step: int, metrics: Metrics) -> None:
        self.ranks.on_first(self.write_student)

    def write_student(self) -> None:
        student = self.cast.student
        self.run.replace_student(lambda folder: student.save(folder, self.cast.tokenizer))
        if isinstance(student.model, LoraLM):
            self.run.replace_adapter(student.save_adapter)

    def resume(self, optimizer: Optimizer) -> Outcome | None:
        """At the begin, and when the guard goes back: the fault it goes back for is not forgotten."""
        outcome = self.checkpoints.load(self.cast.student, optimizer)
        self.ranks.on_first(lambda: self.rewind(outcome))
        self.begun = True
        return outcome

    def rewind(self, outcome: Outcome | None) -> None:
        at = outcome or Outcome(step=-1)
        self.run.repair()
        if self.is_resumed and not self.begun:
            if outcome is None:
                self.display.note("no checkpoint: from step 0")
            elif outcome.best:
                self.run.whole_student()
        self.run.rewind(at.step, at.evaluated)
        if not self.begun:
            self.run.rewind_faults(at.step, at.left_out)

    def save(self, optimizer: Optimizer, outcome: Outcome) -> None:
        self.ranks.on_first(self.run.flush)
        self.checkpoints.save(self.cast.student, optimizer, outcome)

    def on_fault(self, step: int, what: str, rows: list[dict[str, Any]]) -> None:
        self.ranks.on_first(lambda: self.run.log_fault(step, what, rows))
        self.display.warn(f"{what} guard.policy: {self.cast.recipe.guard.policy}")


def _require_same_corpus(manifest: dict[str, Any], run: RunDir) -> None:
    """Before the first checkpoint, too: the run's record of its corpus was written at its start."""

    def by_file(of: dict[str, Any]) -> dict[str, Any]:
        compared = of.get("decontamination") or {}
        files = [*of["files"], *compared.get("against", [])]
        counts = {name: value for name, value in compared.items() if not isinstance(value, list)}
        return (
            _flat(of | {"decontamination": counts})
            | {file["path"]: file["sha256"][:12] for file in files}
            | {"files": len(of["files"])}
        )

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


def _sample(cast: Cast) -> str:
    plan = cast.recipe.eval
    if plan.sample_prompt is None or cast.tokenizer is None:
        return ""
    return complete(cast.student.model, cast.tokenizer, plan.sample_prompt, plan.sample_tokens)
