"""Cut a student out of its teacher: keep some layers, renumbered, some channels of their MLPs, and everything
around them.

Which layers matters more than how many. Right after the cut, the 30-layer SmolLM2-135M keeps a held-out CE
of 9.1 nats with its first 8 and last 7 layers and of 13.7 to 14.6 with every second one, where chance is
10.8: the ends of the stack read and write the residual stream, and the middle is where layers can be missed.
Hence `first_last`.

Which channels matters as much, and norms of weights do not tell: see `ffn_importance`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from potstill.errors import UserError, one_line
from potstill.models.causal_lm import CausalLM
from potstill.models.load import plain_config
from potstill.types import Batch

PER_LAYER = ("layer_types", "no_rope_layers", "attention_layers", "mlp_layer_types")
MLPS = {
    ("gate_proj", "up_proj"): "down_proj",  # Llama, Mistral, Qwen 2 and 3, Gemma, OLMo 2
    ("gate_up_proj",): "down_proj",  # Phi-3: both in one matrix
    ("dense_h_to_4h",): "dense_4h_to_h",  # GPT-NeoX
    ("c_fc",): "c_proj",  # GPT-2, StarCoder 2
    ("fc1",): "fc2",  # Phi
    ("fc_in",): "fc_out",  # GPT-J
    ("up_proj",): "down_proj",  # Nemotron
}
"""Of a layer's `mlp`: the matrices whose rows are its channels, and the one whose columns they are."""
WIDTHS = ("intermediate_size", "n_inner")
"""What configs call the number of channels."""


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


def ffn_width_of(config: Any) -> int:
    """Channels of each layer's MLP."""
    text = config.get_text_config()
    field = _width_field(text)
    found = getattr(text, field)
    found = 4 * text.hidden_size if found is None and field == "n_inner" else found
    if not isinstance(found, int):
        raise UserError(
            f"student.ffn_width: {field} of a {text.model_type} is {found!r:.60}, not one number for all"
            " layers. Leave ffn_width out."
        )
    return found


def channels_to_keep(importance_C: Tensor, count: int) -> Tensor:
    """Numbers of the `count` most important channels, rising; of equals the first."""
    return importance_C.sort(descending=True, stable=True).indices[:count].sort().values


def cut(
    teacher: CausalLM, keep: Sequence[int], ffn_width: int | None = None, batches: Sequence[Batch] = ()
) -> CausalLM:
    """A float32 student of the teacher's layers `keep`, in that order, with the `ffn_width` channels of each
    MLP that add most on the batches, None for all; every tensor a copy, ties kept.

    Raises:
        UserError: a layer that the teacher has not, one named twice or out of order, a stack that is not one
        list, more channels than there are, or an MLP that is not in `MLPS`.
    """
    prefix, total = _stack(teacher)
    if list(keep) != sorted(set(keep)) or not keep or not (keep[0] >= 0 and keep[-1] < total):
        raise UserError(
            f"student.keep: {list(keep)} must be rising layer numbers of the teacher's {total}, from 0 to"
            f" {total - 1}."
        )
    try:
        hf = transformers.AutoModelForCausalLM.from_config(
            cut_config(teacher.hf.config, keep, total, ffn_width),
            dtype=torch.float32,
            trust_remote_code=False,
        )
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        raise _uncuttable(teacher, keep, error) from error
    state = dict(teacher.hf.state_dict())
    if ffn_width is not None and ffn_width < ffn_width_of(teacher.hf.config):
        mlps = {f"{prefix}{layer}.mlp": mlp_of(state, f"{prefix}{layer}.mlp") for layer in keep}
        importance = ffn_importance(teacher, {f"{place}.{out}" for place, (_, out) in mlps.items()}, batches)
        for place, (into, out) in mlps.items():
            keep_K = channels_to_keep(importance[f"{place}.{out}"], ffn_width)
            state |= _narrowed(teacher.hf, state, place, into, out, keep_K)
    kept = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if int(number) not in keep:
                continue
            name = f"{prefix}{list(keep).index(int(number))}.{rest}"
        kept[name] = tensor
    try:
        hf.load_state_dict(kept, strict=True)
    except RuntimeError as error:
        raise _uncuttable(teacher, keep, error) from error
    hf.generation_config = teacher.hf.generation_config
    student = CausalLM(hf.to(teacher.device), name="student")
    student.probe()
    return student


