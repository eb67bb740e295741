"""From hidden states to the sums that the loop divides: CE and KD over N positions, exact, a chunk at a time.

    ce   = sum over positions of -log q_1(label)              q_T = softmax(student logits / T)
    kd   = sum over positions of T^2 D(p_T, q_T)              p_T = softmax(teacher logits / T)
    loss = ce_weight * ce + kd_weight * kd

With V ids, widths D (student) and E (teacher) and C = `chunk`, logits exist for C positions at a time: a few
buffers of C V numbers for both models together, and one gradient each of the head (V D) and of the hidden
states (N D). Nothing of size N V is made. Work is N V (6 D + 2 E) floating-point operations, each product
done once: a chunk's gradient is formed in the forward pass, while its logits are there. It is written out
(`fused`), or, for a divergence of the user's own, autograd takes it back to the chunk's product; the two
products that follow are written out. `backward` only scales what is stored.

Refuses labels that are no ids, counts and vocabularies that differ, and sums that are not finite. `Student`
calls it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.errors import Fault, UserError
from potstill.losses.divergences import forward_kl
from potstill.losses.fused import Weights, is_known, require_same_ids, with_gradient
from potstill.types import Divergence, Head, Targets


@dataclass(frozen=True)
class Objective:
    """What a step minimises; the recipe's `objective` section.

    `matmul_dtype` is what the head's products run in (None: as the tensors are). Softmax, divergence and all
    sums over positions stay in float32, or float64 where the tensors are.
    """

    divergence: Divergence = forward_kl
    kd_weight: float = 0.9
    ce_weight: float = 0.1
    temperature: float = 1.0
    chunk: int = 256
    matmul_dtype: torch.dtype | None = None
    engine: Literal["fused", "reference"] = "fused"
    """`fused` has gradients written out; what it does not know is computed as by `reference`."""
    compiled: bool = False
    """Let torch.compile make few kernels of what is written out, where that gains: see `gains`."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"objective.temperature: is {self.temperature}, must be finite and above 0.")
        for name in ("kd_weight", "ce_weight"):
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"objective.{name}: is {weight}, must be finite and 0 or more.")
        if self.kd_weight == self.ce_weight == 0:
            raise UserError("objective.kd_weight: is 0 and so is objective.ce_weight. One must be above 0.")
        if self.chunk < 1:
            raise UserError(f"objective.chunk: is {self.chunk}, must be 1 or more.")

    def __call__(
        self,
        hidden_ND: Tensor,
        head: Head,
        labels_N: Tensor,
        targets: Targets | None,
        *,
        checked: bool = True,
    ) -> dict[str, Tensor]:
        """Sums over the N positions: `loss` carries the gradient, `ce` and `kd` are for the log.

        `targets` may be None only where kd_weight is 0; `kd` is then absent. Not `checked`, nothing waits for
        the device: labels and sums are then the caller's, for `require_labels` and `require_finite`.
        """
        self._require_fitting(hidden_ND, head, labels_N, targets)
        if checked:
            require_labels(labels_N, head.num_ids)
        tensors = [hidden_ND, head.weight_VD, head.bias_V]
        if not torch.is_grad_enabled():  # a Function cannot tell: inside it, this is always False
            tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
        ce, kd, loss = _SumOverPositions.apply(*tensors, self, head, labels_N, targets)  # type: ignore[no-untyped-call]
        sums = {"ce": ce, "loss": loss} if targets is None else {"ce": ce, "kd": kd, "loss": loss}
        if checked:
            require_finite(_read(sums), len(labels_N))
        return sums

    @torch.no_grad()
    def measure(self, hidden_ND: Tensor, head: Head, labels_N: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Sums over the N positions for a held-out evaluation, without gradients.

        `loss`, `ce`, `kd` as above; `kl` is KL(teacher || student) at temperature 1, `agreement` the number
        of positions where both rank the same id first, `teacher_ce` the teacher's own cross-entropy.
        """
        self._require_fitting(hidden_ND, head, labels_N, targets)
        require_labels(labels_N, head.num_ids)
        _, exact = self._dtypes(hidden_ND, head)
        names = ("ce", "kd", "loss", "kl", "agreement", "teacher_ce")
        sums = {name: hidden_ND.new_zeros((), dtype=exact) for name in names}
        for part, logits_CV in self.logits(hidden_ND, head):
            values, compared = self._values(logits_CV, labels_N[part], targets[part])
            if compared is None or self.temperature != 1:
                compared = targets[part].on_support(logits_CV.log_softmax(-1), 1.0)
            student_CS, teacher_CS = compared
            values["kl"] = forward_kl(student_CS, teacher_CS)
            values["agreement"] = student_CS.argmax(-1) == teacher_CS.argmax(-1)
            values["teacher_ce"] = -teacher_CS.gather(-1, labels_N[part, None]).squeeze(-1)
            for name, value_C in values.items():
                sums[name] += value_C.sum()
        require_finite(_read(sums), len(labels_N))
        return sums

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
        """logits_CV of one chunk of positions after the other, in the types that a step computes them in."""
        matmul, exact = self._dtypes(hidden_ND, head)
        weight_VD = head.weight_VD[: head.num_ids].to(matmul)
        for part in self._parts(len(hidden_ND)):
            yield part, head.finish((hidden_ND[part].to(matmul) @ weight_VD.T).to(exact))

    def _values(
        self, logits_CV: Tensor, labels_C: Tensor, targets: Targets | None
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        """`ce`, `kd` and `loss` per position, the formula once; and the distributions that `kd` compared."""
        logp_CV = logits_CV.log_softmax(-1)
        ce_C = -logp_CV.gather(-1, labels_C[:, None]).squeeze(-1)
        if targets is None:
            return {"ce": ce_C, "loss": self.ce_weight * ce_C}, None
        T = self.temperature
        tempered_CV = logp_CV if T == 1 else (logits_CV / T).log_softmax(-1)
        student_CS, teacher_CS = targets.on_support(tempered_CV, T)
        require_same_ids(student_CS.shape[-1], teacher_CS.shape[-1])
        kd_C = self.divergence(student_CS, teacher_CS)
        if (beyond_C := targets.beyond_support()) is not None:
            kd_C = kd_C + beyond_C
        kd_C = T**2 * kd_C
        loss_C = self.ce_weight * ce_C + self.kd_weight * kd_C
        return {"ce": ce_C, "kd": kd_C, "loss": loss_C}, (student_CS, teacher_CS)

    def _way(self, device: torch.device, targets: Targets | None) -> Way:
        """By which a chunk's values and the gradient of its product are found."""
        if self.engine != "fused" or not is_known(self.divergence, targets):
            return self._by_autograd
        return partial(few_kernels(), self) if self.compiled and gains(device) else self._fused

    def _fused(
        self, product_CV: Tensor, exact: torch.dtype, head: Head, labels_C: Tensor, targets: Targets | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Overwrites the product; its rows begin where a product is fast, and so do the gradient's."""
        logits_CV = head.finish(product_CV.to(exact))
        bend_CV = None if head.softcap is None else 1 - (logits_CV / head.softcap).square_()
        kd_weight = 0.0 if targets is None else self.kd_weight
        weights = Weights(self.ce_weight, kd_weight, self.temperature)
        ce_C, kd_C = with_gradient(logits_CV, labels_C, targets, self.divergence, weights)
        values = {"ce": ce_C, "loss": self.ce_weight * ce_C}
        if kd_C is not None:
            values |= {"kd": kd_C, "loss": values["loss"] + kd_weight * kd_C}
        grad_CV = logits_CV if bend_CV is None else logits_CV.mul_(bend_CV)
        grad_CV = grad_CV if head.scale == 1.0 else grad_CV.mul_(head.scale)
        is_rounded = head.bias_V is None and grad_CV.dtype != product_CV.dtype  # a bias's gradient is exact
        return values, product_CV.copy_(grad_CV) if is_rounded else grad_CV

    def _by_autograd(
        self, product_CV: Tensor, exact: torch.dtype, head: Head, labels_C: Tensor, targets: Targets | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        product_CV = product_CV.to(exact).requires_grad_()
        with torch.enable_grad():
            values, _ = self._values(head.finish(product_CV), labels_C, targets)
            (grad_CV,) = torch.autograd.grad(values["loss"].sum(), product_CV)
        return {name: value_C.detach() for name, value_C in values.items()}, grad_CV

    def _values_only(
        self,
        product_CV: Tensor,
        exact: torch.dtype,
        head: Head,
        labels_C: Tensor,
        targets: Targets | None,
    ) -> tuple[dict[str, Tensor], None]:
        return self._values(head.finish(product_CV.to(exact)), labels_C, targets)[0], None

    def _parts(self, positions: int) -> list[slice]:
        return [slice(start, start + self.chunk) for start in range(0, positions, self.chunk)]

    def _dtypes(self, hidden_ND: Tensor, head: Head) -> tuple[torch.dtype, torch.dtype]:
        """What the products run in, and what everything else does."""
        given = torch.promote_types(hidden_ND.dtype, head.weight_VD.dtype)
        return self.matmul_dtype or given, torch.promote_types(given, torch.float32)

    def _require_fitting(
        self, hidden_ND: Tensor, head: Head, labels_N: Tensor, targets: Targets | None
    ) -> None:
        N = len(hidden_ND)
        if targets is None and self.kd_weight != 0:
            raise UserError(f"objective.kd_weight: is {self.kd_weight} and there is no teacher. Set it to 0.")
        for name, count in (("labels", len(labels_N)), ("targets", N if targets is None else len(targets))):
            if count != N:
                raise UserError(
                    f"objective: {N} hidden states and {count} {name}. There must be one for each."
                )


Way = Callable[..., tuple[dict[str, Tensor], Tensor | None]]


def gains(device: torch.device) -> bool:
    """Whether few kernels are faster there than many: a CPU has its cache blocks."""
    return device.type == "cuda"


@functools.cache
def few_kernels() -> Way:
    """All between a chunk's products, changes of type too, through torch.compile.

    Not `dynamic`: that would make the weights of the terms numbers in float64 that kernels read. The length
    of a chunk becomes one of any size with the second that is seen.
    """
    return torch.compile(Objective._fused)


# PyTorch's own compiler asks this before it writes into what a graph holds. Where it is gone: as if kept.
_is_graph_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class _SumOverPositions(torch.autograd.Function):
    """ce, kd and loss summed over positions, and the gradient of loss, formed a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        objective: Objective,
        head: Head,
        labels_N: Tensor,
        targets: Targets | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        matmul, exact = objective._dtypes(hidden_ND, head)
        V = head.num_ids  # rows of a padded end keep a gradient of zero
        cast_RD = weight_VD[: head.num_rows].to(matmul)
        cast_VD = cast_RD[:V]
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden_ND = torch.zeros_like(hidden_ND) if for_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if for_weight else None
        grad_bias_V = weight_VD.new_zeros(len(weight_VD), dtype=exact) if for_bias else None
        sums = {name: hidden_ND.new_zeros((), dtype=exact) for name in ("ce", "kd", "loss")}
        way = objective._way(hidden_ND.device, targets)
        differentiate: Way = way if any(ctx.needs_input_grad) else objective._values_only

        for part in objective._parts(len(labels_N)):
            hidden_CD = hidden_ND[part].to(matmul)
            taught = None if targets is None else targets[part]
            product_CV = (hidden_CD @ cast_RD.T)[:, :V]
            values, grad_CV = differentiate(product_CV, exact, head, labels_N[part], taught)
            for name, value_C in values.items():
                sums[name] += value_C.sum()
            if grad_CV is None:
                continue
            if grad_bias_V is not None:
                grad_bias_V[:V] += grad_CV.sum(0)  # the bias is what is added to the product
            grad_CV = grad_CV.to(matmul)
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = grad_CV @ cast_VD
            if grad_weight_VD is not None and matmul == exact:
                grad_weight_VD[:V].addmm_(grad_CV.T, hidden_CD)
            elif grad_weight_VD is not None:
                grad_weight_VD[:V] += grad_CV.T @ hidden_CD  # rounded within a chunk, never across chunks

        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden_ND, weight_VD, bias_V)]
        ctx.mark_non_differentiable(sums["ce"], sums["kd"])
        return sums["ce"], sums["kd"], sums["loss"]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        stored = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = [None if grad is None else _scaled(grad, upstream[-1], dtype) for grad, dtype in stored]
        return *grads, None, None, None, None


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """In its place, or in the parameter's type at once: of a head, a copy on the way is as large as it is."""
    if grad.dtype == dtype and not _is_graph_kept():
        return grad.mul_(factor)
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def require_labels(labels_N: Tensor, V: int) -> None:
    """Refuse labels that are no ids; on a device this waits for it."""
    if len(labels_N):
        lowest, highest = torch.stack(torch.aminmax(labels_N)).tolist()
        if lowest < 0 or highest >= V:
            wrong = lowest if lowest < 0 else highest
            raise UserError(f"objective: label {wrong} is outside the student's {V} ids, 0 to {V - 1}.")


def require_finite(sums: dict[str, float], positions: int) -> None:
    for name, value in sums.items():
        if not math.isfinite(value):
            raise Fault(
                f"objective: {name} is {value} over {positions} positions. Logits are not finite, or a token"
                " that one side or the corpus has is impossible on the other."
            )


def _read(sums: dict[str, Tensor]) -> dict[str, float]:
    """With one wait for all."""
    return dict(zip(sums, torch.stack([value.detach() for value in sums.values()]).tolist(), strict=True))
