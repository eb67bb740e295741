"""What llama.cpp computes for each architecture that is written, and the metadata that describes a model to it.

A setting that a file of the architecture has no key for is refused by name: llama.cpp would silently run the
model without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NoReturn

import gguf
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter

from potstill.errors import UserError
from potstill.export.gguf_tokenizer import REFUSED
from potstill.models.causal_lm import CausalLM
from potstill.models.gguf_config import gemma_query_scalar, head_dim, rotated, windowed

SCALED = frozenset({"default", "linear", "yarn"})
PARAMETERS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "longrope": {
        "factor",
        "original_max_position_embeddings",
        "short_factor",
        "long_factor",
        "attention_factor",
    },
}
"""What `rope_parameters` may have beside the base, by the type of scaling."""


@dataclass(frozen=True, slots=True)
class Architecture:
    number: MODEL_ARCH
    ropes: frozenset[str] = SCALED
    biases: tuple[str, ...] = ()
    activation: str = "silu"
    pairs: bool = False
    """The rows of queries and keys that rope turns together lie side by side."""
    norm_offset: float = 0.0
    """Added to the weights of norms, which Transformers has around 0."""
    windows: bool = False
    """Layers may see a window, where every so many see all."""
    caps: bool = False
    """Attention and logits have a softcap."""
    partial: bool = False
    """Rope may turn a part of a head."""

    @property
    def name(self) -> str:
        return str(MODEL_ARCH_NAMES[self.number])


LLAMA = Architecture(MODEL_ARCH.LLAMA, SCALED | {"llama3", "longrope"}, pairs=True)
GEMMA = Architecture(
    MODEL_ARCH.GEMMA3,
    frozenset({"default", "linear"}),
    activation="gelu_pytorch_tanh",
    norm_offset=1.0,
    windows=True,
)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": replace(LLAMA, biases=("attn_q", "attn_k", "attn_v", "attn_output")),
    "mistral": LLAMA,
    "qwen2": Architecture(MODEL_ARCH.QWEN2, biases=("attn_q", "attn_k", "attn_v")),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "qwen3_moe": Architecture(MODEL_ARCH.QWEN3MOE),
    "gemma2": replace(GEMMA, number=MODEL_ARCH.GEMMA2, caps=True),
    "gemma3_text": GEMMA,
    "phi3": Architecture(MODEL_ARCH.PHI3, frozenset({"default", "longrope"}), partial=True),
}
"""By the `model_type` of Transformers' config."""


def architecture_of(config: Any) -> Architecture:
    return ARCHITECTURES[config.model_type]


def require_known(model: CausalLM) -> None:
    """Refuse a model of which llama.cpp would ignore something, before anything is written."""
    config, head = model.hf.config, model.head
    where = f"{model.name}: {config.model_type}"
    if config.model_type not in ARCHITECTURES:
        refuse(where, f"not one of the architectures that are written: {', '.join(ARCHITECTURES)}")
    known = architecture_of(config)
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation != known.activation:
        refuse(where, f"its activation is {activation!r}, not {known.activation!r}")
    _require_rope(where, config, known)
    _require_windows(where, config, known)
    scalar = gemma_query_scalar(known.name, config)
    if scalar is not None and config.query_pre_attn_scalar != scalar:
        value = config.query_pre_attn_scalar
        refuse(where, f"query_pre_attn_scalar is {value}, and llama.cpp takes {scalar}, for which no key is")
    if getattr(config, "use_bidirectional_attention", None):
        refuse(where, "use_bidirectional_attention is set")
    if head.bias_V is not None or head.scale != 1.0:
        refuse(where, f"its head has a bias or a scale ({head.scale})")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if bool(value := getattr(config, name, None)) != known.caps:
            refuse(where, f"{name} is {value}, and llama.cpp {'always' if known.caps else 'never'} has one")
    if experts := getattr(config, "num_experts", None):
        _require_experts(where, config, experts)


def _require_experts(where: str, config: Any, experts: int) -> None:
    """llama.cpp has experts in every layer, and shares that add up to 1."""
    wanted = {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True}
    for name, value in wanted.items():
        if getattr(config, name, value) != value:
            refuse(where, f"{name} is {getattr(config, name)}, and llama.cpp computes with {value}")


def _require_rope(where: str, config: Any, known: Architecture) -> None:
    for part in _ropes(config).values():
        kind = part.get("rope_type", "default")
        if kind not in known.ropes:
            refuse(where, f"rope_type {kind!r} is not one that a GGUF file of it can have")
        extra = {name for name, value in part.items() if value is not None}
        parts = (
            {"partial_rotary_factor"} if known.partial or part.get("partial_rotary_factor") == 1.0 else set()
        )
        if extra := extra - PARAMETERS[kind] - parts - {"rope_theta", "rope_type", "type"}:
            names = ", ".join(sorted(extra))
            refuse(where, f"rope_parameters has {names}, which a GGUF file has no field for")
    local = _ropes(config).get("sliding_attention", {})
    if local.get("rope_type", "default") != "default":
        refuse(where, f"the rope of layers with a window has rope_type {local['rope_type']!r}, not 'default'")


def _require_windows(where: str, config: Any, known: Architecture) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not known.windows and kinds != {"full_attention"}:
        others = ", ".join(sorted(kinds - {"full_attention"}))
        refuse(where, f"layer_types has {others}, not only full_attention")
    window = getattr(config, "sliding_window", None)
    if not known.windows and window and window < config.max_position_embeddings:
        refuse(where, f"sliding_window is {window}, and llama.cpp computes without")
    if known.windows and _period(config) is None:
        refuse(
            where, f"layer_types is {_short(config.layer_types)}: llama.cpp knows a full layer every so many"
        )


def _period(config: Any) -> int | None:
    """Every so many layers one sees all; 0: none does; None: there is no such rule."""
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    period = 0 if all(sliding) else sliding.index(False) + 1
    return period if windowed(period, len(sliding)) == sliding else None


def _short(kinds: list[str]) -> str:
    return " ".join(kind.removesuffix("_attention") for kind in kinds)


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """`rope_parameters` by type of layer."""
    rope = config.rope_parameters or {}
    return rope if "full_attention" in rope else {"full_attention": rope}


def write_shape(writer: GGUFWriter, hf: Any) -> None:
    """The keys of the architecture."""
    config = hf.config
    width, rope = head_dim(config), _ropes(config)["full_attention"]
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(rotated(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture_of(config).windows:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(_period(config))
        if local := _ropes(config).get("sliding_attention"):
            writer.add_rope_freq_base_swa(local["rope_theta"])
    if architecture_of(config).caps:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if getattr(config, "num_experts", None):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(hf.model.rotary_emb.attention_scaling)
    if kind in ("linear", "yarn", "longrope"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        length = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(length)


def refuse(where: str, what: str) -> NoReturn:
    raise UserError(f"{where}: {what}. {REFUSED}")
