"""Checks of the recipe's own models and rows before a run, for faults that would make it worthless.

Each yields a finding: a figure and a verdict. What can be refused while the run is set up (a typo, a damaged
file, another vocabulary, a head or a packing that is not the model's) has been refused by then. The checks here
take a few forward passes: `distill` always runs them and records them in the receipt. `potstill check` goes on
with the trial steps of `trial_steps.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.build.setup import RunSetup, times_read
from potstill.data.decontamination import summary
from potstill.data.mixing import exhausted, in_words
from potstill.errors import UserError, one_line
from potstill.io.terminal import size
from potstill.losses.divergences import forward_kl
from potstill.losses.laws import broken_laws, is_plugin
from potstill.losses.objective import Objective
from potstill.models.load import weights_sha256
from potstill.preflight.plan import Plan, available, plan
from potstill.preflight.probe_batches import Pull, window
from potstill.preflight.same_model import ADVICE_IDENTICAL, SAME, rounding_kl, same_weights
from potstill.training.prefetch import checked_targets
from potstill.types import Batch, Finding, Targets

NEAR_CHANCE = 0.95
"""As a share of the cross-entropy of chance. A unigram model of text is far below it."""
MOST_SOURCES = 8
BEFORE_TRAINING = -1  # messages count steps from 1: the teacher's errors name step 0


def plan_of(setup: RunSetup) -> Plan | str:
    """What the run will need, or why that is unknown. Call it before the first forward pass, whose memory would
    be counted as the libraries'.
    """
    try:
        return plan(setup.resolved, is_set_up=True)
    except Exception as error:  # some models cannot run on fake tensors; a run must not end over its plan
        return f"not planned: {one_line(error)}"


def cheap(setup: RunSetup, planned: Plan | str, place: Path) -> Iterator[Finding]:
    """The checks that take a few forward passes. The student's weights and the random state stay as they were.

    Args:
        setup: the run.
        planned: of `plan_of`.
        place: the run directory, which need not exist yet.
    """
    with torch.random.fork_rng(devices=[setup.device] if setup.device.type == "cuda" else []):
        setup.student.eval()
        batch = setup.corpus.heldout.batch([0]).to(setup.device)
        # Figures that are known already come first.
        yield recipe_is_read(setup)
        yield from sources_last(setup)
        yield files_are_whole(setup)
        yield corpus_is_compared(setup)
        # Before any forward pass, which could itself run out of memory.
        yield from machine_has_room(setup, planned, place)
        # Ids, labels and devices before the models: on a GPU an id out of range ends the process.
        yield vocabulary_is_shared(setup)
        yield weights_differ(setup)
        yield labels_are_next_tokens(setup)
        # Before any loss is computed with it.
        yield from divergence_keeps_its_laws(setup)
        yield parameters_are_on_the_device(setup)
        # Whether the answers depend on the input, before figures that are computed from them.
        yield teacher_reads_its_input(setup, batch)
        yield student_reads_its_input(setup, batch)
        # The loss against a reference, before it is used to judge the student.
        yield cross_entropy_matches_reference(setup, window(batch))
        yield from documents_are_apart(setup)
        before = measure_before_training(setup)
        yield teacher_predicts(setup, before)
        yield cross_entropy_is_plausible(setup, before["ce"])
        yield teacher_and_student_differ(setup, before["kl"])
        yield from setup.teacher.checks(setup, before["kl"])
        # Backward passes last: they take the most time and memory.
        two = window(setup.corpus.train.batch([0, min(1, len(setup.corpus.train) - 1)])).to(setup.device)
        yield masked_positions_get_no_gradient(setup, two)
        yield opposite_rows_cancel(setup, two)


@dataclass(frozen=True)
class Checked:
    """The plan of a run and the findings before it, for the receipt."""

    planned: Plan | str
    findings: list[Finding]


def require_sound(setup: RunSetup, place: Path, note: Callable[[str], None]) -> Checked:
    """Run the cheap checks, and warn of those that failed without ending the run.

    Args:
        place: the run directory.
        note: called with one line for each warning, and with the count of what passed.

    Raises:
        UserError: with every check that failed and ends the run.
    """
    planned = plan_of(setup)
    findings = list(cheap(setup, planned, place))
    failed = [finding for finding in findings if not finding.ok]
    if errors := [finding.problem for finding in failed if finding.ends_run]:
        raise UserError(*errors)
    for finding in failed:
        note(f"warning: {finding.problem}")
    passed = f"all {len(findings)}" if not failed else f"{len(findings) - len(failed)} of {len(findings)}"
    note(f"check: {passed} cheap ones passed; `potstill check` has more")
    return Checked(planned, findings)


def recipe_is_read(setup: RunSetup) -> Finding:
    """Never fails: the recipe was checked as it was loaded."""
    config = setup.recipe.train
    rows = len(setup.corpus.train)
    epochs = config.num_steps * config.rows_per_step / rows
    figure = f"{config.num_steps} steps of {config.rows_per_step} rows: {epochs:.3g} times the {rows} rows"
    return Finding("recipe", figure, True)


def sources_last(setup: RunSetup) -> Iterator[Finding]:
    """How often the run reads each source of a mix. Nothing of one corpus, of which the recipe's check says it.

    Never fails: to read a small source over and over may be meant, and `set_up` has warned of it.
    """
    if read := times_read(setup.recipe, setup.corpus):
        yield Finding("sources", "; ".join([in_words(read), *exhausted(read)]), True, numbers=read)


def files_are_whole(setup: RunSetup) -> Finding:
    """Every corpus file has a hash, which it gets once it is read to its end. Checkpoints were verified before."""
    files = setup.corpus.manifest["files"]
    without = [file["path"] for file in files if not file.get("sha256")]
    read = size(sum(file["bytes"] for file in files))
    parts = setup.corpus.manifest.get("sources", {"": setup.corpus.manifest}).values()
    found = [dataset for part in parts if (dataset := (part.get("reading") or {}).get("dataset"))]
    of_hub = [f"{each['records']} records of {each['name']}@{each['commit'][:12]}" for each in found]
    of_files = [f"{len(files)} of the corpus, {read}, read whole"] if files or not found else []
    figure = "; ".join([*of_files, *of_hub, "checkpoints verified"])
    return Finding("files", figure, not without, f"Not read: {without[:1]}.")


def corpus_is_compared(setup: RunSetup) -> Finding:
    """Never fails: an overlap that the recipe refuses has ended the run while the corpus was read."""
    return Finding("decontamination", summary(setup.corpus.manifest["decontamination"]), True)


def machine_has_room(setup: RunSetup, planned: Plan | str, place: Path) -> Iterator[Finding]:
    """The planned memory and disk, against what is free; what a resumed run has written counts as there."""
    if isinstance(planned, str):
        yield Finding("memory", planned, True)
        return
    memory, disk = available(setup.recipe, place)
    figure = f"{size(planned.peak_bytes)} planned, {size(memory)} available"
    advice = "`potstill plan` lists what to change"
    yield Finding("memory", figure, planned.peak_bytes <= memory, advice)
    written = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    needed = max(planned.disk_peak_bytes - written, 0)
    parts = (
        f"a student of {size(planned.student_disk_bytes)}, written before the previous one is deleted,"
        f" and checkpoints of {size(planned.checkpoint_disk_bytes)} each"
    )
    figure = f"{size(needed)} needed ({parts}), {size(disk)} free"
    yield Finding("disk", figure, needed <= disk, "Make room, or give --out a folder on another disk")


def vocabulary_is_shared(setup: RunSetup) -> Finding:
    """No id of the corpus lies outside the ids that teacher and student share."""
    shared = setup.shared
    masked = f"{shared.masked_in_teacher} masked in the teacher and {shared.masked_in_student} in the student"
    figure = "; ".join([f"{shared.ids} ids shared, {masked}", *(d.rstrip(".") for d in shared.differences)])
    highest = max(rows.highest_id for rows in (setup.corpus.train, setup.corpus.heldout))
    return Finding("vocabulary", figure, highest < shared.ids, f"The corpus has id {highest}.")


def weights_differ(setup: RunSetup) -> Finding:
    """Teacher and student are two models, by their weights; what those cannot show, the check "KD term" does."""
    student, teacher = weights_sha256(setup.student.model), setup.teacher.weights_sha256()
    if teacher is None:
        return Finding("weights", f"student {student[:12]}; the teacher has none", True)
    model = setup.teacher.model
    if model is None:  # the weights are not in this process: their hash is all there is to compare
        figure, differ = f"captured from {teacher[:12]}, student {student[:12]}", student != teacher
    else:
        figure = f"teacher {teacher[:12]}, student {student[:12]}"
        differ = not same_weights(model, setup.student.model)
    return Finding("weights", *_unless_allowed(setup, figure, differ), ADVICE_IDENTICAL)


def divergence_keeps_its_laws(setup: RunSetup) -> Iterator[Finding]:
    """Of a plug-in: one value per position, never negative, 0 where both sides are equal, a finite gradient."""
    divergence, config = setup.student.objective.divergence, setup.recipe.objective.divergence
    if not is_plugin(divergence) or setup.recipe.objective.kd_weight == 0:
        return
    try:
        broken = broken_laws(divergence)
    except UserError as error:
        yield Finding(
            "divergence", f"objective.divergence: {config.name}: {one_line(error)}", False, "Mend the plug-in"
        )
        return
    figure = (
        f"{config.name}: {', '.join(broken) or 'a value per position, 0 at equality, with a finite gradient'}"
    )
    allowed = setup.recipe.allow_any_divergence
    advice = "Mend the plug-in; where it is meant, write allow_any_divergence: true"
    yield Finding(
        "divergence", figure + "; allowed" * (bool(broken) and allowed), not broken or allowed, advice
    )


@torch.no_grad()
def documents_are_apart(setup: RunSetup) -> Iterator[Finding]:
    """In rows as long as the recipe's: the probe at loading has a dozen tokens, fewer than a sliding window."""
    models = {"student": setup.student.model, "teacher": setup.teacher.model}
    if not setup.recipe.corpus.packing:
        return
    tokens = setup.recipe.corpus.tokens_per_row
    faults = [
        f"{name}: {fault}"
        for name, model in models.items()
        if model is not None and (fault := model.find_packing_fault(tokens)) is not None
    ]
    figure = (
        "; ".join(faults)
        or f"a document in a row of {tokens} tokens is what it is alone, whatever its neighbour"
    )
    advice = "Set corpus.packing: false, or corpus.tokens_per_row lower"
    yield Finding("packing", figure, not faults, advice)


