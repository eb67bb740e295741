"""Cut a student out of its teacher: keep some of its layers, some channels of their MLPs, some of their attention
heads, and all else.

Which layers are kept matters more than how many. Right after the cut, the 30-layer SmolLM2-135M has a
held-out CE of 9.1 nats with its first 8 and last 7 layers and of 13.7 to 14.6 with every second one, where
chance is 10.8: the ends of the stack read and write the residual stream, and layers in the middle can be
spared: hence `first_last`. `models.layer_harm` measures which. Which channels are kept matters as much: see
`ffn_importance`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from potstill.errors import UserError, one_line
from potstill.models.causal_lm import CausalLM
from potstill.models.heads import attention_of, group_importance, heads_of, require_honoured, set_heads
from potstill.models.load import on_meta, plain_config
from potstill.models.matrix_inputs import by_output, most_important, summed_inputs
from potstill.models.probes import require_same_cut
from potstill.types import Batch

PER_LAYER = ("layer_types", "layers_block_type", "no_rope_layers", "attention_layers", "mlp_layer_types")
"""Fields of configs with an entry for each layer."""
NUMBERS_OF_LAYERS = ("attn_layer_indices", "mlp_only_layers", "moe_layers")
"""Fields of configs that list layers by number."""
MLPS = {
    ("gate_proj", "up_proj"): "down_proj",  # Llama, Mistral, Qwen 2 and 3, Gemma, OLMo 2
    ("gate_up_proj",): "down_proj",  # Phi-3: both in one matrix
    ("dense_h_to_4h",): "dense_4h_to_h",  # GPT-NeoX
    ("c_fc",): "c_proj",  # GPT-2, StarCoder 2
    ("fc1",): "fc2",  # Phi
    ("fc_in",): "fc_out",  # GPT-J
    ("up_proj",): "down_proj",  # Nemotron
}
"""Of a layer's `mlp`: the matrices whose rows are its channels, and the one whose columns are."""
WIDTHS = ("intermediate_size", "n_inner")
"""Names of configs for the number of channels."""


def layers_to_keep(total: int, count: int, rule: str | None) -> list[int]:
    """Numbers of the `count` layers to keep, by place alone.

    Args:
        rule: `even`: evenly spaced, with both ends; any other: the first half, rounded up, and the last.

    Raises:
        UserError: fewer than one or more than `total`.
    """
    if not 1 <= count <= total:
        raise UserError(
            f"student.layers: {count} layers cannot be kept of the teacher's {total}. Give 1 to {total}."
        )
    if rule == "even":
        step = (total - 1) / max(count - 1, 1)
        return [round(i * step) for i in range(count)]
    first = (count + 1) // 2
    return [*range(first), *range(total - (count - first), total)]


def ffn_width_of(config: Any) -> int:
    """Channels of each layer's MLP; UserError where a config does not have one number for all layers."""
    text = config.get_text_config()
    field = _width_field(text)
    width = getattr(text, field)
    width = 4 * text.hidden_size if width is None and field == "n_inner" else width
    if not isinstance(width, int):
        raise UserError(
            f"student.ffn_width: {field} of a {text.model_type} is {width!r:.60}, not one number for all"
            " layers. Leave ffn_width out."
        )
    return width


def kept_channels(
    teacher: CausalLM, keep: Sequence[int], ffn_width: int | None, batches: Sequence[Batch]
) -> dict[int, Tensor]:
    """keep_K of each of these layers: its `ffn_width` channels of most importance on the batches, rising. Empty where
    all are kept.

    Raises:
        UserError: an MLP that is not in `MLPS`.
    """
    if ffn_width is None or ffn_width >= ffn_width_of(teacher.hf.config):
        return {}
    prefix, state = stack_of(teacher)[0], dict(teacher.hf.state_dict())
    outs = {number: matrix_out(state, f"{prefix}{number}.mlp") for number in keep}
    importance = ffn_importance(teacher, {*outs.values()}, batches)
    return {number: most_important(importance[out], ffn_width) for number, out in outs.items()}


