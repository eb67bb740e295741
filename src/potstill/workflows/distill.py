"""`potstill distill`: from a recipe to a run directory with a student and a receipt."""

from __future__ import annotations

import contextlib
import os
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from potstill.build.resolve import resolve
from potstill.build.rollouts import answers_of
from potstill.build.setup import RunSetup, process_of, set_up
from potstill.data.completions import Completion, CompletionRows, as_file, as_texts
from potstill.errors import Stopped, UserError, one_line
from potstill.evals.heldout import heldout
from potstill.evals.own_samples import own_samples
from potstill.evals.subject import Subject
from potstill.io.locks import remove_leftover_lock
from potstill.io.memory import peak_gib
from potstill.io.terminal import Display, printable
from potstill.models.load import choose_device
from potstill.models.lora import LoraLM
from potstill.models.repair import Repair
from potstill.preflight.auto import settle
from potstill.preflight.checks import Checked, require_sound
from potstill.recipe import load as recipes
from potstill.recipe.load import Recipe
from potstill.recipe.sections_evaluation import labelled
from potstill.runs.inputs import file_hashes
from potstill.runs.places import link_latest
from potstill.runs.run_dir import RunDir, code
from potstill.runs.trackers import logging_to
from potstill.training.checkpoint import Checkpoints, Metrics, Outcome
from potstill.training.distributed import Ranks, process_group
from potstill.training.loop import Hooks, train
from potstill.training.watchdog import Watchdog
from potstill.workflows import samples as samples_of
from potstill.workflows.receipt import Finished, hashes, receipt_of
from potstill.workflows.start import Resume, Start, require_equal, require_same_corpus
from potstill.workflows.start import start as start_run

Json = dict[str, Any]
ANSWERS_SHOWN = 4
"""Held-out prompts whose answers are kept as text."""


def distill(
    recipe: str | Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    resume: Resume = False,
    display: Display | None = None,
) -> RunDir:
    """Run a recipe from its corpus to its receipt.

    On SIGTERM or SIGINT the current step is finished, a checkpoint is saved and the run is returned with status
    `stopped`; a second signal ends the process. A run that hangs beyond its guard's deadline ends the process with
    code 2.

    Args:
        recipe: a YAML file, or a recipe already loaded.
        overrides: `a.b=value`, applied to a file.
        out: a folder that does not exist yet; default `runs/<name of the recipe>`.
        resume: continue the run in `out` from its newest intact checkpoint, or from its start if there is none;
            "auto": only where there is one of this recipe; otherwise a new one starts.

    Raises:
        UserError: anything the user can fix. Nearly all of it is found before the folder is made.
    """
    display = display or Display(quiet=True)
    recipe = Path(recipe) if isinstance(recipe, str) else recipe
    if isinstance(recipe, Recipe) and overrides:
        raise UserError(
            "distill: overrides apply to a recipe file, and the recipe is already loaded. Leave them out."
        )
    loaded = recipe if isinstance(recipe, Recipe) else recipes.load(recipe, overrides)
    if loaded.compare is not None:
        raise UserError(
            "distill: the recipe has a section `compare`, whose arms compare() runs. Call that, or remove it."
        )
    loaded.require_available()
    with process_group(loaded.train.parallel, choose_device(loaded.train.device)) as ranks:
        return _distill(recipe, loaded, out, resume, display, ranks)