def teacher_predicts(setup: RunSetup, before: dict[str, float]) -> Finding:
    """A teacher near chance has nothing to teach; one that is worse than the untouched student may be the student,
    named in the other's place.
    """
    teacher, student, chance = before["teacher_ce"], before["ce"], math.log(setup.shared.ids)
    figure = (
        f"its held-out cross-entropy is {teacher:.3f} nats, chance is {chance:.3f}, the untouched student has"
        f" {student:.3f}"
    )
    recipe = setup.recipe
    is_good = teacher < NEAR_CHANCE * chance and not teacher > student
    if not is_good and (
        recipe.allow_weak_teacher or recipe.allow_identical or recipe.objective.kd_weight == 0
    ):
        return Finding("teacher's knowledge", f"{figure}; allowed", True)
    advice = (
        "Are teacher and student named in each other's place, or is the corpus tokenized for another model? Where it"
        " is meant, write allow_weak_teacher: true"
    )
    return Finding("teacher's knowledge", figure, is_good, advice, ends_run=False)


def _unless_allowed(setup: RunSetup, figure: str, ok: bool) -> tuple[str, bool]:
    if not ok and setup.recipe.allow_identical:
        return f"{figure}; allowed by allow_identical", True
    if not ok and setup.recipe.objective.kd_weight == 0:
        return f"{figure}; kd_weight is 0, the teacher is not used", True
    return figure, ok


