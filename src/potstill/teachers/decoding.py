"""Text that a teacher writes, whatever kind it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import GenerationConfig

from potstill.models.decoding import Decode, Row, choose, decode, decoding_fault
from potstill.types import Teacher


def decoder_of(teacher: Teacher, ids: int) -> Decode:
    """`models.decoding.decode` of a teacher: with a cache where its model has a sound one, else by reading each row
    again for every token.

    Args:
        ids: number of ids shared with the student; no other is written.
    """
    if teacher.model is not None and decoding_fault(teacher.model) is None:
        return partial(decode, teacher.model)
    return partial(_by_reading_again, teacher, ids)


@torch.no_grad()
def _by_reading_again(
    teacher: Teacher,
    ids: int,
    settings: GenerationConfig,
    rows: Sequence[Row],
    beat: Callable[[], None] = lambda: None,
) -> None:
    for row in rows:
        while not row.finish:
            beat()
            read_BT = torch.tensor([[*row.prompt_ids, *row.new]])
            logits_BV = teacher.logits_for_batch(read_BT)[:, :ids].float()
            row.add(int(choose(logits_BV, settings, [row])))
