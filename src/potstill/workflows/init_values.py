"""The values of a recipe that `potstill init` chooses, each with the figure that it came from."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from potstill.build.corpus import open_source
from potstill.build.resolve import Resolved
from potstill.data import packing
from potstill.data.chats.records import Shapes
from potstill.data.chats.templates import ConversationRefused
from potstill.data.readers import Document, Reading
from potstill.data.readers.look import Look
from potstill.errors import UserError, one_line
from potstill.io.cpu_matmul import choose_product_dtype
from potstill.io.terminal import printable, short, size
from potstill.models.load import longest_row, num_weights, plain_config
from potstill.models.pruning import cut_config
from potstill.preflight.fitting import Fitted
from potstill.recipe.commented import Draft
from potstill.types import Vocab
from potstill.workflows.init_making import Making

MOST_TOKENS, MOST_DOCUMENTS = 2_000_000, 5_000
"""Of the data that are read: the figures of more hardly differ."""
SHORTEST_ROW, LONGEST_ROW = 128, {"cpu": 512, "cuda": 4096}
"""Tokens of a row, where documents and models allow for it. Longer rows have more context and are slower."""
LONGEST_WHOLE_ROW = {"cpu": 2048, "cuda": 8192}
"""The same where the end of a longer document is lost."""
LEAST_ROW = 16
"""Where there is hardly any text."""
COVERED = {"stream": 0.9, "whole": 0.98, "single": 0.98}
"""Share of the documents that fit into a row, by its layout: those that are longer lose their context, or their end."""
FEWEST_ROWS = 16
"""To train on. Below it rows are made shorter."""
HELDOUT = 20
"""One row in so many is held out, from 2 to 64 of them."""
TOKENS_PER_STEP = {"cpu": 2048, "cuda": 65536}
PROMPTS_PER_STEP = {"cpu": 8, "cuda": 64}
MOST_STEPS = {"cpu": 500, "cuda": 20000}
PASSES = ((1_000_000, 3), (20_000_000, 2))
"""Tokens -> how often they are read where there are fewer; more are read once."""
FEW_FILES = 20
"""Text files: of fewer, one would be a large part of the text that is held out."""
COMPLETION = {"cpu": 128, "cuda": 512}
LARGE = 1_000_000_000
"""Weights of a student from which on its rate is halved."""
RATES = {"cut": 5e-4, "checkpoint": 1e-4, "config": 1e-3}
"""Peak rates to begin with, by the student: what was cut has much to relearn, a checkpoint much to lose."""
RATE_OF_LORA = 10
"""Times the rate of all weights."""
NEVER_TRAINED = "random weights have everything to learn"
REASONS_OF_RATE = {
    "cut": "a cut student has much to relearn",
    "checkpoint": "a trained student has something to lose",
    "config": NEVER_TRAINED,
}


SAMPLES, LONGEST_SAMPLE, BEGINNING = 2, 400, 16
"""Prompts of a recipe, the longest in characters, and tokens of a document that are one."""


@dataclass(frozen=True)
class Sample:
    """Documents as a run reads them, the first of them or all."""

    documents: list[Document]
    vocab: Vocab
    counts: dict[str, Any]
    is_whole: bool
    total_tokens: float | None
    """Of all documents, estimated where not all were read; None where nobody knows."""
    tokenizer: Any | None
    """None for ids without one."""

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array([len(each.ids) for each in self.documents], np.int64)

    def quantile(self, share: float) -> int:
        return int(np.quantile(self.lengths, share, method="higher"))

    @property
    def scale(self) -> float:
        """By which figures of the sample are those of all."""
        return max((self.total_tokens or self.tokens) / max(self.tokens, 1), 1.0)

    @property
    def of(self) -> str:
        """For reasons."""
        number = len(self.documents)
        return f"{number:,} documents" if self.is_whole else f"the first {number:,} documents"


def choose_size(making: Making, resolved: Resolved, whole: int) -> None:
    """Of a cut student: half of what is not embeddings, where layers and channels can be chosen for a size."""
    draft = making.draft
    for name in ("layers", "keep", "weights", "fraction"):
        if draft.is_given(f"student.{name}"):
            draft.choose(f"student.{name}", None)
            return
    config = plain_config(resolved.teacher.layers_config)
    total = config.get_text_config().num_hidden_layers
    try:
        one, two = (num_weights(cut_config(config, range(n), total)) for n in (1, min(2, total)))
    except UserError:  # the kind of a layer follows from its number
        one = two = 0
    if two <= one:
        draft.choose("student.layers", max(total // 2, 1), f"half of the teacher's {total} layers")
        return
    beside = one - (two - one)
    half = beside + (whole - beside) // 2
    fraction = math.ceil(100 * half / whole) / 100
    draft.choose(
        "student.fraction",
        fraction,
        f"{short(int(fraction * whole))} of {short(whole)} weights: half of the layers', and all {short(beside)} that"
        " are beside them (embeddings); which layers and channels is measured",
    )


def read_sample(making: Making, resolved: Resolved, seen: Look) -> tuple[Resolved, Sample]:
    """Documents by the reader of a run, which refuses what it would refuse there."""
    draft, device = making.draft, resolved.device.type
    kind = draft.tree()["corpus"]["name"]
    if kind == "prompts":
        _choose_rollouts(draft, resolved, device)
    if kind == "text" and len(seen.files) == 1:
        draft.choose(
            "corpus.split_files", True, "one file is several documents, of which some can be held out"
        )
    making.note("reading the data")

    def read() -> tuple[Resolved, Sample]:
        train = {"steps": 1, "rows_per_step": 1, "lr": 1e-4}
        tree = draft.tree()
        now = making.resolved(resolved, tree | {"train": train})
        return now, _sample(now, seen)

    try:
        now, sample = read()
    except ConversationRefused as error:
        if draft.is_given("corpus.skip_refused"):
            raise
        why = f"some records cannot be learnt from and are left out, first {one_line(error)}"
        draft.choose("corpus.skip_refused", True, printable(why, keep=""))
        now, sample = read()
    long = len(sample.documents) < FEW_FILES and sample.quantile(1) > SHORTEST_ROW * 16
    if kind == "text" and long and not draft.is_given("corpus.split_files") and len(seen.files) > 1:
        why = f"{len(sample.documents)} long files are more documents, of which some can be held out"
        draft.choose("corpus.split_files", True, why)
        now, sample = read()
    for line in packing.about_documents({"reading": sample.counts, "documents": len(sample.documents)}):
        making.warnings.append(line)
    return now, sample


def _choose_rollouts(draft: Draft, resolved: Resolved, device: str) -> None:
    if resolved.student.config.name == "config":
        raise UserError(
            "data: prompts without answers, and a student of random weights writes none that a teacher could grade."
            " Have the teacher answer them first (potstill write), or name a trained student or `cut`."
        )
    limit = min(_limits(resolved, LONGEST_WHOLE_ROW[device]).values())
    draft.choose(
        "rollouts.max_new_tokens",
        min(COMPLETION[device], limit // 2),
        "the prompts have no answers: the student writes them, at most so many tokens, and the teacher grades each",
    )


def _sample(resolved: Resolved, seen: Look) -> Sample:
    source, config = open_source(resolved), resolved.recipe.corpus
    reading = source.read(config)
    documents, tokens, is_whole = list[Document](), 0, True
    for document in reading.documents:
        documents.append(document)
        tokens += len(document.ids)
        if tokens >= MOST_TOKENS or len(documents) >= MOST_DOCUMENTS:
            is_whole = False
            break
    if not documents:
        raise UserError(f"data: not one document with text in {config.origin}. Name other data.")
    total = tokens if is_whole else _total(seen, config, documents, tokens)
    return Sample(documents, source.vocabulary, reading.counts, is_whole, total, source.tokenizer)


def _total(seen: Look, config: Any, documents: Sequence[Document], tokens: int) -> float | None:
    """Tokens of all data, by the bytes or records that the sample has of them."""
    if seen.form == "tokens":
        return seen.num_bytes / {"uint16": 2, "uint32": 4}.get(getattr(config, "dtype", ""), 2)
    if seen.form == "text":
        read = {document.source.partition(": token ")[0] for document in documents}
        part = sum(file.stat().st_size for file in seen.files if str(file) in read)
        return tokens * seen.num_bytes / part if part else None
    number = seen.num_records
    return None if number is None else tokens * max(number / len(documents), 1)


def _limits(resolved: Resolved, longest: int) -> dict[str, int]:
    """Tokens of the longest row, by who sets it."""
    student = longest_row(resolved.student.model_config)
    teacher = longest_row(resolved.teacher.model_config)
    models = {"the teacher": teacher, "the student": student}
    limits = {who: length for who, length in models.items() if length}
    return limits | {f"a row for {resolved.device.type} here": longest}


def choose_rows(making: Making, resolved: Resolved, sample: Sample) -> None:
    """Length of a row, and how many are held out, so that enough are left."""
    draft, corpus = making.draft, resolved.recipe.corpus
    longest_here = LONGEST_ROW if corpus.layout == "stream" else LONGEST_WHOLE_ROW
    limits = _limits(resolved, longest_here[resolved.device.type])
    who = min(limits, key=lambda each: limits[each])
    answer = resolved.recipe.rollouts.max_new_tokens if resolved.recipe.rollouts else 0
    share = COVERED[corpus.layout]
    fitting, median = sample.quantile(share), sample.quantile(0.5)
    wanted = max(2 ** math.ceil(math.log2(max(fitting + answer, 2))), SHORTEST_ROW)
    longest = min(wanted, limits[who])
    why = (
        f"{100 * share:.0f} % of {sample.of} have at most {fitting:,} tokens, half of them at most {median:,}"
    )
    why += f"; with {answer} of an answer" if answer else ""
    why += f"; {who} has at most {limits[who]:,}" if longest < wanted else ""
    if draft.is_given("corpus.tokens_per_row"):
        longest = draft.choose("corpus.tokens_per_row", longest)
    fixed = draft.is_given("corpus.tokens_per_row") or corpus.prompt == "whole"
    tokens, packed, heldout = _packed(draft, corpus, sample, [longest] if fixed else [*_halves(longest)])
    if tokens < longest:
        why += f"; with longer rows than {tokens} too few are left"
    draft.choose("corpus.tokens_per_row", tokens, why)
    _about_layout(draft, corpus, sample, tokens)
    rows = len(packed.train) * sample.scale
    about = "" if sample.is_whole else "about "
    of = f"of {about}{rows + heldout:,.0f} {'prompts' if corpus.prompt == 'whole' else 'rows'}"
    draft.choose("corpus.heldout_rows", heldout, f"{of}, never trained on: what every figure is measured on")
    making.rows = rows


def _halves(tokens: int) -> Iterator[int]:
    yield tokens
    while tokens >= 2 * LEAST_ROW:
        tokens //= 2
        yield tokens


def _packed(
    draft: Draft, corpus: Any, sample: Sample, lengths: Sequence[int]
) -> tuple[int, packing.Corpus, int]:
    """The first length that leaves enough rows, else that which leaves most; packed as a run packs them.

    Raises:
        UserError: whatever `packing.build` refuses with the shortest.
    """
    found: list[tuple[int, packing.Corpus, int]] = []
    refused: UserError | None = None
    for tokens in lengths:
        number = sample.tokens * sample.scale / tokens if corpus.prompt != "whole" else len(sample.documents)
        heldout = min(max(int(number / HELDOUT), 2), 64)
        if draft.is_given("corpus.heldout_rows"):
            heldout = draft.given["corpus"]["heldout_rows"]
        try:
            built = packing.build(
                Reading(iter(sample.documents)),
                tokens_per_row=tokens,
                heldout_rows=heldout,
                vocab=sample.vocab,
                layout=corpus.layout,
                may_be_short=corpus.prompt == "whole",
            )
        except UserError as error:
            refused = refused or error  # of the length that was wanted
            continue
        found.append((tokens, built, heldout))
        if len(built.train) * sample.scale >= FEWEST_ROWS:
            return found[-1]
    if not found:
        assert refused is not None
        raise UserError(f"data: too little text. {refused}") from refused
    return max(found, key=lambda each: len(each[1].train))


def _about_layout(draft: Draft, corpus: Any, sample: Sample, tokens: int) -> None:
    """Whether documents share rows."""
    if corpus.prompt == "whole" or not corpus.packing:
        return
    longer = int((sample.lengths > tokens).sum())
    each = tokens / max(float(sample.lengths.mean()), 1)
    many = (
        f"{each:.1f} documents of the mean length a row"
        if each > 1
        else f"{longer:,} of {sample.of} are longer"
    )
    how = "conversations stay whole where they fit" if corpus.whole_documents else "one behind the other"
    draft.choose("corpus.packing", True, f"{many}; {how}, and attention does not cross from one to the next")


def choose_steps(making: Making, resolved: Resolved, sample: Sample) -> None:
    """Rows of a step, steps, and what depends on them."""
    draft, device, rows = making.draft, resolved.device.type, making.rows
    corpus = draft.tree()["corpus"]
    tokens, writes = corpus["tokens_per_row"], resolved.recipe.corpus.prompt == "whole"
    most = max(int(rows) // 4, 1)
    wanted = PROMPTS_PER_STEP[device] if writes else max(TOKENS_PER_STEP[device] // tokens, 1)
    per_step = min(2 ** int(math.log2(wanted)), most)
    what = f"{per_step} prompts a step" if writes else f"{per_step * tokens:,} tokens a step"
    few = (
        f", no more than a quarter of the {rows:,.0f} rows" if per_step < wanted and per_step == most else ""
    )
    per_step = draft.choose("train.rows_per_step", per_step, f"{what}, on {device}{few}")
    if per_step > rows:
        making.warnings.append(
            f"train.rows_per_step: {per_step:,} rows a step, and the data have {rows:,.0f} to train on: a step reads"
            " some several times"
        )
    steps = _steps(draft, sample, rows, per_step, device, writes)
    draft.choose(
        "train.warmup",
        min(max(steps // 20, 1), 100, steps),
        f"a twentieth of the {steps:,} steps, at most 100",
    )
    draft.choose("eval.every", max(steps // 10, 1), "ten times in a run")
    if writes:
        draft.choose(
            "objective.divergence",
            "reverse_kl",
            "on text that the student writes: it is to leave what the teacher would not",
        )
    else:
        why = "the student is to cover all that the teacher holds likely; reverse_kl and jsd hold on to fewer answers"
        draft.choose("objective.divergence", "forward_kl", why)
        draft.choose(
            "objective.kd_weight",
            0.9,
            "nine parts the teacher's distribution, one part the data's own next token",
        )
        draft.choose("objective.ce_weight", 0.1)


def _steps(draft: Draft, sample: Sample, rows: float, per_step: int, device: str, writes: bool) -> int:
    epochs = draft.given.get("train", {}).get("epochs")
    if epochs is not None and not draft.is_given("train.steps"):
        draft.choose("train.epochs", None)
        return max(int(epochs * rows / per_step), 1)
    total = sample.total_tokens
    passes = 1 if writes else next((n for few, n in PASSES if (total or sample.tokens) < few), 1)
    steps = max(math.ceil(passes * rows / per_step), 1)
    if total is None or steps > MOST_STEPS[device]:
        steps = MOST_STEPS[device]
        of = "a data set whose size is not known" if total is None else f"{total / 1e6:,.1f} M tokens"
        read = steps * per_step * draft.tree()["corpus"]["tokens_per_row"] / 1e6
        why = f"{read:,.1f} M of {of}: what a first run on {device} takes"
    else:
        times = {1: "once", 2: "twice"}.get(passes, f"{passes} times")
        about = "" if sample.is_whole else "about "
        why = f"{about}{rows:,.0f} rows are read {times}" + (
            "" if writes else f", {about}{short(int(total))} tokens"
        )
    return int(draft.choose("train.steps", steps, why))


def choose_samples(making: Making, resolved: Resolved, seen: Look, sample: Sample) -> None:
    """What teacher, untouched student and student are to answer side by side; of prompts alone the report has that."""
    corpus = resolved.recipe.corpus
    if corpus.prompt == "whole":
        return
    asked = [*_questions(seen, corpus)] if corpus.is_chat else []
    system = asked[0][0] if asked else None
    found = (text for said, text in asked if said == system) if corpus.is_chat else _beginnings(sample)
    prompts = [*islice(_different(found), SAMPLES)]
    if prompts:
        why = "both models answer them in the report; they are of the data, so put some in that are not"
        making.draft.choose("eval.sample_prompts", prompts, why)
    if prompts and system is not None:
        making.draft.choose("eval.sample_system", system, "what stands before them in the data")


def _different(texts: Iterator[str]) -> Iterator[str]:
    seen = set[str]()
    for text in texts:
        if text not in seen:
            yield text
        seen.add(text)


def _questions(seen: Look, corpus: Any) -> Iterator[tuple[str | None, str]]:
    """Of the first conversations, the system message, None without one, and the user's first turn behind it."""
    shapes = Shapes(corpus.field)
    for where, record in seen.records:
        with contextlib.suppress(ConversationRefused):
            conversation = shapes.conversation(where, record)
            turns = [*conversation.messages[:2]] if conversation else []
            system = turns.pop(0)["content"] if turns and turns[0].get("role") == "system" else None
            first = turns[0] if turns else {}
            if first.get("role") == "user" and 0 < len(first["content"].strip()) <= LONGEST_SAMPLE:
                yield system, first["content"]


