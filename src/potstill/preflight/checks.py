"""What would make a run worthless, looked for on the recipe's own models and rows before an hour is spent.

Each finding has a figure and a verdict. The order is by price; what can be refused while the recipe is
assembled (a typo, a damaged file, another vocabulary, a head or a packing that is not the model's) has been
refused before the first of them. What is here takes a few forward passes, and `distill` runs it by itself
and puts it into the receipt; `potstill check` goes on with `rehearsal.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.build.setup import RunSetup
from potstill.data.decontamination import summary
from potstill.errors import UserError, one_line
from potstill.io.terminal import size
from potstill.losses.divergences import forward_kl
from potstill.losses.objective import Objective
from potstill.models.load import weights_sha256
from potstill.preflight.plan import Plan, available, plan
from potstill.preflight.probe_batches import Pull, window
from potstill.preflight.same_model import ADVICE_IDENTICAL, SAME, rounding_kl, same_weights
from potstill.training.prefetch import ask
from potstill.types import Batch, Finding, Targets

BEFORE = -1  # the first step is number 0: errors of the teacher say step 0


def plan_of(setup: RunSetup) -> Plan | str:
    """What the run will need, or why that is not known; to be asked before the first forward pass."""
    try:
        return plan(setup.resolved, is_set_up=True)
    except Exception as error:  # a model that cannot run without data, say; a run must not end over its plan
        return f"not planned: {one_line(error)}"


def cheap(setup: RunSetup, planned: Plan | str, place: Path) -> Iterator[Finding]:
    """What takes a few forward passes. Leaves the student's weights and the random state as they were.

    `place` is where the run directory is, or will be made.
    """
    with torch.random.fork_rng(devices=[setup.device] if setup.device.type == "cuda" else []):
        setup.student.eval()
        batch = setup.corpus.heldout.batch([0]).to(setup.device)
        yield recipe_is_read(setup)
        yield files_are_whole(setup)
        yield corpus_is_compared(setup)
        yield from the_machine_suffices(setup, planned, place)
        yield vocabulary_is_shared(setup)
        yield weights_differ(setup)
        yield labels_are_next_tokens(setup)
        yield parameters_are_on_the_device(setup)
        yield teacher_reads_its_input(setup, batch)
        yield student_reads_its_input(setup, batch)
        yield cross_entropy_is_the_library_s(setup, window(batch))
        held = measure_a_little(setup)
        yield student_is_not_lost(setup, held["ce"])
        yield teacher_and_student_differ(setup, held["kl"])
        yield from setup.teacher.checks(setup, held["kl"])
        two = window(setup.corpus.train.batch([0, min(1, len(setup.corpus.train) - 1)])).to(setup.device)
        yield a_masked_position_moves_nothing(setup, two)
        yield opposite_rows_cancel(setup, two)


@dataclass(frozen=True)
class Checked:
    """What was found before a run; it goes into the receipt."""

    planned: Plan | str
    findings: list[Finding]


def require_sound(setup: RunSetup, place: Path) -> Checked:
    """The cheap half; UserError where the run would be worthless."""
    planned = plan_of(setup)
    findings = list(cheap(setup, planned, place))
    if red := [f"check: {f.name}: {f.figure}. {f.advice}" for f in findings if not f.ok]:
        raise UserError(*red)
    return Checked(planned, findings)


def recipe_is_read(setup: RunSetup) -> Finding:
    plan = setup.recipe.train
    rows = len(setup.corpus.train)
    epochs = plan.steps * plan.rows_per_step / rows
    figure = f"{plan.steps} steps of {plan.rows_per_step} rows: {epochs:.3g} times the {rows} rows"
    return Finding("recipe", figure, True)


def files_are_whole(setup: RunSetup) -> Finding:
    """Checkpoints were verified and the corpus read to its end before this; each file read has its hash."""
    files = setup.corpus.manifest["files"]
    without = [file["path"] for file in files if not file.get("sha256")]
    read = size(sum(file["bytes"] for file in files))
    figure = f"{len(files)} of the corpus, {read}, read whole; checkpoints verified"
    return Finding("files", figure, not without, f"Not read: {without[:1]}.")


def corpus_is_compared(setup: RunSetup) -> Finding:
    """Never red: the recipe says what is done about an overlap, and what it refuses does not come here."""
    return Finding("decontamination", summary(setup.corpus.manifest["decontamination"]), True)


def the_machine_suffices(setup: RunSetup, planned: Plan | str, place: Path) -> Iterator[Finding]:
    """What a run that goes on has written already is not needed again."""
    if isinstance(planned, str):
        yield Finding("memory", planned, True)
        return
    memory, disk = available(setup.recipe, place)
    figure = f"{size(planned.peak_bytes)} planned, {size(memory)} available"
    advice = "`potstill plan` lists what to change"
    yield Finding("memory", figure, planned.peak_bytes <= memory, advice)
    there = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    needed = max(planned.disk_peak_bytes - there, 0)
    parts = (
        f"a student of {size(planned.student_disk_bytes)}, its last one written beside the one before,"
        f" and checkpoints of {size(planned.checkpoint_disk_bytes)} each"
    )
    figure = f"{size(needed)} needed ({parts}), {size(disk)} free"
    yield Finding("disk", figure, needed <= disk, "Make room, or give --out a folder on another disk")


def vocabulary_is_shared(setup: RunSetup) -> Finding:
    shared = setup.shared
    masked = f"{shared.masked_in_teacher} masked in the teacher and {shared.masked_in_student} in the student"
    figure = "; ".join([f"{shared.ids} ids shared, {masked}", *(d.rstrip(".") for d in shared.differences)])
    highest = max(int(rows.ids.max()) for rows in (setup.corpus.train, setup.corpus.heldout))
    return Finding("vocabulary", figure, highest < shared.ids, f"The corpus has id {highest}.")


def weights_differ(setup: RunSetup) -> Finding:
    """Names, files and formats do not make two models; the KD term tells what hashes cannot."""
    student, teacher = weights_sha256(setup.student.model), setup.teacher.weights_sha256()
    if teacher is None:
        return Finding("weights", f"student {student[:12]}; the teacher has none", True)
    model = setup.teacher.model
    if model is None:  # they are elsewhere: a hash is all there is to compare
        figure, differ = f"captured from {teacher[:12]}, student {student[:12]}", student != teacher
    else:
        figure = f"teacher {teacher[:12]}, student {student[:12]}"
        differ = not same_weights(model, setup.student.model)
    return Finding("weights", *_unless_allowed(setup, figure, differ), ADVICE_IDENTICAL)


def _unless_allowed(setup: RunSetup, figure: str, ok: bool) -> tuple[str, bool]:
    if not ok and setup.recipe.allow_identical:
        return f"{figure}; allowed by allow_identical", True
    if not ok and setup.recipe.objective.kd_weight == 0:
        return f"{figure}; kd_weight is 0, nothing is asked of the teacher", True
    return figure, ok


def labels_are_next_tokens(setup: RunSetup) -> Finding:
    """In every row looked at, the label of a position is the token after it, in the same document."""
    wrong = seen = 0
    for row in range(min(len(setup.corpus.train), 64)):
        batch = setup.corpus.train.batch([row])
        ids_T, positions_T = batch.input_ids_BT[0], batch.position_ids_BT[0]
        inside = batch.positions_N < len(ids_T) - 1  # the last label is the next row's first token
        after_N = batch.positions_N[inside] + 1
        bad_N = (ids_T[after_N] != batch.labels_N[inside]) | (positions_T[after_N] == 0)
        wrong, seen = wrong + int(bad_N.sum()), seen + len(after_N)
    figure = f"{seen - wrong} of {seen} labels are the next token of their document"
    return Finding(
        "labels", figure, wrong == 0 < seen, "The corpus is packed wrongly; this is a bug of ours."
    )


def parameters_are_on_the_device(setup: RunSetup) -> Finding:
    """The student's, and those of a teacher that has any."""
    models = [setup.student, *([] if setup.teacher.model is None else [setup.teacher.model])]
    places = [(name, p.device) for model in models for name, p in model.named_parameters()]
    at = torch.empty(0, device=setup.device).device  # cuda means the current one, say cuda:0
    away = [name for name, device in places if device != at]
    count = len(places)
    return Finding(
        "device", f"{count - len(away)} of {count} tensors on {setup.device}", not away, f"See {away[:1]}."
    )