def _distill(
    recipe: Path | Recipe, loaded: Recipe, out: Path | None, resume: Resume, display: Display, ranks: Ranks
) -> RunDir:
    name = "run" if isinstance(recipe, Recipe) else recipe.stem
    text = recipes.dump(loaded).encode() if isinstance(recipe, Recipe) else recipe.read_bytes()
    start = start_run(loaded, name, text, out, resume, display, ranks)
    if start.run is not None and start.run.status().get("state") == "finished":
        start.run.whole_student()
        remove_leftover_lock(start.path)  # of a process that was killed as it let go
        display.note(f"{start.path}: finished already")
        return start.run
    locked: list[RunDir] = []
    guard = start.resolved.recipe.guard
    with (
        Watchdog(guard, partial(_on_stall, start.path, locked, display)) as watch,
        process_of(start.resolved.recipe),
        _memory_advice(start.resolved.recipe),
    ):

        def note(text: str) -> None:
            watch.beat()
            display.note(text)

        repair = None if start.run is None else _repair_of(start.run)
        answers = None if start.run is None else start.run.heldout_answers
        setup = set_up(start.resolved, note, watch.beat, ranks.broadcast, repair, answers)
        with contextlib.closing(setup.teacher):
            return _run(setup, start, note, display, watch, ranks, locked)


def _repair_of(run: RunDir) -> Repair | None:
    """What was folded into its student before the first step."""
    table = run.folds()
    return None if table is None else Repair.of(table, run.folded())


def _run(
    setup: RunSetup,
    start: Start,
    note: Callable[[str], None],
    display: Display,
    watch: Watchdog,
    ranks: Ranks,
    locked: list[RunDir],
) -> RunDir:
    recipe = setup.recipe
    recorded = None if start.run is None else start.run.inputs()
    inputs = hashes(setup, recorded) | file_hashes(setup.resolved.inputs, recipe.plugins)
    if start.run is not None:
        require_same_corpus(setup.corpus.manifest, start.run)
        require_equal(recorded or {}, inputs, "input", start.run)
    checked = require_sound(setup, start.path, note)
    source = code()  # before the first step: the checkout may change while the run trains
    if start.run is None:
        # Only after every check: a refused recipe leaves no folder behind.
        record: Json = {"resolved": recipes.dump(recipe), "corpus": setup.corpus.manifest, "inputs": inputs}
        record |= {"source": source}
        record |= {"chunk": start.chunk, "commits": dict(setup.resolved.commits)}
        record |= {"layers": None if setup.harm is None else setup.harm.as_dict()}
        if setup.repair is not None:
            record |= {"folds": (setup.repair.as_dict(), setup.repair.weights)}
        if isinstance(setup.corpus.heldout, CompletionRows):
            record |= {"answers": as_file(setup.corpus.heldout.completions, {"by": "teacher"})}
        create = partial(RunDir.create, start.path, recipe=start.recipe_text, **record)
        ranks.on_first(create)
    run = start.run or RunDir(start.path)
    ranks.on_first(lambda: link_latest(run.path))
    note(f"run: {run.path}")
    with contextlib.ExitStack() as stack:
        if ranks.is_first:
            # The lock comes first: without it, nothing may be written to the run, its status included.
            stack.enter_context(run.locked())
            stack.enter_context(_status_on_error(run))
            stack.enter_context(logging_to(recipe.sinks, run, display.warn))
            locked.append(run)
        if start.run is not None:
            ranks.on_first(lambda: run.set_status("running"))
        is_resumed = start.run is not None
        _ActiveRun(setup, run, display, watch, inputs, ranks, is_resumed=is_resumed).finish(checked, source)
    return run


def _on_stall(path: Path, locked: list[RunDir], display: Display, what: str, stacks: str) -> None:
    """Called by the watchdog: report where the run hangs, and end the process."""
    try:
        if locked:
            where = f"{locked[0].write_stacks(stacks)}. --resume continues"
            locked[0].set_status("failed", what)
        else:  # there is no folder yet, or another process may hold it
            os.write(2, stacks.encode())
            where = "above"
        display.error((f"{path}: {what}. Stacks of all threads: {where}.",))
    finally:
        os._exit(2)  # sys.exit would wait for the thread that hangs


@contextlib.contextmanager
def _memory_advice(recipe: Recipe) -> Iterator[None]:
    """Turn a CUDA out-of-memory error into advice on which fields to lower."""
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
def _status_on_error(run: RunDir) -> Iterator[None]:
    """Record in the run's status what ended it."""
    try:
        yield
    except Stopped:
        run.set_status("stopped", "by a signal before the first step; --resume continues")
    except BaseException as error:
        with contextlib.suppress(UserError):  # a full disk must not hide the error itself
            run.set_status("failed", f"{type(error).__name__}: {error}")
        raise


