"""The three kinds of targets that a store keeps, each as it is written and as it is read, row by row.

kind      holds                                                     divergences        temperatures
hidden    the teacher's final hidden states; its head is beside     all                all
sampled   a threshold sample of the distribution, and its entropy   forward KL alone   that of the capture
topk      the k largest probabilities; the rest is one class        all, as bounds     that of the capture

A row of P positions is a dictionary of tensors, which the shard joins to those of other rows. Bytes per
position of `sampled` with V ids, of which b = bits of V - 1, at K kept and M drawn ids: 5 for the counts (6
below a threshold of 1/120), the tail and the entropy, max(K - 1, 0) for probabilities, (K + M) b / 8 for ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from potstill.errors import UserError
from potstill.losses.targets import HiddenTargets, SparseTargets
from potstill.store import sampling
from potstill.store.bitpack import (
    GROUP,
    from_int8,
    id_bits,
    level,
    pack_ids,
    packed_bytes,
    to_int8,
    to_levels,
    unpack_ids,
)
from potstill.store.sampling import KEPT, TAIL_LEVELS, Uniforms, num_drawn
from potstill.types import Head, Targets, moved

DEFAULT_BYTES = 32.0
FINEST = 1e-4
"""Smallest threshold: below it a position may need more ids than the top of many a vocabulary."""
AT_ONCE = 64
"""Positions whose distributions exist at once."""
Row = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Kind(Protocol):
    """How a row's targets become tensors, and targets again."""

    def encode(self, hidden_PE: Tensor, head: Head, uniforms: Uniforms) -> Row: ...

    def decode(self, row: Row, head: Head) -> Targets: ...


