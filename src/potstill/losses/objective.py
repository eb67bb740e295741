"""From hidden states to the sums that the loop divides: CE and KD over N positions, exact, chunk by chunk.

    ce   = sum over positions of -log q_1(label)              q_T = softmax(student logits / T)
    kd   = sum over positions of T^2 D(p_T, q_T)              p_T = softmax(teacher logits / T)
    loss = ce_weight * ce + kd_weight * kd

With V ids, widths D (student) and E (teacher) and C = `chunk`, logits exist for C positions at a time: a few
buffers of C V numbers for both models together, and one gradient each of the head (V D) and of the hidden
states (N D). Nothing of size N V is made. Work is N V (6 D + 2 E) floating-point operations, each product
done once: a chunk's gradient is formed in the forward pass, while its logits exist. It is written out
(`fused`), or, for a user's own divergence, autograd takes it back to the chunk's product; the two products
that follow are written out. `backward` only scales what the forward pass stored.

    objective = Objective(forward_kl, kd_weight=0.9, ce_weight=0.1, temperature=2.0)
    sums = objective(hidden_ND, head, labels_N, HiddenTargets(teacher_hidden_NE, teacher_head))
    (sums["loss"] / N).backward()

Refuses labels outside the vocabulary, counts and vocabularies that differ, and sums that are not finite.
`Student` calls it.
"""

from __future__ import annotations

import contextlib
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
from potstill.losses.fused import Block, Weights, is_supported, require_same_ids, with_gradient
from potstill.losses.targets import SparseTargets
from potstill.types import Divergence, Head, Targets