def evaluate(
    recipe: Recipe, model: str | Path, display: Display | None = None, answers: Path | None = None
) -> Metrics:
    """Held-out metrics of a saved model, on the recipe's held-out rows and against its teacher.

    Args:
        answers: of a run on prompts, `RunDir.heldout_answers`; None: the teacher answers once more.
    """
    note = (display or Display(quiet=True)).note
    resolved = settle(resolve(recipe, saved_student=model), note)
    with process_of(resolved.recipe):
        setup = set_up(resolved, note, answers=answers)
        rows = recipe.train.micro_batch_rows
        with contextlib.closing(setup.teacher):
            sources = setup.corpus.heldout_parts
            metrics = heldout(setup.student, setup.teacher, setup.corpus.heldout, rows, sources=sources)
            if (given := setup.rollouts) is not None:
                asked = (given.heldout, given.config, given.ends)
                metrics |= own_samples(setup.student, setup.teacher, *asked, rows)[0]
            return metrics


class _ActiveRun:
    """A run from its first step to its receipt: the hooks of the training loop, and what follows it."""

    def __init__(
        self,
        setup: RunSetup,
        run: RunDir,
        display: Display,
        watch: Watchdog,
        inputs: dict[str, str],
        ranks: Ranks,
        *,
        is_resumed: bool,
    ) -> None:
        self.setup, self.run, self.display, self.watch, self.ranks = setup, run, display, watch, ranks
        self.clock = _Clock(setup.recipe.train.num_steps)
        self.inputs, self.is_resumed = inputs, is_resumed
        corpus_hashes = {
            "corpus": setup.corpus.fingerprint,
            "tokenizer": setup.corpus.manifest["tokenizer_sha256"],
        }
        self.checkpoints = Checkpoints(run.checkpoints, inputs | corpus_hashes, display.note, ranks)
        self.has_started = False
        self.written: list[Completion] = []
        """What the student wrote behind held-out prompts at the last evaluation."""

    def finish(self, checked: Checked, source: dict[str, str]) -> None:
        """Train to the last step and write the receipt; after a signal, record where the run stopped.

        Args:
            source: of `code`.
        """
        setup, run, recipe = self.setup, self.run, self.setup.recipe
        started_s = time.perf_counter()
        prompt = recipe.eval.sample_prompt
        samples = {"before": samples_of.of_student(setup, prompt)}
        if setup.teacher.is_sharded and setup.teacher.model is not None:
            self.ranks.shard_teacher(setup.teacher.model)
        if (by_teacher := samples_of.of_teacher(setup, prompt)) is not None:
            samples = {"teacher": by_teacher} | samples
        outcome = self.train()
        if outcome.evaluated < recipe.train.num_steps:
            why = f"by a signal after step {outcome.step}; --resume continues"
            self.ranks.on_first(lambda: run.set_status("stopped", why))
            self.display.note(
                f"stopped after step {outcome.step}, checkpoint saved; the same command with"
                f" --resume --out {run.path} continues"
            )
            return
        # Every rank takes part in gathering the shards, although only the first writes the receipt.
        with self.gathered():
            samples["after"] = samples_of.of_student(setup, prompt)

        evaluations: dict[str, Any] = {}
        self.ranks.on_first_for_long(lambda: evaluations.update(self.evaluations()))

        def write_receipt() -> None:
            run.whole_student()
            seconds = time.perf_counter() - started_s
            finished = Finished(outcome, checked, self.inputs, source, samples, evaluations, seconds)
            receipt = receipt_of(setup, run, finished)
            run.write_receipt(receipt | {"ranks": self.ranks.described()})
            run.set_status("finished")  # after the receipt: a finished run always has one

        # Gathered once more: the sample's forward pass has put the weights back into shards.
        with self.gathered():
            self.ranks.on_first(write_receipt)
        _print_summary(setup, run, outcome, samples, self.display)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every weight of both models is there as in a single process."""
        with contextlib.ExitStack() as stack:
            for module in (self.setup.student, self.setup.teacher.model):
                if module is not None:
                    stack.enter_context(self.ranks.gathered(module))
            yield

    def evaluations(self) -> dict[str, Any]:
        """Results of the recipe's `evaluations` on the saved student. One that fails is recorded as not run, with the
        reason: it must not cost the run its receipt.
        """
        results: dict[str, Any] = {}
        if self.setup.recipe.evaluations:
            self.run.whole_student()
        for key, config in labelled(self.setup.recipe.evaluations).items():
            subject = Subject(
                folder=self.run.student,
                out=self.run.evals / key,
                device=self.setup.recipe.train.device,
                tokenizer=self.setup.tokenizer,
                note=self.display.note,
            )
            self.display.note(f"evaluation: {key}")
            try:
                results[key] = config.run(subject)
            except Exception as error:  # a plug-in may raise anything
                reason = (
                    str(error)
                    if isinstance(error, UserError)
                    else f"{type(error).__name__}: {one_line(error)}"
                )
                self.display.warn(f"evaluation {key}: {reason}")
                results[key] = f"not run: {reason}"
        return results

    def train(self) -> Outcome:
        setup, recipe = self.setup, self.setup.recipe
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
        # Without a KD term nothing reads the teacher's targets.
        teacher = setup.teacher if recipe.objective.kd_weight else None
        self.watch.enter_loop()
        data = setup.data(self.ranks, self.run.rollouts, self.watch.beat)
        outcome = train(setup.student, teacher, data, recipe, hooks, self.ranks)
        self.watch.leave_loop()
        return outcome

    def evaluate(self, step: int) -> Metrics:
        setup, size = self.setup, self.setup.recipe.train.micro_batch_rows
        try:
            # Alone, a signal may stop in the middle of an evaluation; several ranks stop together after it.
            poll = self.watch.poll if self.ranks.world == 1 else self.watch.beat
            corpus = setup.corpus
            metrics = heldout(setup.student, setup.teacher, corpus.heldout, size, poll, corpus.heldout_parts)
            if (given := setup.rollouts) is not None:
                asked = (given.heldout, given.config, given.ends)
                own, self.written = own_samples(setup.student, setup.teacher, *asked, size, poll)
                metrics |= own
                if step == 0:
                    self.keep_answers("before")
        except UserError as error:
            raise UserError(f"evaluation after step {step}: {error}") from error
        self.log(step, metrics)
        self.display.heldout_line(step, metrics)
        self.sample(step)
        return metrics

    def sample(self, step: int) -> None:
        """Answers to `eval.sample_prompts`, the teacher's once; on every rank, as a forward pass takes all of them."""
        texts, by_teacher = {}, {}
        for prompt in self.setup.recipe.eval.sample_prompts:
            self.watch.beat()
            texts[prompt] = samples_of.of_student(self.setup, prompt)
            self.display.note(f"sample at step {step}, behind {prompt!r}: {texts[prompt]}")
            if step == 0 and (text := samples_of.of_teacher(self.setup, prompt)) is not None:
                by_teacher[prompt] = text
        if texts:
            self.ranks.on_first(lambda: self.run.log_samples(step, texts, by_teacher))

    def log(self, step: int, metrics: Metrics) -> None:
        if self.ranks.is_first:
            self.run.log(step, metrics)

    def on_step(self, step: int, metrics: Metrics) -> None:
        self.watch.stepped()
        self.log(step, metrics | {"memory/peak_gib": peak_gib(self.setup.device)})
        left_s = self.clock.left(step, metrics["speed/step_s"])
        self.display.step_line(step, self.setup.recipe.train.num_steps, metrics, left_s)

    def on_best(self, step: int, metrics: Metrics) -> None:
        self.ranks.on_first(self.write_student)
        if self.setup.rollouts is not None:
            self.keep_answers("after")

    def keep_answers(self, when: str) -> None:
        """The student's to the first held-out prompts, and once the teacher's, as text where there is a tokenizer."""
        setup, ranks = self.setup, self.ranks
        assert setup.rollouts is not None
        shown = {when: as_texts(self.written[:ANSWERS_SHOWN], setup.tokenizer)}
        if when == "before":
            asked = setup.rollouts.heldout[:ANSWERS_SHOWN]
            by_teacher = answers_of(setup.teacher, asked, setup.rollouts, setup.shared.ids)
            shown["teacher"] = as_texts(by_teacher, setup.tokenizer)
            shown["prompt"] = as_texts(
                [Completion(each, each.ids, [], True) for each in asked], setup.tokenizer
            )
        ranks.on_first(lambda: self.run.write_answers(shown))

    def write_student(self) -> None:
        student = self.setup.student
        self.run.replace_student(lambda folder: student.save(folder, self.setup.tokenizer))
        if isinstance(student.model, LoraLM):
            self.run.replace_adapter(student.save_adapter)

    def resume(self, optimizer: Optimizer) -> Outcome | None:
        """Load the newest checkpoint: at the start, and when the guard rolls back after a fault."""
        outcome = self.checkpoints.load(self.setup.student, optimizer)
        self.ranks.on_first(lambda: self.rewind(outcome))
        self.has_started = True
        return outcome

    def rewind(self, outcome: Outcome | None) -> None:
        """Bring the run directory back to the state of the checkpoint."""
        at = outcome or Outcome(step=-1)
        self.run.repair()
        if self.is_resumed and not self.has_started:
            if outcome is None:
                self.display.note("no checkpoint: from step 0")
            elif outcome.best:
                self.run.whole_student()
        self.run.rewind(at.step, at.evaluated)
        # Not on a rollback, which would drop the very fault that it is for.
        if not self.has_started:
            self.run.rewind_faults(at.step, at.left_out)

    def save(self, optimizer: Optimizer, outcome: Outcome) -> None:
        self.ranks.on_first(self.run.flush)  # before the checkpoint, which must not be newer than the log
        self.checkpoints.save(self.setup.student, optimizer, outcome)

    def on_fault(self, step: int, what: str, rows: list[dict[str, Any]]) -> None:
        self.ranks.on_first(lambda: self.run.log_fault(step, what, rows))
        self.display.warn(f"{what} guard.policy: {self.setup.recipe.guard.policy}")


