"""Several corpora as one: every step has rows of each in the proportion of their weights.

Rows are numbered over all sources: the training rows of the first, of the second and so on, then their held-out rows.
Which rows a step takes is a function of its number and the seed: how many of each source, see `shares.py`; which of
them, the source's own order, every epoch of it all its rows once. Nothing is copied: a row is read from its source.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.data.fixed import MAX_EPOCHS_PER_STEP, Order
from potstill.data.memmap import hashed
from potstill.data.packing import Corpus, PackedRows, batch_of
from potstill.data.shares import shares_of
from potstill.errors import UserError
from potstill.types import Batch, Rows

SHUFFLE = 2**32 - 1
"""In place of a source's number, of the order within a step."""
LOOKED_AT = 1024
"""Rows of all sources by turns, for what is measured on a few."""
MANY_TIMES = 4
"""Repeated so often, text is about as good as new (Muennighoff et al. 2023, arXiv 2305.16264)."""
ADDED_UP = (
    *("documents", "tokens", "train_documents", "train_rows", "train_tokens", "train_positions"),
    *("heldout_documents", "heldout_rows", "heldout_tokens", "heldout_positions", "rows_dropped_as_held_out"),
)
IN_COMMON = ("tokens_per_row", "vocab_size", "tokenizer_sha256")


class MixedRows(PackedRows):
    """Rows of several sources, one after the other; only what their documents are is asked of the sources."""

    def __init__(self, parts: Sequence[PackedRows]) -> None:
        self.parts, self.first_row = parts, 0
        self.tokens_per_row = parts[0].tokens_per_row
        self.ends = list(accumulate(map(len, parts)))
        """The row after the last of each source."""
        for number, part in enumerate(parts):
            part.source = number

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def supervised(self) -> int:
        return sum(part.supervised for part in self.parts)

    @property
    def highest_id(self) -> int:
        return max(part.highest_id for part in self.parts)

    def positions_of(self, row: int) -> int:
        part, own = self.place(row)
        return self.parts[part].positions_of(own)

    def batch(self, rows: Sequence[int]) -> Batch:
        places = [self.place(row) for row in rows]
        return batch_of([(self.parts[part], own) for part, own in places], [self.first_row + r for r in rows])

    def row_hash(self, row: int) -> bytes:
        part, own = self.place(row)
        return self.parts[part].row_hash(own)

    def row_tokens(self, row: int) -> bytes:
        part, own = self.place(row)
        return self.parts[part].row_tokens(own)

    def place(self, row: int) -> tuple[int, int]:
        """Number of its source, and of the row in it."""
        part = bisect_right(self.ends, row)
        return part, row - (self.ends[part - 1] if part else 0)

    @property
    def ranges(self) -> list[range]:
        """The rows of each source."""
        return [range(end - len(part), end) for end, part in zip(self.ends, self.parts, strict=True)]


@dataclass(frozen=True)
class MixedOrder:
    """Which rows a step takes: exact shares of each source, of which every epoch is all its rows once, shuffled."""

    names: tuple[str, ...]
    num_rows: tuple[int, ...]
    weights: tuple[Fraction, ...]
    seed: int

    def rows(self, step: int, rows_per_step: int) -> list[int]:
        shares = shares_of(self.weights, rows_per_step)
        for name, num_rows, most in zip(self.names, self.num_rows, shares.most, strict=True):
            if most > MAX_EPOCHS_PER_STEP * num_rows:
                raise UserError(
                    f"train.rows_per_step: {rows_per_step} rows in a step, {most} of source {name}, which has"
                    f" {num_rows} training rows: each more than {MAX_EPOCHS_PER_STEP} times over. Set it lower."
                )
        first, rows = 0, list[int]()
        counts = zip(self._orders, shares.before(step), shares.before(step + 1), strict=True)
        for order, start, end in counts:
            rows += [first + order.row(position) for position in range(start, end)]
            first += order.num_rows
        # So that each micro-batch has rows of several sources.
        shuffled = np.random.Generator(np.random.PCG64([self.seed, step, SHUFFLE])).permutation(len(rows))
        return [rows[place] for place in shuffled]

    def epoch(self, step: int, rows_per_step: int) -> int:
        """Of as many rows as the sources have together; the first is 0."""
        return ((step + 1) * rows_per_step - 1) // sum(self.num_rows)

    def times_read(self, steps: int, rows_per_step: int) -> dict[str, float]:
        counts = self.rows_read(steps, rows_per_step)
        return {n: counts[n] / rows for n, rows in zip(self.names, self.num_rows, strict=True)}

    def rows_read(self, steps: int, rows_per_step: int) -> dict[str, int]:
        counts = shares_of(self.weights, rows_per_step).before(steps)
        return dict(zip(self.names, counts, strict=True))

    @cached_property
    def _orders(self) -> list[Order]:
        return [Order(rows, self.seed, number) for number, rows in enumerate(self.num_rows)]


