"""Documents packed into rows and split into training and held-out.

A row is `tokens_per_row` consecutive tokens of one long stream of documents. Labels are decided here, once:
the label of token i is token i+1 of the same document, if that may be predicted; nothing downstream shifts or
masks. Positions restart at 0 with each document and each row, which is how attention stays inside a document.
Rows are laid out in one of three ways (`Layout`): documents end to end, cut where a row ends; whole documents, as many
as fit; or one document a row, for models that cannot keep documents apart. The latter two are padded at their ends, and
a document that is longer than a row goes on in the next. A corpus too small to hold rows out is refused.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.data.fixed import FixedRows, Order, RowOrder
from potstill.data.memmap import Stream, hashed, in_blocks, require_ids
from potstill.data.readers import Reading, chat, prompts
from potstill.data.readers.reading import about_files
from potstill.errors import UserError
from potstill.types import Batch, Rows, Vocab

TRAIN, HELDOUT = "train", "heldout"
Layout = Literal["stream", "whole", "single"]
SPREAD = 8  # held-out rows come from up to so many times their tokens, or a twentieth of the corpus


class PackedRows:
    """Rows with random access.

    Args:
        ids: uint32, the stream of all documents.
        starts: int64, where in the stream each document begins.
        bears: bool, whether a token may be predicted from the one before it; False where a document begins.
        layout: "stream": rows of `tokens_per_row` tokens each; "whole": of whole documents that fit into so many,
            in the order of `best_fit`; "single": each document begins a row.
    """

    def __init__(
        self,
        ids: NDArray[np.uint32],
        starts: NDArray[np.int64],
        bears: NDArray[np.bool_],
        tokens_per_row: int,
        layout: Layout = "stream",
    ) -> None:
        self.ids, self.starts, self.bears, self.tokens_per_row = ids, starts, bears, tokens_per_row
        self.layout = layout
        self.first_of_row = FIRST_TOKENS[layout](starts, len(ids), tokens_per_row)
        """int64, where in the stream each row begins; None: every `tokens_per_row` tokens."""
        self.first_row = 0
        """The number of row 0 in a batch: a store of targets numbers the rows of both splits in one sequence.
        """
        if self.first_of_row is None:
            self.supervised_per_row = _supervised(bears, tokens_per_row)
        else:
            self.supervised_per_row = _supervised_from(bears, self.first_of_row)
        self.source: int | None = None
        """Its number in a mix."""
        self.held_out_elsewhere: frozenset[int] = frozenset()
        """Documents that are also in held-out rows of another source of the mix: no row of `kept` has them."""
        self.for_teacher: list[NDArray[np.uint32] | None] = []
        """Of prompts: what the teacher reads in place of each document, None for the same; empty: the same of all."""
        self.kept = np.flatnonzero(self.supervised_per_row)
        """Rows that have a label, by their numbers in the stream: row r of this object is stream row kept[r].
        """

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def supervised(self) -> int:
        """Positions with a label, over all rows."""
        return int(self.supervised_per_row[self.kept].sum())

    @property
    def highest_id(self) -> int:
        """Of all its tokens."""
        return int(self.ids.max())

    def positions_of(self, row: int) -> int:
        """Positions of a row with a label."""
        return int(self.supervised_per_row[self.kept[row]])

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows, on the CPU. A stream's last row may be padded; padding is a document without labels."""
        return batch_of([(self, row) for row in rows], [self.first_row + row for row in rows])

    def tokens_of(self, row: int) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
        """ids of a row without its padding; its position ids with it; the label behind each id, -1 for none. Of a
        stream's last row, the last id has none.
        """
        first, last = self._span(row)
        following = slice(first + 1, min(last + 1, len(self.ids)))
        labels = np.where(self.bears[following], self.ids[following].astype(np.int64), -1)
        return self.ids[first:last], self._positions(first, last), labels

    def row_hash(self, row: int) -> bytes:
        """sha256 of what a row holds: ids, document starts and labels."""
        batch = self.batch([row])
        digest = hashlib.sha256()
        for tensor in (batch.input_ids_BT, batch.position_ids_BT, batch.positions_N, batch.labels_N):
            digest.update(tensor.numpy().tobytes())
        return digest.digest()

    def row_tokens(self, row: int) -> bytes:
        first, last = self._span(row)
        return self.ids[first:last].tobytes()

    def drop(self, other: PackedRows) -> int:
        """Leave out the rows with the same tokens as a row of `other`; returns how many there were."""
        other_rows = {other.row_tokens(row) for row in range(len(other))}
        keep = np.array([self.row_tokens(row) not in other_rows for row in range(len(self))], dtype=np.bool_)
        self.kept = self.kept[keep]
        return int((~keep).sum())

    def row_at(self, token: int) -> int:
        """The row that a token of the stream is in, by its number in the stream."""
        if self.first_of_row is None:
            return token // self.tokens_per_row
        return int(np.searchsorted(self.first_of_row, token, side="right")) - 1

    def documents_of(self, row: int) -> range:
        """The documents that begin, go on or end in a row."""
        first, last = self._span(row)
        number = int(np.searchsorted(self.starts, first, side="right")) - 1
        return range(number, int(np.searchsorted(self.starts, last)))

    def _span(self, row: int) -> tuple[int, int]:
        """The row's first token in the stream, and the one after its last."""
        number, T = int(self.kept[row]), self.tokens_per_row
        if self.first_of_row is None:
            return number * T, min(number * T + T, len(self.ids))
        end = self.first_of_row[number + 1] if number + 1 < len(self.first_of_row) else len(self.ids)
        return int(self.first_of_row[number]), int(end)

    def _positions(self, first: int, last: int) -> NDArray[np.int64]:
        begin = np.zeros(self.tokens_per_row, dtype=np.int64)
        inside = self.starts[np.searchsorted(self.starts, first) : np.searchsorted(self.starts, last)] - first
        begin[inside] = inside
        if last - first < self.tokens_per_row:
            begin[last - first] = last - first
        return np.arange(self.tokens_per_row) - np.maximum.accumulate(begin)