@dataclass(frozen=True)
class Objective:
    """What a step minimises; the recipe's `objective` section.

    `matmul_dtype` is what the head's products run in (None: the dtype of the tensors), also inside of a
    `torch.autocast`. Softmax, divergence and all sums over positions stay in float32, or in float64 where the
    tensors are.

    Raises:
        UserError: a weight or a temperature out of range, or both weights 0.
    """

    divergence: Divergence = forward_kl
    kd_weight: float = 0.9
    ce_weight: float = 0.1
    temperature: float = 1.0
    chunk: int = 256
    matmul_dtype: torch.dtype | None = None
    engine: Literal["fused", "reference"] = "fused"
    """`fused` has gradients written out and leaves other divergences to `reference`, which is autograd."""
    compiled: bool = False
    """Compile the written-out part, where that is faster: see `is_compiling_faster`."""

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
        """Sums over the N positions, in nats: `loss` carries the gradient, `ce` and `kd` are for the log.

        Args:
            hidden_ND: the student's final hidden states at the positions that bear loss.
            head: the student's.
            labels_N: the next tokens, int64.
            targets: of the same positions; None only where kd_weight is 0, and `kd` is then absent.
            checked: False: nothing waits for the device, and the caller checks labels and sums itself by
                `require_labels` and `require_finite`.

        Raises:
            UserError: counts or vocabularies that differ, or a label that is not an id.
            Fault: a sum that is not finite.
        """
        self._require_fitting(hidden_ND, head, labels_N, targets)
        if checked:
            require_labels(labels_N, head.num_ids)
        tensors = [hidden_ND, head.weight_VD, head.bias_V]
        # Decided here: inside a Function gradients are always disabled, and what it is given decides.
        if not torch.is_grad_enabled():
            tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
        with without_autocast(hidden_ND.device):
            ce, kd, loss = _SumOverPositions.apply(*tensors, self, head, labels_N, targets)  # type: ignore[no-untyped-call]
        sums = {"ce": ce, "loss": loss} if targets is None else {"ce": ce, "kd": kd, "loss": loss}
        if checked:
            require_finite(_read(sums), len(labels_N))
        return sums

    @torch.no_grad()
    def measure(self, hidden_ND: Tensor, head: Head, labels_N: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Sums over the N positions for a held-out evaluation, without gradients.

        `loss`, `ce` and `kd` as in training; `kl` is KL(teacher || student) at temperature 1, `agreement` the
        number of positions where both rank the same id first, `teacher_ce` the teacher's cross-entropy. Where the
        targets have a bucket, `kl` and `teacher_ce` are lower bounds: of the latter, a label in the bucket counts with
        the bucket's probability. Sampled targets are not for evaluations.

        Raises:
            UserError, Fault: as in training.
        """
        _, exact = self._dtypes(hidden_ND, head)
        sums = {name: hidden_ND.new_zeros((), dtype=exact) for name in MEASURES}
        with without_autocast(hidden_ND.device):
            for values in self._measured(hidden_ND, head, labels_N, targets):
                for name, value_C in values.items():
                    sums[name] += value_C.sum()
        require_finite(_read(sums), len(labels_N))
        return sums

    @torch.no_grad()
    def per_position(
        self, hidden_ND: Tensor, head: Head, labels_N: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        """What `measure` sums, for each of the N positions, without gradients.

        Raises:
            UserError: as in training.
        """
        _, exact = self._dtypes(hidden_ND, head)
        parts: dict[str, list[Tensor]] = {name: [hidden_ND.new_zeros(0, dtype=exact)] for name in MEASURES}
        with without_autocast(hidden_ND.device):
            for values in self._measured(hidden_ND, head, labels_N, targets):
                for name, value_C in values.items():
                    parts[name].append(value_C.to(exact))
        return {name: torch.cat(of_chunks) for name, of_chunks in parts.items()}

    def _measured(
        self, hidden_ND: Tensor, head: Head, labels_N: Tensor, targets: Targets
    ) -> Iterator[dict[str, Tensor]]:
        """The measures of each chunk of positions in turn."""
        self._require_fitting(hidden_ND, head, labels_N, targets)
        require_labels(labels_N, head.num_ids)
        for part, logits_CV in self.logits(hidden_ND, head):
            values, pair = self._values(logits_CV, labels_N[part], targets[part])
            if pair is None or self.temperature != 1:
                pair = targets[part].on_support(logits_CV.log_softmax(-1), 1.0)
            student_CS, teacher_CS = pair
            values["kl"] = forward_kl(student_CS, teacher_CS)
            first_C, labels_C = logits_CV.argmax(-1), labels_N[part]
            if isinstance(sparse := targets[part], SparseTargets):
                # The likeliest id is among the K that are known; the bucket may still be likelier than each of them.
                teacher_first_C = teacher_CS[:, :-1].argmax(-1)
                first_C, labels_C = sparse.classes_of(first_C), sparse.classes_of(labels_C)
            else:
                teacher_first_C = teacher_CS.argmax(-1)
            values["agreement"] = first_C == teacher_first_C
            values["teacher_ce"] = -teacher_CS.gather(-1, labels_C[:, None]).squeeze(-1)
            yield values

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
        """logits_CV of each chunk of positions in turn, in the dtypes that a step computes them in."""
        matmul, exact = self._dtypes(hidden_ND, head)
        weight_VD = head.weight_VD[: head.num_ids].to(matmul)
        for part in self._parts(len(hidden_ND)):
            with without_autocast(hidden_ND.device):
                logits_CV = head.finish((hidden_ND[part].to(matmul) @ weight_VD.T).to(exact))
            yield part, logits_CV

    def _values(
        self, logits_CV: Tensor, labels_C: Tensor, targets: Targets | None
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        """`ce`, `kd` and `loss` per position by their definition, and the two log-distributions of `kd`.

        The reference engine differentiates this; `fused` is held to it by a test.
        """
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

    def _engine(self, device: torch.device, targets: Targets | None) -> ChunkEngine:
        """What computes a chunk's values and the gradient of its product."""
        if self.engine != "fused" or not is_supported(self.divergence, targets):
            return self._by_autograd
        if self.compiled and is_compiling_faster(device):
            return partial(compiled_fused(), self)
        return self._fused

    def _fused(
        self, product_CV: Tensor, exact: torch.dtype, head: Head, labels_C: Tensor, targets: Targets | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Values and gradient written out. Overwrites the product: the gradient keeps the stride of its rows,
        which begin at whole 16 bytes (`Head.num_rows`) so that the products that follow are fast.
        """
        logits_CV = head.finish(product_CV.to(exact))
        # d softcap tanh(x / softcap) / dx = 1 - tanh^2, from the logits before they are overwritten.
        softcap_grad_CV = None if head.softcap is None else 1 - (logits_CV / head.softcap).square_()
        kd_weight = 0.0 if targets is None else self.kd_weight
        weights = Weights(self.ce_weight, kd_weight, self.temperature)
        ce_C, kd_C = with_gradient(logits_CV, labels_C, targets, self.divergence, weights, self._each_of)
        values = {"ce": ce_C, "loss": self.ce_weight * ce_C}
        if kd_C is not None:
            values |= {"kd": kd_C, "loss": values["loss"] + kd_weight * kd_C}
        # Back through the head in reverse order: softcap, then scale.
        grad_CV = logits_CV if softcap_grad_CV is None else logits_CV.mul_(softcap_grad_CV)
        grad_CV = grad_CV if head.scale == 1.0 else grad_CV.mul_(head.scale)
        # Rounded to the dtype of the products at once, unless a bias still needs the exact gradient.
        is_rounded = head.bias_V is None and grad_CV.dtype != product_CV.dtype
        return values, product_CV.copy_(grad_CV) if is_rounded else grad_CV

    def _by_autograd(
        self, product_CV: Tensor, exact: torch.dtype, head: Head, labels_C: Tensor, targets: Targets | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Values by definition; autograd only down to the product: what follows is written out for all."""
        product_CV = product_CV.to(exact).requires_grad_()
        with torch.enable_grad():  # which a Function disables
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

    def _each_of(self, block: Block, blocks: int) -> Block:
        """What `fused` calls for each of the blocks of a chunk."""
        return block

    def _dtypes(self, hidden_ND: Tensor, head: Head) -> tuple[torch.dtype, torch.dtype]:
        """dtypes of the products and of everything else."""
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


NO_LOSS = -100
"""The label of a position without a loss, for PyTorch and Hugging Face; here there are no such positions."""
MEASURES = ("ce", "kd", "loss", "kl", "agreement", "teacher_ce")
"""What `measure` and `per_position` give."""


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A caller's autocast would round the products, whose dtype is the objective's own to choose."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


ChunkEngine = Callable[..., tuple[dict[str, Tensor], Tensor | None]]
"""(product_CV, exact dtype, head, labels_C, targets) to values per position and the product's gradient."""


def is_compiling_faster(device: torch.device) -> bool:
    """On CUDA, where each kernel reads and writes [C, V]; on a CPU `fused` works in blocks in the cache."""
    return device.type == "cuda"


@functools.cache
def compiled_fused() -> ChunkEngine:
    """Everything between a chunk's products, casts included, through torch.compile.

    Not `dynamic`: that would turn the weights of the terms into float64 scalars which kernels read. The size
    of a chunk becomes dynamic by itself with the second one that occurs.
    """
    return torch.compile(Objective._fused)


# Private to PyTorch, whose compiler asks it before it overwrites what a graph holds. Without it: as if kept.
_is_graph_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class _SumOverPositions(torch.autograd.Function):
    """ce, kd and loss summed over positions; the gradient of loss is formed in the forward pass, by chunk.

    After the forward pass only gradients are kept, of the size of the inputs: no logits, and no graph.
    """

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
        # Cast once a call, not once a chunk. R >= V rows, so that those of a product are aligned.
        cast_RD = weight_VD[: head.num_rows].to(matmul)
        cast_VD = cast_RD[:V]
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden_ND = torch.zeros_like(hidden_ND) if for_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if for_weight else None
        grad_bias_V = weight_VD.new_zeros(len(weight_VD), dtype=exact) if for_bias else None
        sums = {name: hidden_ND.new_zeros((), dtype=exact) for name in ("ce", "kd", "loss")}
        engine = objective._engine(hidden_ND.device, targets)
        differentiate: ChunkEngine = engine if any(ctx.needs_input_grad) else objective._values_only

        for part in objective._parts(len(labels_N)):
            hidden_CD = hidden_ND[part].to(matmul)
            targets_C = None if targets is None else targets[part]
            product_CV = (hidden_CD @ cast_RD.T)[:, :V]
            values, grad_CV = differentiate(product_CV, exact, head, labels_N[part], targets_C)
            for name, value_C in values.items():
                sums[name] += value_C.sum()
            if grad_CV is None:
                continue
            if (
                grad_bias_V is not None
            ):  # before the cast: the bias is added to the product in the exact dtype
                grad_bias_V[:V] += grad_CV.sum(0)
            grad_CV = grad_CV.to(matmul)
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = grad_CV @ cast_VD
            if grad_weight_VD is not None and matmul == exact:
                grad_weight_VD[:V].addmm_(grad_CV.T, hidden_CD)
            elif grad_weight_VD is not None:
                # The product is rounded within a chunk; the sum over chunks is exact, or small chunks vanish.
                grad_weight_VD[:V] += grad_CV.T @ hidden_CD

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
    """factor * grad in the parameter's dtype, in place where nothing needs the gradient again: one more copy
    would be as large as the head.
    """
    if grad.dtype == dtype and not _is_graph_kept():
        return grad.mul_(factor)
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def require_labels(labels_N: Tensor, V: int) -> None:
    """UserError for a label that is not an id from 0 to V - 1. Waits for the device of the labels."""
    if len(labels_N):
        lowest, highest = torch.stack(torch.aminmax(labels_N)).tolist()
        if lowest < 0 or highest >= V:
            wrong = lowest if lowest < 0 else highest
            where = (
                " Positions without a loss have to be left out, as potstill.to_batch does."
                if wrong == NO_LOSS
                else ""
            )
            raise UserError(
                f"objective: label {wrong} is outside the student's {V} ids, 0 to {V - 1}.{where}"
            )


def require_finite(sums: dict[str, float], positions: int, plugin: str = "") -> None:
    """Fault, which names the sum, where one over these positions is not finite; `plugin` is the name of the
    divergence that a plug-in computes `kd` with.
    """
    for name, value in sums.items():
        if plugin and name == "kd" and not math.isfinite(value):
            raise Fault(
                f"objective.divergence: {plugin}, of a plug-in: kd is {value} over {positions} positions."
            )
        if not math.isfinite(value):
            raise Fault(
                f"objective: {name} is {value} over {positions} positions. Logits are not finite, or one side"
                " gives probability 0 to a token that the corpus or the other side has."
            )


def _read(sums: dict[str, Tensor]) -> dict[str, float]:
    """As numbers, with one transfer for all of them."""
    return dict(zip(sums, torch.stack([value.detach() for value in sums.values()]).tolist(), strict=True))
