"""Probes of a model whose files look right: what cannot be seen in names and shapes.

A tensor that is not finite where a few probed tokens do not reach it; a head that is not tied although the config
says so; a cut whose layers, under other numbers, compute something else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from potstill.errors import UserError
from potstill.models.causal_lm import CausalLM, relative_gap
from potstill.models.quantization import parts_of

TOLERANCE = 1e-4
"""Of the largest value: two orders of summation in float32 differ by less."""
TOKENS = 64
"""Of the row on which a cut is compared; fewer where the model takes no more."""


def require_finite(model: CausalLM) -> None:
    """UserError for a weight or buffer with a NaN or an infinity, by name."""
    for name, tensor in [*model.hf.named_parameters(), *model.hf.named_buffers()]:
        for part in parts_of(tensor.detach()):
            # A sum instead of `isfinite`, which would allocate as many bytes as there are weights. In float64 no sum
            # of finite weights overflows.
            if part.is_floating_point() and not bool(part.sum(dtype=torch.float64).isfinite()):
                where = torch.nonzero(~torch.isfinite(part.float()).reshape(-1))[:, 0]
                raise UserError(
                    f"{model.name}: tensor {name} has {len(where)} of {part.numel()} values that are not finite,"
                    f" first at {int(where[0])}. The checkpoint is damaged; take another copy."
                )


def settle_ties(hf: Any) -> None:
    """Let the config say whether the head is the embedding. Where it says tied and the checkpoint has a head of its
    own, Transformers loads both, and whoever builds a model from that config would lose one of them.
    """
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    if head is None or embedding is None:
        return
    is_tied = getattr(head, "weight", None) is getattr(embedding, "weight", None)
    for config in (hf.config, hf.config.get_text_config()):
        if bool(getattr(config, "tie_word_embeddings", is_tied)) and not is_tied:
            config.tie_word_embeddings = False


@torch.no_grad()
def require_same_cut(
    teacher: CausalLM,
    student: CausalLM,
    stack: str,
    keep: Sequence[int],
    narrow: Mapping[int, Callable[[nn.Module], None]],
) -> None:
    """Refuse a cut that is not its teacher: embeddings and head must give the same, and each kept layer on the inputs
    that it has inside the teacher what it gives there.

    Args:
        stack: name of the list of layers.
        keep: numbers of the teacher's layers, in the student's order.
        narrow: by layer, what removes from a copy of it the channels and heads that were cut.

    Raises:
        UserError: with the first layer that differs, and by how much of what it adds.
    """
    longest = getattr(teacher.hf.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    ids_BT = teacher.some_ids(1, min(TOKENS, longest))
    inputs = _layer_inputs(teacher, teacher.hf.get_submodule(stack), ids_BT)
    layers: Any = student.hf.get_submodule(stack)
    for number, layer in zip(keep, layers, strict=True):
        args, kwargs = tree_map(_in_float32, inputs[number])
        # A copy in float32, as the student is: rounding of the teacher's own type would hide a few percent.
        original: Any = copy.deepcopy(teacher.hf.get_submodule(f"{stack}.{number}")).float()
        if number in narrow:
            narrow[number](original)
        expected = hidden_of(original(*args, **kwargs))
        actual = hidden_of(layer.eval()(*args, **kwargs))
        added = expected - hidden_of(args or kwargs["hidden_states"])
        gap = float((actual - expected).abs().max() / added.abs().max().clamp_min(1e-30))
        if not gap <= TOLERANCE:
            raise UserError(
                f"student cut: layer {number} of {type(teacher.hf).__name__} gives another result as layer"
                f" {list(keep).index(number)}, by {100 * gap:.2g} % of what it adds: it depends on its own number."
                " Keep all layers below it, or give the student as a checkpoint or a config."
            )
        layer.train(student.training)
    _require_same_ends(teacher, student, ids_BT)


def _require_same_ends(teacher: CausalLM, student: CausalLM, ids_BT: Tensor) -> None:
    embeddings = [model.hf.get_input_embeddings()(ids_BT).float() for model in (teacher, student)]
    hidden_ND = teacher.hidden(ids_BT)[0]
    logits = [model.head(hidden_ND.to(model.head.weight_VD.dtype)) for model in (teacher, student)]
    for part, (expected, actual) in (("embedding", embeddings), ("head", logits)):
        gap = relative_gap(actual, expected)
        if not gap <= teacher.tolerance():
            raise UserError(
                f"student cut: its {part} is not that of {type(teacher.hf).__name__}: it differs by {gap:.2g} of the"
                " largest value. Give the student as a checkpoint or a config."
            )


def _layer_inputs(teacher: CausalLM, layers: Any, ids_BT: Tensor) -> list[tuple[Any, Any]]:
    """Positional and keyword arguments of each layer in a forward pass."""
    inputs: list[tuple[Any, Any]] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        teacher.hidden(ids_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def hidden_of(value: Any) -> Tensor:
    """The hidden states of a layer's arguments or result."""
    return value if isinstance(value, Tensor) else value[0]
