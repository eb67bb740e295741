"""What layers that were left out did, folded by least squares into the MLP of the layer before them.

Layer p is kept and the next ones are not, up to q. With m_n the inputs of the matrix W out of that MLP, the student's
stream behind layer p is y_n = a_n + W m_n, and should be what the teacher's is before layer q: h_n. Of r_n = h_n - y_n

    dW = argmin  sum_n |r_n - dW m_n|^2 / |h_n|^2  +  ridge |dW|^2          W becomes W + dW

makes up for what those activations can, in closed form, from a sum of C x C numbers. No weight is added. A position
counts by 1 / |h_n|^2, since whatever reads the stream normalises it; the first tokens of a row have streams that are
many times as long, and attention rests on them.

ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819) fits a map of W m_n on the teacher's own streams. Here y is the
student's, gap by gap from the bottom, so that a fit also makes up for what the ones below have left over. It is kept
where it lowers KL(teacher || student) on rows that it was not fitted on, else the weights stay as they were.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.errors import UserError
from potstill.models.causal_lm import CausalLM
from potstill.models.layer_harm import calibration, summed_kl, whole_logp_NV
from potstill.models.matrix_inputs import by_output
from potstill.models.probes import hidden_of
from potstill.models.pruning import matrix_out
from potstill.models.refit import Refit, tokens_BT
from potstill.models.skipping import beside, skipping
from potstill.types import Batch

RIDGES = (1.0, 10.0)
"""The second is tried where the first does not lower the KL; in units of the mean of the diagonal of the sum that is
inverted.
"""


REFITS = ("refit_heads", "refit", "refit_norms", "refit_stream")
NO_GAP = "no layer was left out behind a kept one"
LINEAR = 1e-3
"""Of the largest value: what rounding may make of a sum that is linear."""


@dataclass(frozen=True)
class Fold:
    """What was done about one gap."""

    layer: int
    """Of the teacher: the kept layer before the gap."""
    left_out: list[int]
    kl_before: float
    """KL(teacher || student) on the rows that judge, nats per position."""
    kl_after: float
    ridge: float | None
    """None: neither lowers the KL, so that the weights are as they were."""


@dataclass(frozen=True)
class Repair:
    """What was done about every gap, and the matrices that changed."""

    folds: list[Fold]
    weights: dict[str, Tensor]
    """By their names in the student, float32 on the CPU."""
    why_not: str | None = None
    """Why no gap was tried."""
    refit: Refit | None = None
    """What was done about channels that were left out; None where none were."""
    refit_heads: Refit | None = None
    """The same, of attention heads."""
    refit_norms: Refit | None = None
    """The same, of channels of the residual stream, by a factor on each norm."""
    refit_stream: Refit | None = None
    """The same, by the matrices that read it."""

    @property
    def has_changed(self) -> bool:
        steps = (self.refit_heads, self.refit, *self.folds, self.refit_norms, self.refit_stream)
        return any(step is not None and step.ridge is not None for step in steps)

    @torch.no_grad()
    def apply(self, student: CausalLM) -> None:
        """Give the student the weights: one with the whole residual stream those that were fitted there, and once it is
        narrow the others. One that does not fit is of another student, and is left out: whoever resumes compares the
        student's hash.
        """
        parameters = dict(student.hf.named_parameters())
        for name, weight in self.weights.items():
            if name in parameters and parameters[name].shape == weight.shape:
                parameters[name].copy_(weight)

    @classmethod
    def of(cls, table: dict[str, Any], weights: dict[str, Tensor]) -> Repair:
        """From `as_dict` and the matrices."""
        refits = {name: Refit(**table[name]) for name in REFITS if table.get(name) is not None}
        return cls([Fold(**fold) for fold in table["folds"]], weights, table["why_not"], **refits)

    def as_dict(self) -> dict[str, Any]:
        """For machines, without the matrices."""
        refits = {name: asdict(refit) for name in REFITS if (refit := getattr(self, name)) is not None}
        return {"folds": [asdict(fold) for fold in self.folds], "why_not": self.why_not} | refits


def fold_gaps(
    teacher: CausalLM,
    student: CausalLM,
    stack: str,
    keep: Sequence[int],
    fitted: Sequence[Batch],
    judged: Sequence[Batch],
    note: Callable[[str], None],
) -> Repair:
    """Fit a student that was just cut; it is left as it was: see `Repair.apply`.

    Args:
        stack: name of the list of layers, in both.
        keep: numbers of the teacher's layers, in the student's order.
        fitted: training rows for the least squares.
        judged: other training rows, for the KL.
        note: called with one line for each gap.
    """
    gaps = [
        (place, p, q)
        for place, (p, q) in enumerate(itertools.pairwise([*keep, len(_layers(teacher, stack))]))
        if q > p + 1
    ]
    if not gaps:
        return Repair([], {}, NO_GAP)
    if not any(len(batch.positions_N) for batch in judged):
        return Repair([], {}, "too few training rows")
    names = _matrices_out(student, stack, [place for place, _, _ in gaps])
    gaps = [gap for gap in gaps if gap[0] in names]
    if not gaps:
        return Repair([], {}, f"the MLPs of {type(student.hf).__name__} are of a kind that is not known here")
    folds, weights = [], {}
    with _as_it_was(student.hf, [f"{name}.weight" for name in names.values()]), torch.no_grad():
        folding = _Folding(teacher, student, stack, fitted, judged, [q - 1 for _, _, q in gaps])
        if not folding.is_added(gaps[0][0], names[gaps[0][0]]):
            return Repair([], {}, "its layers do not add what their MLPs give to the stream as it is")
        for place, p, q in gaps:
            before = folding.kl
            ridge = folding.fold(place, names[place], q - 1)
            if ridge is not None:
                weight = student.hf.get_parameter(f"{names[place]}.weight")
                weights[f"{names[place]}.weight"] = weight.detach().cpu().clone()
            folds.append(Fold(p, [*range(p + 1, q)], before, folding.kl, ridge))
            layers = f"layer {p + 1}" if q == p + 2 else f"layers {p + 1} to {q - 1}"
            what = "left as it is" if ridge is None else f"made up for by layer {p}"
            note(f"student: the gap of {layers} is {what}: KL {before:.3f} -> {folding.kl:.3f}")
    return Repair(folds, weights)


class _Folding:
    """A student on its way up the gaps, with the streams behind the highest layer that is settled."""

    def __init__(
        self,
        teacher: CausalLM,
        student: CausalLM,
        stack: str,
        fitted: Sequence[Batch],
        judged: Sequence[Batch],
        numbers: Sequence[int],
    ) -> None:
        self.student, self.layers, self.count = student, _layers(student, stack), len(fitted)
        self.batches = [calibration(batch).to(student.device) for batch in (*fitted, *judged)]
        self.settled = -1
        """Number of the highest layer of the student whose streams are known."""
        self.known: list[Tensor] = []
        """hidden_BTD behind it, of each batch."""
        layers = _layers(teacher, stack)
        self.targets = [_behind(teacher, {n: layers[n] for n in numbers}, each) for each in self.batches]
        self.judge = [(each, whole_logp_NV(teacher, each)) for each in self.batches[self.count :]]
        self.kl = self._kl([None] * len(judged))

    def is_added(self, place: int, name: str) -> bool:
        """Whether what the matrix `name` gives goes into the stream as it is: Gemma 2 and 3 normalise it first."""
        module: Any = self.student.hf.get_submodule(name)
        y_BTD, m_BTC = self._run_to(place, module, 0, self.batches[0])
        change_DC = by_output(module, module.weight).clone()
        module.weight *= 2
        twice_BTD, _ = self._run_to(place, module, 0, self.batches[0])
        module.weight /= 2  # exactly what it was
        added_BTD = m_BTC @ change_DC.T
        gap = float((twice_BTD - y_BTD - added_BTD).abs().max())
        # What MLPs add is small beside some streams, whose difference has the rounding of them both.
        rounding = 8 * torch.finfo(y_BTD.dtype).eps * float(y_BTD.abs().max())
        return gap <= LINEAR * float(added_BTD.abs().max()) + rounding

    def fold(self, place: int, name: str, target: int) -> float | None:
        """Fold what the teacher's layers up to `target` add into the matrix `name` of layer `place`.

        Returns:
            The ridge that lowers the KL; None where none does.
        """
        module: Any = self.student.hf.get_submodule(name)
        runs = [self._run_to(place, module, number, batch) for number, batch in enumerate(self.batches)]
        streams, inputs = [y_BTD for y_BTD, _ in runs], [m_BTC for _, m_BTC in runs]
        self.settled, self.known, kept = place, streams, None
        for ridge, change_DC in self._changes(target, streams, inputs):
            moved = [y + m @ change_DC.T for y, m in zip(streams, inputs, strict=True)]
            if (kl := self._kl(moved[self.count :], place)) < self.kl:
                module.weight += by_output(module, change_DC)
                self.kl, self.known, kept = kl, moved, ridge
                break
        return kept

    def _changes(
        self, target: int, streams_BTD: list[Tensor], inputs_BTC: list[Tensor]
    ) -> Iterator[tuple[float, Tensor]]:
        """dW for each ridge, fitted on the tokens of the first `count` batches."""
        D, C = streams_BTD[0].shape[-1], inputs_BTC[0].shape[-1]
        inner_CC = streams_BTD[0].new_zeros(C, C, dtype=torch.float64)
        outer_CD = streams_BTD[0].new_zeros(C, D, dtype=torch.float64)
        for number, batch in enumerate(self.batches[: self.count]):
            is_token_N = tokens_BT(batch).flatten()
            h_ND, y_ND, m_NC = (
                tensor.flatten(0, 1)[is_token_N].double()
                for tensor in (self.targets[number][target], streams_BTD[number], inputs_BTC[number])
            )
            weight_N1 = 1 / h_ND.norm(dim=-1, keepdim=True).clamp_min(1e-6)
            m_NC *= weight_N1
            inner_CC += m_NC.T @ m_NC
            outer_CD += m_NC.T @ ((h_ND - y_ND) * weight_N1)
        scale = inner_CC.diagonal().mean()
        if not scale > 0:  # this MLP does nothing
            return
        for ridge in RIDGES:
            ridged_CC = inner_CC.clone()
            ridged_CC.diagonal().add_(ridge * scale)
            factor_CC = torch.linalg.cholesky(ridged_CC)
            yield ridge, torch.cholesky_solve(outer_CD, factor_CC).T.float()

    def _run_to(self, place: int, module: Any, number: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """hidden_BTD behind layer `place`, and the input of a module in it."""
        found: dict[str, Tensor] = {}

        def stop(layer: Any, args: Any, output: Any) -> None:
            found["y"], self.beside = hidden_of(output), beside(output)
            raise _Reached

        hooks = [
            module.register_forward_pre_hook(lambda _, args: found.update(m=args[0])),
            self.layers[place].register_forward_hook(stop),
        ]
        try:
            known_BTD = self.known[number] if self.known else None
            with self._from(self.settled, known_BTD), contextlib.suppress(_Reached):
                self.student.hidden(batch.input_ids_BT, batch.position_ids_BT)
        finally:
            for hook in hooks:
                hook.remove()
        return found["y"], found["m"]

    def _from(self, place: int, stream_BTD: Tensor | None) -> contextlib.AbstractContextManager[None]:
        """The student from behind layer `place` on, where the stream is this; None: from its beginning."""
        if stream_BTD is None:
            return contextlib.nullcontext()
        return skipping(self.layers, place, stream_BTD, self.beside)

    def _kl(self, streams_BTD: Sequence[Tensor | None], place: int = -1) -> float:
        """Nats per position of the batches that judge, where the streams behind layer `place` are these."""
        total, positions = 0.0, 0
        for (batch, logp_NV), stream_BTD in zip(self.judge, streams_BTD, strict=True):
            with self._from(place, stream_BTD):
                total += summed_kl(self.student, batch, logp_NV)
            positions += len(batch.positions_N)
        return total / positions


@contextlib.contextmanager
def _as_it_was(hf: Any, names: Sequence[str]) -> Iterator[None]:
    """Inside the block a model drops nothing out; after it, these weights are what they were before."""
    was_training, weights = hf.training, {name: hf.get_parameter(name).detach().clone() for name in names}
    hf.eval()
    try:
        yield
    finally:
        hf.train(was_training)
        with torch.no_grad():
            for name, weight in weights.items():
                hf.get_parameter(name).copy_(weight)


def _matrices_out(student: CausalLM, stack: str, places: Sequence[int]) -> dict[int, str]:
    """By layer, the name of the matrix out of its MLP; without the layers whose MLP is of no known kind."""
    state, found = student.state(), {}
    for place in places:
        name = f"{stack}.{place}.mlp"
        with contextlib.suppress(UserError):
            found[place] = matrix_out(state, name)
    return found


class _Reached(Exception):
    """The layer that was wanted has run; the others need not."""


def _layers(model: CausalLM, stack: str) -> list[Any]:
    layers: Any = model.hf.get_submodule(stack)
    return [*layers]


def _behind(model: CausalLM, layers: dict[int, Any], batch: Batch) -> dict[int, Tensor]:
    """hidden_BTD that these layers give, by their numbers, in float32."""
    found: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, args, output, number=number: found.update({number: hidden_of(output).float()})
        )
        for number, layer in layers.items()
    ]
    try:
        model.hidden(batch.input_ids_BT, batch.position_ids_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return found
