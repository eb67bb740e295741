"""Sparse forms of next-token distributions: threshold sampling, which is unbiased, and top-k, which is not.

Threshold sampling takes one threshold t for all positions. A position keeps every id with p > t at its own
probability, and the next ones while they are above what a drawn id would stand for; what is left, r, is
spread over m = ceil(r / t) ids drawn systematically with inclusion probability p / (r / m), each standing for
r / m <= t. The estimate is unbiased and sums to one, and no other unbiased scheme has less variance at the
same count: this is VarOpt sampling with a common threshold (Cohen, Duffield, Kaplan, Lund, Thorup 2009, arXiv
0803.0473). Over draws the squared error of a position is

    sum over its ids that are not kept of p (r / m - p)                              (`variance`)

and multinomial sampling's with n draws is (1 - sum p^2) / n (Anshumann et al. 2025, arXiv 2503.16870).
A position of low entropy costs one or two ids, one of high entropy many: bytes go where they matter.

The draw is a function of p and of (seed, row, place in the row) alone, whatever else is in the batch.
Tensors are of C positions; an id of -1 pads a row that has fewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128  # ids whose mass is summed first: a draw looks into one block alone
TAIL_LEVELS = 65535
"""The rest r of a position is known in steps of this fraction, rounded up or down at random to its mean."""
DRAW_STREAM, TAIL_STREAM, CODE_STREAM = 0, 1, 2
"""Streams of random numbers of a position: for its draw, and for rounding its tail and its codes. The numbers
are part of the format: another one is another draw."""
IDS_AT_ONCE = 2**22
"""Ids whose mass is summed at once, to find which one a draw falls on: bounds memory, not the result."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Kept and drawn ids of C positions: an unbiased estimate of their full distributions."""

    kept_ids_CK: Tensor
    """int64, by falling probability, padded with -1."""
    kept_p_CK: Tensor
    """Their probabilities, float32, padded with 0."""
    drawn_ids_CM: Tensor
    """int64, rising, padded with -1. An id may occur twice."""
    tail_C: Tensor
    """int64: probability of all drawn ids together, in units of 1 / TAIL_LEVELS; each has an equal part."""


