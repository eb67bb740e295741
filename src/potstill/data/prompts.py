"""Prompts out of packed documents: what the student goes on from in a rollout."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from potstill.data.fixed import Order, RowOrder
from potstill.data.mixing import MixedOrder
from potstill.data.packing import PackedRows
from potstill.errors import UserError

Part = Literal["beginning", "question", "whole"]
WHAT = {
    "beginning": "the first tokens of a document that goes on",
    "question": "what stands before a last answer",
    "whole": "a whole document",
}


@dataclass(frozen=True)
class Prompt:
    number: int
    """Of its document."""
    ids: list[int]
    for_teacher: list[int] | None = None
    """What the teacher reads in its place; None: the same."""
    source: int | None = None
    """The number of the source of a mix that its document is of."""


class Prompts:
    """The prompts of a split, with random access.

    Args:
        rows: the documents.
        part: of a document: its first `tokens`, all before its last answer, or all of it.
        longest: prompts that are longer are left out, and counted in `too_long`; so are documents that have none, in
            `without`.

    Raises:
        UserError: none is left.
    """

    def __init__(
        self, rows: PackedRows, part: Part, tokens: int, longest: int, name: str = "training"
    ) -> None:
        self.rows = rows
        lengths = np.diff(rows.starts, append=len(rows.ids))
        if part == "question":
            prompt_lengths = _before_last_answer(rows)
        elif part == "beginning":
            # A document that ends within its prompt has nothing to be gone on with.
            prompt_lengths = np.where(lengths > tokens, tokens, 0)
        else:
            prompt_lengths = lengths
        own = np.array([0 if ids is None else len(ids) for ids in rows.for_teacher] or np.zeros(len(lengths)))
        is_long = np.maximum(prompt_lengths, own) > longest
        self.without = int((prompt_lengths == 0).sum())
        self.too_long = int(((prompt_lengths > 0) & is_long).sum())
        is_there = np.ones(len(lengths), dtype=np.bool_)
        is_there[list(rows.held_out_elsewhere)] = False
        self.numbers: NDArray[np.int64] = np.flatnonzero((prompt_lengths > 0) & ~is_long & is_there)
        self._lengths = prompt_lengths[self.numbers]
        if not len(self.numbers):
            why = f"{self.too_long} are longer than {longest} tokens" if self.too_long else "none has one"
            todo = (
                "Lower rollouts.max_new_tokens, or raise corpus.tokens_per_row, which bounds both together."
            )
            if not self.too_long:
                todo = (
                    "Lower rollouts.prompt_tokens."
                    if part == "beginning"
                    else "Give documents with an answer."
                )
            raise UserError(
                f"rollouts: not one prompt ({WHAT[part]}) in {len(lengths)} {name} documents: {why}. {todo}"
            )

    def __len__(self) -> int:
        return len(self.numbers)

    def order(self, seed: int) -> RowOrder:
        """Which prompts a step takes."""
        return Order(len(self), seed)

    def __getitem__(self, index: int) -> Prompt:
        number, length = int(self.numbers[index]), int(self._lengths[index])
        start = int(self.rows.starts[number])
        for_teacher = self.rows.for_teacher[number] if self.rows.for_teacher else None
        return Prompt(
            number,
            self.rows.ids[start : start + length].tolist(),
            None if for_teacher is None else for_teacher.tolist(),
            self.rows.source,
        )

    def notes(self) -> Iterator[str]:
        total = len(self) + self.too_long + self.without
        if self.too_long:
            yield (
                f"{self.too_long} of {total} prompts are left out: with rollouts.max_new_tokens behind them they are"
                " longer than a row (corpus.tokens_per_row)"
            )
        if self.without:
            yield f"{self.without} of {total} documents have no prompt, and are left out of the rollouts"


class MixedPrompts:
    """The prompts of the sources of a mix as one, of which every step has those of each in the mix's proportions."""

    def __init__(self, of: Mapping[str, Prompts], weights: tuple[Fraction, ...]) -> None:
        self.of, self.weights = of, weights
        self.ends = list(accumulate(map(len, of.values())))
        self.too_long = sum(each.too_long for each in of.values())

    def __len__(self) -> int:
        return self.ends[-1]

    def order(self, seed: int) -> RowOrder:
        return MixedOrder(tuple(self.of), tuple(map(len, self.of.values())), self.weights, seed)

    def __getitem__(self, index: int) -> Prompt:
        source = bisect_right(self.ends, index)
        return [*self.of.values()][source][index - (self.ends[source - 1] if source else 0)]

    def notes(self) -> Iterator[str]:
        for name, each in self.of.items():
            yield from (f"{name}: {line}" for line in each.notes())


def _before_last_answer(rows: PackedRows) -> NDArray[np.int64]:
    """Of each document, the tokens before its last run of tokens that bear loss; 0 where it has none."""
    bears = np.asarray(rows.bears)
    begins = np.flatnonzero(bears & ~np.concatenate([[False], bears[:-1]]))
    found = np.zeros(len(rows.starts), dtype=np.int64)
    if len(begins):
        documents = np.searchsorted(rows.starts, begins, side="right") - 1
        found[documents] = begins - rows.starts[documents]  # of several, the last is kept
    return found