def _uncuttable(teacher: CausalLM, keep: Sequence[int], error: Exception) -> UserError:
    return UserError(
        f"student cut: {type(teacher.hf).__name__} cannot be cut to layers {list(keep)}: {one_line(error)}"
        " Give the student as a checkpoint or a config."
    )


def cut_config(config: Any, keep: Sequence[int], total: int, ffn_width: int | None = None) -> Any:
    """The config with fewer layers and channels; its lists that have an entry a layer lose the same entries.

    Raises:
        UserError: more channels than there are, or a number of them that is not in the config.
    """
    config = plain_config(config)
    text = config.get_text_config()
    for key in PER_LAYER:
        value = getattr(text, key, None)
        if isinstance(value, list) and len(value) == total:
            setattr(text, key, [value[i] for i in keep])
    text.num_hidden_layers = len(keep)
    if ffn_width is not None:
        theirs = ffn_width_of(config)
        if not 1 <= ffn_width <= theirs:
            raise UserError(
                f"student.ffn_width: {ffn_width} channels cannot be kept of the teacher's {theirs}. Give 1 to"
                f" {theirs}."
            )
        setattr(text, _width_field(text), ffn_width)
    return config


def _width_field(text: Any) -> str:
    found = [field for field in WIDTHS if hasattr(text, field)]
    if len(found) != 1:
        raise UserError(
            f"student.ffn_width: the config of a {text.model_type} has not one of {', '.join(WIDTHS)}, so the"
            " width of its MLPs is not known here. Leave ffn_width out."
        )
    return found[0]


def mlp_of(state: dict[str, Tensor], place: str) -> tuple[tuple[str, ...], str]:
    """Names of the matrices into the channels of the MLP at `place`, and of the one out of them."""
    has = {
        name.removeprefix(f"{place}.").rpartition(".")[0] for name in state if name.startswith(f"{place}.")
    }
    for into, out in MLPS.items():
        if has == {*into, out}:
            return into, out
    raise UserError(
        f"student.ffn_width: {place} has {', '.join(sorted(has)) or 'nothing'}: no MLP that is known here."
        " Leave ffn_width out."
    )


@torch.no_grad()
def ffn_importance(teacher: CausalLM, outs: set[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Of each MLP, by the name of its matrix out of the channels: what each channel adds to the hidden state,
    as root mean square over the batches' positions, importance_C in float64. That is the RMS of its
    activation times the norm of its column.

    Activations on a little data are what Minitron ranks by (Muralidharan et al. 2024, arXiv:2407.14679),
    without the column. Norms of weights alone chose worse than chance (docs/cut.md).
    """
    modules = {name: teacher.hf.get_submodule(name) for name in outs}
    squares = summed_inputs(
        teacher,
        modules,
        batches,
        lambda x_NC: torch.linalg.vector_norm(x_NC, dim=0, dtype=torch.float64) ** 2,
    )
    count = sum(len(batch.positions_N) for batch in batches)
    return {
        name: (squares[name] / count).sqrt()
        * torch.linalg.vector_norm(_by_output(module, module.weight), dim=0, dtype=torch.float64)
        for name, module in modules.items()
    }


def summed_inputs(
    teacher: CausalLM,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    of: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """`of` what comes into each module at the batches' positions, input_NC, summed over the batches."""
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


def _by_output(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight with a row for each output, or back from that."""
    return weight.T if isinstance(module, Conv1D) else weight


def _narrowed(
    hf: Any, state: dict[str, Tensor], place: str, into: tuple[str, ...], out: str, keep_K: Tensor
) -> dict[str, Tensor]:
    """The tensors of the MLP at `place` with its channels `keep_K` alone."""
    matrix = partial(_by_output, hf.get_submodule(f"{place}.{out}"))
    out_DC = matrix(state[f"{place}.{out}.weight"])
    found = {f"{place}.{out}.weight": matrix(out_DC[:, keep_K])}
    for name in (f"{place}.{name}" for name in into):
        rows_RD = matrix(state[f"{name}.weight"])
        # A matrix of both, gate and up, has a channel's two rows C apart.
        keep_R = torch.cat([keep_K + first for first in range(0, len(rows_RD), out_DC.shape[1])])
        found[f"{name}.weight"] = matrix(rows_RD[keep_R])
        if f"{name}.bias" in state:
            found[f"{name}.bias"] = state[f"{name}.bias"][keep_R]
    return found


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
