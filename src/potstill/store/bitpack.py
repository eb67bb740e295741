"""Numbers in few bits: ids in as many as the vocabulary needs, probabilities in 8, hidden states in int8."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.errors import UserError

GROUP = 64  # hidden states that share a scale
LEVELS = 255


def id_bits(num_ids: int) -> int:
    """Bits that an id from 0 to num_ids - 1 needs, at least 1."""
    return max((num_ids - 1).bit_length(), 1)


def pack_ids(ids: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Ids of `bits` bits each, little-endian and without gaps; the last byte is padded with zeros.

    Raises:
        ValueError: an id that does not fit.
    """
    if len(ids) and (ids.min() < 0 or int(ids.max()) >> bits):
        raise ValueError(f"ids from {ids.min()} to {ids.max()} in {bits} bits")
    if bits in (8, 16, 32):  # the same bytes, faster
        return ids.astype(f"<u{bits // 8}").view(np.uint8)
    spread = (ids[:, None] >> np.arange(bits)) & 1
    return np.packbits(spread.astype(np.uint8).reshape(-1), bitorder="little")


def unpack_ids(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.int64]:
    """The inverse of `pack_ids` for `count` ids."""
    if bits in (8, 16, 32):
        return np.frombuffer(packed.tobytes(), f"<u{bits // 8}").astype(np.int64)
    spread = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return spread.astype(np.int64) @ (np.int64(1) << np.arange(bits))


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `pack_ids` makes of `count` ids."""
    return -(-count * bits // 8)


def level(code: Tensor, smallest: float) -> Tensor:
    """The probability that a code stands for, float64: 256 levels from `smallest` to 1 in equal ratios."""
    return torch.exp(math.log(smallest) * (1 - code.double() / LEVELS))


def to_levels(p_CK: Tensor, smallest: float, uniforms_C: Tensor) -> Tensor:
    """uint8 codes of probabilities from `smallest` to 1, which fall in each row, by systematic rounding.

    Each is rounded up or down to a neighbouring level and unbiased. One uniform number rounds a whole row, so
    that errors cancel: the row's sum is off by at most one step of its first entry.
    """
    below_CK = ((1 - p_CK.double().log() / math.log(smallest)) * LEVELS).floor().clamp(0, LEVELS - 1)
    low_CK, high_CK = level(below_CK, smallest), level(below_CK + 1, smallest)
    share_CK = ((p_CK.double() - low_CK) / (high_CK - low_CK)).clamp(0, 1)
    # Up where the running sum of the shares crosses a whole number: as often as the shares add up to.
    crossed_CK = (share_CK.cumsum(-1) + uniforms_C[:, None]).floor()
    is_up_CK = crossed_CK.diff(dim=-1, prepend=torch.zeros_like(uniforms_C)[:, None])
    return (below_CK + is_up_CK).to(torch.uint8)


def to_int8(hidden_NE: Tensor) -> tuple[Tensor, Tensor]:
    """hidden_NE as quantised_NE in int8, with scale_NG in float16 for each group of GROUP neighbours.

    Raises:
        UserError: a state above 127 times the largest float16.
    """
    N, E = hidden_NE.shape
    groups_NGW = torch.nn.functional.pad(hidden_NE.float(), (0, -E % GROUP)).view(N, -(-E // GROUP), GROUP)
    largest_NG = groups_NGW.abs().amax(-1)
    if N and (largest := float(largest_NG.max())) > 127 * torch.finfo(torch.float16).max:
        raise UserError(
            f"targets: a hidden state of {largest:.3g} is beyond int8. Set capture.dtype: bfloat16."
        )
    # The scale is rounded up to float16: rounded down, the largest of a group would be clipped at 127.
    scale_NG = (largest_NG / 127).half()
    scale_NG = torch.where(scale_NG.float() * 127 < largest_NG, _next_half(scale_NG), scale_NG)
    quantised = (groups_NGW / scale_NG.float().clamp_min(1e-30)[..., None]).round().clamp(-127, 127)
    return quantised.flatten(1)[:, :E].to(torch.int8), scale_NG


def from_int8(quantised_NE: Tensor, scale_NG: Tensor) -> Tensor:
    """hidden_NE in float32, the inverse of `to_int8` up to half a step of each group's scale."""
    return quantised_NE.float() * scale_NG.float().repeat_interleave(GROUP, -1)[:, : quantised_NE.shape[1]]


def _next_half(value: Tensor) -> Tensor:
    """The next larger float16 of a positive one: its bits count up."""
    return (value.view(torch.int16) + 1).view(torch.float16)