def _beginnings(sample: Sample) -> Iterator[str]:
    """Of the first documents that go on behind them."""
    for document in sample.documents:
        if sample.tokenizer is not None and len(document.ids) >= 2 * BEGINNING:
            ids = document.ids[:BEGINNING].tolist()
            if (text := sample.tokenizer.decode(ids, skip_special_tokens=True)).strip():
                yield text


def choose_rate(making: Making, resolved: Resolved, sample: Sample) -> None:
    """The learning rate, and the type of matrix products: after the plan, which may have made it a LoRA."""
    draft = making.draft
    student = draft.tree()["student"]
    weights = num_weights(resolved.student.model_config)
    rate, why = RATES[student["name"]], REASONS_OF_RATE[student["name"]]
    if weights >= LARGE:
        rate, why = rate / 2, f"{why}, half as fast from {short(LARGE)} weights on"
    if student.get("lora"):
        rate, why = rate * RATE_OF_LORA, f"{why}; adapters take {RATE_OF_LORA} times the rate of all weights"
    draft.choose("train.lr", rate, f"{why}; a value to begin with, not measured on this pair")
    dtype, reason = choose_product_dtype(resolved.device)
    draft.choose("train.precision", "auto", f"{dtype} on this machine: {reason.removeprefix('auto: ')}")