def kept_groups(
    teacher: CausalLM, keep: Sequence[int], kv_heads: int | None, batches: Sequence[Batch]
) -> dict[int, Tensor]:
    """groups_G of each of these layers: its `kv_heads` KV groups of most importance on the batches, rising. Empty where
    all are kept.

    Raises:
        UserError: an attention that is not in `models.heads.ATTENTIONS`.
    """
    if kv_heads is None or kv_heads >= (heads := heads_of(teacher.hf.config)).kv_heads:
        return {}
    prefix, state = stack_of(teacher)[0], dict(teacher.hf.state_dict())
    outs = {number: attention_of(state, f"{prefix}{number}", heads).out for number in keep}
    importance = group_importance(teacher, {*outs.values()}, heads, batches)
    return {number: most_important(importance[out], kv_heads) for number, out in outs.items()}


def cut(
    teacher: CausalLM,
    keep: Sequence[int],
    ffn_width: int | None = None,
    batches: Sequence[Batch] = (),
    channels: Mapping[int, Tensor] | None = None,
    kv_heads: int | None = None,
    groups: Mapping[int, Tensor] | None = None,
) -> CausalLM:
    """A float32 student with some of its teacher's layers; every tensor is a copy, and ties are kept.

    Args:
        keep: numbers of the layers to keep, rising.
        ffn_width: channels of each MLP to keep, those of most importance on the batches; None: all.
        channels: which they are, of each layer; None: by `kept_channels`.
        kv_heads: KV groups of each attention to keep, those of most importance on the batches; None: all.
        groups: which they are, of each layer; None: by `kept_groups`.

    Raises:
        UserError: layers that the teacher does not have, duplicates or another order, an architecture without
            one stack of layers, more channels or KV groups than there are, or an MLP or an attention that is not
            known here.
    """
    prefix, total = stack_of(teacher)
    if list(keep) != sorted(set(keep)) or not keep or not (keep[0] >= 0 and keep[-1] < total):
        raise UserError(
            f"student.keep: {list(keep)} must be rising layer numbers of the teacher's {total}, from 0 to"
            f" {total - 1}."
        )
    try:
        hf = transformers.AutoModelForCausalLM.from_config(
            cut_config(teacher.hf.config, keep, total, ffn_width, kv_heads),
            dtype=torch.float32,
            trust_remote_code=False,
        )
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AttributeError) as error:
        raise _uncuttable(teacher, keep, error) from error
    if channels is None:
        channels = kept_channels(teacher, keep, ffn_width, batches)
    if groups is None:
        groups = kept_groups(teacher, keep, kv_heads, batches)
    if groups:
        require_honoured(hf, prefix, range(len(keep)))
    state = dict(teacher.hf.state_dict())
    columns: dict[int, dict[str, Tensor]] = {number: {} for number in keep}
    for each in (
        *_narrow_mlps(teacher, state, prefix, channels),
        *_narrow_attentions(teacher, state, prefix, groups),
    ):
        state |= _narrowed(teacher.hf, state, each)
        columns[each.number][each.out.removeprefix(f"{prefix}{each.number}.")] = each.keep_K
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
    _rescale_queries(hf, keep)
    hf.generation_config = teacher.hf.generation_config
    student = CausalLM(hf.to(teacher.device), name="student")
    student.probe()
    narrow = {number: partial(_without, of) for number, of in columns.items()}
    require_same_cut(teacher, student, prefix.removesuffix("."), keep, narrow)
    return student


def _uncuttable(teacher: CausalLM, keep: Sequence[int], error: Exception) -> UserError:
    return UserError(
        f"student cut: {type(teacher.hf).__name__} cannot be cut to layers {list(keep)}: {one_line(error)}"
        " Give the student as a checkpoint or a config."
    )