def batch_of(chosen: Sequence[tuple[PackedRows, int]], numbers: Sequence[int]) -> Batch:
    """Rows of one length as a batch, on the CPU; `numbers` is what they are called in it."""
    B, T = len(chosen), chosen[0][0].tokens_per_row if chosen else 0
    ids_BT = np.zeros((B, T), dtype=np.int64)
    positions_BT = np.zeros((B, T), dtype=np.int64)
    labels_BT = np.full((B, T), -1, dtype=np.int64)
    lengths_B = np.full(B, T, dtype=np.int64)
    for b, (rows, row) in enumerate(chosen):
        ids, positions_BT[b], following = rows.tokens_of(row)
        lengths_B[b] = len(ids)
        ids_BT[b, : len(ids)] = ids
        labels_BT[b, : len(following)] = following
    labels = torch.from_numpy(labels_BT.reshape(-1))
    positions_N = torch.nonzero(labels >= 0)[:, 0]
    sources = [rows.source for rows, _ in chosen if rows.source is not None]
    return Batch(
        rows_B=torch.tensor(list(numbers), dtype=torch.int64),
        input_ids_BT=torch.from_numpy(ids_BT),
        position_ids_BT=torch.from_numpy(positions_BT),
        positions_N=positions_N,
        labels_N=labels[positions_N],
        lengths_B=torch.from_numpy(lengths_B),
        sources_B=torch.tensor(sources) if sources else None,
    )


@dataclass(frozen=True)
class Corpus:
    train: PackedRows
    heldout: PackedRows
    manifest: dict[str, Any]
    """Counts, hashes of files and tokenizer, fingerprint: `corpus.json` of a run."""

    @property
    def parts(self) -> Mapping[str, Corpus]:
        """The sources of a mix, by name; empty: it is one corpus."""
        return {}

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """What of every step each source of a mix is; empty: it is one corpus."""
        return ()

    @property
    def heldout_parts(self) -> Mapping[str, range]:
        """Of the held-out rows, counted from 0, those of each source of a mix; empty: it is one corpus."""
        return {}

    @property
    def in_proportion(self) -> Rows:
        """Training rows in an order in which the first ones stand for all: of a mix, sources take turns."""
        return self.train

    def source_of(self, row: int) -> str:
        """The source in a mix of a row, by its number in a batch; empty: it is one corpus. A row that the student wrote
        has a number behind those of the corpus, and no source by it: IndexError.
        """
        return ""

    @property
    def fingerprint(self) -> str:
        """sha256 over the vocabulary, and ids, document starts and labels of both splits."""
        return str(self.manifest["fingerprint"])

    def order(self, seed: int) -> RowOrder:
        return Order(len(self.train), seed)

    def steps(self, seed: int, rows_per_step: int, rows_per_micro_batch: int, world: int = 1) -> FixedRows:
        """The training rows in that order, step by step."""
        return FixedRows(self.train, self.order(seed), rows_per_step, rows_per_micro_batch, world)