def _print_summary(
    setup: RunSetup, run: RunDir, outcome: Outcome, samples: dict[str, str], display: Display
) -> None:
    names = sorted(outcome.first)
    table = [[n, *(f"{m[n]:.4f}" for m in (outcome.first, outcome.last, outcome.best))] for n in names]
    display.table(
        "held-out rows", ["metric", "step 0", f"step {setup.recipe.train.num_steps}", "best"], table
    )
    prompt = setup.recipe.eval.sample_prompt
    if prompt is not None:
        for when, text in samples.items():
            display.note(f"sample {when}, behind {prompt!r}: {text}")
    if outcome.best_step == 0:
        display.warn(
            "no evaluation was better than that of the untouched student, so the saved student is the untouched one."
        )
    display.note(f"student (step {outcome.best_step}, best held-out loss): {run.student}")
    display.note(f"receipt: {run.path / 'receipt.json'}")
    place = printable(shlex.quote(str(run.path)), keep="")
    display.note(
        f"potstill export {place} writes it for Transformers and llama.cpp; potstill chat {place} talks to it"
    )


class _Clock:
    """Estimates the time left from the median of recent steps, which one slow step does not move."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.recent_s: list[float] = []

    def left(self, step: int, seconds: float) -> float:
        self.recent_s = [*self.recent_s[-100:], seconds]
        return (self.steps - step) * statistics.median(self.recent_s)
