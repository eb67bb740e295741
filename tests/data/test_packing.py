"""Labels, masks, the split and the order, each against a few lines of plain Python that say the same
thing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.data import packing as rows_
from potstill.data.fixed import Order
from potstill.data.memmap import Stream
from potstill.data.packing import Corpus, PackedRows, build, split
from potstill.data.readers import Document, Reading
from potstill.errors import UserError
from potstill.types import Vocab

V = 50


def document(ids: list[int], labels: list[bool] | None = None) -> Document:
    return Document("here", np.array(ids, np.uint32), None if labels is None else np.array(labels, np.bool_))


def random_documents(count: int, seed: int = 0, longest: int = 30) -> list[Document]:
    generator = np.random.default_rng(seed)
    return [document(generator.integers(0, V, generator.integers(1, longest)).tolist()) for _ in range(count)]


def corpus_of(documents: list[Document], tokens_per_row: int = 8, heldout_rows: int = 3) -> Corpus:
    reading = Reading(iter(documents), [{"path": "a", "bytes": 1, "sha256": "0"}])
    return build(reading, tokens_per_row=tokens_per_row, heldout_rows=heldout_rows, vocab=Vocab(V))


def plain_rows(documents: list[Document], T: int) -> list[dict[str, list[int] | dict[int, int]]]:
    """The law in plain lines: every token's id, place and, where it has one, label."""
    stream: list[tuple[int, int, int | None]] = []
    for d in documents:
        may = [True] * len(d.ids) if d.labels is None else d.labels.tolist()
        for i, id_ in enumerate(d.ids.tolist()):
            follows = i + 1 < len(d.ids) and may[i + 1]
            stream.append((id_, i, int(d.ids[i + 1]) if follows else None))
    rows = []
    for first in range(0, len(stream), T):
        row = stream[first : first + T]
        missing = T - len(row)
        labels = {p: label for p, (_, _, label) in enumerate(row) if label is not None}
        if labels:
            places = [min(place, p) for p, (_, place, _) in enumerate(row)]
            ids = [id_ for id_, _, _ in row]
            rows.append(
                {"ids": ids + [0] * missing, "places": places + list(range(missing)), "labels": labels}
            )
    return rows


def stream_of(documents: list[Document]) -> Stream:
    stream = Stream(None, "documents")
    for one in documents:
        stream.append(one.ids, one.labels)
    return stream


def pack(documents: list[Document], T: int) -> PackedRows:
    return rows_.pack(stream_of(documents), np.arange(len(documents)), T, None, "rows")


some_documents = st.lists(
    st.lists(st.tuples(st.integers(0, V - 1), st.booleans()), min_size=1, max_size=20),
    min_size=1,
    max_size=12,
).map(lambda many: [document([i for i, _ in one], [may for _, may in one]) for one in many])


@settings(max_examples=200, deadline=None)
@given(some_documents, st.integers(2, 9))
def test_ids_positions_and_labels_are_those_of_the_plain_lines(documents: list[Document], T: int) -> None:
    rows = pack(documents, T)
    expected = plain_rows(documents, T)
    assert len(rows) == len(expected)
    for row, plain in enumerate(expected):
        batch = rows.batch([row])
        assert batch.input_ids_BT.tolist() == [plain["ids"]]
        assert batch.position_ids_BT.tolist() == [plain["places"]]
        assert dict(zip(batch.positions_N.tolist(), batch.labels_N.tolist(), strict=True)) == plain["labels"]
    assert rows.supervised == sum(len(plain["labels"]) for plain in expected)
    whole = rows.batch(range(len(rows)))
    assert len(whole.positions_N) == len(whole.labels_N) == rows.supervised


def test_a_label_is_the_next_token_of_its_own_document_and_of_no_other() -> None:
    rows = pack([document([1, 2, 3]), document([4, 5]), document([6]), document([7, 8, 9])], 5)
    batch = rows.batch([0, 1])
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 0]]
    assert batch.positions_N.tolist() == [0, 1, 3, 6, 7]
    assert batch.labels_N.tolist() == [2, 3, 5, 8, 9]


