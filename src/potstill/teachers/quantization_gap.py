"""How far a quantized teacher is from its full weights, on the same held-out positions."""

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

AT_ONCE = 32  # positions whose logits exist at once, a few times in float64


@dataclass(frozen=True)
class QuantizationGap:
    """Of the teacher as it runs, from its full weights."""

    kl: float
    """KL(full, quantised), nats per position."""
    agreement: float
    """Share of positions where both think the same next token the likeliest."""
    positions: int
    weight_bytes: int
    full_weight_bytes: int
    tokens_per_s: float
    """Of this measurement alone: one warm forward pass."""
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
    """Of a quantized teacher from its `full` weights, which lie in `reference`, at the batch's positions and over the
    first `ids` of the vocabulary.
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
    """Full weights of another model would measure that model."""
    require_same(teacher.vocab, full.vocab, "teacher", "teacher.reference")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        ours, theirs = (getattr(of.model.hf.config.get_text_config(), name) for of in (teacher, full))
        if ours != theirs:
            raise UserError(
                f"teacher.reference: {source} has {name} {theirs}, the teacher {ours}. Name the teacher's own"
                " full weights, or leave it out."
            )
