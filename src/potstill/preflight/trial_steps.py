"""The recipe's own steps, on trial: `potstill check`, whose cheap half is `preflight.py`, and `--smoke`.

What is trained here is thrown away.
"""

from __future__ import annotations

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
from potstill.preflight.auto import settle
from potstill.preflight.checks import cheap, plan_of, require_sound
from potstill.preflight.plan import Plan, available
from potstill.preflight.probe_batches import window
from potstill.recipe.load import Recipe
from potstill.runs.run_dir import default_path
from potstill.training.loop import Hooks, Metrics, train
from potstill.training.optim import lr_at, rates
from potstill.types import Batch, Finding, Order

STEPS = 10
WHOLE_STEPS = 3
"""Of them with all rows of a step, to be timed; the others take a quarter of the rows."""
TURNS = 3
"""Of each recipe whose steps are timed beside another's."""
LR_SEEN = 1e-6
"""Below this rate, as in a long warm-up, float32 weights near 1 cannot move in one step."""


def check(setup: RunSetup, place: Path) -> Iterator[Finding]:
    """Every check, cheapest first, each as soon as it is known; after a failed one, expensive ones are
    skipped.

    The last three are what the run will take of time, memory and disk.
    """
    sound, planned, time = True, plan_of(setup), "not measured: a check failed before it"
    for finding in cheap(setup, planned, place):
        sound = sound and finding.ok
        yield finding
    for finding in trial(setup) if sound else ():
        if finding.name == "projected time":
            time = finding.figure
        else:
            yield finding
    yield Finding("projected time", time, True)
    yield from projected(setup, planned, place)


def projected(setup: RunSetup, planned: Plan | str, place: Path) -> Iterator[Finding]:
    """Peak memory and bytes on the disk, beside what there is; never red, the cheap checks have judged."""
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
    """The costly half: the student is saved and loaded, and trained for ten real steps."""
    setup.student.eval()
    yield saved_is_what_was_trained(setup, window(setup.corpus.heldout.batch([0])).to(setup.device))
    try:
        yield from steps_do_what_the_recipe_says(setup)
    except UserError as error:  # a loss that is not finite, say, told as the run would tell it
        yield Finding("steps", str(error), False, "The run would end there")


@torch.no_grad()
def saved_is_what_was_trained(setup: RunSetup, batch: Batch) -> Finding:
    advice = "The saved student is another model; do not train it."
    with tempfile.TemporaryDirectory() as folder:
        setup.student.save(Path(folder) / "student", setup.tokenizer)
        saved = sum(path.stat().st_size for path in Path(folder).rglob("*"))
        try:
            again = from_checkpoint(Path(folder) / "student", setup.device)
        except UserError as error:
            return Finding("save and reload", f"cannot be loaded: {error}", False, advice)
        again.mask_from(setup.shared.ids)
        before, after = (
            model.head(model.hidden(batch.input_ids_BT)) for model in (setup.student.model, again)
        )
    gap = float((before - after).abs().max())
    figure = f"{size(saved)} saved and loaded, logits differ by {gap:.2g}"
    return Finding("save and reload", figure, gap <= 1e-5, advice)


