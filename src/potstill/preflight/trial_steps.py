"""Trial steps of the recipe's own run: the expensive half of `potstill check`, and `distill --smoke`.

The trained student is thrown away. The cheap half is `checks.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from potstill.build.resolve import Resolved
from potstill.build.setup import RunSetup, make_objective, process_of, set_up
from potstill.errors import UserError
from potstill.evals.heldout import heldout
from potstill.io.memory import peak_gib
from potstill.io.terminal import Display, clock, size
from potstill.models.lora import REACHED_LATE
from potstill.models.student import from_checkpoint
from potstill.preflight.auto import note_types, settle
from potstill.preflight.bos_probe import texts_begin_as_the_teacher_reads_them
from potstill.preflight.checks import cheap, plan_of, require_sound
from potstill.preflight.plan import Plan, available
from potstill.preflight.probe_batches import window
from potstill.preflight.rollouts import student_writes
from potstill.recipe.load import Recipe
from potstill.runs.places import default_path
from potstill.training.checkpoint import Metrics
from potstill.training.loop import Hooks, train
from potstill.training.optim import lr_at, rates
from potstill.types import Batch, Data, Finding

STEPS = 10
WHOLE_STEPS = 3
"""The first of them have all rows of a step and are timed; the others take a quarter of the rows."""
TURNS = 3
"""How often each recipe is timed where several are compared."""
MIN_VISIBLE_LR = 1e-6
"""Below this rate, as in a long warm-up, float32 weights near 1 cannot move in one step."""


def check(setup: RunSetup, place: Path) -> Iterator[Finding]:
    """Every check, cheap ones first, each yielded as soon as it is known. After a failed check, expensive ones
    are skipped. The last three findings are the projected time, memory and disk.

    Args:
        setup: the run. Its student is trained, and of no use afterwards.
        place: the run directory, which need not exist yet.
    """
    sound, planned, time = True, plan_of(setup), "not measured: a check failed before it"
    for finding in cheap(setup, planned, place):
        sound = sound and finding.ok
        yield finding
    # Held back until memory and disk can follow it: a report ends with what the run will take.
    for finding in trial(setup) if sound else ():
        if finding.name == "projected time":
            time = finding.figure
        else:
            yield finding
    yield Finding("projected time", time, True)
    yield from projected(setup, planned, place)


def projected(setup: RunSetup, planned: Plan | str, place: Path) -> Iterator[Finding]:
    """Peak memory and disk, with what is available. Never fails: the cheap checks have judged both."""
    memory, disk = available(setup.recipe, place)
    measured = f"{size(peak_gib(setup.device) * 2**30)} measured so far"
    if isinstance(planned, str):
        yield Finding("projected memory", f"{planned} {measured}, {size(memory)} available", True)
        yield Finding("projected disk", f"{planned} {size(disk)} free", True)
        return
    figure = f"{size(planned.peak_bytes)} at the peak, {measured}, {size(memory)} available"
    yield Finding("projected memory", figure, True)
    figure = f"{size(planned.disk_peak_bytes)} at the most, {size(planned.disk_bytes)} after it"
    yield Finding("projected disk", f"{figure}, {size(disk)} free", True)


def trial(setup: RunSetup) -> Iterator[Finding]:
    """The expensive checks: the student is saved and loaded, then trained for a few real steps."""
    setup.student.eval()
    yield from texts_begin_as_the_teacher_reads_them(setup)
    yield from student_writes(setup)
    # Before the steps: what has not been trained can still be compared with what was loaded.
    yield save_and_reload_agree(setup, window(setup.corpus.heldout.batch([0])).to(setup.device))
    try:
        yield from trial_steps(setup)
    except UserError as error:  # the message that would end the run, of a loss that is not finite, say
        yield Finding("steps", str(error), False, "The run would end there")


@torch.no_grad()
def save_and_reload_agree(setup: RunSetup, batch: Batch) -> Finding:
    """The student, saved and loaded again, has the same logits."""
    advice = "The saved student is another model; do not train it."
    with tempfile.TemporaryDirectory() as folder:
        setup.student.save(Path(folder) / "student", setup.tokenizer)
        saved = sum(path.stat().st_size for path in Path(folder).rglob("*"))
        try:
            reloaded = from_checkpoint(Path(folder) / "student", setup.device)
        except UserError as error:
            return Finding("save and reload", f"cannot be loaded: {error}", False, advice)
        reloaded.mask_from(setup.shared.ids)  # a checkpoint has logits for padded ids, too
        before, after = (
            model.head(model.hidden(batch.input_ids_BT)) for model in (setup.student.model, reloaded)
        )
    gap = float((before - after).abs().max())
    figure = f"{size(saved)} saved and loaded, logits differ by {gap:.2g}"
    return Finding("save and reload", figure, gap <= 1e-5, advice)


@dataclass(frozen=True)
class _Thinned:
    """The recipe's data; after the first steps, with only a quarter of the rows."""

    whole: Data
    thin: Data

    @classmethod
    def of(cls, setup: RunSetup) -> _Thinned:
        return cls(setup.data(), setup.data(rows_per_step=max(setup.recipe.train.rows_per_step // 4, 1)))

    @property
    def fixed(self) -> bool:
        return self.whole.fixed

    def step(self, step: int) -> list[Batch]:
        return self._of(step).step(step)

    def epoch(self, step: int) -> int:
        return self.whole.epoch(step)

    def figures(self, step: int) -> dict[str, float]:
        return self._of(step).figures(step)

    def _of(self, step: int) -> Data:
        return self.whole if step < WHOLE_STEPS else self.thin


class _Observer:
    """Records, through the loop's hooks, which weights real steps move, and at which learning rates."""

    def __init__(self, setup: RunSetup) -> None:
        self.device = setup.device
        self.parameters = dict(setup.student.named_parameters())
        self.trained = [name for name, p in self.parameters.items() if p.requires_grad]
        self.late = {name for name in self.trained if REACHED_LATE in name}
        """Adapters whose gradient is 0 in the first step."""
        self.num_steps = min(STEPS, setup.recipe.train.num_steps)
        self.compared_after = min(2 if self.late else 1, self.num_steps)
        """Number of steps after which weights are compared with those before."""
        self.before = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.reached: set[str] = set()
        """Parameters with a nonzero gradient: that they moved proves nothing, weight decay moves them, too."""
        self.moved: list[str] = []
        self.steps: list[Metrics] = []
        self.utilisation: list[float] = []
        """Of the GPU, in percent."""
        self.optimizers: list[torch.optim.Optimizer] = []
        self.rates: list[list[float]] = []
        """Of each step: the learning rate of each parameter group, and the logged one."""
        self.gradient_hooks = [
            p.register_post_accumulate_grad_hook(partial(self.note_gradient, name))  # type: ignore[no-untyped-call]
            for name, p in self.parameters.items()
            if p.requires_grad
        ]

    def note_gradient(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None and bool(parameter.grad.any()):
            self.reached.add(name)

    def on_step(self, step: int, metrics: Metrics) -> None:
        if step == self.compared_after:
            for hook in self.gradient_hooks:
                hook.remove()
            after = self.parameters
            self.moved = [name for name, old in self.before.items() if not torch.equal(old, after[name])]
            self.before.clear()  # a whole copy of the student
        self.steps.append(metrics)
        self.rates.append([*rates(self.optimizers[0]), metrics["train/lr"]])
        if self.device.type == "cuda":
            self.utilisation.extend(_utilisation(self.device))

    def hooks(self) -> Hooks:
        unmeasured = {"heldout/loss": math.inf}
        return Hooks(
            lambda step: unmeasured,
            self.on_step,
            lambda *_: None,
            resume=self.optimizers.append,
            should_stop=lambda: len(self.steps) == self.num_steps,
        )


def trial_steps(setup: RunSetup) -> Iterator[Finding]:
    """Real steps on real rows: which weights move, at which learning rate, and how fast."""
    config, observed = setup.recipe.train, _Observer(setup)
    teacher = setup.teacher if setup.recipe.objective.kd_weight else None
    train(setup.student, teacher, _Thinned.of(setup), _strict(setup.recipe), observed.hooks())

    steps = observed.steps
    yield trained_weights_move(
        observed.trained,
        [name for name in observed.parameters if name not in observed.trained],
        observed.moved,
        observed.reached,
        observed.compared_after,
        late=observed.late if observed.compared_after == 1 else set(),
        slow=steps[0]["train/lr"] < MIN_VISIBLE_LR,
    )
    yield learning_rate_follows_schedule(observed.rates, [lr_at(step, config) for step in range(len(steps))])
    losses = [step["train/loss"] for step in steps]
    thinned = (
        f", the last {len(steps) - WHOLE_STEPS} with a quarter of the rows"
        if len(steps) > WHOLE_STEPS
        else ""
    )
    figure = f"{len(steps)} real steps{thinned}; loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    if coefficient := setup.student.router_coefficient:
        first, last = (step["train/router_loss"] for step in (steps[0], steps[-1]))
        figure += f"; router loss {first:.4f} -> {last:.4f}, coefficient {coefficient:g}"
    yield Finding("steps", figure, all(map(math.isfinite, losses)))
    first_s, deadline_s = steps[0]["speed/step_s"], setup.recipe.guard.first_step_s
    figure = f"{first_s:.3g} s, guard.first_step_s is {deadline_s:g}"
    yield Finding("first step", figure, first_s < deadline_s, "Raise the deadline, or make the step smaller.")
    if setup.device.type == "cuda":
        busy = observed.utilisation
        median = f"{statistics.median(busy):.0f} % in the median" if busy else ""
        yield Finding("GPU utilisation", median or "not measured: pip install nvidia-ml-py", True)
    step_s = _median_step_s(steps[:WHOLE_STEPS])
    whole = clock(config.num_steps * step_s)
    figure = f"{whole} for {config.num_steps} steps of {step_s:.3g} s, evaluations not counted"
    yield Finding("projected time", figure, True)


def trained_weights_move(
    trained: list[str],
    frozen: list[str],
    moved: list[str],
    reached: set[str],
    steps: int,
    *,
    late: set[str],
    slow: bool,
) -> Finding:
    """Every trained tensor has a gradient and moves in the first `steps`, and no frozen one does.

    Args:
        trained: names of the tensors that require a gradient.
        frozen: names of the others.
        moved: names of those whose values changed.
        reached: names of those that had a nonzero gradient.
        steps: after how many steps this was recorded.
        late: excused, since only a second step would reach them.
        slow: the learning rate is too low for float32 weights to move in one step; gradients must exist.
    """
    still = [name for name in trained if name not in moved]
    figure = (
        f"{len(trained) - len(still)} of {len(trained)} tensors moved in the first"
        f" {'step' if steps == 1 else f'{steps} steps'}, {len(reached)} have a gradient"
        + (", the rate is too low for the others" if slow else "")
        + (f", of {len(late)} it is 0 in the first step, the only one" if late else "")
    )
    strayed = [name for name in frozen if name in moved]
    if frozen:
        figure += f"; {len(strayed)} of {len(frozen)} frozen ones moved"
    faulty = [name for name in trained if name not in reached | late] + ([] if slow else still)
    faulty = [name for name in faulty if name not in late]
    advice = f"{faulty[:1]} did not: is it used, trainable, in the optimizer?"
    if strayed:
        advice = f"{strayed[:1]} is frozen and moved; a bug of ours."
    return Finding("weights move", figure, not faulty and not strayed, advice)


def learning_rate_follows_schedule(actual: list[list[float]], scheduled: list[float]) -> Finding:
    """`actual` has the rates of each step: those of the optimizer's groups, and the logged one."""
    groups = len(actual[0]) - 1
    figure = (
        f"{actual[0][-1]:.3g} at step 1, {actual[-1][-1]:.3g} at step {len(actual)}, read back from"
        f" {'each of ' if groups > 1 else ''}{groups} group{'s' if groups > 1 else ''} of the optimizer"
    )
    for step, (rates_of_step, expected) in enumerate(zip(actual, scheduled, strict=True), start=1):
        for group, rate in enumerate(rates_of_step):
            if rate != expected:
                where = "in the log" if group == groups else f"in group {group}"
                figure = f"{rate:.3g} {where} at step {step}, {expected:.3g} by the schedule"
                return Finding(
                    "learning rate", figure, False, "The optimizer does not run at the schedule's rate."
                )
    return Finding("learning rate", figure, True)


def smoke(
    resolved: Resolved, steps: int, display: Display | None = None, name: str = "run", at_most: bool = False
) -> Metrics:
    """Run exactly `steps` steps of the recipe, and project the time of the whole run; writes nothing.

    Args:
        resolved: the recipe and its model sources.
        steps: from 1 to the recipe's own number.
        display: where progress is shown; None: nowhere.
        name: of the run directory, whose disk is checked.
        at_most: run all of a recipe that has fewer steps.

    Returns:
        The metrics of the last step, the median seconds of a step and of an evaluation, and the projected
        seconds of the whole run.

    Raises:
        UserError: whatever keeps `distill` from starting, a failed check included.
    """
    if not at_most:  # before anything is read, where the recipe says it itself
        _require_as_many(steps, resolved.recipe.train.steps)
    display = display or Display(quiet=True)
    note_types(resolved, display.note)
    resolved = settle(resolved, display.note)
    with process_of(resolved.recipe):
        setup = set_up(resolved, display.note)
        recipe = setup.recipe
        with contextlib.closing(setup.teacher):
            steps = min(steps, recipe.train.num_steps) if at_most else steps
            _require_as_many(steps, recipe.train.num_steps)
            require_sound(setup, default_path(name), display.note)
            metrics, evaluations = _smoke_steps(setup, steps, display)
    written_s = _written_s(metrics, 1 if recipe.rollouts is None else recipe.rollouts.every)
    alone = [
        each | {"speed/step_s": each["speed/step_s"] - each.get("speed/rollout_s", 0.0)} for each in metrics
    ]
    step_s, evaluation_s = _median_step_s(alone) + written_s, statistics.median(evaluations)
    # Before the first step, after the last one, and between steps where the recipe says so.
    num_evaluations = 2 + (recipe.train.num_steps - 1) // recipe.eval.every if recipe.eval.every else 2
    return metrics[-1] | {
        "smoke/steps": len(metrics),
        "smoke/step_s": step_s,
        "smoke/evaluation_s": evaluation_s,
        "smoke/of_steps": recipe.train.num_steps,
        "smoke/projected_s": recipe.train.num_steps * step_s + num_evaluations * evaluation_s,
        **({"smoke/projected_rollout_s": recipe.train.num_steps * written_s} if written_s else {}),
    }


def _written_s(steps: list[Metrics], every: int) -> float:
    """Seconds a step of writing the student's own rows, which the first step of every block does for all of it; 0 where
    it writes none.
    """
    blocks = [step["speed/rollout_s"] for step in steps if "speed/rollout_s" in step]
    return statistics.median(blocks[1:] or blocks) / every if blocks else 0.0


def _require_as_many(steps: int, of: int | None) -> None:
    if steps < 1 or (of is not None and steps > of):
        run = "1 on" if of is None else f"1 to the recipe's {of} steps"
        raise UserError(f"--smoke {steps}: must be from {run}.")


def _smoke_steps(setup: RunSetup, steps: int, display: Display) -> tuple[list[Metrics], list[float]]:
    """The metrics of each step, and the seconds of each evaluation."""
    recipe = setup.recipe
    logged: list[Metrics] = []
    evaluations: list[float] = []

    def evaluate_student(step: int) -> Metrics:
        started = time.perf_counter()
        corpus, size = setup.corpus, recipe.train.micro_batch_rows
        metrics = heldout(setup.student, setup.teacher, corpus.heldout, size, sources=corpus.heldout_parts)
        evaluations.append(time.perf_counter() - started)
        display.heldout_line(step, metrics)
        return metrics

    def on_step(step: int, metrics: Metrics) -> None:
        logged.append(metrics)
        left = statistics.median(each["speed/step_s"] for each in logged) * (steps - step)
        display.step_line(step, steps, metrics, left)

    hooks = Hooks(evaluate_student, on_step, lambda *_: None, should_stop=lambda: len(logged) == steps)
    teacher = setup.teacher if recipe.objective.kd_weight else None
    train(setup.student, teacher, setup.data(), _strict(recipe), hooks)
    return logged, evaluations


def step_seconds(setup: RunSetup, recipes: Mapping[str, Recipe]) -> dict[str, float]:
    """Median seconds of a step of each recipe; they may differ in their objectives alone.

    They take turns, so that a machine that slows down slows all of them. The student is trained by it.
    """
    times: dict[str, list[float]] = {name: [] for name in recipes}
    for _ in range(TURNS):
        for name, recipe in recipes.items():
            setup.student.objective = make_objective(recipe, setup.student.objective.matmul_dtype)
            steps = _first_steps(setup, recipe)
            times[name] += [step["speed/step_s"] for step in steps[1:] or steps]  # the first one allocates
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _first_steps(setup: RunSetup, recipe: Recipe) -> list[Metrics]:
    """The metrics of WHOLE_STEPS steps."""
    logged: list[Metrics] = []
    hooks = Hooks(
        lambda step: {"heldout/loss": math.inf},
        lambda step, metrics: logged.append(metrics),
        lambda *_: None,
        should_stop=lambda: len(logged) == WHOLE_STEPS,
    )
    teacher = setup.teacher if recipe.objective.kd_weight else None
    own = dataclasses.replace(setup, rollouts=None if recipe.rollouts is None else setup.rollouts)
    train(setup.student, teacher, own.data(), _strict(recipe), hooks)
    return logged


def _strict(recipe: Recipe) -> Recipe:
    """With a guard that stops at a fault: a trial reports it, whatever the run would do about it."""
    return dataclasses.replace(recipe, guard=dataclasses.replace(recipe.guard, policy="stop"))


def _median_step_s(steps: list[Metrics]) -> float:
    """Seconds of a step, without the first, which pays for allocations, unless it is the only one."""
    return statistics.median(step["speed/step_s"] for step in steps[1:] or steps)


def _utilisation(device: torch.device) -> list[float]:
    """Percent of time that the GPU was busy; empty where it cannot be read."""
    try:
        return [float(torch.cuda.utilization(device))]
    except ModuleNotFoundError:  # its figures come from NVIDIA's own library, an extra
        return []
