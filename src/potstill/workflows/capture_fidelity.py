"""How far a store's targets are from the teacher's full distributions, measured and not assumed.

On held-out rows, which no training sees, the targets are encoded, decoded and compared with the full ones by
what a training makes of them: the gradient of the KD term for the recipe's own student.

gradient_cosine, gradient_relative_error
    between the gradients of the student's head weights, summed over all positions as a step sums them: noise
    averages out over a step's positions, bias does not
hidden_gradient_cosine
    between the gradients of the student's final hidden states, where nothing averages
captured_mass      probability of the ids that are kept or drawn, on average; 1 for hidden states
kl_to_stored       KL(full || stored), nats; the rest of top-k taken as uniform. Not for samples, which
                   give most ids no probability in any one draw
kl_from_stored     KL(stored || full), nats, for samples alone
true_kd, logged_kd the KD term with the full distributions, and what a run from the store would log
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from potstill.losses.divergences import forward_kl
from potstill.losses.targets import SparseTargets
from potstill.models.student import Student
from potstill.store.codecs import Codec
from potstill.teachers.capture_rows import captured
from potstill.types import Rows, Targets, Teacher


def certificate(student: Student, teacher: Teacher, rows: Rows, codec: Codec, seed: int) -> dict[str, Any]:
    """Row by row over `rows`; the student is as it is, and left so."""
    assert teacher.model is not None
    objective = replace(student.objective, kd_weight=1.0, ce_weight=0.0)
    of_head = [torch.zeros_like(student.model.head.weight_VD, dtype=torch.float32) for _ in range(2)]
    sums: dict[str, float] = defaultdict(float)
    was_training = student.training
    student.eval()
    for number in range(len(rows)):
        batch = rows.batch([number]).to(student.model.device)
        (one,) = captured(teacher, rows, [number], codec, seed, 1)
        stored = codec.decode(one.kept, teacher.model.head)
        if isinstance(stored, SparseTargets):
            stored = stored.to(student.model.device)
        pair = teacher.targets(batch), stored
        with torch.no_grad():
            hidden_ND = student.hidden_ND(batch)
        of_hidden = []
        for targets, grad_VD, name in zip(pair, of_head, ("true_kd", "logged_kd"), strict=True):
            leaf_ND = hidden_ND.detach().requires_grad_()
            head = student.model.head
            head = replace(head, weight_VD=head.weight_VD.detach().requires_grad_())
            terms = objective(leaf_ND, head, batch.labels_N, targets)
            torch.autograd.backward(terms["loss"])
            assert leaf_ND.grad is not None and head.weight_VD.grad is not None
            grad_VD += head.weight_VD.grad
            of_hidden.append(leaf_ND.grad)
            sums[name] += float(terms["kd"])
        found = _compared(*pair, student.objective.temperature, head.num_ids) | _dots("hidden", *of_hidden)
        for name, value in found.items():
            sums[name] += value
        sums["positions"] += len(batch.labels_N)
    student.train(was_training)
    sums |= _dots("head", *of_head)
    names = ("true_kd", "logged_kd", "captured_mass", "kl_to_stored", "kl_from_stored")
    means = {name: sums[name] / sums["positions"] for name in names if name in sums}
    return {
        "positions": int(sums["positions"]),
        "gradient_cosine": _cosine("head", sums),
        "gradient_relative_error": math.sqrt(sums["head_apart"] / max(sums["head_full"], 1e-300)),
        "hidden_gradient_cosine": _cosine("hidden", sums),
        **means,
    }


def _dots(name: str, full: Tensor, stored: Tensor) -> dict[str, float]:
    full, stored = full.double().flatten(), stored.double().flatten()
    return {
        f"{name}_full": float(full @ full),
        f"{name}_stored": float(stored @ stored),
        f"{name}_both": float(full @ stored),
        f"{name}_apart": float((full - stored) @ (full - stored)),
    }


def _cosine(name: str, sums: dict[str, float]) -> float:
    return sums[f"{name}_both"] / max(math.sqrt(sums[f"{name}_full"] * sums[f"{name}_stored"]), 1e-300)


@torch.no_grad()
def _compared(full: Targets, stored: Targets, temperature: float, num_ids: int) -> dict[str, float]:
    """Sums over positions, a few at a time."""
    sums: dict[str, float] = defaultdict(float)
    for start in range(0, len(full), 64):
        part = slice(start, start + 64)
        shape = (len(full[part]), num_ids)
        nothing_NV = torch.zeros(shape, device=full.head.weight_VD.device)  # type: ignore[attr-defined]
        _, full_NV = full[part].on_support(nothing_NV, temperature)
        some = stored[part]
        if not isinstance(some, SparseTargets):
            _, stored_NV = some.on_support(nothing_NV, temperature)
            sums["kl_to_stored"] += float(forward_kl(stored_NV, full_NV).sum())
            sums["captured_mass"] += shape[0]
            continue
        ids_NK = some.ids_NK
        is_id_NK = ids_NK >= 0
        kept_NV = torch.zeros_like(full_NV).scatter_add_(-1, ids_NK.clamp_min(0), is_id_NK.float()) > 0
        sums["captured_mass"] += float(full_NV.exp()[kept_NV].sum())
        p_NK = some.logp_NK.exp()
        if some.has_bucket:
            rest_N = (1 - p_NK.sum(-1)).clamp_min(1e-12) / (num_ids - ids_NK.shape[1] or 1)
            stored_NV = rest_N.log()[:, None].expand_as(full_NV).scatter(-1, ids_NK, p_NK.log())
            sums["kl_to_stored"] += float(forward_kl(stored_NV, full_NV).sum())
        else:
            estimate_NV = torch.zeros_like(full_NV).scatter_add_(-1, ids_NK.clamp_min(0), p_NK)
            sums["kl_from_stored"] += float(forward_kl(full_NV, estimate_NV.log()).sum())
    return dict(sums)
