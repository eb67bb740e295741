"""The config of a GGUF file: Transformers' reading of it, completed by the keys and tensors that it ignores.

A key of the architecture is compared with the config, and where the config has a field for it, the file's
value is set. A key that changes the computation and that no field expresses is refused by name, and so is a
tensor that no weight of the model takes. What a key means is what llama.cpp computes with it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import modeling_gguf_pytorch_utils as transformers_gguf

from potstill.errors import one_line
from potstill.io.gguf_library import quick_gguf
from potstill.io.safe_open import printable_name, refuse
from potstill.models.gguf_files import FOLDER, GGUFModel, check_gguf
from potstill.models.gguf_rope import FREQS, LONG, READ, SHORT, rope_parameters

WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
FIELDS: dict[str, tuple[str, ...]] = {
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("norm_epsilon", "norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    WINDOW: ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "embedding_scale": ("embedding_multiplier",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "residual_scale": ("residual_multiplier",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.inner_size": ("intermediate_size",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "use_parallel_residual": ("use_parallel_residual",),
    "vocab_size": ("vocab_size",),
}
"""A key without its architecture -> the field of the config, under the names that it has in one or another."""
TENSOR_FLAGS = {
    "output.weight": ("tie_word_embeddings", False),
    "blk.0.attn_q.bias": ("attention_bias", True),
    "blk.0.ffn_up.bias": ("mlp_bias", True),
}
"""A tensor -> the field that its presence decides."""
NO_EFFECT = {"context_length", "tensor_data_layout", "rope.scaling.finetuned"}
GATING = {"softmax": 1, "sigmoid": 2}
GEMMA_PERIODS = {"gemma2": 2, "gemma3": 6}
"""Every so many layers one has full attention, where the file names no pattern."""
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Layers of the only models whose attention llama.cpp does not scale by the width of a head."""


def complete(path: Path, config: Any) -> Any:
    """The config with the file's own values where it has others.

    Args:
        path: a GGUF file.
        config: what Transformers made of it.

    Raises:
        UserError: a key that changes the computation and that the config cannot express.
    """
    file = GGUFModel(path, check_gguf(path))
    changes = {
        field: value
        for tensor, (field, value) in TENSOR_FLAGS.items()
        if tensor in file.info.tensors and getattr(config, field, value) is not value
    }
    for key in FIELDS:
        field, value = _field(config, key), file.get(key)
        if field is not None and value is not None and not _equal(value, _stated(config, key)):
            changes[field] = value
    config = _changed(file, config, changes)
    config = _changed(file, config, _layers(file, config) | _rope(file, config))
    has_rope = bool(getattr(config, "rope_parameters", None))
    skipped = NO_EFFECT | (READ if has_rope else set()) | _keys_of_newer_readers(path)
    for name in file.info.metadata:
        arch, _, key = name.partition(".")
        if arch in (file.info.architecture, "xielu", "diffusion") and key not in skipped:
            _require_expressed(file, config, name, key)
    return config


def require_known_tensors(path: Path, hf: Any) -> None:
    """Refuse a tensor that Transformers would leave out without a word; `hf` is the model without data."""
    if _keys_of_newer_readers(path):
        return  # it reports what these leave out
    info = check_gguf(path)
    processor = transformers_gguf.TENSOR_PROCESSORS.get(info.architecture, transformers_gguf.TensorProcessor)
    try:
        with quick_gguf():
            known = transformers_gguf.get_gguf_hf_weights_map(hf, processor(config=hf.config.to_dict()))
    except Exception as error:  # an architecture that the gguf package does not name
        refuse(path, f"Transformers cannot load it: {one_line(error)}", FOLDER)
    names = known.keys() | {f"{name}.weight" for name in known if name.endswith("_exps")}
    if extra := sorted(info.tensors.keys() - names - {FREQS, LONG, SHORT}):
        what = f"{len(extra)} tensor(s), first {printable_name(extra[0])}"
        refuse(path, f"{what}: no weight of {type(hf).__name__}, and another model without", FOLDER)


def windowed(period: int, num_layers: int) -> list[bool]:
    """Whether each layer sees a window, where every `period`-th sees all; 0: each layer sees a window."""
    return [period == 0 or (layer + 1) % period != 0 for layer in range(num_layers)]