def distributions(
    hidden_PE: Tensor, head: Head, temperature: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few positions after the other: p_CV, float32, and logits_CV at the temperature."""
    for start in range(0, len(hidden_PE), AT_ONCE):
        part = slice(start, min(start + AT_ONCE, len(hidden_PE)))
        logits_CV = head(hidden_PE[part])
        if temperature != 1:
            logits_CV = logits_CV / temperature
        yield part, logits_CV.softmax(-1), logits_CV


def entropy(p_CV: Tensor, logits_CV: Tensor) -> Tensor:
    """Of each row of p_CV, the softmax of logits_CV, in nats."""
    logsumexp_C = logits_CV.amax(-1) - p_CV.amax(-1).log()
    mean_C: Tensor = torch.linalg.vecdot(p_CV, logits_CV)
    if not bool(mean_C.isfinite().all()):  # an id that is ruled out adds 0, and not 0 * inf
        mean_C = torch.linalg.vecdot(p_CV, logits_CV.clamp_min(torch.finfo(logits_CV.dtype).min))
    return (logsumexp_C - mean_C).clamp_min(0)


@dataclass(frozen=True)
class Hidden:
    """Final hidden states, in a type that the certificate tells the price of."""

    dtype: str

    def encode(self, hidden_PE: Tensor, head: Head, uniforms: Uniforms) -> Row:
        if self.dtype == "int8":
            hidden, scale = to_int8(hidden_PE)
            return {"hidden": hidden.cpu(), "scale": scale.cpu()}
        return {"hidden": hidden_PE.to(DTYPES[self.dtype]).cpu()}

    def decode(self, row: Row, head: Head) -> HiddenTargets:
        hidden_PE = from_int8(row["hidden"], row["scale"]) if self.dtype == "int8" else row["hidden"]
        weight_VE = head.weight_VD
        return HiddenTargets(moved(hidden_PE, weight_VE.device).to(weight_VE.dtype), head)


@dataclass(frozen=True)
class Sampled:
    """See `sampling`. The largest kept probability is what the others and the tail leave."""

    threshold: float
    num_ids: int
    temperature: float

    @property
    def smallest(self) -> float:
        """No kept probability is below it."""
        return self.threshold / 2

    @property
    def count_dtype(self) -> torch.dtype:
        return torch.uint8 if 2 / self.threshold < 240 else torch.uint16

    def encode(self, hidden_PE: Tensor, head: Head, uniforms: Uniforms) -> Row:
        parts: list[Row] = []
        for part, p_CV, logits_CV in distributions(hidden_PE, head, self.temperature):
            sample = sampling.threshold_sample(p_CV, self.threshold, uniforms[part])
            coded = self._coded(sample, uniforms[part])
            parts.append(coded | {"entropy": entropy(p_CV, logits_CV).half()})
        joined = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        bits = id_bits(self.num_ids)
        joined["ids"] = torch.from_numpy(pack_ids(joined["ids"].numpy(), bits))
        return joined

    def _coded(self, sample: sampling.Sample, uniforms: Uniforms) -> Row:
        kept_C = (sample.kept_ids_CK >= 0).sum(-1)
        others_CK = sample.kept_p_CK[:, 1:]
        is_other_CK = sample.kept_ids_CK[:, 1:] >= 0
        codes_CK = to_levels(others_CK.clamp_min(self.smallest), self.smallest, uniforms.get(KEPT))
        ids_CK = torch.cat([sample.kept_ids_CK, sample.drawn_ids_CM], -1)
        return {
            "kept": kept_C.to(self.count_dtype),
            "tail": sample.tail_C.to(torch.uint16),
            "p": codes_CK[is_other_CK],
            "ids": ids_CK[ids_CK >= 0],
        }

    def decode(self, row: Row, head: Head) -> SparseTargets:
        kept_P, tail_P = row["kept"].long(), row["tail"].long()
        drawn_P = num_drawn(tail_P, self.threshold)
        total_P = kept_P + drawn_P
        P, K = len(kept_P), max(int(total_P.max()), 1) if len(kept_P) else 1
        ids = torch.from_numpy(unpack_ids(row["ids"].numpy(), int(total_P.sum()), id_bits(self.num_ids)))
        turn_K = torch.arange(K)
        is_id_PK = turn_K < total_P[:, None]
        ids_PK = torch.full((P, K), -1, dtype=torch.int64).masked_scatter_(is_id_PK, ids)
        tail_P = tail_P.double() / TAIL_LEVELS
        each_P = tail_P / drawn_P.clamp_min(1)
        p_PK = torch.where(is_id_PK, each_P[:, None], 0.0)
        is_behind_PK = (turn_K >= 1) & (turn_K < kept_P[:, None])
        p_PK.masked_scatter_(is_behind_PK, level(row["p"], self.smallest))
        others_P = torch.where(is_behind_PK, p_PK, 0.0).sum(-1)
        p_PK[:, 0] = torch.where(kept_P > 0, (1 - tail_P - others_P).clamp_min(0), p_PK[:, 0])
        return SparseTargets(
            ids_PK, p_PK.log().float(), self.temperature, has_bucket=False, entropy_N=row["entropy"].float()
        )


@dataclass(frozen=True)
class TopK:
    """The largest k, and all the rest in one class."""

    k: int
    dtype: str
    num_ids: int
    temperature: float

    def encode(self, hidden_PE: Tensor, head: Head, uniforms: Uniforms) -> Row:
        ids, logp = [], []
        for _, p_CV, logits_CV in distributions(hidden_PE, head, self.temperature):
            ids_CK, _ = sampling.top_k(p_CV, self.k)
            ids.append(ids_CK)
            # Not the logarithm of a probability, which is 0 where it is too small.
            logp_CK = logits_CV.gather(-1, ids_CK) - logits_CV.logsumexp(-1, keepdim=True)
            logp.append(logp_CK.to(DTYPES[self.dtype]))
        packed = pack_ids(torch.cat(ids).cpu().numpy().reshape(-1), id_bits(self.num_ids))
        return {"ids": torch.from_numpy(packed), "logp": torch.cat(logp).cpu()}

    def decode(self, row: Row, head: Head) -> SparseTargets:
        logp_PK = row["logp"].float()
        ids = torch.from_numpy(unpack_ids(row["ids"].numpy(), logp_PK.numel(), id_bits(self.num_ids)))
        return SparseTargets(ids.view(logp_PK.shape), logp_PK, self.temperature, has_bucket=True)


def k_of(bytes_per_position: float, num_ids: int, dtype: str) -> int:
    """Ids of top-k that so many bytes hold; UserError where they hold none."""
    each = id_bits(num_ids) / 8 + DTYPES[dtype].itemsize
    if bytes_per_position < each:
        raise UserError(
            f"capture.bytes_per_position: {bytes_per_position:g}, and one id of {num_ids} takes {each:.3g}."
            " Set it higher."
        )
    return min(int(bytes_per_position / each), num_ids)


def planned_bytes(kind: dict[str, Any], num_ids: int, width: int) -> float:
    """Of a position, before anything is captured; for a threshold that was asked for, at most.

    Args:
        kind: the recipe's section `capture`.
        width: of the teacher's hidden states.
    """
    match kind["name"]:
        case "hidden" if kind["dtype"] == "int8":
            return float(width + 2 * -(-width // GROUP))
        case "hidden":
            return float(width * DTYPES[kind["dtype"]].itemsize)
        case "topk":
            each = id_bits(num_ids) / 8 + DTYPES[kind["dtype"]].itemsize
            return each * (
                min(kind["k"] or k_of(kind["bytes_per_position"], num_ids, kind["dtype"]), num_ids)
            )
        case _ if kind["bytes_per_position"] or not kind["threshold"]:
            return float(kind["bytes_per_position"] or DEFAULT_BYTES)
        case _:
            most = torch.tensor([math.ceil(1 / kind["threshold"])])
            return sampled_bytes(kind["threshold"], most, most * 0, num_ids)


def sampled_bytes(threshold: float, kept_C: Tensor, drawn_C: Tensor, num_ids: int) -> float:
    """Bytes of positions with so many ids, per position."""
    fixed = Sampled(threshold, num_ids, 1.0).count_dtype.itemsize + 2 + 2
    ids = packed_bytes(int((kept_C + drawn_C).sum()), id_bits(num_ids))
    return fixed + (ids + int((kept_C - 1).clamp_min(0).sum())) / max(len(kept_C), 1)


def threshold_of(bytes_per_position: float, hidden_PE: Tensor, head: Head, temperature: float) -> float:
    """The smallest threshold, to three digits, whose samples of these positions need no more bytes.

    Raises:
        UserError: fewer bytes than one id needs.
    """
    all_p = [p_CV for _, p_CV, _ in distributions(hidden_PE, head, temperature)]

    def needed(threshold: float) -> float:
        counts = [sampling.ids_per_position(p_CV, threshold) for p_CV in all_p]
        kept_C, drawn_C = (torch.cat(list(column)) for column in zip(*counts, strict=True))
        return sampled_bytes(threshold, kept_C, drawn_C, head.num_ids)

    if (least := needed(1.0)) > bytes_per_position:
        raise UserError(
            f"capture.bytes_per_position: {bytes_per_position:g}, and one id of {head.num_ids} takes"
            f" {least:.3g}. Set it higher."
        )
    low, high = math.log(FINEST), 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if needed(math.exp(middle)) > bytes_per_position else (low, middle)
    digits = 2 - math.floor(high / math.log(10))
    return min(float(math.ceil(math.exp(high) * 10**digits) / 10**digits), 1.0)