@dataclass(frozen=True)
class MixedCorpus(Corpus):
    train: MixedRows
    weights: tuple[Fraction, ...]
    of: Mapping[str, Corpus]

    @property
    def parts(self) -> Mapping[str, Corpus]:
        return self.of

    @property
    def shares(self) -> tuple[Fraction, ...]:
        return tuple(weight / sum(self.weights) for weight in self.weights)

    @property
    def heldout_parts(self) -> Mapping[str, range]:
        ends = list(accumulate(len(part.heldout) for part in self.of.values()))
        return {
            name: range(end - len(part.heldout), end)
            for (name, part), end in zip(self.of.items(), ends, strict=True)
        }

    @cached_property
    def in_proportion(self) -> Rows:
        return _Chosen(self.train, self._by_turns())

    def source_of(self, row: int) -> str:
        if row < len(self.train):
            return list(self.of)[self.train.place(row)[0]]
        return next(n for n, part in self.heldout_parts.items() if row - len(self.train) in part)

    def order(self, seed: int) -> MixedOrder:
        num_rows = tuple(len(part.train) for part in self.of.values())
        return MixedOrder(tuple(self.of), num_rows, self.weights, seed)

    def _by_turns(self) -> list[int]:
        """Each source's first rows, as one-row steps would have them; at the end those of sources that have more."""
        shares, ranges, rows = shares_of(self.weights, 1), self.train.ranges, list[int]()
        step = 0
        while len(rows) < min(LOOKED_AT, len(self.train)):
            before, after = shares.before(step), shares.before(step + 1)
            source = next(i for i, count in enumerate(after) if count > before[i])
            if before[source] < len(ranges[source]):
                rows.append(ranges[source][before[source]])
            step += 1
            if step >= 4 * LOOKED_AT:  # what is left is of sources that hardly weigh anything
                break
        return rows


@dataclass(frozen=True)
class _Chosen:
    """Some rows of others, in another order, with the numbers that they have there."""

    rows: Rows
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, rows: Sequence[int]) -> Batch:
        return self.rows.batch([self.numbers[row] for row in rows])


def mixed(parts: Mapping[str, Corpus], weights: Sequence[float]) -> Corpus:
    """The corpora as one.

    Args:
        weights: of each, in the same order; only their proportions count.

    Raises:
        UserError: nothing is left of a source, as all of it is held out in others.
    """
    exact = tuple(Fraction(str(weight)) for weight in weights)  # 0.7 is seven tenths
    parts = _without_held_out(parts)
    train = MixedRows([part.train for part in parts.values()])
    heldout = MixedRows([part.heldout for part in parts.values()])
    heldout.first_row = len(train)
    manifests = [part.manifest for part in parts.values()]
    digest = hashlib.sha256("".join(manifest["fingerprint"] for manifest in manifests).encode())
    sources = {
        name: {
            "weight": float(weight / sum(exact)),
            "rows": [of_train.start, of_train.stop],
            "heldout_rows_at": [len(train) + of_heldout.start, len(train) + of_heldout.stop],
            **part.manifest,
        }
        for (name, part), weight, of_train, of_heldout in zip(
            parts.items(), exact, train.ranges, heldout.ranges, strict=True
        )
    }
    manifest: dict[str, Any] = {name: sum(m[name] for m in manifests) for name in ADDED_UP}
    manifest |= {name: manifests[0][name] for name in IN_COMMON}
    manifest |= {
        "layout": "mix",
        "fingerprint": digest.hexdigest(),
        "reading": {},
        "files": [file for each in manifests for file in each["files"]],
        "sources": sources,
    }
    return MixedCorpus(train, heldout, manifest, exact, parts)


