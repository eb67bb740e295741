"""A step's micro-batches: its rows in order, a share for every rank, and each row as if packed alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from potstill import load_recipe
from potstill.build.corpus import make_corpus
from potstill.build.resolve import resolve
from potstill.data.packing import Corpus
from potstill.types import Batch


@pytest.fixture
def corpus(tiny_recipe: Callable[..., Path]) -> Corpus:
    return make_corpus(resolve(load_recipe(tiny_recipe())))[0]


@pytest.mark.parametrize(
    ("per_micro_batch", "world", "sizes"),
    [(7, 1, [7]), (3, 1, [3, 3, 1]), (1, 1, [1] * 7), (7, 2, [4, 3]), (3, 2, [3, 3, 1]), (7, 7, [1] * 7)],
)
def test_a_step_is_cut_into_micro_batches_with_one_for_every_rank(
    corpus: Corpus, per_micro_batch: int, world: int, sizes: list[int]
) -> None:
    data = corpus.steps(3, 7, per_micro_batch, world)
    batches = data.step(5)
    assert [len(batch.rows_B) for batch in batches] == sizes
    assert torch.cat([batch.rows_B for batch in batches]).tolist() == corpus.order(3).rows(5, 7)
    assert data.epoch(5) == corpus.order(3).epoch(5, 7)


def test_a_row_of_a_batch_is_the_row_packed_alone(corpus: Corpus) -> None:
    """All rows at once: documents end inside them, and the last one is padded."""
    for rows in (corpus.train, corpus.heldout):
        for row, one in enumerate(rows.batch(range(len(rows))).split()):
            alone = rows.batch([row])
            for field in dataclasses.fields(Batch):
                ours, theirs = getattr(one, field.name), getattr(alone, field.name)
                is_tensor = isinstance(ours, torch.Tensor)
                assert torch.equal(ours, theirs) if is_tensor else ours == theirs, (row, field.name)