def test_a_label_may_be_the_first_token_of_the_next_row() -> None:
    rows = pack([document([1, 2, 3, 4, 5, 6])], 3)
    batch = rows.batch([0, 1])
    assert batch.positions_N.tolist() == [0, 1, 2, 3, 4]
    assert batch.labels_N.tolist() == [2, 3, 4, 5, 6]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_a_mask_says_which_tokens_are_predicted_and_not_which_predict() -> None:
    batch = pack([document([1, 2, 3, 4], [False, False, True, False])], 4).batch([0])
    assert (batch.positions_N.tolist(), batch.labels_N.tolist()) == ([1], [3])


def test_masking_more_only_ever_removes_labels_and_changes_none() -> None:
    ids = list(range(1, 41))
    generator = np.random.default_rng(1)
    wide = generator.random(40) < 0.8
    narrow = wide & (generator.random(40) < 0.5)
    T = 40
    rows = [pack([document(ids, mask.tolist())], T).batch([0]) for mask in (wide, narrow)]
    more, fewer = [set(zip(b.positions_N.tolist(), b.labels_N.tolist(), strict=True)) for b in rows]
    assert fewer < more
    assert (rows[0].input_ids_BT == rows[1].input_ids_BT).all()


def test_rows_come_in_the_order_asked_for_and_with_their_numbers() -> None:
    rows = pack(random_documents(20), 8)
    batch = rows.batch([5, 2, 5])
    assert batch.rows_B.tolist() == [5, 2, 5]
    for b, row in enumerate([5, 2, 5]):
        alone = rows.batch([row])
        assert (batch.input_ids_BT[b] == alone.input_ids_BT[0]).all()
        mine = (batch.positions_N >= b * 8) & (batch.positions_N < (b + 1) * 8)
        assert batch.labels_N[mine].tolist() == alone.labels_N.tolist()
        assert (batch.positions_N[mine] - b * 8).tolist() == alone.positions_N.tolist()


def test_rows_without_a_label_are_left_out() -> None:
    rows = pack([document([1, 2, 3, 4], [False] * 4), document([5, 6, 7, 8])], 4)
    assert len(rows) == 1
    assert rows.batch([0]).input_ids_BT.tolist() == [[5, 6, 7, 8]]
    assert len(pack([document([1]), document([2])], 4)) == 0


def contents(rows: PackedRows) -> set[tuple[int, ...]]:
    return {tuple(row) for row in rows.batch(range(len(rows))).input_ids_BT.tolist()}


@pytest.mark.parametrize("seed", range(20))
def test_no_training_row_equals_a_held_out_row_even_where_documents_repeat(seed: int) -> None:
    some = random_documents(30, seed)
    again = [some[i] for i in np.random.default_rng(seed).integers(0, 30, 40)]
    corpus = corpus_of(some + again)
    assert len(corpus.heldout) == 3
    assert contents(corpus.train).isdisjoint(contents(corpus.heldout))


def ids_of(rows: PackedRows) -> list[tuple[int, ...]]:
    return [tuple(part.tolist()) for part in np.split(rows.ids, rows.starts[1:])]


@pytest.mark.parametrize("seed", range(20))
def test_a_document_that_repeats_is_on_one_side_whatever_its_labels(seed: int) -> None:
    some = random_documents(30, seed)
    masked = [dataclasses.replace(d, labels=np.arange(len(d.ids)) % 2 == 0) for d in some]
    train, heldout, count = split(stream_of(some + masked + some), heldout_rows=4, tokens_per_row=8)
    assert set(ids_of(train)).isdisjoint(ids_of(heldout))
    assert sorted(ids_of(train) + ids_of(heldout)) == sorted(tuple(d.ids.tolist()) for d in some * 3)
    assert count == len(heldout.starts)