def cut_config(
    config: Any,
    keep: Sequence[int],
    total: int,
    ffn_width: int | None = None,
    kv_heads: int | None = None,
) -> Any:
    """The config with fewer layers, channels and heads; lists with an entry per layer lose the same entries.

    Raises:
        UserError: more channels or heads than there are, or a config that does not say how many there are.
    """
    config = plain_config(config)
    text = config.get_text_config()
    fields = [text.attribute_map.get(key, key) for key in PER_LAYER]
    kinds = {key: value for key in fields if isinstance(value := getattr(text, key, None), list)}
    for key in NUMBERS_OF_LAYERS:
        if isinstance(value := getattr(text, key, None), list):
            setattr(text, key, [list(keep).index(number) for number in value if number in keep])
    text.num_hidden_layers = len(keep)
    for key, value in kinds.items():
        kept = [value[i] for i in keep] if len(value) == total else value
        if getattr(getattr(type(text), key, None), "fset", text) is not None:
            setattr(text, key, kept)
        elif getattr(text, key) != kept:  # a property, computed from the numbers of the layers
            raise UserError(
                f"student cut: layers {list(keep)} of a {text.model_type} are {', '.join(map(str, kept))}, as layers 0"
                f" to {len(keep) - 1} they would be {', '.join(map(str, getattr(text, key)))}. Keep layers in the same"
                " places, or give the student as a checkpoint or a config."
            )
    if ffn_width is not None:
        teacher_width = ffn_width_of(config)
        if not 1 <= ffn_width <= teacher_width:
            raise UserError(
                f"student.ffn_width: {ffn_width} channels cannot be kept of the teacher's {teacher_width}."
                f" Give 1 to {teacher_width}."
            )
        setattr(text, _width_field(text), ffn_width)
    return config if kv_heads is None else set_heads(config, kv_heads)


def _width_field(text: Any) -> str:
    fields = [field for field in WIDTHS if hasattr(text, field)]
    if len(fields) != 1:
        raise UserError(
            f"student.ffn_width: the config of a {text.model_type} has {len(fields)} of {', '.join(WIDTHS)},"
            " so the width of its MLPs is unknown. Leave ffn_width out."
        )
    return fields[0]


def mlp_of(state: dict[str, Tensor], place: str) -> tuple[tuple[str, ...], str]:
    """Names of the matrices into the channels of the MLP at `place`, and of the one out of them.

    Raises:
        UserError: an MLP that is not in `MLPS`.
    """
    matrices = {
        name.removeprefix(f"{place}.").rpartition(".")[0] for name in state if name.startswith(f"{place}.")
    }
    for into, out in MLPS.items():
        if matrices == {*into, out}:
            return into, out
    raise UserError(
        f"student.ffn_width: {place} has {', '.join(sorted(matrices)) or 'nothing'}, which is not an MLP"
        " known here. Leave ffn_width out."
    )


def matrix_out(state: dict[str, Tensor], place: str) -> str:
    """Name of the matrix out of the channels of the MLP at `place`; see `mlp_of`."""
    return f"{place}.{mlp_of(state, place)[1]}"