def teacher_reads_its_input(setup: RunSetup, batch: Batch) -> Finding:
    """Other tokens must give other answers: logits that were never computed from the input do not."""
    if not setup.teacher.reads_new_text:
        logp_NV = _teacher_logp(setup, batch)
        gap = float((logp_NV - logp_NV[:1]).abs().max())
        figure = f"its stored log-probabilities differ by {gap:.2g} nats from place to place"
        return Finding("teacher", figure, gap > SAME, "The store says the same everywhere. Capture it again")
    gap = _gap(lambda b: _teacher_logp(setup, b), batch)
    advice = "The teacher answers the same whatever it reads. Look at its checkpoint."
    return Finding(
        "teacher", f"its log-probabilities move by {gap:.2g} nats with its input", gap > SAME, advice
    )


def student_reads_its_input(setup: RunSetup, batch: Batch) -> Finding:
    gap = _gap(lambda b: _student_logits(setup, b).log_softmax(-1), batch)
    advice = "The student answers the same whatever it reads. Look at its checkpoint."
    return Finding(
        "student", f"its log-probabilities move by {gap:.2g} nats with its input", gap > SAME, advice
    )


@torch.no_grad()
def cross_entropy_is_the_library_s(setup: RunSetup, batch: Batch) -> Finding:
    """Ours against Transformers' own forward and PyTorch's own cross-entropy, on the same positions."""
    targets = _targets(setup, batch)
    ours = float(setup.student.measure(batch, targets)["ce"]) / len(batch.labels_N)
    own_BTV = setup.student.model.hf(
        input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
    ).logits
    own_NV = own_BTV.flatten(0, 1)[batch.positions_N, : setup.student.model.head.num_ids]
    theirs = float(F.cross_entropy(own_NV.double(), batch.labels_N))
    figure = f"cross-entropy {ours:.4f} nats, a reference forward gives {theirs:.4f}"
    return Finding(
        "cross-entropy",
        figure,
        abs(ours - theirs) <= 0.02 * theirs,
        "The loss is not the model's; a bug of ours.",
    )


