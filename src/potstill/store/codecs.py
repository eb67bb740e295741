"""The codecs of a store: how a row's targets become tensors on disk, and targets again.

name      holds                                                     divergences        temperatures
hidden    the teacher's final hidden states; its head is beside     all                all
sampled   a threshold sample of the distribution, and its entropy   forward KL alone   that of the capture
topk      the k largest probabilities; the rest is one class        all, as bounds     that of the capture

"as bounds": the divergence over k ids and one class for the rest is never above the full one. A row of P
positions is a dictionary of tensors, which the shard joins to those of other rows. Bytes per
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
from torch.nn import functional as F

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
from potstill.store.sampling import CODE_STREAM, TAIL_LEVELS, Uniforms, num_drawn
from potstill.types import Head, Targets, moved

DEFAULT_BYTES = 32.0
MIN_THRESHOLD = 1e-4
"""The smallest that is chosen: a position needs up to 1 / threshold ids, here 10,000."""
POSITIONS_AT_ONCE = 64
"""Positions whose distributions exist at once: [64, V] and not [P, V]."""
Row = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Codec(Protocol):
    """How a row's targets become tensors of a shard, and targets again."""

    def encode(self, hidden_PE: Tensor, head: Head, uniforms: Uniforms) -> Row:
        """The targets of P positions of one row, on the CPU.

        Args:
            hidden_PE: the teacher's final hidden states.
            head: the teacher's, on the same device.
            uniforms: random numbers of these positions; codecs without a draw ignore them.
        """
        ...

    def decode(self, row: Row, head: Head | None) -> Targets:
        """Targets of the row's P positions, from what `encode` returned; without a head those of `TopK` alone."""
        ...


