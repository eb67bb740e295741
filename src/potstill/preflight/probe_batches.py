"""Short batches, and targets whose gradient has a known direction, for the checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.types import Batch, Targets

TOKENS = 64
"""Of each row of a `window`."""


@dataclass(frozen=True)
class Pull:
    """Targets slightly off the student's own distribution, and mirrored in it where a sign is negative: under KL,
    opposite signs have opposite gradients.
    """

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
        # Mirrored in probabilities, not in logits: the gradient of KL in the student's logits is p - q.
        opposite_NV = (2 * own_NV.exp() - beside_NV.exp()).log()
        return student_logp_NV, torch.where(self.signs_N[:, None] > 0, beside_NV, opposite_NV)

    def beyond_support(self) -> None:
        return None


def window(batch: Batch) -> Batch:
    """Up to TOKENS columns of the batch, from its first supervised position on; positions are renumbered."""
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
        sources_B=batch.sources_B,
    )