def test_the_split_depends_on_content_and_not_on_names_or_order() -> None:
    documents = random_documents(60)
    here, there = (
        split(stream_of(d), heldout_rows=3, tokens_per_row=8)[1] for d in (documents, documents[::-1])
    )
    assert sorted(ids_of(here)) == sorted(ids_of(there))


def test_a_training_row_with_the_tokens_of_a_held_out_row_is_dropped_and_counted() -> None:
    # Long documents that share their first rows: whole they differ, row by row they do not.
    documents = [document([*range(32), number]) for number in range(33, 45)]
    corpus = corpus_of(documents, tokens_per_row=33, heldout_rows=1)
    assert corpus.manifest["rows_dropped_as_held_out"] == 0
    corpus = corpus_of([document([*range(16), *range(16), n, *range(15)]) for n in range(33, 45)], 16, 2)
    assert corpus.manifest["rows_dropped_as_held_out"] > 0
    assert contents(corpus.train).isdisjoint(contents(corpus.heldout))


def test_a_corpus_that_says_one_thing_over_and_over_is_refused() -> None:
    with pytest.raises(UserError, match=r"40 documents, all equal, of 320 tokens"):
        corpus_of([document([7] * 8)] * 40)


def test_a_corpus_that_is_too_small_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        UserError,
        match=r"one document, of 16 tokens in all; at least 1 training row and 3 held-out rows of 8",
    ):
        corpus_of([document(list(range(16)))])
    with pytest.raises(UserError, match="not one document with text in it"):
        corpus_of([])


def test_rows_without_labels_do_not_count_as_held_out_rows() -> None:
    generator = np.random.default_rng(3)
    rarely = [
        Document("here", generator.integers(0, V, 64).astype(np.uint32), np.arange(64) == 63)
        for _ in range(60)
    ]
    corpus = corpus_of(rarely, tokens_per_row=8, heldout_rows=6)
    assert len(corpus.heldout) == 6 and corpus.heldout.supervised >= 6 and len(corpus.train) > 0


def test_an_id_outside_the_vocabulary_is_refused_with_its_source_and_both_numbers() -> None:
    with pytest.raises(UserError, match=rf"here: id {V} at token 2 is outside the vocabulary of {V} ids"):
        corpus_of([*random_documents(40), document([1, 2, V])])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 23), st.integers(1, 60), st.integers(0, 2**32))