def why_changed(field: str, found: Fitted) -> str:
    whole, memory = size(found.whole_bytes), size(found.memory)
    assert found.planned is not None
    peak = size(found.planned.peak_bytes)
    return {
        "train.rows_per_micro_batch": f"all rows of a step at once take {whole} of {memory}, these {peak}",
        "train.activation_checkpointing": "the forward pass is computed twice: one row at once alone does not fit",
        "teacher.dtype": "two bytes a weight: four do not fit",
        "student.lora": "adapters alone are trained: gradients and moments of all weights do not fit. It needs"
        " pip install 'potstill[lora]'",
        "teacher.weights": "fewer bits a weight: `potstill check` measures what that costs",
    }[field]


def note_whole_batch(draft: Draft, found: Fitted) -> None:
    assert found.planned is not None
    rows = draft.tree()["train"]["rows_per_step"]
    why = f"a whole step at once: {size(found.planned.peak_bytes)} of {size(found.memory)}"
    draft.choose("train.rows_per_micro_batch", rows, why)


def verdict(found: Fitted) -> str:
    """Whether it fits, with both figures."""
    if found.planned is None:
        return f"its memory is not planned: {found.why_not.rstrip('.')}"
    needed, disk = found.planned.peak_bytes, found.planned.disk_peak_bytes
    figures = f"{size(needed)} of {size(found.memory)} memory, {size(disk)} of {size(found.disk)} disk"
    return f"it fits: {figures}" if found.fits else f"it does not fit: {figures}"
