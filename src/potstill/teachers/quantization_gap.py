"""How much a teacher's quantization changes its predictions, measured on held-out positions."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from potstill.data.tokenizers import require_same
from potstill.errors import UserError
from potstill.io.terminal import size
from potstill.models.quantization import weight_bytes
from potstill.types import Batch

if TYPE_CHECKING:
    from potstill.teachers.hf import TorchTeacher

AT_ONCE = 32
"""Positions whose logits exist at once, in several float64 copies."""


@dataclass(frozen=True)
class QuantizationGap:
    """The quantized teacher compared with its full weights."""

    kl: float
    """KL(full || quantized), nats per position."""
    agreement: float
    """Share of positions where both have the same most likely token."""
    positions: int
    weight_bytes: int
    full_weight_bytes: int
    tokens_per_s: float
    """Of one warm forward pass; not a benchmark."""
    full_tokens_per_s: float

    def summary(self) -> str:
        return (
            f"KL {self.kl:.3g} nats from its full weights, {self.agreement:.1%} the same likeliest token, at"
            f" {self.positions} positions; {size(self.weight_bytes)} of weights instead of"
            f" {size(self.full_weight_bytes)}, {self.tokens_per_s:.0f} tokens/s instead of"
            f" {self.full_tokens_per_s:.0f}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def quantization_gap(
    teacher: TorchTeacher, full: TorchTeacher, reference: str, batch: Batch, ids: int
) -> QuantizationGap:
    """Compare a quantized teacher with its full weights.

    Args:
        teacher: the quantized one.
        full: with full weights.
        reference: path or hub id of the full weights, for messages.
        batch: where both are compared, at its N positions.
        ids: over how many ids of the vocabulary.

    Raises:
        UserError: `full` is another model: its vocabulary, width or number of layers differs.
    """
    _require_same_shape(teacher, full, reference)
    full.share_ids(ids)
    device = batch.input_ids_BT.device
    seconds, hidden = [], []
    for of in (teacher, full):
        of.targets(batch)  # the first call allocates, and compiles kernels where there are any
        started = time.perf_counter()
        hidden.append(of.targets(batch).hidden_NE)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    kl, same = 0.0, 0
    for start in range(0, len(batch.positions_N), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        q_NV, p_NV = (
            of.model.head(hidden_NE[part]).double().log_softmax(-1)
            for of, hidden_NE in zip((teacher, full), hidden, strict=True)
        )
        kl += float((p_NV.exp() * (p_NV - q_NV)).sum())
        same += int((p_NV.argmax(-1) == q_NV.argmax(-1)).sum())
    N, tokens = len(batch.positions_N), batch.input_ids_BT.numel()
    return QuantizationGap(
        kl / N,
        same / N,
        N,
        weight_bytes(teacher.model),
        weight_bytes(full.model),
        tokens / seconds[0],
        tokens / seconds[1],
    )


def _require_same_shape(teacher: TorchTeacher, full: TorchTeacher, source: str) -> None:
    """UserError for another model, whose distance would say nothing about the quantization."""
    require_same(teacher.vocab, full.vocab, "teacher", "teacher.reference")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        quantized, whole = (getattr(of.model.hf.config.get_text_config(), name) for of in (teacher, full))
        if quantized != whole:
            raise UserError(
                f"teacher.reference: {source} has {name} {whole}, the teacher {quantized}. Name the teacher's own"
                " full weights, or leave it out."
            )