def labels_are_next_tokens(setup: RunSetup) -> Finding:
    """In the first rows, the label of each position is the token after it, in the same document."""
    wrong = compared = 0
    rows = setup.corpus.in_proportion
    for row in range(min(len(rows), 64)):
        batch = rows.batch([row])
        ids_T, positions_T = batch.input_ids_BT[0], batch.position_ids_BT[0]
        inside = batch.positions_N < len(ids_T) - 1  # the last label is the next row's first token
        after_N = batch.positions_N[inside] + 1
        bad_N = (ids_T[after_N] != batch.labels_N[inside]) | (positions_T[after_N] == 0)
        wrong, compared = wrong + int(bad_N.sum()), compared + len(after_N)
    figure = f"{compared - wrong} of {compared} labels are the next token of their document"
    return Finding(
        "labels", figure, wrong == 0 < compared, "The corpus is packed wrongly; this is a bug of ours."
    )


def parameters_are_on_the_device(setup: RunSetup) -> Finding:
    """Those of the student, and of the teacher where it has any in this process."""
    models = [setup.student, *([] if setup.teacher.model is None else [setup.teacher.model])]
    places = [(name, p.device) for model in models for name, p in model.named_parameters()]
    expected = torch.empty(0, device=setup.device).device  # `cuda` stands for the current one, say cuda:0
    away = [name for name, device in places if device != expected]
    count = len(places)
    return Finding(
        "device", f"{count - len(away)} of {count} tensors on {setup.device}", not away, f"See {away[:1]}."
    )


