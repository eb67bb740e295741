"""Attention heads with their KV groups: which a layer has, and which of them it keeps.

A group is a key/value head with the query heads that read it. Its share of the hidden state is a sum of its own, so
that a layer without it is the layer with these columns of the matrix out of the attention set to zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.errors import UserError, one_line
from potstill.models.causal_lm import CausalLM
from potstill.models.matrix_inputs import by_output, summed_inputs
from potstill.types import Batch

ATTENTIONS = {
    ("q_proj", "k_proj", "v_proj"): ("o_proj", "dense", "out_proj"),  # Llama and most others; Phi; LFM2
    ("qkv_proj",): ("o_proj",),  # Phi-3: all queries, then all keys, then all values
}
"""Of a layer's attention: the matrices whose rows are its heads, and names of the one whose columns are."""
PLACES = ("self_attn", "attn", "attention", "self_attention")
"""Names of a layer's attention."""
ADVICE = "Leave kv_heads out."


class _OtherShape(UserError):
    """A matrix does not have the heads that the config says."""


@dataclass(frozen=True)
class Heads:
    """Of each layer."""

    kv_heads: int
    queries: int
    """Query heads that read one key/value head."""
    head_dim: int

    @property
    def group_width(self) -> int:
        """Inputs of the matrix out of the attention that a group gives."""
        return self.queries * self.head_dim

    def columns(self, groups_G: Tensor) -> Tensor:
        """Numbers of the inputs that these groups give."""
        return _of_heads(groups_G, self.group_width)

    def rows(self, groups_G: Tensor) -> dict[str, Tensor]:
        """Numbers of these groups' rows, by the name of the matrix into the heads."""
        q_R, kv_R = self.columns(groups_G), _of_heads(groups_G, self.head_dim)
        q, kv = self.kv_heads * self.group_width, self.kv_heads * self.head_dim
        fused_R = torch.cat([q_R, q + kv_R, q + kv + kv_R])
        return {"q_proj": q_R, "k_proj": kv_R, "v_proj": kv_R, "qkv_proj": fused_R}


@dataclass(frozen=True)
class Attention:
    """Names of the matrices of one layer."""

    into: tuple[str, ...]
    out: str


