"""What channels of the residual stream that were left out gave, made up for by the kept ones, before training.

First a factor on each norm: over fewer channels it divides by another number. Then the matrices that read what a norm
gives: with x_n what the norm of the whole model gives and m_n what the narrow one's gives of the kept channels of the
same stream, K those channels, such a matrix W becomes

    argmin over V of  sum_n |W x_n - V m_n|^2  +  ridge |V - W[:, K]|^2

in closed form, for all layers, from sums of K x K and K x D numbers. Each of the two is kept where it lowers
KL(teacher || student) on rows that it was not fitted on. Matrices that write to the stream stay as they are: what they
add to one channel has nothing to do with the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from potstill.models.causal_lm import CausalLM
from potstill.models.layer_harm import calibration, whole_logp_NV
from potstill.models.refit import RIDGES, SUMS_BYTES, Refit, kl_of, set_weights, tokens_BT
from potstill.models.stream_config import stream_dims
from potstill.models.stream_width import hooked, norms_of, scale_norm
from potstill.types import Batch

AS_IT_IS = 0.0
"""In the place of a ridge, of what was kept and has none."""


@torch.no_grad()
def refit_stream(
    teacher: CausalLM,
    whole: CausalLM,
    student: CausalLM,
    keep_K: Tensor,
    fitted: Sequence[Batch],
    judged: Sequence[Batch],
    note: Callable[[str], None],
) -> tuple[Refit, Refit, dict[str, Tensor]]:
    """Fit a student whose residual stream was just narrowed; it is left as it was.

    Args:
        whole: the student before that.
        keep_K: channels that are kept.
        fitted: training rows for the least squares.
        judged: other training rows, for the KL.
        note: called with one line for each step.

    Returns:
        What is won by the norms and by the matrices, and the weights that it takes, by their names, float32 on the CPU.
    """
    fitted, judged = ([calibration(batch).to(student.device) for batch in part] for part in (fitted, judged))
    judge = [(batch, whole_logp_NV(teacher, batch)) for batch in judged]
    were_training = whole.training, student.training
    whole.eval(), student.eval()
    before = {name: weight.detach().clone() for name, weight in student.hf.named_parameters()}
    try:
        stream = _Stream(whole, student, keep_K, fitted)
        norms = _refit_norms(stream, judge)
        matrices = _refit_matrices(stream, judge, before)
        changed = {
            name: weight.detach().cpu().clone()
            for name, weight in student.hf.named_parameters()
            if not torch.equal(weight, before[name])
        }
    finally:
        set_weights(student, before)
        whole.train(were_training[0]), student.train(were_training[1])
    for what, refit in (("norms", norms), ("matrices that read it", matrices)):
        done = "are left as they are" if refit.ridge is None else "make up for its other channels"
        note(
            f"student: of the residual stream, {what} {done}: KL {refit.kl_before:.3f} -> {refit.kl_after:.3f}"
        )
    return norms, matrices, changed


class _Stream:
    """The norms of both models, and what the whole one's are given."""

    def __init__(self, whole: CausalLM, student: CausalLM, keep_K: Tensor, batches: Sequence[Batch]) -> None:
        self.whole, self.student, self.keep_K = whole, student, keep_K.to(whole.device)
        self.batches = batches
        self.dims = stream_dims(whole.hf.config, student.hf.config)
        self.norms, self.own = norms_of(whole.hf, self.dims), norms_of(student.hf, self.dims)
        self.narrow = copy.deepcopy(self.own)
        """The student's, without what the last one makes up for in a head that is tied to scaled embeddings."""
        for name, norm in self.narrow.items():
            for which, weight_K in norm.named_parameters(recurse=False):
                weight_K.copy_(self.norms[name].get_parameter(which)[self.keep_K])

    def scale(self, factors: Mapping[str, float]) -> None:
        """Multiply what each of the student's norms gives."""
        for name, factor in factors.items():
            scale_norm(self.own[name], factor)
            scale_norm(self.narrow[name], factor)

    def run(self, names: Sequence[str], see: Callable[[str, Tensor, Tensor], None]) -> None:
        """Read all rows; `see` gets a norm's name, what the whole one gives at each token, and what the narrow one
        gives of the same stream.
        """

        def hook(
            is_token_N: Tensor, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor
        ) -> None:
            given = self.narrow[name](args[0][..., self.keep_K])
            see(name, *(of.flatten(0, -2)[is_token_N] for of in (output, given)))

        norms = {name: self.norms[name] for name in names}
        for batch in self.batches:
            with hooked(norms, partial(hook, tokens_BT(batch).flatten())):
                self.whole.hidden(batch.input_ids_BT, batch.position_ids_BT)

    def readers(self) -> dict[str, list[str]]:
        """Names of the matrices that read what a norm gives, by the norm's name; a tied head is none of them."""
        given: dict[int, tuple[str, Tensor]] = {}  # by address: a head reads a view
        found: dict[str, list[str]] = {}

        def give(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            given[output.data_ptr()] = name, output  # kept, so that its address stays its own

        def read(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            if (norm := given.get(args[0].data_ptr())) is not None:
                found.setdefault(norm[0], []).append(name)

        embedding = self.student.hf.get_input_embeddings().weight
        matrices = {
            name: module
            for name, module in self.whole.hf.named_modules()
            if isinstance(module, nn.Linear)
            and self.dims.get(f"{name}.weight") == 1
            and self.student.hf.get_parameter(f"{name}.weight") is not embedding
        }
        with hooked(self.norms, give), hooked(matrices, read):
            self.whole.hf(input_ids=self.batches[0].input_ids_BT[:1, :2], use_cache=False)
        return found


def _refit_norms(stream: _Stream, judge: Sequence[tuple[Batch, Tensor]]) -> Refit:
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in stream.norms}

    def see(name: str, wanted_ND: Tensor, given_NK: Tensor) -> None:
        bias_D = getattr(stream.norms[name], "bias", None)
        bias_K = 0.0 if bias_D is None else bias_D[stream.keep_K]  # has no part in what a factor changes
        wanted_NK, given_NK = ((of - bias_K).double() for of in (wanted_ND[:, stream.keep_K], given_NK))
        sums[name] += torch.stack([(wanted_NK * given_NK).sum(), (given_NK**2).sum()]).cpu()

    stream.run([*stream.norms], see)
    start = kl_of(stream.student, judge)
    factors = {name: float(wanted / given) for name, (wanted, given) in sums.items() if wanted > 0}
    before = {f"{name}.weight": norm.weight.clone() for name, norm in stream.own.items()}
    stream.scale(factors)
    if (kl := kl_of(stream.student, judge)) < start:
        return Refit(start, kl, AS_IT_IS)
    stream.scale({name: 1 / factor for name, factor in factors.items()})
    set_weights(stream.student, before)  # to the bit
    return Refit(start, start, None)


def _refit_matrices(
    stream: _Stream, judge: Sequence[tuple[Batch, Tensor]], cut: Mapping[str, Tensor]
) -> Refit:
    readers = stream.readers()
    names = [f"{name}.weight" for of in readers.values() for name in of]
    before = {name: cut[name] for name in names}
    fits: dict[float, dict[str, Tensor]] = {ridge: {} for ridge in RIDGES}
    for norm, inner_KK, outer_KD in _sums(stream, [*readers]):
        for ridge, factor_KK in _factors(inner_KK):
            for name in (f"{each}.weight" for each in readers[norm]):
                whole_RD, narrow_RK = (
                    weight.double() for weight in (stream.whole.hf.get_parameter(name), before[name])
                )
                left_KR = outer_KD @ whole_RD.T - inner_KK @ narrow_RK.T
                change_RK = torch.cholesky_solve(left_KR, factor_KK).T
                fits[ridge][name] = (before[name] + change_RK.to(before[name])).cpu()
    best = start = kl_of(stream.student, judge)
    chosen: float | None = None
    for ridge, by_name in fits.items():
        set_weights(stream.student, before | by_name)
        if (kl := kl_of(stream.student, judge)) < best:
            best, chosen = kl, ridge
    set_weights(stream.student, before | ({} if chosen is None else fits[chosen]))
    return Refit(start, best, chosen)


def _sums(stream: _Stream, norms: Sequence[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """inner_KK of what the narrow norm gives and outer_KD of it with what the whole one gives, both in float64."""
    D, K = stream.whole.hf.config.get_text_config().hidden_size, len(stream.keep_K)
    at_once = max(SUMS_BYTES // (8 * K * (K + D)), 1)
    for first in range(0, len(norms), at_once):
        part = norms[first : first + at_once]
        sums: dict[str, tuple[Tensor, Tensor]] = {
            name: (
                torch.zeros(K, K, dtype=torch.float64, device=stream.whole.device),
                torch.zeros(K, D, dtype=torch.float64, device=stream.whole.device),
            )
            for name in part
        }

        def see(name: str, wanted_ND: Tensor, given_NK: Tensor, sums: Mapping[str, Any] = sums) -> None:
            m_NK = given_NK.double()
            inner_KK, outer_KD = sums[name]
            inner_KK += m_NK.T @ m_NK
            outer_KD += m_NK.T @ wanted_ND.double()

        stream.run(part, see)
        for name, (inner_KK, outer_KD) in sums.items():
            yield name, inner_KK, outer_KD


def _factors(inner_KK: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Of each ridge, the Cholesky factor of the sum with it; none of a norm that gives nothing."""
    scale = inner_KK.diagonal().mean()
    for ridge in RIDGES if scale > 0 else ():
        ridged_KK = inner_KK.clone()
        ridged_KK.diagonal().add_(ridge * scale)
        factor_KK, failed = torch.linalg.cholesky_ex(ridged_KK)
        if not failed:
            yield ridge, factor_KK
