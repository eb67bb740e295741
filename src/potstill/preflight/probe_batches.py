"""Batches and targets that checks are made of: short enough to be cheap, made to pull a known way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.types import Batch, Targets

TOKENS = 64  # of each row, where gradients are looked at


@dataclass(frozen=True)
class Pull:
    """Targets a little beside the student's own distribution, on the side that the sign says."""

    signs_N: Tensor

    def __len__(self) -> int:
        return len(self.signs_N)

    def __getitem__(self, positions: slice) -> Targets:
        return Pull(self.signs_N[positions])

    def on_support(self, student_logp_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        own_NV = student_logp_NV.detach()
        bump_V = torch.ones_like(own_NV[0])
        bump_V[::2] = -1
        beside_NV = (own_NV + (1 + 0.1 * bump_V).log()).log_softmax(-1)
        opposite_NV = (2 * own_NV.exp() - beside_NV.exp()).log()
        return student_logp_NV, torch.where(self.signs_N[:, None] > 0, beside_NV, opposite_NV)

    def beyond_support(self) -> None:
        return None


def window(batch: Batch) -> Batch:
    """The batch's columns from its first supervised position on, few enough to be cheap in a long row."""
    T = batch.input_ids_BT.shape[1]
    first = min(int((batch.positions_N % T).min()), max(T - TOKENS, 0))
    columns = torch.arange(first, min(first + TOKENS, T))
    b_N, t_N = batch.positions_N // T, batch.positions_N % T
    inside = (t_N >= first) & (t_N <= int(columns[-1]))
    return Batch(
        batch.rows_B,
        batch.input_ids_BT[:, columns],
        batch.position_ids_BT[:, columns],
        (b_N * len(columns) + t_N - first)[inside],
        batch.labels_N[inside],
    )
