"""The costly half of the check: the student is saved and loaded, and trained for ten real steps, on trial.

What is trained here is thrown away. `preflight.py` runs it when nothing before it was red.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from potstill.assembly import Cast
from potstill.errors import UserError
from potstill.students.student import from_checkpoint
from potstill.training.loop import Hooks, train
from potstill.training.optim import lr_at
from potstill.types import Batch

STEPS = 10
TOKENS = 64  # of each row, where gradients are looked at


@dataclass(frozen=True)
class Finding:
    name: str
    figure: str
    ok: bool
    advice: str = ""
    """What to do where it is red."""


def rehearsal(cast: Cast) -> Iterator[Finding]:
    """Each finding as soon as it is known."""
    cast.student.eval()
    yield saved_is_what_was_trained(cast, window(cast.corpus.heldout.batch([0])).to(cast.device))
    try:
        yield from steps_do_what_the_recipe_says(cast)
    except UserError as error:  # a loss that is not finite, say, told as the run would tell it
        yield Finding("steps", str(error), False, "The run would end there")


@torch.no_grad()
def saved_is_what_was_trained(cast: Cast, batch: Batch) -> Finding:
    advice = "The saved student is another model; do not train it."
    with tempfile.TemporaryDirectory() as folder:
        cast.student.save(Path(folder) / "student", cast.tokenizer)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*"))
        try:
            again = from_checkpoint(Path(folder) / "student", cast.device)
        except UserError as error:
            return Finding("save and reload", f"cannot be loaded: {error}", False, advice)
        again.mask_from(cast.shared.ids)
        before, after = (
            model.head(model.hidden(batch.input_ids_BT)) for model in (cast.student.model, again)
        )
    gap = float((before - after).abs().max())
    figure = f"{size / 2**20:.0f} MiB saved and loaded, logits differ by {gap:.2g}"
    return Finding("save and reload", figure, gap <= 1e-5, advice)


def steps_do_what_the_recipe_says(cast: Cast) -> Iterator[Finding]:
    """Real steps on real rows: what moves, at which rate, how fast."""
    plan = cast.recipe.train
    before = {name: p.detach().clone() for name, p in cast.student.named_parameters() if p.requires_grad}
    still: list[str] = []
    lines: list[dict[str, float]] = []
    busy: list[float] = []

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if step == 1:
            parameters = dict(cast.student.named_parameters())
            still.extend(name for name, old in before.items() if torch.equal(old, parameters[name]))
        lines.append(metrics)
        if cast.device.type == "cuda":
            busy.extend(_utilisation(cast.device))

    wanted = min(STEPS, plan.steps)
    never = {"heldout/loss": math.inf}
    hooks = Hooks(lambda step: never, on_step, lambda *_: None, should_stop=lambda: len(lines) == wanted)
    teacher = cast.teacher if cast.recipe.objective.kd_weight else None
    recipe = dataclasses.replace(cast.recipe, guard=dataclasses.replace(cast.recipe.guard, policy="stop"))
    train(cast.student, teacher, cast.corpus.train, cast.corpus.order(plan.seed), recipe, hooks)

    moved = f"{len(before) - len(still)} of {len(before)} tensors moved in the first step"
    yield Finding("weights move", moved, not still, f"{still[:1]} did not: is it used, and in the optimizer?")
    rates = [(line["train/lr"], lr_at(step, plan)) for step, line in enumerate(lines)]
    off = max(abs(set_to - wanted_lr) for set_to, wanted_lr in rates)
    figure = (
        f"{rates[0][0]:.3g} at step 1, {rates[-1][0]:.3g} at step {len(rates)}, read back from the optimizer"
    )
    yield Finding("learning rate", figure, off == 0, "The optimizer does not run at the schedule's rate.")
    losses = [line["train/loss"] for line in lines]
    figure = f"{len(lines)} real steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    yield Finding("steps", figure, all(map(math.isfinite, losses)))
    first_s, deadline_s = lines[0]["speed/step_s"], cast.recipe.guard.first_step_s
    figure = f"{first_s:.3g} s, guard.first_step_s is {deadline_s:g}"
    yield Finding("first step", figure, first_s < deadline_s, "Raise the deadline, or make the step smaller.")
    if cast.device.type == "cuda":
        figure = (
            f"{statistics.median(busy):.0f} % in the median"
            if busy
            else "not measured: pip install nvidia-ml-py"
        )
        yield Finding("GPU utilisation", figure, True)
    step_s = statistics.median(line["speed/step_s"] for line in lines[1:] or lines)
    figure = (
        f"{plan.steps} steps of {step_s:.3g} s: {plan.steps * step_s / 3600:.3g} h, evaluations not counted"
    )
    yield Finding("projected time", figure, True)


def _utilisation(device: torch.device) -> list[float]:
    try:
        return [float(torch.cuda.utilization(device))]
    except ModuleNotFoundError:  # its figures come from NVIDIA's own library, an extra
        return []


def window(batch: Batch) -> Batch:
    """The batch's columns from its first supervised position on, few enough to be cheap in a long row."""
    T = batch.input_ids_BT.shape[1]
    first = min(int((batch.positions_N % T).min()), max(T - TOKENS, 0))
    columns = torch.arange(first, min(first + TOKENS, T))
    b_N, t_N = batch.positions_N // T, batch.positions_N % T
    inside = (t_N >= first) & (t_N <= int(columns[-1]))
    return Batch(
        batch.rows_B,
        batch.input_ids_BT[:, columns],
        batch.position_ids_BT[:, columns],
        (b_N * len(columns) + t_N - first)[inside],
        batch.labels_N[inside],
    )
