"""What the token that a tokenizer puts before each text (BOS) is worth to the teacher."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from potstill.build.setup import RunSetup
from potstill.data.packing import Corpus, PackedRows
from potstill.data.tokenizers import bos_ids
from potstill.preflight.checks import BEFORE_TRAINING
from potstill.training.prefetch import checked_targets
from potstill.types import Finding

DOCUMENTS = 2
MUCH = 0.02
"""Nats by which the teacher must be worse for the recipe to be called wrong."""


def texts_begin_as_the_teacher_reads_them(setup: RunSetup) -> Iterator[Finding]:
    """The teacher's cross-entropy on the same labels with a BOS before each text, and without; of each source of a mix.

    Nothing where the tokenizer has none, the corpus is no text, or the teacher cannot read another text.
    """
    for name, corpus in (setup.corpus.parts or {"": setup.corpus}).items():
        yield from _texts_of(setup, corpus, f"bos of {name}" if name else "bos")


def _texts_of(setup: RunSetup, corpus: Corpus, name: str) -> Iterator[Finding]:
    tokenizer, config = setup.tokenizer, setup.recipe.corpus
    reading = corpus.manifest.get("reading") or {}
    in_corpus, is_chat = reading.get("bos_ids") or [], "conversations" in reading
    is_off = config.bos is False and tokenizer is not None and not is_chat
    bos = in_corpus or (bos_ids(tokenizer) if is_off else [])
    documents = list(_documents(corpus.heldout, len(in_corpus), config.tokens_per_row - len(bos)))
    if not bos or not documents or not setup.teacher.reads_new_text:
        return
    source = corpus.heldout.source
    with_it, without = (_cross_entropy(setup, documents, source, before) for before in (bos, []))
    figure = (
        f"the teacher's cross-entropy is {with_it:.3f} nats with the tokenizer's BOS before each text, {without:.3f}"
        f" without it; texts begin {'with' if in_corpus else 'without'} it"
    )
    other, worse_by = ("false", with_it - without) if in_corpus else ("null", without - with_it)
    yield Finding(name, figure, worse_by < MUCH, f"Set corpus.bos: {other}", ends_run=False)


def _documents(rows: PackedRows, num_bos: int, longest: int) -> Iterator[NDArray[np.uint32]]:
    """The ids of some documents from their beginning, without what was put before them."""
    found = 0
    for start, end in zip(rows.starts, [*rows.starts[1:], len(rows.ids)], strict=True):
        document = rows.ids[int(start) + num_bos : int(end)][:longest]
        if len(document) > 1 and found < DOCUMENTS:
            found += 1
            yield document


def _cross_entropy(
    setup: RunSetup, documents: list[NDArray[np.uint32]], source: int | None, before: list[int]
) -> float:
    """The teacher's, in nats, on all tokens of the documents but each one's first."""
    ids: list[NDArray[np.uint32]] = []
    starts, bears = [], []
    for document in documents:
        starts.append(sum(len(each) for each in ids))
        ids.append(np.concatenate([np.array(before, np.uint32), document]))
        bears.append(np.arange(len(ids[-1])) > len(before))
    rows = PackedRows(
        np.concatenate(ids),
        np.array(starts, np.int64),
        np.concatenate(bears),
        setup.recipe.corpus.tokens_per_row,
        "single",
    )
    batch = rows.batch(range(len(rows))).to(setup.device)
    sums = setup.student.measure(batch, checked_targets(setup.teacher, batch, BEFORE_TRAINING))
    return float(sums["teacher_ce"]) / len(batch.labels_N)
