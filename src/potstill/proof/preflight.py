"""What would make a run worthless, looked for on the recipe's own models and rows before an hour is spent.

Each finding has a figure and a verdict. The order is by price; what can be refused while the recipe is
assembled (files, vocabularies, head, packing) has been refused before the first of them. The student that is
trained here for a few steps is thrown away. `potstill check` prints them.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from potstill.assembly import Cast
from potstill.errors import UserError
from potstill.evals.likelihood import heldout
from potstill.students.student import from_checkpoint
from potstill.training.loop import Hooks, train
from potstill.training.optim import lr_at
from potstill.types import Batch

STEPS = 10
SAME = 1e-6  # nats: below it, two models say the same


@dataclass(frozen=True)
class Finding:
    name: str
    figure: str
    ok: bool
    advice: str
    """What to do where it is red."""


def preflight(cast: Cast) -> Iterator[Finding]:
    """Every check, cheapest first, each as soon as it is known."""
    cast.student.eval()
    batch = cast.corpus.heldout.batch([0]).to(cast.device)
    yield labels_are_next_tokens(cast)
    yield parameters_are_on_the_device(cast)
    yield teacher_reads_its_input(cast, batch)
    yield student_reads_its_input(cast, batch)
    yield cross_entropy_is_the_library_s(cast, batch)
    first = heldout(cast.student, cast.teacher, cast.corpus.heldout, cast.recipe.train.micro_batch_rows)
    yield student_is_not_lost(cast, first["heldout/ce"])
    yield teacher_and_student_differ(first["heldout/kl"])
    yield saved_is_what_was_trained(cast, batch)
    yield from steps_do_what_the_recipe_says(cast, first)


def labels_are_next_tokens(cast: Cast) -> Finding:
    """In every row looked at, the label of a position is the token after it, in the same document."""
    wrong = seen = 0
    for row in range(min(len(cast.corpus.train), 64)):
        batch = cast.corpus.train.batch([row])
        ids_T, positions_T = batch.input_ids_BT[0], batch.position_ids_BT[0]
        inside = batch.positions_N < len(ids_T) - 1  # the last label is the next row's first token
        after_N = batch.positions_N[inside] + 1
        bad_N = (ids_T[after_N] != batch.labels_N[inside]) | (positions_T[after_N] == 0)
        wrong, seen = wrong + int(bad_N.sum()), seen + len(after_N)
    figure = f"{seen - wrong} of {seen} labels are the next token of their document"
    return Finding(
        "labels", figure, wrong == 0 < seen, "The corpus is packed wrongly; this is a bug of ours."
    )


def parameters_are_on_the_device(cast: Cast) -> Finding:
    away = [name for name, p in cast.student.named_parameters() if p.device.type != cast.device.type]
    count = len(list(cast.student.parameters()))
    return Finding(
        "device", f"{count - len(away)} of {count} tensors on {cast.device}", not away, f"See {away[:1]}."
    )


def teacher_reads_its_input(cast: Cast, batch: Batch) -> Finding:
    """Other tokens must give other answers: logits that were never computed from the input do not."""
    gap = _gap(lambda b: _teacher_logp(cast, b), batch)
    advice = "The teacher answers the same whatever it reads. Look at its checkpoint."
    return Finding(
        "teacher", f"its log-probabilities move by {gap:.2g} nats with its input", gap > SAME, advice
    )


def student_reads_its_input(cast: Cast, batch: Batch) -> Finding:
    gap = _gap(lambda b: _student_logits(cast, b).log_softmax(-1), batch)
    advice = "The student answers the same whatever it reads. Look at its checkpoint."
    return Finding(
        "student", f"its log-probabilities move by {gap:.2g} nats with its input", gap > SAME, advice
    )


@torch.no_grad()
def cross_entropy_is_the_library_s(cast: Cast, batch: Batch) -> Finding:
    """Ours against Transformers' own forward and PyTorch's own cross-entropy, on the same positions."""
    targets = cast.teacher.targets(batch)
    ours = float(cast.student.measure(batch, targets)["ce"]) / len(batch.labels_N)
    own_BTV = cast.student.model.hf(
        input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
    ).logits
    own_NV = own_BTV.flatten(0, 1)[batch.positions_N, : cast.student.model.head.num_ids]
    theirs = float(F.cross_entropy(own_NV.double(), batch.labels_N))
    figure = f"cross-entropy {ours:.4f} nats, a reference forward gives {theirs:.4f}"
    return Finding(
        "cross-entropy",
        figure,
        abs(ours - theirs) <= 0.02 * theirs,
        "The loss is not the model's; a bug of ours.",
    )


def student_is_not_lost(cast: Cast, ce: float) -> Finding:
    """A cut student may start near chance; one far above it speaks another vocabulary than the corpus."""
    chance = math.log(cast.shared.ids)
    figure = f"held-out cross-entropy {ce:.3f} nats, chance is {chance:.3f}"
    return Finding(
        "chance", figure, ce < 2 * chance, "Is the student's vocabulary the corpus's? See corpus.tokenizer."
    )


def teacher_and_student_differ(kl: float) -> Finding:
    """Equal under whatever name or format: nothing to distil."""
    advice = "Teacher and student are the same model; the KD term is 0 and nothing would be learned."
    return Finding("KD term", f"held-out KL to the teacher {kl:.4g} nats", kl > SAME, advice)


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
        before, after = (
            model.head(model.hidden(batch.input_ids_BT)) for model in (cast.student.model, again)
        )
    gap = float((before - after).abs().max())
    figure = f"{size / 2**20:.0f} MiB saved and loaded, logits differ by {gap:.2g}"
    return Finding("save and reload", figure, gap <= 1e-5, advice)


def steps_do_what_the_recipe_says(cast: Cast, first: dict[str, float]) -> Iterator[Finding]:
    """Real steps on real rows: what moves, at which rate, how fast."""
    plan = cast.recipe.train
    before = {name: p.detach().clone() for name, p in cast.student.named_parameters() if p.requires_grad}
    still: list[str] = []
    lines: list[dict[str, float]] = []

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if step == 1:
            parameters = dict(cast.student.named_parameters())
            still.extend(name for name, old in before.items() if torch.equal(old, parameters[name]))
        lines.append(metrics)

    wanted = min(STEPS, plan.steps)
    hooks = Hooks(lambda step: first, on_step, lambda *_: None, should_stop=lambda: len(lines) == wanted)
    teacher = cast.teacher if cast.recipe.objective.kd_weight else None
    train(cast.student, teacher, cast.corpus.train, cast.corpus.order(plan.seed), cast.recipe, hooks)

    moved = f"{len(before) - len(still)} of {len(before)} tensors moved in the first step"
    yield Finding("weights move", moved, not still, f"{still[:1]} did not: is it used, and in the optimizer?")
    rates = [(line["train/lr"], lr_at(step, plan)) for step, line in enumerate(lines)]
    off = max(abs(set_to - wanted_lr) for set_to, wanted_lr in rates)
    figure = (
        f"{rates[0][0]:.3g} at step 1, {rates[-1][0]:.3g} at step {len(rates)}, read back from the optimizer"
    )
    yield Finding("learning rate", figure, off == 0, "The optimizer does not run at the schedule's rate.")
    losses = [line["train/loss"] for line in lines]
    yield Finding(
        "ten steps", f"loss {losses[0]:.4f} -> {losses[-1]:.4f}", all(map(math.isfinite, losses)), ""
    )
    step_s = statistics.median(line["speed/step_s"] for line in lines[1:] or lines)
    figure = (
        f"{plan.steps} steps of {step_s:.3g} s: {plan.steps * step_s / 3600:.3g} h, evaluations not counted"
    )
    yield Finding("projected time", figure, True, "")


def _gap(answer: Callable[[Batch], torch.Tensor], batch: Batch) -> float:
    """How far an answer moves when the input is read backwards."""
    backwards = Batch(
        batch.rows_B, batch.input_ids_BT.flip(1), batch.position_ids_BT, batch.positions_N, batch.labels_N
    )
    with torch.no_grad():
        return float((answer(batch) - answer(backwards)).abs().max())


def _teacher_logp(cast: Cast, batch: Batch) -> torch.Tensor:
    targets = cast.teacher.targets(batch)[:16]
    nothing_NV = torch.zeros(len(targets), cast.student.model.head.num_ids, device=cast.device)
    return targets.on_support(nothing_NV, 1.0)[1].clamp_min(-100)


def _student_logits(cast: Cast, batch: Batch) -> torch.Tensor:
    hidden_BTD = cast.student.model.hidden(batch.input_ids_BT, batch.position_ids_BT)
    return cast.student.model.head(hidden_BTD.flatten(0, 1)[batch.positions_N[:16]])
