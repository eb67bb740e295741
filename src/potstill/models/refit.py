"""What channels of an MLP and attention heads that were left out gave, made up for by the kept ones: least squares,
before training.

Of a layer, m_n are the inputs of the matrix W out of its MLP or of its attention, K those that are kept, h_n the stream
behind the layer. The student's matrix becomes

    argmin over V of  sum_n |W m_n - V m_n[K]|^2 / |h_n|^2  +  ridge |V - W[:, K]|^2

on the teacher's own activations, for all layers, in closed form from sums of K x K numbers: activations of channels go
together, so that the kept ones know much of the others; what heads give does, too. A position counts by 1 / |h_n|^2, as
in `models.repair`. It is kept where it lowers KL(teacher || student) on rows that it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.models.causal_lm import CausalLM
from potstill.models.heads import attention_of, heads_of
from potstill.models.layer_harm import calibration, summed_kl, whole_logp_NV
from potstill.models.matrix_inputs import by_output
from potstill.models.probes import hidden_of
from potstill.models.pruning import matrix_out
from potstill.types import Batch

RIDGES = (0.1, 1.0)
"""In units of the mean of the diagonal of the sum that is inverted; the one of the lower KL is taken."""
SUMS_BYTES = 2**30
"""Of the sums that exist at once: layers are read in as many passes as that takes."""


@dataclass(frozen=True)
class Refit:
    """What was done about the channels, or the heads, that were left out of all layers."""

    kl_before: float
    """KL(teacher || student) on the rows that judge, nats per position."""
    kl_after: float
    ridge: float | None
    """None: none lowers the KL, so that the weights are as they were."""


def refit_channels(
    teacher: CausalLM,
    student: CausalLM,
    stack: str,
    channels: Mapping[int, Tensor],
    fitted: Sequence[Batch],
    judged: Sequence[Batch],
) -> tuple[Refit, dict[str, Tensor]]:
    """Fit the MLPs of a student that was just cut; it is left as it was.

    Args:
        stack: name of the list of layers, in both.
        channels: keep_K of each layer that the student has, by the teacher's number, rising.
        fitted: training rows for the least squares.
        judged: other training rows, for the KL.

    Returns:
        What is won, and the matrices that it takes, by their names in the student, float32 on the CPU.
    """
    states = dict(teacher.hf.state_dict()), student.state()
    outs = []
    for place, (n, keep_K) in enumerate(channels.items()):
        whole, narrow = (
            matrix_out(state, f"{stack}.{at}.mlp") for state, at in zip(states, (n, place), strict=True)
        )
        outs.append(_Out(f"{stack}.{n}", whole, narrow, keep_K))
    return _refit(teacher, student, outs, fitted, judged)


def refit_heads(
    teacher: CausalLM,
    student: CausalLM,
    stack: str,
    groups: Mapping[int, Tensor],
    fitted: Sequence[Batch],
    judged: Sequence[Batch],
) -> tuple[Refit, dict[str, Tensor]]:
    """As `refit_channels`, for the matrices out of the attentions.

    Args:
        groups: groups_G of each layer that the student has, by the teacher's number, rising.
    """
    states = dict(teacher.hf.state_dict()), student.state()
    heads = [heads_of(model.hf.config) for model in (teacher, student)]
    outs = []
    for place, (n, groups_G) in enumerate(groups.items()):
        whole, narrow = (
            attention_of(state, f"{stack}.{at}", its).out
            for state, its, at in zip(states, heads, (n, place), strict=True)
        )
        outs.append(_Out(f"{stack}.{n}", whole, narrow, heads[0].columns(groups_G)))
    return _refit(teacher, student, outs, fitted, judged)


@dataclass(frozen=True)
class _Out:
    """A matrix of which inputs were left out."""

    layer: str
    """Name of the teacher's layer that has it."""
    teacher: str
    student: str
    """Its name in both."""
    keep_K: Tensor
    """Numbers of the inputs that are kept."""


@torch.no_grad()
def _refit(
    teacher: CausalLM,
    student: CausalLM,
    outs: Sequence[_Out],
    fitted: Sequence[Batch],
    judged: Sequence[Batch],
) -> tuple[Refit, dict[str, Tensor]]:
    fitted, judged = ([calibration(batch).to(student.device) for batch in part] for part in (fitted, judged))
    judge = [(batch, whole_logp_NV(teacher, batch)) for batch in judged]
    names = [f"{out.student}.weight" for out in outs]
    before = {name: student.hf.get_parameter(name).detach().clone() for name in names}
    was_training = student.hf.training
    student.hf.eval()
    fits: dict[float, dict[str, Tensor]] = {ridge: {} for ridge in RIDGES}
    for out, sums in _sums(teacher, outs, fitted):
        name, module = f"{out.student}.weight", student.hf.get_submodule(out.student)
        for ridge, change_DK in _changes(sums):
            fits[ridge][name] = (before[name] + by_output(module, change_DK).to(before[name])).cpu()
    try:
        best = start = kl_of(student, judge)
        chosen: float | None = None
        for ridge, by_name in fits.items():
            set_weights(student, before | by_name)
            if (kl := kl_of(student, judge)) < best:
                best, chosen = kl, ridge
    finally:
        set_weights(student, before)
        student.hf.train(was_training)
    return Refit(start, best, chosen), {} if chosen is None else fits[chosen]