@torch.no_grad()
def ffn_importance(teacher: CausalLM, outs: set[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """importance_C of each MLP in float64: the root mean square, over the batches' positions, of what a
    channel adds to the hidden state, which is the RMS of its activation times the norm of its column.

    Minitron ranks by activations on a little data (Muralidharan et al. 2024, arXiv 2407.14679), without the
    column. Norms of weights alone chose worse than chance (docs/cut.md).

    Args:
        outs: names of the matrices out of the channels, the keys of the result.
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
        * torch.linalg.vector_norm(by_output(module, module.weight), dim=0, dtype=torch.float64)
        for name, module in modules.items()
    }


class _Narrow(NamedTuple):
    """What is kept of the inputs of one matrix, and of what makes them."""

    number: int
    """The teacher's layer."""
    out: str
    """Name of the matrix that reads them."""
    keep_K: Tensor
    """Their numbers: columns of that matrix."""
    rows: dict[str, Tensor]
    """By the names of the matrices that make them: numbers of their rows."""


def _narrow_mlps(
    teacher: CausalLM, state: dict[str, Tensor], prefix: str, channels: Mapping[int, Tensor]
) -> Iterator[_Narrow]:
    for number, keep_K in channels.items():
        mlp = f"{prefix}{number}.mlp"
        into, out = mlp_of(state, mlp)[0], matrix_out(state, mlp)
        matrix = partial(by_output, teacher.hf.get_submodule(out))
        width = matrix(state[f"{out}.weight"]).shape[1]
        rows = {}
        for name in (f"{mlp}.{name}" for name in into):
            # One matrix of gate and up has the two rows of a channel C apart.
            starts = range(0, len(matrix(state[f"{name}.weight"])), width)
            rows[name] = torch.cat([keep_K + first for first in starts])
        yield _Narrow(number, out, keep_K, rows)


def _narrow_attentions(
    teacher: CausalLM, state: dict[str, Tensor], prefix: str, groups: Mapping[int, Tensor]
) -> Iterator[_Narrow]:
    for number, groups_G in groups.items():
        heads = heads_of(teacher.hf.config)
        attention = attention_of(state, f"{prefix}{number}", heads)
        rows = heads.rows(groups_G)
        into = {name: rows[name.rpartition(".")[2]] for name in attention.into}
        yield _Narrow(number, attention.out, heads.columns(groups_G), into)


def _narrowed(hf: Any, state: dict[str, Tensor], narrow: _Narrow) -> dict[str, Tensor]:
    """The tensors around the inputs that are kept."""
    matrix = partial(by_output, hf.get_submodule(narrow.out))
    narrowed = {f"{narrow.out}.weight": matrix(matrix(state[f"{narrow.out}.weight"])[:, narrow.keep_K])}
    for name, keep_R in narrow.rows.items():
        narrowed[f"{name}.weight"] = matrix(matrix(state[f"{name}.weight"])[keep_R])
        if f"{name}.bias" in state:
            narrowed[f"{name}.bias"] = state[f"{name}.bias"][keep_R]
    return narrowed


def _without(columns: Mapping[str, Tensor], layer: nn.Module) -> None:
    """Set the weights out of all channels and heads of a layer but these to zero: what is left is the narrowed one."""
    for out, keep_K in columns.items():
        matrix: Any = layer.get_submodule(out)
        weight_DC = by_output(matrix, matrix.weight)
        dropped_C = torch.ones(weight_DC.shape[1], dtype=torch.bool, device=weight_DC.device)
        dropped_C[keep_K] = False
        weight_DC[:, dropped_C] = 0


@torch.no_grad()
def _rescale_queries(hf: Any, keep: Sequence[int]) -> None:
    """GPT-2's `scale_attn_by_inverse_layer_idx` divides a layer's scores by its number, from 1: of a layer that has
    another number now, the queries make up for it.
    """
    if not getattr(hf.config, "scale_attn_by_inverse_layer_idx", False):
        return
    for now, before in enumerate(keep):
        queries = hf.transformer.h[now].attn.c_attn  # a Conv1D: columns of queries, keys and values
        queries.weight[:, : hf.config.hidden_size] *= (now + 1) / (before + 1)
        queries.bias[: hf.config.hidden_size] *= (now + 1) / (before + 1)


def require_heads(config: Any, kv_heads: int) -> None:
    """UserError for a config whose models cannot have so many KV groups; see `heads.require_honoured`."""
    total = config.get_text_config().num_hidden_layers
    narrow = cut_config(config, range(total), total, None, kv_heads)
    try:
        hf = on_meta(narrow)
    except Exception as error:  # what Transformers raises over a config that fits no model
        raise UserError(
            f"student.kv_heads: Transformers builds no {narrow.model_type} of {kv_heads} key/value heads:"
            f" {one_line(error)} Leave kv_heads out."
        ) from error
    require_honoured(hf, _stack(hf)[0], range(total))


def stack_of(model: CausalLM) -> tuple[str, int]:
    """Prefix of the layers in the state dict, as `model.layers.`, and how many there are."""
    return _stack(model.hf)


def _stack(hf: Any) -> tuple[str, int]:
    total = hf.config.get_text_config().num_hidden_layers
    stacks = [
        name
        for name, module in hf.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    outermost = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(outermost) != 1:
        raise UserError(
            f"student cut: {type(hf).__name__} has {len(outermost)} stacks of {total} layers, not one."
            " Give the student as a checkpoint or a config."
        )
    return f"{outermost[0]}.", total