def gemma_query_scalar(architecture: str, config: Any) -> int | None:
    """What llama.cpp takes for Gemma's `query_pre_attn_scalar`, as no key has it; None for other models."""
    if architecture not in GEMMA_27B:
        return None
    if config.num_hidden_layers == GEMMA_27B[architecture]:
        return int(config.hidden_size // config.num_attention_heads)
    return head_dim(config)


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotated(config: Any) -> int:
    """The dimensions of a head that rope turns."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    return int(head_dim(config) * (rope.get("partial_rotary_factor") or 1.0))


def _changed(file: GGUFModel, config: Any, changes: dict[str, Any]) -> Any:
    if not changes:
        return config
    try:
        return type(config).from_dict(config.to_dict() | changes)
    except Exception as error:  # Transformers raises anything over a damaged config
        file.refuse(f"its keys describe no {type(config).__name__}: {one_line(error)}")


def _layers(file: GGUFModel, config: Any) -> dict[str, Any]:
    """Which layers see a window, and how Gemma scales its attention: Transformers reads neither."""
    kind = file.info.architecture
    changes: dict[str, Any] = {}
    pattern = file.get(PATTERN, GEMMA_PERIODS.get(kind))
    if getattr(config, "layer_types", None) and pattern is not None:
        if kind == "gemma3" and not file.get(WINDOW):
            pattern = 1
        changes["layer_types"] = [
            "sliding_attention" if each else "full_attention" for each in _pattern(pattern, config)
        ]
    if (scalar := gemma_query_scalar(kind, config)) is not None:
        changes["query_pre_attn_scalar"] = scalar
    return {name: value for name, value in changes.items() if getattr(config, name) != value}


def _rope(file: GGUFModel, config: Any) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return {}
    full, turned = rope.get("full_attention", rope), file.get("rope.dimension_count") or rotated(config)
    if "partial_rotary_factor" in full:
        full = full | {"partial_rotary_factor": turned / head_dim(config)}
    made = rope_parameters(file, full, turned)
    changes: dict[str, Any] = {"rope_parameters": made}
    if "full_attention" in rope:
        local = {"rope_type": "default", "rope_theta": file.get("rope.freq_base_swa", 10_000.0)}
        changes["rope_parameters"] = rope | {"full_attention": made, "sliding_attention": local}
    original = made.get("original_max_position_embeddings")
    if original and hasattr(config, "original_max_position_embeddings"):
        changes["original_max_position_embeddings"] = original  # Phi-3 takes this one, not rope's own
    return {name: value for name, value in changes.items() if getattr(config, name) != value}


def _require_expressed(file: GGUFModel, config: Any, name: str, key: str) -> None:
    """Refuse a key of the computation that does not agree with the config."""
    value = file.get(key) if name.startswith(file.info.architecture) else file.info.metadata[name]
    stated = _stated(config, key)
    if key == PATTERN:
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        fits = _pattern(value, config) == [each == "sliding_attention" for each in types]
    elif stated is None:  # no field has it: an unknown key is switched off by 0, a scale by 1
        fits = value in (0, False) or (key.endswith("scale") and value == 1)
    else:
        fits = _equal(value, stated)
    if not fits:
        has = "has no field for it" if stated is None else f"computes with {stated!r:.60}"
        file.refuse(f"{printable_name(name)} is {value!r:.60}, and {type(config).__name__} {has}")


def _stated(config: Any, key: str) -> Any:
    """What the config says of a key, by its fields or their defaults; None where it has nothing to say."""
    field = _field(config, key)
    if field and (value := getattr(config, field, None)) is not None:
        return value
    rope = getattr(config, "rope_parameters", None) or {}
    defaults: dict[str, Any] = {
        "attention.causal": True,
        "attention.head_count_kv": config.num_attention_heads,
        "attention.scale": (getattr(config, "query_pre_attn_scalar", None) or head_dim(config)) ** -0.5,
        WINDOW: 0 if field else None,
        "embedding_length_out": config.hidden_size,
        "expert_gating_func": GATING.get(getattr(config, "scoring_func", "softmax")),
        "feed_forward_length": 4 * config.hidden_size,
        "rope.dimension_count": getattr(config, "rotary_dim", None) or rotated(config),
        "rope.dimension_count_swa": rotated(config),
        "rope.freq_base_swa": rope.get("sliding_attention", rope).get("rope_theta"),
    }
    widths = ("key_length", "value_length", "key_length_swa", "value_length_swa")
    return head_dim(config) if key.removeprefix("attention.") in widths else defaults.get(key)


def _field(config: Any, key: str) -> str | None:
    """The config's name of a key; a head's width may be set although its class does not list it."""
    names = FIELDS.get(key, ())
    return next((name for name in names if hasattr(config, name) or name == "head_dim"), None)


def _pattern(value: Any, config: Any) -> list[bool]:
    return (
        [bool(each) for each in value]
        if isinstance(value, list)
        else windowed(value, config.num_hidden_layers)
    )


def _equal(value: Any, stated: Any) -> bool:
    if isinstance(value, float) and isinstance(stated, int | float):
        return math.isclose(value, stated, rel_tol=1e-6)
    return bool(value == (0 if stated is None else stated))


def _keys_of_newer_readers(path: Path) -> set[str]:
    """The keys that Transformers' newer code, one function an architecture, looks at; empty for the others."""
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config, read_gguf_metadata
    except ImportError:  # Transformers before these
        return set()
    architecture = check_gguf(path).architecture
    if architecture not in GGUF_CONFIG_ARCHS:
        return set()

    class Watched(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            keys.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            keys.add(key)
            return super().get(key, default)

    keys: set[str] = set()
    metadata, tensors = read_gguf_metadata(str(path))
    get_gguf_config(Watched(metadata), tensors)
    return {key.removeprefix(f"{architecture}.") for key in keys}