def heads_of(config: Any) -> Heads:
    """What the config says of each layer's heads.

    Raises:
        UserError: it does not have the same numbers for all layers.
    """
    text = config.get_text_config()
    heads, kv_heads = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise UserError(
            f"student.kv_heads: the config of a {text.model_type} has {kv_heads!r:.60} for num_key_value_heads, not one"
            f" number for all layers. {ADVICE}"
        )
    if getattr(text, "num_kv_shared_layers", None):
        raise UserError(
            f"student.kv_heads: {text.num_kv_shared_layers} layers of a {text.model_type} read the keys and values of"
            f" others (num_kv_shared_layers), so that no layer can choose its own. {ADVICE}"
        )
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Heads(kv_heads, heads // kv_heads, head_dim)


def set_heads(config: Any, kv_heads: int) -> Any:
    """The config with so many KV groups in each layer; it is changed.

    Raises:
        UserError: more than there are, or a config that cannot have them.
    """
    heads, text = heads_of(config), config.get_text_config()
    if not 1 <= kv_heads <= heads.kv_heads:
        raise UserError(
            f"student.kv_heads: {kv_heads} key/value heads cannot be kept of the teacher's {heads.kv_heads}. Give 1 to"
            f" {heads.kv_heads}."
        )
    if kv_heads == heads.kv_heads:
        return config
    try:
        text.num_key_value_heads, text.num_attention_heads = kv_heads, kv_heads * heads.queries
        text.head_dim = heads.head_dim  # hidden_size // num_attention_heads is another number now
        type(config).from_dict(copy.deepcopy(config).to_dict())  # what a saved config must pass
    except Exception as error:  # each config has checks of its own
        raise UserError(
            f"student.kv_heads: the config of a {text.model_type} cannot have {kv_heads} of {heads.kv_heads} key/value"
            f" heads: {one_line(error)} Give another number, or leave kv_heads out."
        ) from error
    return config


def attention_of(state: Mapping[str, Tensor], layer: str, heads: Heads) -> Attention:
    """The attention of the layer with this name.

    Raises:
        UserError: it is not in `ATTENTIONS`, or its matrices do not have these heads.
    """
    place = next(
        (name for name in PLACES if any(key.startswith(f"{layer}.{name}.") for key in state)), PLACES[0]
    )
    own = {
        name.removeprefix(f"{layer}.{place}."): tensor
        for name, tensor in state.items()
        if name.startswith(f"{layer}.{place}.")
    }
    # A norm of each head alone is the same for all; one over all heads would see fewer of them.
    whole = {name: tensor for name, tensor in own.items() if not _is_norm(name, tensor, heads)}
    matrices = {name.rpartition(".")[0] or name for name in whole}
    for into, outs in ATTENTIONS.items():
        for out in outs:
            if matrices == {*into, out}:
                _require_shapes(whole, f"{layer}.{place}", into, out, heads)
                return Attention(tuple(f"{layer}.{place}.{name}" for name in into), f"{layer}.{place}.{out}")
    raise UserError(
        f"student.kv_heads: {layer}.{place} has {', '.join(sorted(matrices)) or 'nothing'}, which is not an attention"
        f" whose heads are known here. {ADVICE}"
    )


def require_honoured(hf: Any, stack: str, numbers: Sequence[int]) -> None:
    """UserError for a model that does not have the heads that its config says, or an attention that is not known here:
    some compute the length of a head from the hidden size and the number of heads, whatever `head_dim` is.

    Args:
        stack: prefix of the layers in the state dict.
        numbers: layers that are looked at.
    """
    state, heads = hf.state_dict(), heads_of(hf.config)
    try:
        for number in numbers:
            attention_of(state, f"{stack}{number}", heads)
    except _OtherShape as error:
        raise UserError(
            f"student.kv_heads: {type(hf).__name__} does not keep heads of {heads.head_dim} where there are fewer of"
            f" them. {ADVICE}"
        ) from error


@torch.no_grad()
def group_importance(
    teacher: CausalLM, outs: set[str], heads: Heads, batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """importance_G of each attention in float64: the root mean square, over the batches' positions, of the length of
    what a KV group adds to the hidden state.

    With W_g the group's columns of the matrix out and C_g the sum of x x^T over its inputs x, that is
    sqrt(trace(W_g C_g W_g^T) / N).

    Args:
        outs: names of the matrices out of the attentions, the keys of the result.
    """
    modules = {name: teacher.hf.get_submodule(name) for name in outs}

    def moments_Gcc(x_NC: Tensor) -> Tensor:
        x_GNc = x_NC.double().reshape(-1, heads.kv_heads, heads.group_width).transpose(0, 1)
        return torch.bmm(x_GNc.mT, x_GNc)

    sums = summed_inputs(teacher, modules, batches, moments_Gcc)
    count = sum(len(batch.positions_N) for batch in batches)
    found = {}
    for name, module in modules.items():
        weight: Any = module.weight
        out_DC = by_output(module, weight).double()
        out_GDc = out_DC.reshape(-1, heads.kv_heads, heads.group_width).transpose(0, 1)
        found[name] = (((out_GDc @ sums[name]) * out_GDc).sum((1, 2)) / count).clamp_min(0).sqrt()
    return found


def _of_heads(heads_H: Tensor, width: int) -> Tensor:
    return (heads_H[:, None] * width + torch.arange(width, device=heads_H.device)).flatten()


def _is_norm(name: str, tensor: Tensor, heads: Heads) -> bool:
    module, _, kind = name.rpartition(".")
    is_norm = "norm" in module and "." not in module and kind in ("weight", "bias")
    return is_norm and tensor.shape == (heads.head_dim,)


def _require_shapes(
    own: Mapping[str, Tensor], place: str, into: tuple[str, ...], out: str, heads: Heads
) -> None:
    everything = torch.arange(heads.kv_heads)
    wanted = {f"{name}.weight": len(heads.rows(everything)[name]) for name in into}
    wanted |= {f"{out}.weight": heads.kv_heads * heads.group_width}
    for name, width in wanted.items():
        found = own[name].shape[1 if name == f"{out}.weight" else 0]
        if found != width:
            raise _OtherShape(
                f"student.kv_heads: {place}.{name} is {' x '.join(map(str, own[name].shape))}, and {heads.kv_heads}"
                f" key/value heads, {heads.queries} queries to each, of {heads.head_dim} make {width}. {ADVICE}"
            )