@torch.no_grad()
def set_weights(student: CausalLM, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        student.hf.get_parameter(name).copy_(weight)


def kl_of(student: CausalLM, judge: Sequence[tuple[Batch, Tensor]]) -> float:
    """Nats per position."""
    positions = sum(len(batch.positions_N) for batch, _ in judge)
    return sum(summed_kl(student, batch, logp_NV) for batch, logp_NV in judge) / positions


def _sums(
    teacher: CausalLM, outs: Sequence[_Out], batches: Sequence[Batch]
) -> Iterator[tuple[_Out, _LayerSums]]:
    """Of each matrix, over the tokens of all batches."""
    # The kept inputs with each other, what they have to do with the stream, and the columns of the others.
    matrix: Any = teacher.hf.get_submodule(outs[0].teacher)
    (D, C), K = by_output(matrix, matrix.weight).shape, len(outs[0].keep_K)
    at_once = max(SUMS_BYTES // (8 * (K * (K + D) + D * (C - K))), 1)
    for first in range(0, len(outs), at_once):
        part = [(out, _LayerSums(teacher, out)) for out in outs[first : first + at_once]]
        try:
            for batch in batches:
                for _, each in part:
                    each.is_token_N = tokens_BT(batch).flatten()
                teacher.hidden(batch.input_ids_BT, batch.position_ids_BT)
        finally:
            for _, each in part:
                each.remove()
        yield from part


class _LayerSums:
    """Of one matrix of the teacher: inner_KK of the kept inputs, outer_KD of them and of what the others give, both in
    float64. Its hooks add the tokens of each forward.
    """

    def __init__(self, teacher: CausalLM, out: _Out) -> None:
        matrix: Any = teacher.hf.get_submodule(out.teacher)
        layer, keep_K = teacher.hf.get_submodule(out.layer), out.keep_K
        weight_DC = by_output(matrix, matrix.weight).double()
        D, C = weight_DC.shape
        device = weight_DC.device
        self.keep_K = keep_K.to(device)
        self.is_dropped_C = torch.ones(C, dtype=torch.bool, device=device)
        self.is_dropped_C[self.keep_K] = False
        self.dropped_DC = weight_DC[:, self.is_dropped_C]
        self.is_token_N = torch.ones(0, dtype=torch.bool)
        self.inner_KK = torch.zeros(len(keep_K), len(keep_K), dtype=torch.float64, device=device)
        self.outer_KD = torch.zeros(len(keep_K), D, dtype=torch.float64, device=device)
        self._input_NC = torch.empty(0)
        self._hooks = [matrix.register_forward_pre_hook(self._see), layer.register_forward_hook(self._add)]

    def _see(self, module: Any, args: tuple[Any, ...]) -> None:
        self._input_NC = args[0].flatten(0, -2)

    def _add(self, module: Any, args: Any, output: Any) -> None:
        hidden_ND = hidden_of(output).flatten(0, 1)[self.is_token_N].double()
        m_NC = self._input_NC[self.is_token_N].double()
        m_NC = m_NC / hidden_ND.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        kept_NK = m_NC[:, self.keep_K]
        self.inner_KK += kept_NK.T @ kept_NK
        self.outer_KD += kept_NK.T @ (m_NC[:, self.is_dropped_C] @ self.dropped_DC.T)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _changes(sums: _LayerSums) -> Iterator[tuple[float, Tensor]]:
    """What each ridge adds to the matrix of the kept inputs, float32."""
    scale = sums.inner_KK.diagonal().mean()
    if not scale > 0:  # this part does nothing
        return
    for ridge in RIDGES:
        ridged_KK = sums.inner_KK.clone()
        ridged_KK.diagonal().add_(ridge * scale)
        factor_KK, failed = torch.linalg.cholesky_ex(ridged_KK)
        if not failed:
            yield ridge, torch.cholesky_solve(sums.outer_KD, factor_KK).T.float()


def tokens_BT(batch: Batch) -> Tensor:
    """bool: what is not padding."""
    B, T = batch.input_ids_BT.shape
    device = batch.input_ids_BT.device
    if batch.lengths_B is None:
        return torch.ones(B, T, dtype=torch.bool, device=device)
    return torch.arange(T, device=device) < batch.lengths_B[:, None]