def threshold_sample(p_CV: Tensor, threshold: float, uniforms: Uniforms) -> Sample:
    """Draw once at each of C positions.

    Args:
        p_CV: probabilities in float32; rows sum to one.
        threshold: t above, more than 0 and at most 1, where it is one draw from the whole distribution.
        uniforms: random numbers of the same positions.
    """
    kept_ids_CK, kept_p_CK = _keep(p_CV, threshold)
    C, V = p_CV.shape
    # Kept ids take no part in the draw: their mass is set to 0. The padding of a row points to its first kept
    # id, which is zeroed anyway; a row that keeps nothing must lose nothing, so it gets its own value back.
    rest_CW = F.pad(p_CV, (0, -V % BLOCK)) if V % BLOCK else p_CV.clone()
    first_C1 = kept_ids_CK[:, :1].clamp_min(0)
    places_CK = torch.where(kept_ids_CK >= 0, kept_ids_CK, first_C1)
    has_none_C1 = kept_ids_CK[:, :1] < 0
    rest_CW.scatter_(1, places_CK, torch.where(has_none_C1, rest_CW.gather(1, places_CK), 0.0))
    # Sums of 16 ids in float32, then in float64: exact enough, ten times as fast as float64 throughout.
    blocks_CBW = rest_CW.view(C, -1, BLOCK)
    upto_CB = blocks_CBW.view(C, -1, BLOCK // 16, 16).sum(-1).double().sum(-1).cumsum(-1)
    total_C = upto_CB[:, -1]
    tail_C = _tail(total_C, kept_ids_CK, uniforms)
    drawn_C = num_drawn(tail_C, threshold)

    # Systematic sampling: points at equal steps along the mass that is left, one random shift for all.
    M = int(drawn_C.max()) if C else 0
    turn_M = torch.arange(M, device=p_CV.device, dtype=torch.float64)
    is_drawn_CM = turn_M < drawn_C[:, None]
    step_C = total_C / drawn_C.clamp_min(1)
    at_CM = ((uniforms.get(DRAW_STREAM)[:, None] + turn_M) * step_C[:, None]).where(is_drawn_CM, 0.0)
    width = max(IDS_AT_ONCE // (BLOCK * max(C, 1)), 1)
    drawn = [_id_at(blocks_CBW, upto_CB, part_CM) for part_CM in torch.split(at_CM, width, dim=1)]
    return Sample(kept_ids_CK, kept_p_CK, torch.cat(drawn, 1).where(is_drawn_CM, -1), tail_C)


def _id_at(blocks_CBW: Tensor, upto_CB: Tensor, at_CM: Tensor) -> Tensor:
    """The id in whose share of the mass each point of at_CM lies: first the block, then the id inside the block;
    upto_CB is the mass up to each block's end.
    """
    # Rounding of the sums must not lead past the last id that has any mass: it would be an impossible one.
    at_CM = torch.minimum(at_CM, upto_CB[:, -1:] * (1 - 1e-12))
    block_CM = torch.searchsorted(upto_CB, at_CM, right=True).clamp_max(upto_CB.shape[1] - 1)
    before_CM = F.pad(upto_CB, (1, 0)).gather(1, block_CM)
    inside_CMW = blocks_CBW[torch.arange(len(at_CM), device=at_CM.device)[:, None], block_CM]
    inside_CMW = inside_CMW.double().cumsum(-1)
    at_CM = torch.minimum((at_CM - before_CM).clamp_min(0.0), inside_CMW[..., -1] * (1 - 1e-9))
    return block_CM * BLOCK + torch.searchsorted(inside_CMW, at_CM[..., None], right=True).squeeze(-1)


def num_drawn(tail_C: Tensor, threshold: float) -> Tensor:
    """m, int64: over how many ids a tail is spread. A function of the rounded tail, so that it need not
    be stored. The 1e-9 keeps a quotient that should be whole from being rounded up by an ulp.
    """
    return (tail_C.double() / TAIL_LEVELS / threshold - 1e-9).ceil().long()


def top_k(p_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ids_CK of the k largest probabilities, and these as p_CK, falling; all V where k is larger."""
    p_CK, ids_CK = p_CV.topk(min(k, p_CV.shape[-1]))
    return ids_CK, p_CK


def ids_per_position(p_CV: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Numbers of kept and of drawn ids of `threshold_sample` at each position, int64, without drawing."""
    kept_ids_CK, kept_p_CK = _keep(p_CV, threshold)
    rest_C = 1 - kept_p_CK.double().sum(-1)
    kept_C = (kept_ids_CK >= 0).sum(-1)
    return kept_C, num_drawn((rest_C.clamp_min(0) * TAIL_LEVELS).round().long(), threshold)


def variance(p_V: Tensor, threshold: float) -> float:
    """Expected squared error of one draw from p_V, summed over ids, by the closed form above."""
    ids_CK, _ = _keep(p_V[None].float(), threshold)
    rest_V = p_V.double().clone()
    rest_V[ids_CK[0][ids_CK[0] >= 0]] = 0
    r = min(float(rest_V.sum()), 1.0)
    m = max(math.ceil(r / threshold - 1e-9), 1)
    return float((rest_V * (r / m - rest_V)).sum())


def _keep(p_CV: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """ids_CK that keep their own probability, and these as p_CK, falling: all above the threshold, then as
    many more as have a larger probability than what a drawn id would stand for.
    """
    C = len(p_CV)
    # Candidates: an id of at most r / m is never kept, and r / m is above threshold / 2 or all that is left.
    # Few blocks have one, so that [C, V] is read once for the largest of each block and sorted nowhere.
    blocks_CBW = F.pad(p_CV, (0, -p_CV.shape[1] % BLOCK)).view(C, -1, BLOCK)
    at_C, block = (blocks_CBW.amax(-1) > threshold / 2).nonzero(as_tuple=True)
    hit, within = (blocks_CBW[at_C, block] > threshold / 2).nonzero(as_tuple=True)
    at_C, ids = at_C[hit], block[hit] * BLOCK + within
    counts_C = torch.bincount(at_C, minlength=C)
    place = torch.arange(len(at_C), device=p_CV.device) - (counts_C.cumsum(0) - counts_C)[at_C]
    width = int(counts_C.max()) + 1 if C else 1
    p_CK = p_CV.new_zeros(C, width)
    ids_CK = torch.full((C, width), -1, dtype=torch.int64, device=p_CV.device)
    p_CK[at_C, place], ids_CK[at_C, place] = p_CV[at_C, ids], ids
    p_CK, order_CK = p_CK.sort(dim=-1, descending=True, stable=True)
    ids_CK = ids_CK.gather(1, order_CK)
    # Mass left if the ids before are kept. Where those are all there are, rounding may bring it below 0.
    rest_CK = (1 - (p_CK.double().cumsum(-1) - p_CK)).clamp_min(0)
    stands_for_CK = rest_CK / (rest_CK / threshold - 1e-9).ceil().clamp_min(1)
    enough_CK = (p_CK <= threshold) & (p_CK <= stands_for_CK)
    num_kept_C = enough_CK.int().argmax(-1)  # the last column is empty, so there is one
    is_kept_CK = torch.arange(width, device=p_CV.device) < num_kept_C[:, None]
    most = max(int(num_kept_C.max()) if C else 0, 1)
    return ids_CK.where(is_kept_CK, -1)[:, :most], p_CK.where(is_kept_CK, 0.0)[:, :most]


def _tail(total_C: Tensor, kept_ids_CK: Tensor, uniforms: Uniforms) -> Tensor:
    """The mass left, in units of 1 / TAIL_LEVELS, rounded at random so that its mean is right."""
    # Where nothing is kept the tail is all of the distribution, whatever the rounding of its sum.
    parts_C = (
        (total_C.clamp(0, 1) * TAIL_LEVELS + uniforms.get(TAIL_STREAM)).floor().long().clamp_max(TAIL_LEVELS)
    )
    return parts_C.where(kept_ids_CK[:, 0] >= 0, TAIL_LEVELS)


@dataclass(frozen=True)
class Uniforms:
    """Random numbers in [0, 1) of C positions: functions of (seed, row, place in the row, stream) alone.

    A counter-based generator has no state: a resumed capture, another batch size or another device draws the
    same numbers.
    """

    seed: int
    row: int
    places_C: NDArray[np.int64]
    device: torch.device | str = "cpu"

    def get(self, stream: int) -> Tensor:
        """uniforms_C in float64, on `device`."""
        with np.errstate(over="ignore"):
            mixed = _mix(np.full(len(self.places_C), self.seed, dtype=np.uint64))
            for value in (np.uint64(self.row), self.places_C.astype(np.uint64), np.uint64(stream)):
                mixed = _mix(mixed + value * _ODD + _ODD)
        return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53).to(self.device)

    def __getitem__(self, part: slice) -> Uniforms:
        return Uniforms(self.seed, self.row, self.places_C[part], self.device)


_ODD = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