@torch.no_grad()
def measure_a_little(setup: RunSetup) -> dict[str, float]:
    """CE and KL over up to two held-out rows, nats per position."""
    batch = setup.corpus.heldout.batch(range(min(2, len(setup.corpus.heldout)))).to(setup.device)
    sums = setup.student.measure(batch, ask(setup.teacher, batch, BEFORE))
    return {name: float(value) / len(batch.labels_N) for name, value in sums.items()}


def student_is_not_lost(setup: RunSetup, ce: float) -> Finding:
    """A trained model far above chance speaks another vocabulary than the corpus; a cut one is only cut."""
    chance = math.log(setup.shared.ids)
    figure = f"held-out cross-entropy {ce:.3f} nats, chance is {chance:.3f}"
    if setup.origin["name"] != "checkpoint":
        return Finding(
            "chance", f"{figure}; a student that is {setup.origin['name']} may start above it", True
        )
    return Finding(
        "chance", figure, ce < 2 * chance, "Is the student's vocabulary the corpus's? See corpus.tokenizer."
    )


def teacher_and_student_differ(setup: RunSetup, kl: float) -> Finding:
    """Equal under whatever name or format: nothing to distil."""
    least = rounding_kl(_teacher_logp(setup, setup.corpus.heldout.batch([0]).to(setup.device)))
    figure = f"KL to the teacher {kl:.4g} nats on held-out rows, rounding alone makes {least:.1g}"
    return Finding("KD term", *_unless_allowed(setup, figure, kl > least), ADVICE_IDENTICAL)


