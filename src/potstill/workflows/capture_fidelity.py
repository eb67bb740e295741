"""The certificate of a store: how well captured targets stand in for the teacher's full distributions.

On held-out rows, which training never sees, targets are encoded, decoded and compared with the full ones by their
effect on training: the gradient of the KD term for the recipe's own student.

gradient_cosine, gradient_relative_error
    between the gradients of the student's head weights, summed over all positions as in a step: noise
    averages out over a step's positions, bias does not
hidden_gradient_cosine
    between the gradients of the student's final hidden states, where nothing averages out
captured_mass      mean probability of the ids kept or sampled; 1 for hidden states
kl_to_stored       KL(full || stored), nats; the mass outside the top k spread evenly. Not for samples: one draw
                   gives most ids no probability, so it would be infinite
kl_from_stored     KL(stored || full), nats, for samples only
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
    """Fidelity of `codec` on `rows`, one row at a time. The student is not changed."""
    if teacher.model is None:
        return _mass_only(teacher, rows, codec, seed)
    objective = replace(student.objective, kd_weight=1.0, ce_weight=0.0)
    head_grads = [torch.zeros_like(student.model.head.weight_VD, dtype=torch.float32) for _ in range(2)]
    sums: dict[str, float] = defaultdict(float)
    was_training = student.training
    student.eval()
    for number in range(len(rows)):
        batch = rows.batch([number]).to(student.model.device)
        (row,) = captured(teacher, rows, [number], codec, seed, 1)
        stored = codec.decode(row.kept, teacher.model.head)
        if isinstance(stored, SparseTargets):
            stored = stored.to(student.model.device)
        pair = teacher.targets(batch), stored
        with torch.no_grad():
            hidden_ND = student.hidden_ND(batch)
        hidden_grads = []
        # The body is left out: its backward is the same linear map of the hidden gradient for both targets.
        for targets, grad_VD, name in zip(pair, head_grads, ("true_kd", "logged_kd"), strict=True):
            leaf_ND = hidden_ND.detach().requires_grad_()
            head = student.model.head
            head = replace(head, weight_VD=head.weight_VD.detach().requires_grad_())
            terms = objective(leaf_ND, head, batch.labels_N, targets)
            torch.autograd.backward(terms["loss"])
            assert leaf_ND.grad is not None and head.weight_VD.grad is not None
            grad_VD += head.weight_VD.grad
            hidden_grads.append(leaf_ND.grad)
            sums[name] += float(terms["kd"])
        row_sums = _divergences(*pair, student.objective.temperature, head.num_ids)
        row_sums |= _dot_products("hidden", *hidden_grads)
        for name, value in row_sums.items():
            sums[name] += value
        sums["positions"] += len(batch.labels_N)
    student.train(was_training)
    sums |= _dot_products("head", *head_grads)
    names = ("true_kd", "logged_kd", "captured_mass", "kl_to_stored", "kl_from_stored")
    means = {name: sums[name] / sums["positions"] for name in names if name in sums}
    return {
        "positions": int(sums["positions"]),
        "gradient_cosine": _cosine("head", sums),
        "gradient_relative_error": math.sqrt(sums["head_difference"] / max(sums["head_full"], 1e-300)),
        "hidden_gradient_cosine": _cosine("hidden", sums),
        **means,
    }


def _mass_only(teacher: Teacher, rows: Rows, codec: Codec, seed: int) -> dict[str, Any]:
    """Of a teacher whose whole distributions nobody here knows: what is kept of them is all that can be measured."""
    mass, positions = 0.0, 0
    for row in captured(teacher, rows, range(len(rows)), codec, seed, 1):
        stored = codec.decode(row.kept, None)
        assert isinstance(stored, SparseTargets)
        mass, positions = mass + float(stored.logp_NK.exp().sum()), positions + len(stored)
    return {"positions": positions, "captured_mass": mass / positions}


def _dot_products(name: str, full: Tensor, stored: Tensor) -> dict[str, float]:
    full, stored = full.double().flatten(), stored.double().flatten()
    return {
        f"{name}_full": float(full @ full),
        f"{name}_stored": float(stored @ stored),
        f"{name}_cross": float(full @ stored),
        f"{name}_difference": float((full - stored) @ (full - stored)),
    }


def _cosine(name: str, sums: dict[str, float]) -> float:
    return sums[f"{name}_cross"] / max(math.sqrt(sums[f"{name}_full"] * sums[f"{name}_stored"]), 1e-300)


@torch.no_grad()
def _divergences(full: Targets, stored: Targets, temperature: float, num_ids: int) -> dict[str, float]:
    """Captured mass and KL, summed over positions; 64 at a time, to bound the memory of V-wide tensors."""
    sums: dict[str, float] = defaultdict(float)
    for start in range(0, len(full), 64):
        part = slice(start, start + 64)
        shape = (len(full[part]), num_ids)
        # `on_support` wants a student's log-probs, too; only the teacher's side is used here.
        unused_NV = torch.zeros(shape, device=full.head.weight_VD.device)  # type: ignore[attr-defined]
        _, full_NV = full[part].on_support(unused_NV, temperature)
        chunk = stored[part]
        if not isinstance(chunk, SparseTargets):
            _, stored_NV = chunk.on_support(unused_NV, temperature)
            sums["kl_to_stored"] += float(forward_kl(stored_NV, full_NV).sum())
            sums["captured_mass"] += shape[0]
            continue
        ids_NK = chunk.ids_NK
        is_id_NK = ids_NK >= 0  # -1 pads a position with fewer ids
        # Added, not assigned: a padding slot, clamped to id 0, must not clear a 0 that was kept.
        kept_NV = torch.zeros_like(full_NV).scatter_add_(-1, ids_NK.clamp_min(0), is_id_NK.float()) > 0
        sums["captured_mass"] += float(full_NV.exp()[kept_NV].sum())
        p_NK = chunk.logp_NK.exp()
        if chunk.has_bucket:
            rest_N = (1 - p_NK.sum(-1)).clamp_min(1e-12) / (num_ids - ids_NK.shape[1] or 1)
            stored_NV = rest_N.log()[:, None].expand_as(full_NV).scatter(-1, ids_NK, p_NK.log())
            sums["kl_to_stored"] += float(forward_kl(stored_NV, full_NV).sum())
        else:
            estimate_NV = torch.zeros_like(full_NV).scatter_add_(-1, ids_NK.clamp_min(0), p_NK)
            sums["kl_from_stored"] += float(forward_kl(full_NV, estimate_NV.log()).sum())
    return dict(sums)