def distributions(
    hidden_PE: Tensor, head: Head, temperature: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Softmaxes of all positions, POSITIONS_AT_ONCE at a time: which they are, p_CV in float32, and logits_CV
    divided by the temperature.
    """
    for start in range(0, len(hidden_PE), POSITIONS_AT_ONCE):
        part = slice(start, min(start + POSITIONS_AT_ONCE, len(hidden_PE)))
        logits_CV = head(hidden_PE[part])
        if temperature != 1:
            logits_CV = logits_CV / temperature
        yield part, logits_CV.softmax(-1), logits_CV


def entropy(p_CV: Tensor, logits_CV: Tensor) -> Tensor:
    """Entropy of each row of p_CV, which is softmax(logits_CV): entropy_C in nats."""
    # Without a second pass over [C, V]: H = logsumexp(z) - sum p z, and logsumexp(z) = max z - log max p.
    logsumexp_C = logits_CV.amax(-1) - p_CV.amax(-1).log()
    mean_C: Tensor = torch.linalg.vecdot(p_CV, logits_CV)
    if not bool(mean_C.isfinite().all()):  # an impossible id adds 0, not 0 * inf
        mean_C = torch.linalg.vecdot(p_CV, logits_CV.clamp_min(torch.finfo(logits_CV.dtype).min))
    return (logsumexp_C - mean_C).clamp_min(0)


@dataclass(frozen=True)
class Hidden:
    """Final hidden states. What a narrower `dtype` costs, the certificate of each store measures.

    `dtype` is float32, bfloat16, float16 or int8, which keeps one float16 scale for 64 numbers.
    """

    dtype: str

    def encode(self, hidden_PE: Tensor, head: Head, uniforms: Uniforms) -> Row:
        if self.dtype == "int8":
            hidden, scale = to_int8(hidden_PE)
            return {"hidden": hidden.cpu(), "scale": scale.cpu()}
        return {"hidden": hidden_PE.to(DTYPES[self.dtype]).cpu()}

    def decode(self, row: Row, head: Head | None) -> HiddenTargets:
        assert head is not None
        hidden_PE = from_int8(row["hidden"], row["scale"]) if self.dtype == "int8" else row["hidden"]
        weight_VE = head.weight_VD
        return HiddenTargets(moved(hidden_PE, weight_VE.device).to(weight_VE.dtype), head)


@dataclass(frozen=True)
class Sampled:
    """A threshold sample of the softmax at `temperature`, and its entropy: see `sampling`.

    The largest kept probability takes no byte: it is what the others and the tail leave of one, so that a
    decoded row sums to one exactly.
    """

    threshold: float
    num_ids: int
    temperature: float

    @property
    def smallest(self) -> float:
        """Lower bound of a kept probability, the lowest level of its code."""
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
        # A position's kept ids come first, by falling probability, then the drawn ones: the counts tell a
        # reader which is which.
        kept_C = (sample.kept_ids_CK >= 0).sum(-1)
        others_CK = sample.kept_p_CK[:, 1:]
        is_other_CK = sample.kept_ids_CK[:, 1:] >= 0
        codes_CK = to_levels(others_CK.clamp_min(self.smallest), self.smallest, uniforms.get(CODE_STREAM))
        ids_CK = torch.cat([sample.kept_ids_CK, sample.drawn_ids_CM], -1)
        return {
            "kept": kept_C.to(self.count_dtype),
            "tail": sample.tail_C.to(torch.uint16),
            "p": codes_CK[is_other_CK],
            "ids": ids_CK[ids_CK >= 0],
        }

    def decode(self, row: Row, head: Head | None) -> SparseTargets:
        kept_P, tail_P = row["kept"].long(), row["tail"].long()
        drawn_P = num_drawn(tail_P, self.threshold)
        total_P = kept_P + drawn_P
        P, K = len(kept_P), max(int(total_P.max()), 1) if len(kept_P) else 1
        ids = torch.from_numpy(unpack_ids(row["ids"].numpy(), int(total_P.sum()), id_bits(self.num_ids)))
        column_K = torch.arange(K)
        is_id_PK = column_K < total_P[:, None]
        ids_PK = torch.full((P, K), -1, dtype=torch.int64).masked_scatter_(is_id_PK, ids)
        tail_P = tail_P.double() / TAIL_LEVELS
        each_P = tail_P / drawn_P.clamp_min(1)
        p_PK = torch.where(is_id_PK, each_P[:, None], 0.0)
        is_other_PK = (column_K >= 1) & (column_K < kept_P[:, None])
        p_PK.masked_scatter_(is_other_PK, level(row["p"], self.smallest))
        others_P = torch.where(is_other_PK, p_PK, 0.0).sum(-1)
        # The first of the kept ids last: it is what all the others leave.
        p_PK[:, 0] = torch.where(kept_P > 0, (1 - tail_P - others_P).clamp_min(0), p_PK[:, 0])
        return SparseTargets(
            ids_PK, p_PK.log().float(), self.temperature, has_bucket=False, entropy_N=row["entropy"].float()
        )


@dataclass(frozen=True)
class TopK:
    """The k largest log-probabilities of the softmax at `temperature`; all other ids are one class."""

    k: int
    dtype: str
    num_ids: int
    temperature: float

    def encode(self, hidden_PE: Tensor, head: Head, uniforms: Uniforms) -> Row:
        ids, logp = [], []
        for _, p_CV, logits_CV in distributions(hidden_PE, head, self.temperature):
            ids_CK, _ = sampling.top_k(p_CV, self.k)
            ids.append(ids_CK)
            # From the logits, not log(p_CK): a probability that underflows has a finite log-probability.
            logp_CK = logits_CV.gather(-1, ids_CK) - logits_CV.logsumexp(-1, keepdim=True)
            logp.append(logp_CK.to(DTYPES[self.dtype]))
        return self._packed(torch.cat(ids), torch.cat(logp))

    def encode_known(self, targets: SparseTargets, labels_P: Tensor | None = None) -> Row:
        """The k likeliest of the ids whose log-probabilities are known; a position that has fewer is padded.

        Args:
            labels_P: ids that are to be among them, however unlikely; None: none.
        """
        first_PK = targets.logp_NK
        if labels_P is not None:
            first_PK = first_PK.masked_fill(targets.ids_NK == labels_P[:, None], math.inf)
        order_PK = first_PK.topk(min(self.k, first_PK.shape[1]), dim=-1).indices
        logp_PK = targets.logp_NK.gather(-1, order_PK)
        ids_PK = targets.ids_NK.gather(-1, order_PK).clamp_min(0)
        missing = self.k - logp_PK.shape[1]
        ids_PK, logp_PK = F.pad(ids_PK, (0, missing)), F.pad(logp_PK, (0, missing), value=-math.inf)
        return self._packed(ids_PK, logp_PK.to(DTYPES[self.dtype]))

    def _packed(self, ids_PK: Tensor, logp_PK: Tensor) -> Row:
        packed = pack_ids(ids_PK.cpu().numpy().reshape(-1), id_bits(self.num_ids))
        return {"ids": torch.from_numpy(packed), "logp": logp_PK.cpu()}

    def decode(self, row: Row, head: Head | None) -> SparseTargets:
        logp_PK = row["logp"].float()
        ids = torch.from_numpy(unpack_ids(row["ids"].numpy(), logp_PK.numel(), id_bits(self.num_ids)))
        ids_PK = ids.view(logp_PK.shape).masked_fill(logp_PK.isneginf(), -1)
        return SparseTargets(ids_PK, logp_PK, self.temperature, has_bucket=True)


def k_of(bytes_per_position: float, num_ids: int, dtype: str) -> int:
    """The largest k of `TopK` within a number of bytes per position.

    Raises:
        UserError: fewer bytes than one id needs.
    """
    each = id_bits(num_ids) / 8 + DTYPES[dtype].itemsize
    if bytes_per_position < each:
        raise UserError(
            f"capture.bytes_per_position: {bytes_per_position:g}, and one id of {num_ids} takes {each:.3g}."
            " Set it higher."
        )
    return min(int(bytes_per_position / each), num_ids)


def planned_bytes(section: dict[str, Any], num_ids: int, width: int) -> float:
    """Bytes per position, before anything is captured; an upper bound where the recipe gives a threshold.

    Args:
        section: the recipe's `capture`.
        num_ids: V.
        width: of the teacher's hidden states, E.
    """
    match section["name"]:
        case "hidden" if section["dtype"] == "int8":
            return float(width + 2 * -(-width // GROUP))
        case "hidden":
            return float(width * DTYPES[section["dtype"]].itemsize)
        case "topk":
            each = id_bits(num_ids) / 8 + DTYPES[section["dtype"]].itemsize
            return each * (
                min(section["k"] or k_of(section["bytes_per_position"], num_ids, section["dtype"]), num_ids)
            )
        case _ if section["bytes_per_position"] or not section["threshold"]:
            return float(section["bytes_per_position"] or DEFAULT_BYTES)
        case _:
            most_C = torch.tensor([math.ceil(1 / section["threshold"])])
            return sampled_bytes(section["threshold"], most_C, most_C * 0, num_ids)


def sampled_bytes(threshold: float, kept_C: Tensor, drawn_C: Tensor, num_ids: int) -> float:
    """Bytes per position of C positions with these numbers of kept and drawn ids."""
    fixed = Sampled(threshold, num_ids, 1.0).count_dtype.itemsize + 2 + 2
    ids = packed_bytes(int((kept_C + drawn_C).sum()), id_bits(num_ids))
    return fixed + (ids + int((kept_C - 1).clamp_min(0).sum())) / max(len(kept_C), 1)


def threshold_of(bytes_per_position: float, hidden_PE: Tensor, head: Head, temperature: float) -> float:
    """The smallest threshold, to three digits, whose samples of these positions need no more bytes than that.

    Found by bisection on its logarithm: bytes fall as the threshold rises. Nothing is drawn for it.

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
    low, high = math.log(MIN_THRESHOLD), 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if needed(math.exp(middle)) > bytes_per_position else (low, middle)
    digits = 2 - math.floor(high / math.log(10))
    return min(float(math.ceil(math.exp(high) * 10**digits) / 10**digits), 1.0)
