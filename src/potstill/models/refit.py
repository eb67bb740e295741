"""What channels of an MLP that were left out gave, made up for by the kept ones: least squares, before training.

Of a layer, m_n are the activations before the matrix W out of its MLP, K the channels that are kept, h_n the stream
behind the layer. The student's matrix becomes

    argmin over V of  sum_n |W m_n - V m_n[K]|^2 / |h_n|^2  +  ridge |V - W[:, K]|^2

on the teacher's own activations, for all layers, in closed form from sums of K x K numbers: activations of channels go
together, so that the kept ones know much of the others. A position counts by 1 / |h_n|^2, as in `models.repair`. It is
kept where it lowers KL(teacher || student) on rows that it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.models.causal_lm import CausalLM
from potstill.models.layer_harm import calibration, summed_kl, whole_logp_NV
from potstill.models.probes import hidden_of
from potstill.models.pruning import by_output, ffn_width_of, matrix_out
from potstill.types import Batch

RIDGES = (0.1, 1.0)
"""In units of the mean of the diagonal of the sum that is inverted; the one of the lower KL is taken."""
SUMS_BYTES = 2**30
"""Of the sums that exist at once: layers are read in as many passes as that takes."""


@dataclass(frozen=True)
class Refit:
    """What was done about the channels that were left out of all layers."""

    kl_before: float
    """KL(teacher || student) on the rows that judge, nats per position."""
    kl_after: float
    ridge: float | None
    """None: none lowers the KL, so that the weights are as they were."""


@torch.no_grad()
def refit_channels(
    teacher: CausalLM,
    student: CausalLM,
    stack: str,
    channels: Mapping[int, Tensor],
    fitted: Sequence[Batch],
    judged: Sequence[Batch],
) -> tuple[Refit, dict[str, Tensor]]:
    """Fit a student that was just cut; it is left as it was.

    Args:
        stack: name of the list of layers, in both.
        channels: keep_K of each layer that the student has, by the teacher's number, rising.
        fitted: training rows for the least squares.
        judged: other training rows, for the KL.

    Returns:
        What is won, and the matrices that it takes, by their names in the student, float32 on the CPU.
    """
    fitted, judged = ([calibration(batch).to(student.device) for batch in part] for part in (fitted, judged))
    judge = [(batch, whole_logp_NV(teacher, batch)) for batch in judged]
    state = student.state()
    names = {n: f"{matrix_out(state, f'{stack}.{place}.mlp')}.weight" for place, n in enumerate(channels)}
    before = {name: student.hf.get_parameter(name).detach().clone() for name in names.values()}
    was_training = student.hf.training
    student.hf.eval()
    fits: dict[float, dict[str, Tensor]] = {ridge: {} for ridge in RIDGES}
    for number, sums in _sums(teacher, stack, channels, fitted):
        name = names[number]
        module = student.hf.get_submodule(name.removesuffix(".weight"))
        for ridge, change_DK in _changes(sums):
            fits[ridge][name] = (before[name] + by_output(module, change_DK).to(before[name])).cpu()
    try:
        best = start = _kl(student, judge)
        chosen: float | None = None
        for ridge, by_name in fits.items():
            set_weights(student, before | by_name)
            if (kl := _kl(student, judge)) < best:
                best, chosen = kl, ridge
    finally:
        set_weights(student, before)
        student.hf.train(was_training)
    return Refit(start, best, chosen), {} if chosen is None else fits[chosen]


@torch.no_grad()
def set_weights(student: CausalLM, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        student.hf.get_parameter(name).copy_(weight)


def _kl(student: CausalLM, judge: Sequence[tuple[Batch, Tensor]]) -> float:
    """Nats per position."""
    positions = sum(len(batch.positions_N) for batch, _ in judge)
    return sum(summed_kl(student, batch, logp_NV) for batch, logp_NV in judge) / positions


def _sums(
    teacher: CausalLM, stack: str, channels: Mapping[int, Tensor], batches: Sequence[Batch]
) -> Iterator[tuple[int, _LayerSums]]:
    """Of each layer, over the tokens of all batches."""
    layers: Any = teacher.hf.get_submodule(stack)
    state = dict(teacher.hf.state_dict())
    matrices = {n: teacher.hf.get_submodule(matrix_out(state, f"{stack}.{n}.mlp")) for n in channels}
    width = teacher.head.weight_VD.shape[1]
    # The kept activations with each other, what they have to do with the stream, and the columns of the others.
    kept = max(map(len, channels.values()))
    largest = 8 * (kept * (kept + width) + width * (ffn_width_of(teacher.hf.config) - kept))
    at_once, numbers = max(SUMS_BYTES // largest, 1), [*channels]
    for first in range(0, len(numbers), at_once):
        part = {n: _LayerSums(matrices[n], layers[n], channels[n]) for n in numbers[first : first + at_once]}
        try:
            for batch in batches:
                for each in part.values():
                    each.is_token_N = tokens_BT(batch).flatten()
                teacher.hidden(batch.input_ids_BT, batch.position_ids_BT)
        finally:
            for each in part.values():
                each.remove()
        yield from part.items()


class _LayerSums:
    """Of one layer of the teacher: inner_KK of the kept activations, outer_KD of them and of what the others give, both
    in float64. Its hooks add the tokens of each forward.
    """

    def __init__(self, matrix: Any, layer: Any, keep_K: Tensor) -> None:
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
    """What each ridge adds to the matrix of the kept channels, float32."""
    scale = sums.inner_KK.diagonal().mean()
    if not scale > 0:  # this MLP does nothing
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