def test_every_epoch_takes_every_row_once(num_rows: int, rows_per_step: int, seed: int) -> None:
    order = Order(num_rows, seed)
    steps = -(-4 * num_rows // rows_per_step)
    served = [row for step in range(steps) for row in order.rows(step, rows_per_step)]
    for epoch in range(4):
        assert sorted(served[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
    assert [order.epoch(s, rows_per_step) for s in range(steps)] == [
        ((s + 1) * rows_per_step - 1) // num_rows for s in range(steps)
    ]


def test_the_order_knows_no_history_and_no_step_size() -> None:
    order, fresh = Order(17, 5), Order(17, 5)
    forward = [order.rows(step, 6) for step in range(9)]
    assert [fresh.rows(step, 6) for step in reversed(range(9))] == forward[::-1]
    assert [row for step in range(18) for row in order.rows(step, 3)] == [
        row for rows in forward for row in rows
    ]


def test_the_order_changes_with_the_seed_and_with_the_epoch() -> None:
    first, second = Order(40, 1).rows(0, 40), Order(40, 1).rows(1, 40)
    assert first != second and first != Order(40, 2).rows(0, 40) and first != list(range(40))


CHANGES: dict[str, Callable[[], Corpus]] = {
    "a token": lambda: corpus_of([*random_documents(60)[:-1], document([1, 2, 3])]),
    "where a document begins": lambda: corpus_of(
        [
            part
            for d in random_documents(60)
            for part in (document(d.ids[:9].tolist()), document(d.ids[9:].tolist()))
        ]
    ),
    "a label": lambda: corpus_of(
        [dataclasses.replace(d, labels=np.arange(len(d.ids)) != 5) for d in random_documents(60)]
    ),
    "the row length": lambda: corpus_of(random_documents(60), tokens_per_row=9),
    "the number of held-out rows": lambda: corpus_of(random_documents(60), heldout_rows=4),
    "the order of documents": lambda: corpus_of(random_documents(60)[::-1]),
    "the vocabulary": lambda: build(
        Reading(iter(random_documents(60))), tokens_per_row=8, heldout_rows=3, vocab=Vocab(V, ("a", "b"))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_changes_with(change: str) -> None:
    assert CHANGES[change]().fingerprint != corpus_of(random_documents(60)).fingerprint


def test_the_fingerprint_changes_with_one_token_where_all_else_stays() -> None:
    # Documents of one row each and one held out: the same starts, labels and rows whatever the tokens are.
    def of(first: int) -> Corpus:
        return corpus_of(
            [document([first, n, *range(6)]) for n in range(20)], tokens_per_row=8, heldout_rows=1
        )

    one, other = of(8), of(9)
    for name in ("starts", "bears", "kept"):
        assert (getattr(one.train, name) == getattr(other.train, name)).all()
        assert (getattr(one.heldout, name) == getattr(other.heldout, name)).all()
    assert one.fingerprint != other.fingerprint


def test_the_fingerprint_repeats_and_the_manifest_counts_what_the_rows_hold() -> None:
    documents = random_documents(60)
    corpus = corpus_of(documents)
    found = corpus.manifest
    assert corpus.fingerprint == corpus_of(random_documents(60)).fingerprint == found["fingerprint"]
    assert found["documents"] == 60 == found["train_documents"] + found["heldout_documents"]
    assert (
        found["tokens"]
        == sum(len(d.ids) for d in documents)
        == found["train_tokens"] + found["heldout_tokens"]
    )
    assert (found["train_rows"], found["heldout_rows"]) == (len(corpus.train), len(corpus.heldout))
    everything = [rows.batch(range(len(rows))) for rows in (corpus.train, corpus.heldout)]
    assert [found["train_positions"], found["heldout_positions"]] == [len(b.positions_N) for b in everything]
    assert (found["tokens_per_row"], found["vocab_size"]) == (8, V)
    assert found["tokenizer_sha256"] == Vocab(V).fingerprint
    assert found["files"] == [{"path": "a", "bytes": 1, "sha256": "0"}]
    assert corpus.order(3) == Order(len(corpus.train), 3)


# ---- whole documents in a row


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=40), st.integers(2, 12))
def test_whole_documents_stand_in_one_row_each_and_the_rows_are_few(lengths: list[int], T: int) -> None:
    order = rows_.best_fit(lengths, T)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    stream = Stream(None, "x")
    for number in order:
        stream.append(np.full(lengths[number], number, np.uint32), None)
    rows = PackedRows(stream.ids(), stream.starts(), stream.bears(), T, "whole")
    assert rows.first_of_row is not None
    bounds = [*rows.first_of_row.tolist(), len(rows.ids)]
    held = [rows.ids[first:last].tolist() for first, last in pairwise(bounds)]
    assert [token for row in held for token in row] == rows.ids.tolist()
    assert all(1 <= len(row) <= T for row in held)
    for number, length in enumerate(lengths):
        assert sum(number in row for row in held) == -(-length // T)
    # Two neighbouring rows that both are at most half full would have been one.
    remainders = [length % T for length in lengths if length % T]
    if all(length <= T for length in lengths) and T % 2 == 0:
        half_empty = sum(len(row) <= T // 2 for row in held)
        assert half_empty <= 1 or all(r > T // 2 for r in remainders)


def test_a_corpus_of_whole_documents_is_packed_by_best_fit_and_not_as_it_was_read() -> None:
    """Lengths that fill rows of ten in pairs, and none with its neighbour."""
    lengths = [7] * 20 + [3] * 20
    made = build(
        Reading(
            iter([document([1 + (i * 5 + at) % (V - 1) for at in range(n)]) for i, n in enumerate(lengths)])
        ),
        tokens_per_row=10,
        heldout_rows=2,
        vocab=Vocab(V),
        layout="whole",
    )
    rows = len(made.train) + len(made.heldout)
    tokens = made.manifest["train_tokens"] + made.manifest["heldout_tokens"]
    assert rows * 10 == pytest.approx(tokens, abs=14), (rows, tokens)  # one row of each side may be half full


def test_no_answer_stands_in_a_row_without_its_question() -> None:
    """Of 100 chats of 93 tokens in rows of 128 a row holds one; end to end 43 % of the labels lack their beginning."""
    chats = []
    for number in range(100):
        labels = [False] * 33 + [True] * 60
        chats.append(document([number % V] + [(number * 7 + i) % V for i in range(92)], labels))

    def share_cut(layout: rows_.Layout) -> float:
        made = build(Reading(iter(chats)), tokens_per_row=128, heldout_rows=2, vocab=Vocab(V), layout=layout)
        cut = labels = 0
        for row in range(len(made.train)):
            batch = made.train.batch([row])
            first, last = made.train._span(row)
            begins = set(made.train.starts.tolist())
            second = min((at - first for at in begins if first < at < last), default=last - first)
            labels += len(batch.positions_N)
            cut += 0 if first in begins else int((batch.positions_N < second).sum())
        return cut / labels

    assert share_cut("whole") == 0 and share_cut("stream") == pytest.approx(0.43, abs=0.1)


def test_parts_of_one_conversation_are_held_out_or_trained_on_together() -> None:
    parts = []
    for number in range(40):
        first = document([number % V, number // V + 1, 3, 4, 5, 6])
        second = document([number % V, number // V + 1, 3, 4, 5, 6, 7, 8])
        parts += [dataclasses.replace(each, part_of=f"chat {number}") for each in (first, second)]
    made = build(Reading(iter(parts)), tokens_per_row=8, heldout_rows=6, vocab=Vocab(V), layout="single")

    def conversations(rows: PackedRows) -> set[tuple[int, ...]]:
        return {tuple(rows.batch([row]).input_ids_BT[0, :2].tolist()) for row in range(len(rows))}

    assert not conversations(made.train) & conversations(made.heldout)


def test_what_of_a_conversation_would_lack_its_question_is_left_out_and_counted() -> None:
    labels = [False] * 4 + [True] * 16
    long, short = (
        document([1] * 20, labels),
        [document([n % V, n, 3], [False, True, True]) for n in range(40)],
    )
    made = build(
        Reading(iter([long, *short])), tokens_per_row=8, heldout_rows=2, vocab=Vocab(V), layout="whole"
    )
    assert made.manifest["conversations_cut"] == {"documents": 1, "labels": 12}
    assert made.manifest["tokens"] == 8 + 3 * 40
    (line,) = rows_.about_documents(made.manifest)
    assert line.startswith("1 of 41 conversations are longer than a row, and end with it: 12 tokens")


def test_a_document_longer_than_a_row_is_counted_and_told() -> None:
    documents = [document([1] * 5), document([2] * 20), *(document([n % V, n]) for n in range(40))]
    made = build(Reading(iter(documents)), tokens_per_row=8, heldout_rows=2, vocab=Vocab(V), layout="whole")
    assert made.manifest["documents_longer_than_a_row"] == 1 and made.manifest["layout"] == "whole"
    (line,) = rows_.about_documents(made.manifest)
    assert line.startswith("1 of 42 documents are longer than a row")
