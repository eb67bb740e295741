"""Each codec, written, read and given to the objective, against the full distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from potstill.errors import UserError
from potstill.losses.objective import Objective
from potstill.losses.targets import HiddenTargets, SparseTargets
from potstill.registry import entries
from potstill.store import codecs
from potstill.store.bitpack import id_bits
from potstill.store.codecs import (
    Codec,
    Hidden,
    Sampled,
    TopK,
    k_of,
    planned_bytes,
    threshold_of,
)
from potstill.store.sampling import Uniforms, ids_per_position
from potstill.types import Head, Targets

V, E, D = 300, 48, 24
DIVERGENCES = sorted(entries("divergence"))


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HEAD, STUDENT_HEAD = Head(normal(V, E, seed=1, scale=0.35)), Head(normal(V, D, seed=2, scale=0.4))


def uniforms(count: int, seed: int = 0, row: int = 0) -> Uniforms:
    return Uniforms(seed, row, np.arange(count))


def kept(codec: Codec, hidden_PE: Tensor, seed: int = 0, head: Head = HEAD) -> Targets:
    return codec.decode(codec.encode(hidden_PE, head, uniforms(len(hidden_PE), seed)), head)


def sparse(codec: Codec, hidden_PE: Tensor, seed: int = 0, head: Head = HEAD) -> SparseTargets:
    found = kept(codec, hidden_PE, seed, head)
    assert isinstance(found, SparseTargets)
    return found


def full_p(hidden_PE: Tensor, temperature: float = 1.0) -> Tensor:
    return (HEAD(hidden_PE).double() / temperature).softmax(-1)


def estimates(targets: SparseTargets) -> Tensor:
    found_PV = torch.zeros(len(targets), V, dtype=torch.float64)
    return found_PV.scatter_add_(1, targets.ids_NK.clamp_min(0), targets.logp_NK.double().exp())


def put(
    targets: Targets, name: str = "forward_kl", temperature: float = 1.0, seed: int = 3, same: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The KD term's sum, and its gradients by the student's hidden states and head. `same`: one state."""
    hidden_ND = normal(1 if same else len(targets), D, seed=seed).expand(len(targets), -1).clone()
    hidden_ND.requires_grad_()
    weight_VD = STUDENT_HEAD.weight_VD.clone().requires_grad_()
    objective = Objective(entries("divergence")[name], 1.0, 0.0, temperature, chunk=64)
    labels_N = torch.zeros(len(targets), dtype=torch.int64)
    terms = objective(hidden_ND, Head(weight_VD), labels_N, targets)
    terms["loss"].backward()
    assert hidden_ND.grad is not None and weight_VD.grad is not None
    return terms["kd"], hidden_ND.grad, weight_VD.grad


