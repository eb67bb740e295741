"""What goes into a model's matrices: sums over some rows, by which channels and heads are ranked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from potstill.models.causal_lm import CausalLM
from potstill.types import Batch


def by_output(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight with a row for each output, and back: GPT-2's `Conv1D` stores it transposed."""
    return weight.T if isinstance(module, Conv1D) else weight


def summed_inputs(
    teacher: CausalLM,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    of: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Sum over the batches of `of(input_NC)`, where input_NC is a module's input at the batch's positions."""
    sums: dict[str, Tensor] = {}

    def add(name: str, positions_N: Tensor, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums[name] = sums.get(name, 0.0) + of(inputs[0].flatten(0, 1)[positions_N])

    for batch in batches:
        batch = batch.to(teacher.device)
        hooks = [
            module.register_forward_pre_hook(partial(add, name, batch.positions_N))
            for name, module in modules.items()
        ]
        teacher.hidden(batch.input_ids_BT, batch.position_ids_BT)
        for hook in hooks:
            hook.remove()
    return sums


def most_important(importance_C: Tensor, count: int) -> Tensor:
    """Numbers of the `count` most important ones, rising; ties go to the first."""
    return importance_C.sort(descending=True, stable=True).indices[:count].sort().values