def a_masked_position_moves_nothing(setup: RunSetup, batch: Batch) -> Finding:
    """Half of the labels are taken away: no gradient may arrive where they were, and one in every row."""
    kept = replace(batch, positions_N=batch.positions_N[::2], labels_N=batch.labels_N[::2])
    found: list[Tensor] = []

    model = setup.student.model
    hidden = model.hidden

    def keep(*given: Tensor) -> Tensor:
        found.append(hidden(*given))
        found[-1].retain_grad()
        return found[-1]

    model.__dict__["hidden"] = keep  # no hook on the body: it may be compiled
    try:
        setup.student(kept, _targets(setup, kept))["loss"].backward()
    finally:
        del model.__dict__["hidden"]
        setup.student.zero_grad(set_to_none=True)
    grad_BTD = found[0].grad
    assert grad_BTD is not None
    reached = (grad_BTD != 0).any(-1)
    supervised = torch.zeros_like(reached)
    supervised.view(-1)[kept.positions_N] = True
    stray = int((reached & ~supervised).sum())
    rows, rows_reached = int(supervised.any(1).sum()), int((reached & supervised).any(1).sum())
    figure = (
        f"gradient at {int((reached & supervised).sum())} of {int(supervised.sum())} supervised positions in"
        f" {rows_reached} of {rows} rows, and at {stray} of {int((~supervised).sum())} others"
    )
    alive = rows_reached == rows or setup.recipe.allow_identical
    return Finding("mask", figure, stray == 0 and alive, "The loss is not that of the supervised positions.")


def opposite_rows_cancel(setup: RunSetup, batch: Batch) -> Finding:
    """A row twice, with targets that pull it to opposite sides: each row must count, and count the same."""
    of_row_0 = batch.positions_N < batch.input_ids_BT.shape[1]
    positions_N, labels_N = batch.positions_N[of_row_0], batch.labels_N[of_row_0]
    twice = Batch(
        batch.rows_B,
        batch.input_ids_BT[:1].repeat(2, 1),
        batch.position_ids_BT[:1].repeat(2, 1),
        torch.cat([positions_N, positions_N + batch.input_ids_BT.shape[1]]),
        labels_N.repeat(2),
    )
    asked = setup.student.objective
    setup.student.objective = Objective(forward_kl, 1.0, 0.0, 1.0, asked.chunk, asked.matmul_dtype)
    try:
        sizes = []
        for sign in (-1.0, 1.0):  # the second row pulled against the first, and with it
            signs_N = torch.ones(len(twice.positions_N), device=setup.device)
            signs_N[len(positions_N) :] = sign
            setup.student(twice, Pull(signs_N))["loss"].backward()
            grads = [p.grad for p in setup.student.parameters() if p.grad is not None]
            sizes.append(float(torch.nn.utils.get_total_norm(grads)))
            setup.student.zero_grad(set_to_none=True)
    finally:
        setup.student.objective = asked
    ratio = sizes[0] / max(sizes[1], 1e-30)
    figure = f"the gradient of a row and its opposite is {ratio:.2g} of that of the row twice"
    return Finding(
        "rows", figure, sizes[1] > 0 and ratio < 0.05, "Not every row trains alike; a bug of ours."
    )


def _targets(setup: RunSetup, batch: Batch) -> Targets:
    """The teacher's at a window's positions; one that knows whole rows alone is replaced by a known pull."""
    if not setup.teacher.reads_new_text:
        return Pull(torch.ones(len(batch.positions_N), device=setup.device))
    return ask(setup.teacher, batch, BEFORE)


def _gap(answer: Callable[[Batch], torch.Tensor], batch: Batch) -> float:
    """How far an answer moves when the input is read backwards."""
    backwards = Batch(
        batch.rows_B, batch.input_ids_BT.flip(1), batch.position_ids_BT, batch.positions_N, batch.labels_N
    )
    with torch.no_grad():
        return float((answer(batch) - answer(backwards)).abs().max())


def _teacher_logp(setup: RunSetup, batch: Batch) -> torch.Tensor:
    targets = ask(setup.teacher, batch, BEFORE)[:16]
    nothing_NV = torch.zeros(len(targets), setup.student.model.head.num_ids, device=setup.device)
    at = getattr(targets, "temperature", 1.0)  # few ids know one temperature alone
    return targets.on_support(nothing_NV, at)[1].clamp_min(-100)


def _student_logits(setup: RunSetup, batch: Batch) -> torch.Tensor:
    hidden_BTD = setup.student.model.hidden(batch.input_ids_BT, batch.position_ids_BT)
    return setup.student.model.head(hidden_BTD.flatten(0, 1)[batch.positions_N[:16]])