@dataclass(frozen=True)
class _Thinned:
    """The recipe's rows, after the first steps only a quarter of each step's."""

    order: Order

    def rows(self, step: int, rows_per_step: int) -> list[int]:
        rows = self.order.rows(step, rows_per_step)
        return rows if step < WHOLE_STEPS else rows[: max(len(rows) // 4, 1)]

    def epoch(self, step: int, rows_per_step: int) -> int:
        return self.order.epoch(step, rows_per_step)


class _Watcher:
    """What real steps do to the student's weights and at which rates, seen through the loop's hooks."""

    def __init__(self, setup: RunSetup) -> None:
        self.device = setup.device
        self.parameters = dict(setup.student.named_parameters())
        self.trained = [name for name, p in self.parameters.items() if p.requires_grad]
        self.late = {name for name in self.trained if REACHED_LATE in name}
        self.wanted = min(STEPS, setup.recipe.train.steps)
        self.looked_at = min(2 if self.late else 1, self.wanted)
        """After how many steps the weights are compared with those before."""
        self.before = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.reached: set[str] = set()
        """By a gradient: decay alone moves weights, too."""
        self.moved: list[str] = []
        self.lines: list[Metrics] = []
        self.busy: list[float] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.rates: list[list[float]] = []
        """Of each step: the rate of each group, and the one that was logged."""
        self.gradient_hooks = [
            p.register_post_accumulate_grad_hook(partial(self.note_gradient, name))  # type: ignore[no-untyped-call]
            for name, p in self.parameters.items()
            if p.requires_grad
        ]

    def note_gradient(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None and bool(parameter.grad.any()):
            self.reached.add(name)

    def on_step(self, step: int, metrics: Metrics) -> None:
        if step == self.looked_at:
            for hook in self.gradient_hooks:
                hook.remove()
            after = self.parameters
            self.moved = [name for name, old in self.before.items() if not torch.equal(old, after[name])]
            self.before.clear()
        self.lines.append(metrics)
        self.rates.append([*rates(self.optimizers[0]), metrics["train/lr"]])
        if self.device.type == "cuda":
            self.busy.extend(_utilisation(self.device))

    def hooks(self) -> Hooks:
        never = {"heldout/loss": math.inf}
        return Hooks(
            lambda step: never,
            self.on_step,
            lambda *_: None,
            resume=self.optimizers.append,
            should_stop=lambda: len(self.lines) == self.wanted,
        )


def steps_do_what_the_recipe_says(setup: RunSetup) -> Iterator[Finding]:
    """Real steps on real rows: what moves, at which rate, how fast."""
    plan, seen = setup.recipe.train, _Watcher(setup)
    teacher = setup.teacher if setup.recipe.objective.kd_weight else None
    order = _Thinned(setup.corpus.order(plan.seed))
    train(setup.student, teacher, setup.corpus.train, order, _strict(setup.recipe), seen.hooks())

    lines = seen.lines
    yield what_is_trained_moves(
        seen.trained,
        [name for name in seen.parameters if name not in seen.trained],
        seen.moved,
        seen.reached,
        seen.looked_at,
        late=seen.late if seen.looked_at == 1 else set(),
        slow=lines[0]["train/lr"] < LR_SEEN,
    )
    yield rate_is_the_schedule_s(seen.rates, [lr_at(step, plan) for step in range(len(lines))])
    losses = [line["train/loss"] for line in lines]
    thinned = (
        f", the last {len(lines) - WHOLE_STEPS} with a quarter of the rows"
        if len(lines) > WHOLE_STEPS
        else ""
    )
    figure = f"{len(lines)} real steps{thinned}; loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    yield Finding("steps", figure, all(map(math.isfinite, losses)))
    first_s, deadline_s = lines[0]["speed/step_s"], setup.recipe.guard.first_step_s
    figure = f"{first_s:.3g} s, guard.first_step_s is {deadline_s:g}"
    yield Finding("first step", figure, first_s < deadline_s, "Raise the deadline, or make the step smaller.")
    if setup.device.type == "cuda":
        median = f"{statistics.median(seen.busy):.0f} % in the median" if seen.busy else ""
        yield Finding("GPU utilisation", median or "not measured: pip install nvidia-ml-py", True)
    step_s = _settled_s(lines[:WHOLE_STEPS])
    figure = f"{clock(plan.steps * step_s)} for {plan.steps} steps of {step_s:.3g} s, evaluations not counted"
    yield Finding("projected time", figure, True)


def what_is_trained_moves(
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

    Excused are those that only a second step would reach (`late`), and lack of motion at a `slow` rate.
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


def rate_is_the_schedule_s(seen: list[list[float]], wanted: list[float]) -> Finding:
    """`seen` has the rates of each step: those of the optimizer's groups, and the one that was logged."""
    groups = len(seen[0]) - 1
    figure = (
        f"{seen[0][-1]:.3g} at step 1, {seen[-1][-1]:.3g} at step {len(seen)}, read back from"
        f" {'each of ' if groups > 1 else ''}{groups} group{'s' if groups > 1 else ''} of the optimizer"
    )
    for step, (rates_of_step, rate) in enumerate(zip(seen, wanted, strict=True), start=1):
        for group, found in enumerate(rates_of_step):
            if found != rate:
                where = "in the log" if group == groups else f"in group {group}"
                figure = f"{found:.3g} {where} at step {step}, the schedule says {rate:.3g}"
                return Finding(
                    "learning rate", figure, False, "The optimizer does not run at the schedule's rate."
                )
    return Finding("learning rate", figure, True)


def smoke(resolved: Resolved, steps: int, display: Display | None = None, name: str = "run") -> Metrics:
    """Exactly `steps` steps of the recipe's own run, and what they say of the whole; writes nothing.

    Returns the metrics of the last step, the median seconds of a step and of an evaluation, and the projected
    seconds of the full run, which would be called `name`.

    Raises:
        UserError: whatever `distill` would refuse to start for, a failed cheap check too.
    """
    recipe = resolved.recipe
    if not 1 <= steps <= recipe.train.steps:
        raise UserError(f"--smoke {steps}: must be from 1 to the recipe's {recipe.train.steps} steps.")
    display = display or Display(quiet=True)
    resolved = settle(resolved, display.note)
    with process_of(resolved.recipe):
        setup = set_up(resolved, display.note)
        checked = require_sound(setup, default_path(name))
        display.note(f"check: all {len(checked.findings)} cheap ones passed")
        lines, evaluations = _smoke_steps(setup, steps, display)
    step_s, evaluation_s = _settled_s(lines), statistics.median(evaluations)
    num_evaluations = 2 + (recipe.train.steps - 1) // recipe.eval.every if recipe.eval.every else 2
    return lines[-1] | {
        "smoke/steps": len(lines),
        "smoke/step_s": step_s,
        "smoke/evaluation_s": evaluation_s,
        "smoke/projected_s": recipe.train.steps * step_s + num_evaluations * evaluation_s,
    }


def _smoke_steps(setup: RunSetup, steps: int, display: Display) -> tuple[list[Metrics], list[float]]:
    """The metrics of each step, and the seconds of each evaluation."""
    recipe = setup.recipe
    lines: list[Metrics] = []
    evaluations: list[float] = []

    def evaluate_student(step: int) -> Metrics:
        started = time.perf_counter()
        metrics = heldout(setup.student, setup.teacher, setup.corpus.heldout, recipe.train.micro_batch_rows)
        evaluations.append(time.perf_counter() - started)
        display.heldout_line(step, metrics)
        return metrics

    def on_step(step: int, metrics: Metrics) -> None:
        lines.append(metrics)
        left = statistics.median(line["speed/step_s"] for line in lines) * (steps - step)
        display.step_line(step, steps, metrics, left)

    hooks = Hooks(evaluate_student, on_step, lambda *_: None, should_stop=lambda: len(lines) == steps)
    teacher = setup.teacher if recipe.objective.kd_weight else None
    order = setup.corpus.order(recipe.train.seed)
    train(setup.student, teacher, setup.corpus.train, order, _strict(recipe), hooks)
    return lines, evaluations


def step_seconds(setup: RunSetup, recipes: Mapping[str, Recipe]) -> dict[str, float]:
    """Median seconds of a step of each recipe, which differ in nothing but their weights of the loss.

    They take turns, so that a machine that slows down slows all of them. The student is not what it was.
    """
    seen: dict[str, list[float]] = {name: [] for name in recipes}
    for _ in range(TURNS):
        for name, recipe in recipes.items():
            setup.student.objective = make_objective(recipe, setup.student.objective.matmul_dtype)
            lines = _first_steps(setup, recipe)
            seen[name] += [line["speed/step_s"] for line in lines[1:] or lines]  # the first one allocates
    return {name: statistics.median(seconds) for name, seconds in seen.items()}


def _first_steps(setup: RunSetup, recipe: Recipe) -> list[Metrics]:
    lines: list[Metrics] = []
    hooks = Hooks(
        lambda step: {"heldout/loss": math.inf},
        lambda step, metrics: lines.append(metrics),
        lambda *_: None,
        should_stop=lambda: len(lines) == WHOLE_STEPS,
    )
    teacher = setup.teacher if recipe.objective.kd_weight else None
    order = setup.corpus.order(recipe.train.seed)
    train(setup.student, teacher, setup.corpus.train, order, _strict(recipe), hooks)
    return lines


def _strict(recipe: Recipe) -> Recipe:
    """On trial a fault is told, whatever the run would do about it."""
    return dataclasses.replace(recipe, guard=dataclasses.replace(recipe.guard, policy="stop"))


def _settled_s(lines: list[Metrics]) -> float:
    """Seconds of a step. The first one pays for allocations that no other does; it may be the only one."""
    return statistics.median(line["speed/step_s"] for line in lines[1:] or lines)


def _utilisation(device: torch.device) -> list[float]:
    try:
        return [float(torch.cuda.utilization(device))]
    except ModuleNotFoundError:  # its figures come from NVIDIA's own library, an extra
        return []
