"""The certificate against the same figures written out in float64, without the objective and without autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from potstill.build.resolve import resolve
from potstill.build.setup import set_up
from potstill.losses.targets import SparseTargets
from potstill.models.student import Student
from potstill.recipe import load as recipes
from potstill.store.codecs import Codec, Hidden, Sampled, TopK
from potstill.teachers.capture_rows import captured
from potstill.teachers.hf import TorchTeacher
from potstill.types import Rows
from potstill.workflows.capture_fidelity import certificate

Made = tuple[Student, TorchTeacher, Rows]
SEED = 3


@pytest.fixture(params=[1.0, 2.0])
def made(request: pytest.FixtureRequest, tiny_recipe: Callable[..., Path]) -> Made:
    path = tiny_recipe(objective=f"{{chunk: 16, temperature: {request.param}}}")
    setup = set_up(resolve(recipes.load(path)), lambda line: None)
    assert isinstance(setup.teacher, TorchTeacher)
    return setup.student, setup.teacher, setup.corpus.heldout


def estimate(kind: Codec, made: Made, number: int, full_NV: Tensor, q_NV: Tensor) -> tuple[Tensor, ...]:
    """p of the targets, what their KD term pulls towards, and which ids they have."""
    _, teacher, rows = made
    (one,) = captured(teacher, rows, [number], kind, SEED, 1)
    stored = kind.decode(one.kept, teacher.model.head)
    if not isinstance(stored, SparseTargets):
        T = made[0].objective.temperature
        p_NV = (teacher.model.head(stored.hidden_NE).double() / T).softmax(-1)
        return p_NV, p_NV, torch.ones_like(p_NV, dtype=torch.bool)
    p_NV, has_NV = torch.zeros_like(full_NV), torch.zeros_like(full_NV, dtype=torch.bool)
    for n in range(len(stored)):
        for id, logp in zip(stored.ids_NK[n].tolist(), stored.logp_NK[n].tolist(), strict=True):
            if id >= 0:
                p_NV[n, id] += math.exp(logp)
                has_NV[n, id] = True
    if not stored.has_bucket:
        return p_NV, p_NV, has_NV
    rest_N1 = 1 - p_NV.sum(-1, keepdim=True)
    # The class of all the rest pulls each of its ids by the student's own share in it.
    outside_NV = q_NV * ~has_NV
    pull_NV = p_NV + rest_N1 * outside_NV / outside_NV.sum(-1, keepdim=True)
    uniform_NV = p_NV + rest_N1 * ~has_NV / (~has_NV).sum(-1, keepdim=True)
    return uniform_NV, pull_NV, has_NV


def cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / one.norm() / other.norm())


@pytest.mark.parametrize("name", ["sampled", "topk", "bfloat16", "float32"])
@torch.no_grad()
def test_it_says_what_the_formulas_say(made: Made, name: str) -> None:
    student, teacher, rows = made
    T = student.objective.temperature
    kind: Codec = {"sampled": Sampled(0.05, 258, T), "topk": TopK(6, "float32", 258, T)}.get(
        name, Hidden(name)
    )
    with torch.enable_grad():
        found = certificate(student, teacher, rows, kind, SEED)

    weight_VD = student.model.head.weight_VD.double()
    of_head, of_hidden = ([[], []] for _ in range(2))
    mass, to_stored, from_stored, true_kd, logged_kd = ([] for _ in range(5))
    student.eval()
    for number in range(len(rows)):
        batch = rows.batch([number])
        full_NV = (teacher.model.head(teacher.targets(batch).hidden_NE).double() / T).softmax(-1)  # type: ignore[union-attr]
        hidden_ND = student.hidden_ND(batch).double()
        logq_NV = (hidden_ND @ weight_VD.T / T).log_softmax(-1)
        p_NV, pull_NV, has_NV = estimate(kind, made, number, full_NV, logq_NV.exp())
        for side, target_NV in enumerate((full_NV, pull_NV)):
            by_logits_NV = T * (logq_NV.exp() - target_NV)
            of_head[side].append(by_logits_NV.T @ hidden_ND)
            of_hidden[side].append(by_logits_NV @ weight_VD)
        mass.append((full_NV * has_NV).sum(-1))
        to_stored.append((full_NV * (full_NV / p_NV).log()).sum(-1))
        from_stored.append(torch.special.xlogy(p_NV, p_NV / full_NV).sum(-1))
        entropy_N = -(full_NV * full_NV.log()).sum(-1)
        true_kd.append(T**2 * (-(full_NV * logq_NV).sum(-1) - entropy_N))
        if name == "topk":
            rest_N = 1 - (p_NV * has_NV).sum(-1)
            q_rest_N = (logq_NV.exp() * ~has_NV).sum(-1)
            inside_N = torch.where(has_NV, p_NV * (p_NV.log() - logq_NV), 0.0).sum(-1)
            logged_kd.append(T**2 * (inside_N + rest_N * (rest_N / q_rest_N).log()))
        else:
            logged_kd.append(T**2 * (-(p_NV * logq_NV).sum(-1) - entropy_N))

    full, stored = (torch.stack(side).sum(0) for side in of_head)
    wanted = {
        "positions": sum(map(len, mass)),
        "gradient_cosine": cosine(full, stored),
        "gradient_relative_error": float((full - stored).norm() / full.norm()),
        "hidden_gradient_cosine": cosine(*(torch.cat(side) for side in of_hidden)),
        "captured_mass": float(torch.cat(mass).mean()),
        "true_kd": float(torch.cat(true_kd).mean()),
        "logged_kd": float(torch.cat(logged_kd).mean()),
        ("kl_from_stored" if name == "sampled" else "kl_to_stored"): float(
            torch.cat(from_stored if name == "sampled" else to_stored).mean()
        ),
    }
    assert found.keys() == wanted.keys()
    # A sample's entropy is kept in float16: to 2**-11 of 5.6 nats, T * T times.
    rounding = T**2 * 5.6 * 2**-11 if name == "sampled" else 0
    for figure, value in wanted.items():
        allowed = 2e-5 + (rounding if figure == "logged_kd" else 0)
        assert found[figure] == pytest.approx(value, rel=2e-4, abs=allowed), figure
    if name == "float32":
        assert found["gradient_cosine"] == pytest.approx(1, abs=1e-12)
        assert found["gradient_relative_error"] == 0


def test_it_leaves_the_student_as_it_was(made: Made) -> None:
    student, teacher, rows = made
    before = student.weights_sha256()
    for training in (True, False):
        student.train(training)
        certificate(student, teacher, rows, TopK(3, "float16", 258, student.objective.temperature), SEED)
        assert student.training is training and student.weights_sha256() == before
    assert all(parameter.grad is None for parameter in student.parameters())


def test_more_bytes_are_a_better_certificate(made: Made) -> None:
    student, teacher, rows = made
    T = student.objective.temperature
    for kinds in (
        [Sampled(threshold, 258, T) for threshold in (0.3, 0.05, 0.005)],
        [TopK(k, "float32", 258, T) for k in (2, 20, 200)],
        [Hidden("int8"), Hidden("bfloat16"), Hidden("float32")],
    ):
        errors = [
            certificate(student, teacher, rows, kind, SEED)["gradient_relative_error"] for kind in kinds
        ]
        assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
