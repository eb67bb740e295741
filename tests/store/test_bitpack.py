"""Ids in as few bits as they need, probabilities in a byte, hidden states in groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from potstill.errors import UserError
from potstill.store.bitpack import (
    GROUP,
    LEVELS,
    from_int8,
    id_bits,
    level,
    pack_ids,
    packed_bytes,
    to_int8,
    to_levels,
    unpack_ids,
)

VOCABULARIES = {1: 1, 2: 1, 3: 2, 255: 8, 256: 8, 257: 9, 50257: 16, 65536: 16, 65537: 17}
VOCABULARIES |= {131072: 17, 151936: 18, 262144: 18}


@pytest.mark.parametrize("size, bits", VOCABULARIES.items())
def test_every_id_comes_back(size: int, bits: int) -> None:
    assert id_bits(size) == bits
    ids = np.random.default_rng(0).permutation(size)
    packed = pack_ids(ids, bits)
    assert packed.dtype == np.uint8 and len(packed) == packed_bytes(size, bits) == math.ceil(size * bits / 8)
    assert np.array_equal(unpack_ids(packed, size, bits), ids)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 63])
@pytest.mark.parametrize("bits", [1, 5, 8, 9, 16, 17, 18, 31, 32])
def test_any_number_of_ids_comes_back(count: int, bits: int) -> None:
    ids = np.random.default_rng(count).integers(0, 2**bits, count)
    assert np.array_equal(unpack_ids(pack_ids(ids, bits), count, bits), ids)


def test_the_bits_are_little_endian() -> None:
    assert pack_ids(np.array([0b101, 0b011, 0b110]), 3).tolist() == [0b10_011_101, 0b1]
    assert pack_ids(np.array([0x0201]), 16).tolist() == [1, 2]


@pytest.mark.parametrize("ids", [[-1], [512], [0, 2**40]])
def test_an_id_that_does_not_fit_is_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="in 9 bits"):
        pack_ids(np.array(ids), 9)


@pytest.mark.parametrize("smallest", [5e-5, 0.01, 0.25, 0.5])
def test_a_probability_is_rounded_to_a_neighbouring_level_without_bias(smallest: float) -> None:
    p = torch.linspace(1, smallest, 40, dtype=torch.float64)
    p = torch.cat([p, level(torch.arange(LEVELS + 1), smallest)])
    p = p.sort(descending=True).values.clamp(smallest, 1)
    count = 4000
    uniforms_C = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes_CK = to_levels(p.expand(count, -1), smallest, uniforms_C)
    assert codes_CK.dtype == torch.uint8
    found_CK, step = level(codes_CK, smallest), smallest ** (-1 / LEVELS)
    assert (found_CK >= smallest * (1 - 1e-12)).all() and (found_CK <= 1 + 1e-12).all()
    assert ((found_CK / p).log().abs() <= math.log(step) * (1 + 1e-9)).all()
    off_K = found_CK.mean(0) - p
    assert (off_K.abs() <= 5 * (step - 1) * p / 2 / math.sqrt(count)).all()
    # Errors cancel: a row's sum is off by one step, not by one for each entry.
    assert float((found_CK - p).sum(-1).abs().max()) <= (step - 1) * float(p[0])


def test_no_probabilities_make_no_codes() -> None:
    assert to_levels(torch.zeros(3, 0), 0.01, torch.zeros(3, dtype=torch.float64)).shape == (3, 0)


@pytest.mark.parametrize("width", [1, 63, 64, 65, 100, 576])
@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-3, 1.0, 50.0, 8.3e6])
def test_int8_is_off_by_half_a_step_of_its_group(width: int, scale: float) -> None:
    hidden_NE = torch.randn(50, width, generator=torch.Generator().manual_seed(width))
    hidden_NE = (hidden_NE / hidden_NE.abs().max() * scale).float()
    quantised_NE, scale_NG = to_int8(hidden_NE)
    assert quantised_NE.shape == hidden_NE.shape and quantised_NE.dtype == torch.int8
    assert scale_NG.shape == (50, -(-width // GROUP)) and scale_NG.dtype == torch.float16
    back_NE = from_int8(quantised_NE, scale_NG)
    for group, (ours, theirs) in enumerate(
        zip(hidden_NE.split(GROUP, 1), back_NE.split(GROUP, 1), strict=True)
    ):
        largest_N = ours.abs().amax(-1)
        step_N = scale_NG[:, group].float()
        assert ((ours - theirs).abs() <= 0.5001 * step_N[:, None]).all()
        # A float16 above largest / 127: a 1024th more, or the smallest that there is.
        assert (step_N <= largest_N / 127 * (1 + 2**-9) + 6e-8).all()
        assert (largest_N <= step_N * 127).all()


def test_zeros_stay_zeros_beside_numbers() -> None:
    hidden_NE = torch.zeros(2, 130)
    hidden_NE[1, 129] = -3.0
    back_NE = from_int8(*to_int8(hidden_NE))
    assert torch.equal(back_NE[:, :129], hidden_NE[:, :129])
    assert float(back_NE[1, 129]) == pytest.approx(-3.0, rel=1e-3)
    assert to_int8(torch.zeros(0, 8))[0].shape == (0, 8)


def test_a_state_beyond_int8_is_refused() -> None:
    hidden_NE = torch.ones(3, 70)
    hidden_NE[2, 69] = 9e6
    with pytest.raises(UserError, match=r"9e\+06 is beyond int8. Set capture.dtype: bfloat16"):
        to_int8(hidden_NE)