def _supervised(bears: NDArray[np.bool_], tokens_per_row: int) -> NDArray[np.int64]:
    """Labels per row. A label belongs to the position before its token, so a lone last token has none."""
    counts = np.zeros(-(-max(len(bears) - 1, 0) // tokens_per_row), dtype=np.int64)
    for first, block in in_blocks(bears[1:], tokens_per_row):
        starts = np.arange(0, len(block), tokens_per_row)
        counts[first // tokens_per_row :][: len(starts)] = np.add.reduceat(block, starts, dtype=np.int64)
    return counts


def best_fit(lengths: Sequence[int], tokens_per_row: int) -> NDArray[np.int64]:
    """An order of documents in which rows of whole ones waste little: the longest first, each into the fullest row that
    has room for it. Rows follow each other, each with the document that began it in front, so that where a row ends can
    be seen from the lengths: the next row's first document did not fit.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # the keys of `with_room`, sorted
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[number]
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
            rows[row].append(number)
            room -= length
        else:
            row, room = len(rows), -length % tokens_per_row
            rows.append([number])
        if room:
            if not with_room[room]:
                insort(rooms, room)
            with_room[room].append(row)
    return np.fromiter((number for row in rows for number in row), np.int64, len(lengths))


def _first_of_whole(starts: NDArray[np.int64], num_tokens: int, tokens_per_row: int) -> NDArray[np.int64]:
    """Where rows of whole documents begin: with each that has no room in the row before."""
    first: list[int] = []
    room = 0
    for start, length in zip(starts.tolist(), np.diff(starts, append=num_tokens).tolist(), strict=True):
        if length > room:
            first += range(start, start + length, tokens_per_row)
            room = -length % tokens_per_row
        else:
            room -= length
    return np.array(first, dtype=np.int64)


def _first_of_single(starts: NDArray[np.int64], num_tokens: int, tokens_per_row: int) -> NDArray[np.int64]:
    """Where rows begin that hold one document each; a longer one goes on in the next row."""
    lengths = np.diff(starts, append=num_tokens)
    rows = -(-lengths // tokens_per_row)
    within = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
    first: NDArray[np.int64] = np.repeat(starts, rows) + within * tokens_per_row
    return first


FIRST_TOKENS: dict[Layout, Callable[..., NDArray[np.int64] | None]] = {
    "stream": lambda starts, num_tokens, tokens_per_row: None,
    "whole": _first_of_whole,
    "single": _first_of_single,
}


def _supervised_from(bears: NDArray[np.bool_], first: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels per row, of rows that begin at these tokens."""
    counts = np.zeros(len(first), dtype=np.int64)
    for row, block in in_blocks(first, 1):
        end = first[row + len(block)] if row + len(block) < len(first) else len(bears)
        # A label belongs to the position before its token; the stream's last position has none.
        labels = np.append(bears[block[0] + 1 : end + 1], False)
        counts[row : row + len(block)] = np.add.reduceat(labels, block - block[0], dtype=np.int64)
    return counts


def build(
    reading: Reading,
    *,
    tokens_per_row: int,
    heldout_rows: int,
    vocab: Vocab,
    layout: Layout = "stream",
    folder: Path | None = None,
    may_be_short: bool = False,
) -> Corpus:
    """Split whole documents, pack both sides, drop training rows that equal a held-out row, and count.

    With a folder, tokens pass through its files, and memory does not grow with them. `may_be_short`: of prompts, which
    need not fill a row all together.
    """
    read = _collected(reading, tokens_per_row, vocab, layout, folder)
    documents = read.stream
    if not len(documents):
        raise UserError(
            "corpus.path: not one document with text in it. Check the path, the field and the patterns."
        )
    total, lengths = documents.num_tokens, documents.lengths
    if tokens_per_row > total and not may_be_short:  # before a row of that length is allocated
        raise _too_little(documents, 0, 0, heldout_rows, tokens_per_row)
    train, heldout, num_heldout = split(
        documents,
        heldout_rows,
        tokens_per_row,
        folder,
        layout,
        read.leaders,
        read.for_teacher,
        may_be_short,
    )
    documents.discard()
    dropped = train.drop(heldout)
    heldout.first_row = len(train)
    if len(heldout) < heldout_rows or len(train) == 0:
        raise _too_little(documents, len(train), len(heldout), heldout_rows, tokens_per_row)
    manifest = {
        "documents": len(documents),
        "tokens": total,
        "tokens_per_row": tokens_per_row,
        "layout": layout,
        "train_documents": len(documents) - num_heldout,
        "train_rows": len(train),
        "train_tokens": len(train.ids),
        "train_positions": train.supervised,
        "heldout_documents": num_heldout,
        "heldout_rows": len(heldout),
        "heldout_tokens": len(heldout.ids),
        "heldout_positions": heldout.supervised,
        "rows_dropped_as_held_out": dropped,
        "vocab_size": vocab.size,
        "tokenizer_sha256": vocab.fingerprint,
        "fingerprint": _fingerprint(vocab, train, heldout),
        "reading": reading.counts,
        "files": reading.files,
    }
    if layout != "stream" and not may_be_short:  # end to end, any document may be cut
        manifest["documents_longer_than_a_row"] = sum(length > tokens_per_row for length in lengths)
        manifest["conversations_cut"] = {"documents": read.longer, "labels": read.lost}
    return Corpus(train, heldout, manifest)


@dataclass
class _Collected:
    """Documents as they were read."""

    stream: Stream
    leaders: array[int] = field(default_factory=lambda: array("q"))
    """For each document the one whose side it takes."""
    for_teacher: dict[int, NDArray[np.uint32]] = field(default_factory=dict)
    longer: int = 0
    """Conversations that are longer than a row."""
    lost: int = 0
    """Their labels behind it."""


def _collected(
    reading: Reading, tokens_per_row: int, vocab: Vocab, layout: Layout, folder: Path | None
) -> _Collected:
    read, part_of = _Collected(Stream(folder, "documents")), None
    try:
        for document in reading.documents:
            require_ids(document.source, document.ids, vocab.size)
            number = len(read.stream)
            # Parts of one conversation share its text, and are held out or trained on together.
            is_further = document.part_of is not None and document.part_of == part_of
            read.leaders.append(read.leaders[-1] if is_further else number)
            part_of, ids, labels = document.part_of, document.ids, document.labels
            if layout != "stream" and labels is not None and len(ids) > tokens_per_row:
                # Of a conversation what would stand in a row without its question is not learnt.
                read.lost += int(labels[tokens_per_row:].sum())
                ids, labels = ids[:tokens_per_row], labels[:tokens_per_row]
                read.longer += 1
            if document.for_teacher is not None:
                read.for_teacher[number] = document.for_teacher
            read.stream.append(ids, labels)
    except BaseException:
        read.stream.discard()
        raise
    return read


def about_documents(manifest: dict[str, Any]) -> Iterator[str]:
    """What whoever starts a run should know of the documents, a line each; nothing where all is as usual."""
    for name, part in manifest.get("sources", {}).items():
        yield from (f"{name}: {line}" for line in about_documents(part))
    reading = manifest.get("reading") or {}
    if bos_ids := reading.get("bos_ids"):
        yield f"each text begins with {', '.join(f'id {number}' for number in bos_ids)}, as the tokenizer has it (BOS)"
    yield from about_files(reading)
    yield from prompts.notes(reading)
    yield from chat.notes(reading)
    if number := manifest.get("documents_longer_than_a_row"):
        yield (
            f"{number} of {manifest['documents']} documents are longer than a row and are cut: what is behind a cut"
            " does not see what is before it. Set corpus.tokens_per_row higher"
        )
    if (cut := manifest.get("conversations_cut") or {}).get("documents"):
        yield (
            f"{cut['documents']} of {manifest['documents']} conversations are longer than a row, and end with it:"
            f" {cut['labels']} tokens of the assistant's are left out. Set corpus.tokens_per_row higher"
        )


def _too_little(
    documents: Stream, train: int, heldout: int, heldout_rows: int, tokens_per_row: int
) -> UserError:
    number, total = len(documents), documents.num_tokens
    distinct = len({hashed(documents[each][0]) for each in range(number)})
    if distinct == 1:
        what = f"{number} documents, all equal" if number > 1 else "one document"
        return UserError(
            f"corpus: {what}, of {total} tokens in all; at least 1 training row and {heldout_rows} held-out rows of"
            f" {tokens_per_row} tokens are needed, in different documents, and none is divided. Give more of them"
            " (corpus.split_files of name: text makes several of a long file)."
        )
    of = f", {distinct} of them different," if distinct < number else ""
    return UserError(
        f"corpus: {number} documents{of} of {total} tokens give {train} training rows and {heldout} held-out"
        f" rows of {tokens_per_row} tokens; at least 1 and {heldout_rows} are needed, in different documents."
        " Give more text, or set corpus.tokens_per_row or corpus.heldout_rows lower."
    )


def split(
    documents: Stream,
    heldout_rows: int,
    tokens_per_row: int,
    folder: Path | None = None,
    layout: Layout = "stream",
    leaders: Sequence[int] | None = None,
    for_teacher: Mapping[int, NDArray[np.uint32]] | None = None,
    may_be_short: bool = False,
) -> tuple[PackedRows, PackedRows, int]:
    """Training rows, held-out rows, and the number of documents on the held-out side.

    Documents go there in the order of their hash, so that the split depends on content and not on names, and
    the same text is never on both sides, whichever of its tokens bear loss. The rows are drawn from more
    documents than needed, so that no single one dominates; the other rows of these documents go unused. `leaders`: for
    each document the one whose side it takes, None for its own. `for_teacher`: by the number of a document.
    """
    each = (hashed(documents[number][0]) for number in range(len(documents)))
    digests = np.fromiter(each, "S32", len(documents))
    if leaders is not None:
        digests = digests[np.asarray(leaders)]
    order = np.argsort(digests, kind="stable")
    per_row = min(tokens_per_row, documents.num_tokens // len(documents)) if may_be_short else tokens_per_row
    needed = heldout_rows * per_row
    wanted = max(needed, min(SPREAD * needed, documents.num_tokens // 20))
    count, tokens = 0, 0
    heldout = pack(documents, order[:0], tokens_per_row, None, HELDOUT, layout)
    while len(heldout) < heldout_rows and count < len(order):
        while count < len(order) and (tokens < wanted or digests[order[count]] == digests[order[count - 1]]):
            tokens += documents.lengths[order[count]]
            count += 1
        heldout = pack(documents, order[:count], tokens_per_row, folder, HELDOUT, layout, for_teacher)
        # Rows without a label do not count: long prompts with short answers may need more documents.
        wanted = 2 * tokens
    by_content = sorted(range(len(heldout)), key=heldout.row_hash)[:heldout_rows]
    heldout.kept = heldout.kept[sorted(by_content)]
    train = pack(documents, order[count:], tokens_per_row, folder, TRAIN, layout, for_teacher)
    return train, heldout, count


def pack(
    documents: Stream,
    numbers: NDArray[np.int64],
    tokens_per_row: int,
    folder: Path | None,
    name: str,
    layout: Layout = "stream",
    for_teacher: Mapping[int, NDArray[np.uint32]] | None = None,
) -> PackedRows:
    """Some of the documents, end to end in the order in which they were read, or in that of `best_fit`."""
    stream, numbers = Stream(folder, name), np.sort(numbers)
    if layout == "whole":
        numbers = numbers[best_fit([documents.lengths[number] for number in numbers], tokens_per_row)]
    for number in numbers:
        stream.append(*documents[number])
    rows = PackedRows(stream.ids(), stream.starts(), stream.bears(), tokens_per_row, layout)
    if for_teacher:
        rows.for_teacher = [for_teacher.get(int(number)) for number in numbers]
    return rows


def _fingerprint(vocab: Vocab, *splits: PackedRows) -> str:
    digest = hashlib.sha256(vocab.fingerprint.encode())
    for rows in splits:
        digest.update(f"{rows.tokens_per_row} {len(rows.ids)} {len(rows)}\n".encode())
        if rows.layout != "stream":
            digest.update(f"{rows.layout}\n".encode())
        for part in (rows.ids, rows.starts, rows.bears, rows.kept):
            for _, block in in_blocks(part):
                digest.update(block.data)
        for ids in rows.for_teacher:
            digest.update(b"same" if ids is None else hashed(ids))
    return digest.hexdigest()
