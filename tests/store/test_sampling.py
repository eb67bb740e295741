"""Threshold sampling against its definition, computed here in float64 by other means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.store import sampling
from potstill.store.sampling import (
    TAIL_LEVELS,
    Sample,
    Uniforms,
    ids_per_position,
    num_drawn,
    threshold_sample,
    top_k,
    variance,
)

THRESHOLDS = [1e-3, 0.004, 0.02, 0.05, 0.11, 0.3, 0.7, 1.0]


def peaked(size: int = 300, seed: int = 0, scale: float = 3.0) -> Tensor:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * logits).softmax(-1)


def with_holes() -> Tensor:
    p = peaked(260)
    p[1::2] = 0
    return p / p.sum()


DISTRIBUTIONS = {
    "peaked": peaked(),
    "open": peaked(scale=1.0),
    "sure": peaked(200, scale=12.0),
    "uniform": torch.full((333,), 1 / 333, dtype=torch.float64),
    "one-hot": torch.eye(150, dtype=torch.float64)[77],
    "holes": with_holes(),
    "two": torch.tensor([0.5, 0.5], dtype=torch.float64),
    "one": torch.ones(1, dtype=torch.float64),
}


def split(p: NDArray[np.float64], threshold: float) -> tuple[NDArray[np.bool_], float, int]:
    """Which ids are kept, what is left, and over how many it is spread, as the docstring puts it: above the
    threshold, and whatever would else be drawn more than once.
    """
    kept = p > threshold
    while True:
        r = float(p[~kept].sum())
        m = max(math.ceil(r / threshold - 1e-9), 1)
        more = ~kept & (p > r / m * (1 + 1e-9))
        if not more.any():
            return kept, r, m
        kept[np.argmax(np.where(kept, -1, p))] = True


def closed_form(p: NDArray[np.float64], threshold: float) -> float:
    kept, r, m = split(p, threshold)
    return float((p[~kept] * (r / m - p[~kept])).sum())


def places(count: int, first: int = 0) -> NDArray[np.int64]:
    return np.arange(first, first + count)


def estimates(p_CV: Tensor, sample: Sample, threshold: float) -> Tensor:
    """Each draw's estimate of every id's probability, float64."""
    m_C = num_drawn(sample.tail_C, threshold)
    each_C = sample.tail_C.double() / TAIL_LEVELS / m_C.clamp_min(1)
    drawn = (sample.drawn_ids_CM >= 0).double() * each_C[:, None]
    found_CV = torch.zeros(p_CV.shape, dtype=torch.float64)
    found_CV.scatter_add_(1, sample.drawn_ids_CM.clamp_min(0), drawn)
    return found_CV.scatter_add_(1, sample.kept_ids_CK.clamp_min(0), sample.kept_p_CK.double())


def draws(p: Tensor, threshold: float, count: int, seed: int = 5) -> Tensor:
    p_CV = p.float().expand(count, -1)
    return estimates(p_CV, threshold_sample(p_CV, threshold, Uniforms(seed, 3, places(count))), threshold)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("threshold", [0.004, 0.05, 0.3, 1.0])
def test_the_mean_over_draws_is_the_full_distribution_and_the_variance_the_closed_form(
    name: str, threshold: float
) -> None:
    p, count = DISTRIBUTIONS[name], 4000 if threshold > 0.01 else 1000
    found_CV = draws(p, threshold, count)
    kept, r, m = split(p.numpy(), threshold)
    # An id is there or not, for r / m; and the rest is rounded to a step, which is shared by all of it.
    deviation = (p * (r / m - p)).clamp_min(0).sqrt() + 1 / TAIL_LEVELS
    deviation[torch.from_numpy(kept)] = 0
    # Five deviations of a mean; an id that hardly any draw has is one draw from its mean.
    allowed = 5 * deviation / math.sqrt(count) + 5 * r / m / count + 1e-6
    assert ((found_CV.mean(0) - p).abs() <= allowed).all()

    squared_C = (found_CV - p).square().sum(-1)
    wanted = closed_form(p.numpy(), threshold)
    assert float(squared_C.mean()) == pytest.approx(
        wanted, abs=5 * float(squared_C.std()) / math.sqrt(count) + 1e-7
    )
    assert variance(p, threshold) == pytest.approx(wanted, rel=1e-5, abs=1e-9)


def distinct(p: NDArray[np.float64], n: float) -> float:
    """Ids that n multinomial draws are expected to name."""
    return float((1 - (1 - p) ** n).sum())


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 4.0])
def test_no_more_variance_than_multinomial_sampling_at_the_same_number_of_ids(
    threshold: float, scale: float
) -> None:
    for seed in range(20):
        p = peaked(200 + seed, seed, scale).numpy()
        kept, r, m = split(p, threshold)
        ids = min(int(kept.sum()) + m * (r > 0), (p > 0).sum() - 1e-6)
        low, high = 0.0, 1e9
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if distinct(p, middle) < ids else (low, middle)
        assert closed_form(p, threshold) <= (1 - (p**2).sum()) / high + 1e-12


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_a_draw_keeps_the_right_ids_and_its_tail_gives_the_number_of_drawn_ones(
    name: str, threshold: float
) -> None:
    p, count = DISTRIBUTIONS[name], 40
    p_CV = p.float().expand(count, -1)
    sample = threshold_sample(p_CV, threshold, Uniforms(0, 0, places(count)))
    kept, r, m = split(p.numpy(), threshold)
    is_kept_CK, is_drawn_CM = sample.kept_ids_CK >= 0, sample.drawn_ids_CM >= 0
    assert (is_kept_CK.sum(-1) == kept.sum()).all()
    assert (kept[sample.kept_ids_CK[is_kept_CK]]).all()
    assert torch.equal(sample.kept_p_CK[is_kept_CK], p_CV[0, sample.kept_ids_CK[is_kept_CK]])
    assert (sample.kept_p_CK.diff(dim=-1) <= 0).all()
    assert torch.equal(num_drawn(sample.tail_C, threshold), is_drawn_CM.sum(-1))
    ids = sample.drawn_ids_CM[is_drawn_CM]
    assert ((ids >= 0) & (ids < len(p))).all()
    assert (p[ids] > 0).all()
    if r > 1e-4:
        assert not kept[ids].any()  # else what is left is rounding
    assert ((sample.tail_C / TAIL_LEVELS - r).abs() <= 1.01 / TAIL_LEVELS).all()
    # One more or less where the rounded rest crosses a multiple of the threshold.
    assert ((is_drawn_CM.sum(-1) - (m if r > 1e-9 else 0)).abs() <= 1).all()
    stands_for = sample.tail_C.double() / TAIL_LEVELS / is_drawn_CM.sum(-1).clamp_min(1)
    assert (stands_for <= threshold * (1 + 1e-6)).all()
    planned_kept_C, planned_drawn_C = ids_per_position(p_CV, threshold)
    assert torch.equal(planned_kept_C, is_kept_CK.sum(-1))
    assert ((planned_drawn_C - is_drawn_CM.sum(-1)).abs() <= 1).all()


def test_a_uniform_distribution_is_drawn_evenly() -> None:
    p_CV = torch.full((50, 1000), 1e-3)
    sample = threshold_sample(p_CV, 0.02, Uniforms(0, 0, places(50)))
    assert sample.drawn_ids_CM.shape == (50, 50)
    assert (sample.drawn_ids_CM.diff(dim=-1) - 20).abs().max() <= 1


def test_a_certain_position_costs_one_id() -> None:
    p_CV = torch.eye(500)[[3, 499, 0]]
    sample = threshold_sample(p_CV, 0.05, Uniforms(0, 0, places(3)))
    assert sample.kept_ids_CK.tolist() == [[3], [499], [0]] and sample.kept_p_CK.tolist() == [[1], [1], [1]]
    assert sample.drawn_ids_CM.shape == (3, 0) and sample.tail_C.tolist() == [0, 0, 0]


def test_at_threshold_one_it_is_one_draw_from_the_distribution() -> None:
    p = peaked(40, scale=1.0)
    counts = torch.bincount(
        threshold_sample(
            p.float().expand(20_000, -1), 1.0, Uniforms(1, 0, places(20_000))
        ).drawn_ids_CM.flatten(),
        minlength=40,
    )
    chi_squared = float(((counts - 20_000 * p).square() / (20_000 * p)).sum())
    assert chi_squared < 39 + 5 * math.sqrt(2 * 39)


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 255, 256, 300, 1000])
def test_every_id_of_a_vocabulary_of_any_size_can_be_drawn(size: int) -> None:
    p_CV = torch.full((4 * size, size), 1 / size)
    sample = threshold_sample(p_CV, 1.0, Uniforms(0, 0, places(4 * size)))
    sizes = {len(of) for of in (sample.drawn_ids_CM, sample.kept_ids_CK)}
    assert sizes == {4 * size}
    ids = torch.cat([sample.drawn_ids_CM, sample.kept_ids_CK], 1)
    ids = ids[ids >= 0]
    assert int(ids.max()) < size and int(ids.max()) >= 0.8 * (size - 1) and int(ids.min()) <= 0.2 * size


def same(one: Sample, other: Sample, row: int, at: int) -> bool:
    """Row of one against row of the other, without padding."""
    ours = (one.kept_ids_CK[row], one.drawn_ids_CM[row], one.tail_C[row : row + 1])
    theirs = (other.kept_ids_CK[at], other.drawn_ids_CM[at], other.tail_C[at : at + 1])
    return all(torch.equal(a[a >= 0], b[b >= 0]) for a, b in zip(ours, theirs, strict=True))


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    p_CV = torch.stack([peaked(300, seed, 0.5 + seed / 8) for seed in range(32)]).float()
    uniforms = Uniforms(9, 2, places(32, 7))
    whole = threshold_sample(p_CV, 0.03, uniforms)
    for part in (slice(0, 1), slice(5, 9), slice(31, 32), slice(3, 32)):
        some = threshold_sample(p_CV[part], 0.03, uniforms[part])
        assert all(same(whole, some, row, row - part.start) for row in range(part.start, part.stop))


def test_a_draw_does_not_depend_on_how_many_ids_are_looked_up_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p_CV = torch.stack([peaked(300, seed, 1.0) for seed in range(8)]).float()
    whole = threshold_sample(p_CV, 0.01, Uniforms(9, 2, places(8)))
    monkeypatch.setattr(sampling, "IDS_AT_ONCE", 8 * sampling.BLOCK * 3)
    parts = threshold_sample(p_CV, 0.01, Uniforms(9, 2, places(8)))
    assert torch.equal(whole.drawn_ids_CM, parts.drawn_ids_CM)


@pytest.mark.parametrize("seed, row, first", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_another_seed_row_or_place_is_another_draw(seed: int, row: int, first: int) -> None:
    p_CV = peaked(300, scale=1.0).float().expand(16, -1)
    one = threshold_sample(p_CV, 0.03, Uniforms(0, 0, places(16)))
    other = threshold_sample(p_CV, 0.03, Uniforms(seed, row, places(16, first)))
    assert not any(same(one, other, number, number) for number in range(16))


def mixed(state: int) -> int:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_random_numbers_are_those_of_earlier_versions() -> None:
    """SplitMix64 over seed, row, place and stream, in Python's own integers."""
    found = Uniforms(2**63 - 1, 2**40, np.array([0, 5, 2**20])).get(2)
    for number, place in zip(found.tolist(), (0, 5, 2**20), strict=True):
        state = mixed(2**63 - 1)
        for value in (2**40, place, 2):
            state = mixed((state + (value + 1) * 0x9E3779B97F4A7C15) % 2**64)
        assert number == (state >> 11) / 2**53


def test_random_numbers_are_uniform_and_their_streams_uncorrelated() -> None:
    count = 20_000
    streams = torch.stack([Uniforms(0, 0, places(count)).get(stream) for stream in range(3)])
    streams = torch.cat([streams, Uniforms(0, 1, places(count)).get(0)[None]])
    assert ((streams >= 0) & (streams < 1)).all()
    for one in streams:
        gap = (one.sort().values - (torch.arange(count) + 0.5) / count).abs().max()
        assert float(gap) < 2.2 / math.sqrt(count)  # Kolmogorov and Smirnov's, at 1e-4
    assert (torch.corrcoef(streams) - torch.eye(4)).abs().max() < 5 / math.sqrt(count)


def test_top_k_are_the_largest_in_falling_order() -> None:
    p_CV = torch.stack([peaked(50, 1), peaked(50, 2)]).float()
    ids_CK, p_CK = top_k(p_CV, 7)
    assert torch.equal(p_CK, p_CV.sort(dim=-1, descending=True).values[:, :7])
    assert torch.equal(p_CV.gather(1, ids_CK), p_CK)
    assert top_k(p_CV, 80)[0].shape == (2, 50)