def teacher_reads_its_input(setup: RunSetup, batch: Batch) -> Finding:
    """Other tokens must give other log-probabilities. Of a store, whose rows are fixed, positions are compared."""
    if not setup.teacher.reads_new_text:
        logp_NV = _teacher_logp(setup, batch)
        gap = float((logp_NV - logp_NV[:1]).abs().max())
        figure = f"its stored log-probabilities differ by {gap:.2g} nats between positions"
        return Finding("teacher", figure, gap > SAME, "The store has one answer everywhere. Capture it again")
    gap = _gap(lambda b: _teacher_logp(setup, b), batch)
    advice = "The teacher's output does not depend on its input. Look at its checkpoint."
    return Finding(
        "teacher", f"its log-probabilities move by {gap:.2g} nats with its input", gap > SAME, advice
    )


def student_reads_its_input(setup: RunSetup, batch: Batch) -> Finding:
    """Other tokens must give other log-probabilities."""
    gap = _gap(lambda b: _student_logits(setup, b).log_softmax(-1), batch)
    advice = "The student's output does not depend on its input. Look at its checkpoint."
    return Finding(
        "student", f"its log-probabilities move by {gap:.2g} nats with its input", gap > SAME, advice
    )


@torch.no_grad()
def cross_entropy_matches_reference(setup: RunSetup, batch: Batch) -> Finding:
    """Ours, within 2 %, is that of Transformers' forward and PyTorch's cross-entropy on the same positions."""
    targets = _targets(setup, batch)
    ours = float(setup.student.measure(batch, targets)["ce"]) / len(batch.labels_N)
    positions_BT = setup.student.model.row_positions(batch.position_ids_BT)
    positions = {} if positions_BT is None else {"position_ids": positions_BT}
    reference_BTV = setup.student.model.hf(input_ids=batch.input_ids_BT, use_cache=False, **positions).logits
    reference_NV = reference_BTV.flatten(0, 1)[batch.positions_N, : setup.student.model.head.num_ids]
    reference = float(F.cross_entropy(reference_NV.double(), batch.labels_N))
    figure = f"cross-entropy {ours:.4f} nats, a reference forward gives {reference:.4f}"
    return Finding(
        "cross-entropy",
        figure,
        abs(ours - reference) <= 0.02 * reference,
        "The loss is not the model's; a bug of ours.",
    )


@torch.no_grad()
def measure_before_training(setup: RunSetup) -> dict[str, float]:
    """CE and KL of up to two held-out rows, of a mix of one row of each of its first sources, in nats per position."""
    rows = setup.corpus.heldout
    firsts = [part.start for part in setup.corpus.heldout_parts.values()][:MOST_SOURCES]
    batch = rows.batch(firsts or range(min(2, len(rows)))).to(setup.device)
    sums = setup.student.measure(batch, checked_targets(setup.teacher, batch, BEFORE_TRAINING))
    return {name: float(value) / len(batch.labels_N) for name, value in sums.items()}


def cross_entropy_is_plausible(setup: RunSetup, ce: float) -> Finding:
    """A checkpoint with a loss of twice chance has another vocabulary than the corpus; a cut or random student may
    start there.
    """
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
    """A KL that rounding alone could make: the models are the same under other names, and there is nothing to
    distil.
    """
    least = rounding_kl(_teacher_logp(setup, setup.corpus.heldout.batch([0]).to(setup.device)))
    figure = f"KL to the teacher {kl:.4g} nats on held-out rows, rounding alone makes {least:.1g}"
    return Finding("KD term", *_unless_allowed(setup, figure, kl > least), ADVICE_IDENTICAL)


