"""Cut a student out of its teacher: keep some layers, renumbered, and everything around them.

Which layers matters more than how many. Right after the cut, the 30-layer SmolLM2-135M keeps a held-out CE
of 9.1 nats with its first 8 and last 7 layers and of 13.7 to 14.6 with every second one, where chance is
10.8: the ends of the stack read and write the residual stream, and the middle is where layers can be missed.
Hence `first_last`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn

from potstill.errors import UserError, one_line
from potstill.models.causal_lm import CausalLM
from potstill.models.load import plain_config

PER_LAYER = ("layer_types", "no_rope_layers", "attention_layers", "mlp_layer_types")


def layers_to_keep(total: int, count: int, rule: str) -> list[int]:
    """`first_last`: the first half, rounded up, and the last; `even`: spread over the stack, both ends
    included.
    """
    if not 1 <= count <= total:
        raise UserError(
            f"student.layers: {count} layers cannot be kept of the teacher's {total}. Give 1 to {total}."
        )
    if rule == "first_last":
        first = (count + 1) // 2
        return [*range(first), *range(total - (count - first), total)]
    step = (total - 1) / max(count - 1, 1)
    return [round(i * step) for i in range(count)]


def cut(teacher: CausalLM, keep: Sequence[int]) -> CausalLM:
    """A float32 student of the teacher's layers `keep`, in that order; every tensor a copy, ties kept.

    Raises:
        UserError: a layer that the teacher has not, one named twice or out of order, or a stack that is not
        one list.
    """
    prefix, total = _stack(teacher)
    if list(keep) != sorted(set(keep)) or not keep or not (keep[0] >= 0 and keep[-1] < total):
        raise UserError(
            f"student.keep: {list(keep)} must be rising layer numbers of the teacher's {total}, from 0 to"
            f" {total - 1}."
        )
    hf = transformers.AutoModelForCausalLM.from_config(
        cut_config(teacher.hf.config, keep, total), dtype=torch.float32, trust_remote_code=False
    )
    kept = {}
    for name, tensor in teacher.hf.state_dict().items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if int(number) not in keep:
                continue
            name = f"{prefix}{list(keep).index(int(number))}.{rest}"
        kept[name] = tensor
    try:
        hf.load_state_dict(kept, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"student cut: {type(hf).__name__} cannot be cut to layers {list(keep)}: {one_line(error)}"
            " Give the student as a checkpoint or a config."
        ) from error
    hf.generation_config = teacher.hf.generation_config
    student = CausalLM(hf.to(teacher.device), name="student")
    student.probe()
    return student


def cut_config(config: Any, keep: Sequence[int], total: int) -> Any:
    """The config with fewer layers; its per-layer lists (layer types, say) lose the same entries."""
    config = plain_config(config)
    text = config.get_text_config()
    for key in PER_LAYER:
        value = getattr(text, key, None)
        if isinstance(value, list) and len(value) == total:
            setattr(text, key, [value[i] for i in keep])
    text.num_hidden_layers = len(keep)
    return config


def _stack(model: CausalLM) -> tuple[str, int]:
    """Where the layers live in the state dict, `model.layers.`, and how many there are."""
    total = model.hf.config.get_text_config().num_hidden_layers
    stacks = [
        name
        for name, module in model.hf.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    outermost = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(outermost) != 1:
        raise UserError(
            f"student cut: {type(model.hf).__name__} has {len(outermost)} stacks of {total} layers, not one."
            " Give the student as a checkpoint or a config."
        )
    return f"{outermost[0]}.", total
