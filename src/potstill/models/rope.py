"""Rotary positions whose frequencies depend on the length of the input: longrope and dynamic NTK scaling.

Transformers chooses the frequencies once for everything in a call, by its largest position. In a micro-batch of
packed rows that is another document's length, so that a document's logits would depend on its neighbours. Here each
document has those of its own length, as if it were alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

BY_LENGTH = ("longrope", "dynamic")


def document_numbers(position_ids: Tensor) -> Tensor:  # Transformers passes it by this name
    """Of each position, the number of its document in the row, from 0."""
    before_B1 = position_ids[:, :1] - 1
    return (torch.diff(position_ids, prepend=before_B1, dim=-1) != 1).cumsum(-1)


def document_lengths(position_ids_BT: Tensor) -> Tensor:
    """lengths_BT, of each position's document: its largest position plus 1."""
    numbers_BT = document_numbers(position_ids_BT)
    longest_BT = torch.zeros_like(position_ids_BT)
    longest_BT.scatter_reduce_(1, numbers_BT, position_ids_BT, "amax")
    return longest_BT.gather(1, numbers_BT) + 1


def per_document_rope(hf: nn.Module) -> None:
    """Let the model's rotary embeddings treat each document by its own length, where their type needs it."""
    for module in hf.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
        if any(kind in BY_LENGTH for kind in kinds) and not isinstance(module, _PerDocument):
            family: Any = type(module)
            module.__class__ = _per_document(family)


@cache
def _per_document(family: Any) -> type[nn.Module]:
    return type(family.__name__, (_PerDocument, family), {})


class _PerDocument(nn.Module):
    """Mixed into a class of Transformers, whose forward computes cos_BTH and sin_BTH."""

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        forward: Any = super().forward
        if isinstance(position_ids, FakeTensor):  # a plan: shapes alone, and no lengths to read
            fake: tuple[Tensor, Tensor] = forward.__wrapped__(self, x, position_ids, *args, **kwargs)
            return fake
        lengths_BT = document_lengths(position_ids)
        limit = self._original_length(*args, **kwargs)
        # One token lets Transformers go back to the original frequencies, which the short documents have. Then comes
        # each longer length, ascending, because dynamic scaling only ever grows.
        forward(x, torch.zeros_like(position_ids), *args, **kwargs)
        positions_BT = torch.where(lengths_BT > limit, 0, position_ids)
        cos_BTH, sin_BTH = forward(x, positions_BT, *args, **kwargs)
        for length in sorted(set(lengths_BT[lengths_BT > limit].tolist())):
            own_BT = lengths_BT == length
            own = forward(x, torch.where(own_BT, position_ids, 0), *args, **kwargs)
            cos_BTH = torch.where(own_BT[..., None], own[0], cos_BTH)
            sin_BTH = torch.where(own_BT[..., None], own[1], sin_BTH)
        return cos_BTH, sin_BTH

    def _original_length(self, layer_type: str | None = None) -> int:
        config: Any = self.config
        rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