def masked_positions_get_no_gradient(setup: RunSetup, batch: Batch) -> Finding:
    """With every other label removed, gradients arrive at the remaining positions alone, and in every row."""
    kept = replace(batch, positions_N=batch.positions_N[::2], labels_N=batch.labels_N[::2])
    outputs: list[Tensor] = []

    model = setup.student.model
    hidden = model.hidden

    def recording(*inputs: Tensor) -> Tensor:
        outputs.append(hidden(*inputs))
        outputs[-1].retain_grad()
        return outputs[-1]

    model.__dict__["hidden"] = recording  # not a hook on the body, which may be compiled
    try:
        setup.student(kept, _targets(setup, kept))["loss"].backward()
    finally:
        del model.__dict__["hidden"]
        setup.student.zero_grad(set_to_none=True)
    grad_BTD = outputs[0].grad
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
    """One row twice in a batch, with targets that pull it in opposite directions: where both rows count alike,
    their gradients cancel.
    """
    of_row_0 = batch.positions_N < batch.input_ids_BT.shape[1]
    positions_N, labels_N = batch.positions_N[of_row_0], batch.labels_N[of_row_0]
    twice = Batch(
        batch.rows_B,
        batch.input_ids_BT[:1].repeat(2, 1),
        batch.position_ids_BT[:1].repeat(2, 1),
        torch.cat([positions_N, positions_N + batch.input_ids_BT.shape[1]]),
        labels_N.repeat(2),
    )
    objective = setup.student.objective
    # KL alone at temperature 1: the targets pull a known way under no other loss.
    setup.student.objective = Objective(forward_kl, 1.0, 0.0, 1.0, objective.chunk, objective.matmul_dtype)
    try:
        sizes = []
        for sign in (-1.0, 1.0):  # the second row pulls against the first, then with it
            signs_N = torch.ones(len(twice.positions_N), device=setup.device)
            signs_N[len(positions_N) :] = sign
            setup.student(twice, Pull(signs_N))["loss"].backward()
            grads = [p.grad for p in setup.student.parameters() if p.grad is not None]
            sizes.append(float(torch.nn.utils.get_total_norm(grads)))
            setup.student.zero_grad(set_to_none=True)
    finally:
        setup.student.objective = objective
    ratio = sizes[0] / max(sizes[1], 1e-30)
    figure = f"the gradient of a row and its opposite is {ratio:.2g} of that of the row twice"
    return Finding(
        "rows", figure, sizes[1] > 0 and ratio < 0.05, "Not every row trains alike; a bug of ours."
    )


def _targets(setup: RunSetup, batch: Batch) -> Targets:
    """The teacher's at the positions of a window, which a store does not have: `Pull` stands in for it."""
    if not setup.teacher.reads_new_text:
        return Pull(torch.ones(len(batch.positions_N), device=setup.device))
    return checked_targets(setup.teacher, batch, BEFORE_TRAINING)


def _gap(answer: Callable[[Batch], torch.Tensor], batch: Batch) -> float:
    """The largest change of an output when the input tokens are reversed."""
    backwards = Batch(
        batch.rows_B,
        batch.input_ids_BT.flip(1),
        batch.position_ids_BT,
        batch.positions_N,
        batch.labels_N,
        sources_B=batch.sources_B,
    )
    with torch.no_grad():
        return float((answer(batch) - answer(backwards)).abs().max())


def _teacher_logp(setup: RunSetup, batch: Batch) -> torch.Tensor:
    targets = checked_targets(setup.teacher, batch, BEFORE_TRAINING)[:16]
    nothing_NV = torch.zeros(len(targets), setup.student.model.head.num_ids, device=setup.device)
    temperature = getattr(targets, "temperature", 1.0)  # sparse targets exist at one temperature alone
    return targets.on_support(nothing_NV, temperature)[1].clamp_min(-100)


def _student_logits(setup: RunSetup, batch: Batch) -> torch.Tensor:
    hidden_BTD = setup.student.model.hidden(batch.input_ids_BT, batch.position_ids_BT)
    return setup.student.model.head(hidden_BTD.flatten(0, 1)[batch.positions_N[:16]])