@pytest.mark.parametrize("threshold", [0.004, 0.03, 0.2, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_stored_sample_is_right_on_average_and_sums_to_one(threshold: float, temperature: float) -> None:
    count = 1500
    hidden_PE = normal(1, E, seed=4, scale=1.5).expand(count, -1)
    targets = sparse(Sampled(threshold, V, temperature), hidden_PE)
    found_PV = estimates(targets)
    assert (found_PV.sum(-1) - 1).abs().max() < 1e-6
    p_V = full_p(hidden_PE[:1], temperature)[0]
    # Five deviations of a mean, and no fewer than one draw for an id that hardly any has.
    allowed = 5 * found_PV.std(0) / math.sqrt(count) + 5 * threshold / count
    assert ((found_PV.mean(0) - p_V).abs() <= allowed).all()
    entropy = float(-(p_V * p_V.log()).sum())
    assert targets.entropy_N is not None and targets.temperature == temperature and not targets.has_bucket
    assert targets.entropy_N.tolist() == pytest.approx([entropy] * count, rel=2**-11)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_and_gradient_of_samples_are_the_full_ones_on_average(temperature: float) -> None:
    """Training on samples tends to training on the full distributions."""
    count = 3000
    hidden_PE = normal(1, E, seed=5, scale=1.5).expand(count, -1)
    stored = sparse(Sampled(0.03, V, temperature), hidden_PE)
    live = HiddenTargets(hidden_PE, HEAD)
    _, true_grad_ND, _ = put(live, temperature=temperature, same=True)
    _, grad_ND, _ = put(stored, temperature=temperature, same=True)
    deviation_D = grad_ND.std(0)
    assert (deviation_D > 0.01 * true_grad_ND[0].norm()).any(), "a draw alone should be noisy"
    off_D = (grad_ND.mean(0) - true_grad_ND[0]).abs()
    assert (off_D <= 5 * deviation_D / math.sqrt(count)).all()

    losses = [float(put(stored[n : n + 1], temperature=temperature, same=True)[0]) for n in range(300)]
    whole = float(put(stored, temperature=temperature, same=True)[0]) / count
    true = float(put(live, temperature=temperature, same=True)[0]) / count
    spread = float(torch.tensor(losses).std())
    assert stored.entropy_N is not None
    rounding = temperature**2 * float(stored.entropy_N[0]) * 2**-11
    allowed = 5 * spread / math.sqrt(count) + rounding
    assert abs(whole - true) <= allowed
    # Without the entropies it would be off by far more than that.
    beyond = stored.beyond_support()
    assert beyond is not None and temperature**2 * abs(float(beyond.mean())) > 10 * allowed


def test_a_draw_is_a_function_of_the_seed_and_the_place_of_a_position() -> None:
    codec, hidden_PE = Sampled(0.03, V, 1.0), normal(100, E, seed=6, scale=1.5)
    ids = [sparse(codec, hidden_PE, seed).ids_NK for seed in (0, 0, 1)]
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0][:, :5], ids[2][:, :5])
    whole, part = codec.encode(hidden_PE, HEAD, uniforms(100)), slice(30, 70)
    some = codec.decode(codec.encode(hidden_PE[part], HEAD, uniforms(100)[part]), HEAD)
    K = some.ids_NK.shape[1]
    assert torch.equal(codec.decode(whole, HEAD).ids_NK[part, :K], some.ids_NK)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_of_all_ids_is_the_live_teacher(name: str, temperature: float) -> None:
    hidden_PE = normal(40, E, seed=7, scale=1.5)
    stored = sparse(TopK(V, "float32", V, temperature), hidden_PE)
    ours, wanted = (put(of, name, temperature) for of in (stored, HiddenTargets(hidden_PE, HEAD)))
    for found, right in zip(ours, wanted, strict=True):
        assert torch.allclose(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("k", [1, 5, 64])
def test_a_divergence_with_a_bucket_is_a_lower_bound(name: str, dtype: str, k: int) -> None:
    hidden_PE = normal(60, E, seed=8, scale=1.5)
    for temperature in (1.0, 2.0):
        stored, live = (
            sparse(TopK(k, dtype, V, temperature), hidden_PE),
            HiddenTargets(hidden_PE, HEAD),
        )
        rounding = 1e-5 if dtype == "float32" else 4e-3
        for position in range(0, 60, 7):
            at = slice(position, position + 1)
            bound, full = (float(put(of[at], name, temperature)[0]) for of in (stored, live))
            assert -rounding <= bound <= full + rounding
            assert all(g.isfinite().all() for g in put(stored[at], name, temperature))


def test_top_k_stores_the_largest_probabilities() -> None:
    hidden_PE = normal(30, E, seed=9, scale=1.5)
    stored = sparse(TopK(7, "float32", V, 2.0), hidden_PE)
    p_PK, ids_PK = full_p(hidden_PE, 2.0).sort(dim=-1, descending=True)
    assert torch.equal(stored.ids_NK, ids_PK[:, :7]) and stored.has_bucket and stored.entropy_N is None
    assert torch.allclose(stored.logp_NK.exp().double(), p_PK[:, :7], atol=1e-6)


def test_hidden_states_in_float32_are_the_live_teacher() -> None:
    hidden_PE = normal(40, E, seed=10, scale=1.5)
    stored = kept(Hidden("float32"), hidden_PE)
    for name in DIVERGENCES:
        for ours, wanted in zip(put(stored, name), put(HiddenTargets(hidden_PE, HEAD), name), strict=True):
            assert torch.equal(ours, wanted)


# Measured on these states: 1.21e-5, 1.9e-7 and 1.38e-4 nats; half as much again is allowed.
@pytest.mark.parametrize("dtype, most", [("bfloat16", 1.8e-5), ("float16", 3e-7), ("int8", 2.1e-4)])
def test_hidden_states_in_fewer_bits_are_off_by_no_more_than_measured(dtype: str, most: float) -> None:
    hidden_PE = normal(200, E, seed=11, scale=1.5)
    stored = kept(Hidden(dtype), hidden_PE)
    assert isinstance(stored, HiddenTargets)
    p_PV, q_PV = full_p(hidden_PE), full_p(stored.hidden_NE)
    kl = float((p_PV * (p_PV / q_PV).log()).sum(-1).mean())
    assert 0 < kl <= most


def test_sparse_targets_have_one_temperature() -> None:
    hidden_PE = normal(4, E)
    for codec in (Sampled(0.05, V, 2.0), TopK(3, "float16", V, 2.0)):
        with pytest.raises(UserError, match=r"is 1.0.*2.0"):
            put(kept(codec, hidden_PE), temperature=1.0)


def test_impossible_ids_stay_impossible_and_no_gradient_is_nan() -> None:
    """A padded end, masked with -inf, and a student for which an id is impossible as well."""
    head = Head(HEAD.weight_VD, torch.zeros(V).index_fill(0, torch.arange(200, V), -math.inf))
    hidden_PE = normal(50, E, seed=12, scale=1.5)
    for codec in (Sampled(0.02, V, 1.0), TopK(64, "float16", V, 1.0), TopK(V, "float32", V, 1.0)):
        stored = sparse(codec, hidden_PE, head=head)
        likely = (stored.ids_NK >= 0) & (stored.logp_NK > -1e3)
        assert int(stored.ids_NK[likely].max()) < 200
        student = normal(50, V, seed=13).index_fill(1, torch.arange(200, V), -math.inf).requires_grad_()
        student_NS, teacher_NS = stored.on_support(student.log_softmax(-1), 1.0)
        kd = entries("divergence")["forward_kl"](student_NS, teacher_NS).sum()
        kd.backward()
        assert kd.isfinite() and student.grad is not None and student.grad.isfinite().all()


def row_bytes(codec: Codec, hidden_PE: Tensor) -> float:
    row = codec.encode(hidden_PE, HEAD, uniforms(len(hidden_PE)))
    return sum(tensor.nbytes for tensor in row.values()) / len(hidden_PE)


def test_bytes_per_position_are_as_planned() -> None:
    hidden_PE = normal(128, E, seed=14, scale=1.5)
    for dtype in ("float32", "bfloat16", "int8"):
        section = {"name": "hidden", "dtype": dtype}
        assert row_bytes(Hidden(dtype), hidden_PE) == planned_bytes(section, V, E)
    for dtype in ("float16", "float32"):
        section = {"name": "topk", "dtype": dtype, "k": 12, "bytes_per_position": None}
        assert row_bytes(TopK(12, dtype, V, 1.0), hidden_PE) == planned_bytes(section, V, E)
    for threshold in (1e-3, 0.01, 0.1, 1.0):
        section = {"name": "sampled", "threshold": threshold, "bytes_per_position": None}
        assert row_bytes(Sampled(threshold, V, 1.0), hidden_PE) <= planned_bytes(section, V, E)


@pytest.mark.parametrize("wanted", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_threshold_fits_the_bytes_per_position(wanted: float, temperature: float) -> None:
    hidden_PE = normal(512, E, seed=15, scale=1.5)
    threshold = threshold_of(wanted, hidden_PE, HEAD, temperature)
    assert float(f"{threshold:.3g}") == threshold
    taken = row_bytes(Sampled(threshold, V, temperature), hidden_PE)
    # Few bytes are a coarse choice: of 2 ids or 3, for all positions at once.
    assert (0.96 if wanted > 8 else 0.9) * wanted <= taken <= 1.005 * wanted


def test_too_few_bytes_for_one_id_are_refused() -> None:
    hidden_PE = normal(8, E)
    with pytest.raises(UserError, match=r"capture.bytes_per_position: 5, and one id of 300 takes 6.12"):
        threshold_of(5, hidden_PE, HEAD, 1.0)
    with pytest.raises(UserError, match=r"capture.bytes_per_position: 3, and one id of 300 takes 3.12"):
        k_of(3, V, "float16")
    assert k_of(4, V, "float16") == 1 and k_of(1e6, V, "float16") == V


def test_counts_do_not_overflow() -> None:
    for threshold in (codecs.MIN_THRESHOLD, 0.005, 0.009, 0.5, 1.0):
        most = torch.iinfo(Sampled(threshold, V, 1.0).count_dtype).max
        for size in (int(1 / threshold) - 1, int(2 / threshold) - 1):
            p_CV = torch.full((1, max(size, 1)), 1 / max(size, 1))
            kept_C, drawn_C = ids_per_position(p_CV, threshold)
            assert int(kept_C) <= most and int(kept_C + drawn_C) <= 1 / threshold + 1


def test_ids_of_a_masked_vocabulary_are_packed_by_its_size() -> None:
    head = Head(HEAD.weight_VD, known=200)
    row = TopK(5, "float16", 200, 1.0).encode(normal(16, E), head, uniforms(16))
    assert id_bits(200) == 8 and len(row["ids"]) == 16 * 5
    assert int(row["ids"].max()) < 200