def _without_held_out(parts: Mapping[str, Corpus]) -> dict[str, Corpus]:
    """Without the training rows that have a document of another source's held-out rows, whatever its labels."""
    documents = {name: _documents(part.heldout) for name, part in parts.items()}
    left: dict[str, Corpus] = {}
    for name, part in parts.items():
        others = set().union(*(of for other, of in documents.items() if other != name))
        kept, part.train.held_out_elsewhere = _rows_without(part.train, others)
        dropped = len(part.train) - len(kept)
        if not len(kept):
            raise UserError(
                f"corpus.sources: {name}: no training row is left: each has a document that another source holds out."
                " Leave out one of the two."
            )
        left[name] = _with_rows(part, kept, dropped) if dropped else part
    return left


def _documents(rows: PackedRows) -> set[tuple[int, bytes]]:
    """Length and sha256 of the ids of each document, also of those that `kept` has no row of: they may be prompts."""
    return {(len(ids), hashed(ids)) for ids in (_document(rows, n) for n in range(len(rows.starts)))}


def _document(rows: PackedRows, number: int) -> NDArray[np.uint32]:
    end = int(rows.starts[number + 1]) if number + 1 < len(rows.starts) else len(rows.ids)
    return rows.ids[int(rows.starts[number]) : end]


def _rows_without(
    rows: PackedRows, documents: set[tuple[int, bytes]]
) -> tuple[NDArray[np.int64], frozenset[int]]:
    """`kept` of the rows in which none of these documents begins, goes on or ends; and those that are there."""
    lengths = np.diff(rows.starts, append=len(rows.ids))
    gone, found = set[int](), set[int]()
    # A document of another length is another document, and needs no hash.
    for number in np.flatnonzero(np.isin(lengths, [length for length, _ in documents])).tolist():
        ids, start = _document(rows, number), int(rows.starts[number])
        if (len(ids), hashed(ids)) in documents:
            found.add(number)
            gone |= {*range(rows.row_at(start), rows.row_at(start + len(ids) - 1) + 1)}
    kept = rows.kept[~np.isin(rows.kept, list(gone))] if gone else rows.kept
    return kept, frozenset(found)


def _with_rows(part: Corpus, kept: NDArray[np.int64], dropped: int) -> Corpus:
    """The corpus with fewer training rows; so says its manifest. A cache on disk keeps what it has."""
    part.train.kept = kept
    part.heldout.first_row = len(kept)
    counts = {
        "train_rows": len(kept),
        "train_positions": part.train.supervised,
        "rows_dropped_as_held_out": part.manifest["rows_dropped_as_held_out"] + dropped,
    }
    digest = hashlib.sha256(f"{part.fingerprint} without {dropped}".encode() + hashed(kept))
    return replace(part, manifest=part.manifest | counts | {"fingerprint": digest.hexdigest()})


def in_words(read: Mapping[str, float]) -> str:
    """How often each source is read."""
    return f"read {', '.join(f'{name} {times:.2g} times' for name, times in read.items())}"


def exhausted(read: Mapping[str, float]) -> Iterator[str]:
    """What to say of each source that is read many times."""
    for name, times in read.items():
        if times > MANY_TIMES:
            yield (
                f"source {name} is exhausted {times:.1f} times, and is learned by heart. Give it more text, a lower"
                " weight, or fewer steps"
            )
