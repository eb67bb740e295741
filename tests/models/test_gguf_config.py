"""What is read out of a GGUF file is the model that was written, far positions too, or a line names why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import gap, tiny, write
from weight_files import refusal

from potstill.errors import UserError
from potstill.models.load import load_causal_lm, load_config

BASE = {"rope_theta": 5000.0, "factor": 8.0}
LLAMA3 = BASE | {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = BASE | {"rope_type": "yarn", "original_max_position_embeddings": 128}
SCALING = "rope.scaling."
YARN_KEYS = {
    f"{SCALING}type": "yarn",
    f"{SCALING}factor": 8.0,
    f"{SCALING}original_context_length": 128,
}


def plain_frequencies() -> torch.Tensor:
    return 5000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)


def longrope(short: list[float], long: list[float], attention: float) -> dict[str, Any]:
    return {
        "rope_theta": 5000.0,
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": 128,
        "attention_factor": attention,
    }


ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "unscaled": ("llama", {"rope_theta": 5000.0, "rope_type": "default"}, {}),
    "none": ("llama", {"rope_theta": 5000.0, "rope_type": "default"}, {f"{SCALING}type": "none"}),
    "linear": (
        "llama",
        BASE | {"rope_type": "linear"},
        {f"{SCALING}type": "linear", f"{SCALING}factor": 8.0},
    ),
    "a factor alone": ("llama", BASE | {"rope_type": "linear"}, {f"{SCALING}factor": 8.0}),
    "the old key": ("llama", BASE | {"rope_type": "linear"}, {"rope.scale_linear": 8.0}),
    "yarn": ("qwen2", YARN, YARN_KEYS),
    "yarn, other bounds": (
        "qwen3",
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
        YARN_KEYS | {f"{SCALING}yarn_beta_fast": 16.0, f"{SCALING}yarn_beta_slow": 2.0},
    ),
    "yarn, attention": (
        "llama",
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        YARN_KEYS | {f"{SCALING}yarn_log_multiplier": 0.5},
    ),
    "longrope": (
        "llama",
        longrope([1.0, 1.5, 2.0, 3.0], [2.0, 4.0, 8.0, 9.0], 1.25),
        {
            f"{SCALING}type": "longrope",
            f"{SCALING}original_context_length": 128,
            f"{SCALING}attn_factor": 1.25,
        },
    ),
    "llama3": ("llama", LLAMA3, {}),
    "other divisors": ("llama", longrope([1.0, 3.0, 2.0, 7.0], [1.0, 3.0, 2.0, 7.0], 1.0), {}),
}


@pytest.mark.parametrize("case", ROPES)
def test_a_scaled_rope_is_read_back_and_survives_a_folder(case: str, tmp_path: Path) -> None:
    architecture, rope, keys = ROPES[case]
    hf = tiny(architecture, rope_parameters=dict(rope))
    tensors = {}
    if case in ("llama3", "other divisors"):
        tensors["rope_freqs"] = plain_frequencies() / hf.model.rotary_emb.inv_freq
    if case == "longrope":
        tensors = {f"rope_factors_{name}": rope[f"{name}_factor"] for name in ("short", "long")}
    read = load_causal_lm(write(tmp_path / "m.gguf", architecture, hf, keys, **tensors))
    assert max(gap(hf, read.hf)) < 1e-5
    read.save(tmp_path / "folder")
    again = load_causal_lm(tmp_path / "folder")
    assert max(gap(hf, again.hf)) < 1e-5
    if case == "llama3":
        assert again.hf.config.rope_parameters == rope


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({f"{SCALING}type": "ntk"}, "rope.scaling.type is 'ntk'"),
        ({f"{SCALING}attn_factor": 1.5}, "rope.scaling.attn_factor is 1.5"),
        (YARN_KEYS | {f"{SCALING}yarn_ext_factor": 0.5}, "rope.scaling.yarn_ext_factor is 0.5"),
        ({f"{SCALING}alpha": 1000.0}, "llama.rope.scaling.alpha is 1000.0"),
        ({"rope.dimension_count": 4}, "llama.rope.dimension_count is 4"),
        ({"attention.scale": 0.5}, "llama.attention.scale is 0.5"),
        ({"attention.value_length": 16}, "llama.attention.value_length is 16"),
        ({"attention.sliding_window": 64}, "llama.attention.sliding_window is 64"),
        ({"attention.sliding_window_pattern": 2}, "llama.attention.sliding_window_pattern is 2"),
        ({"attention.causal": False}, "llama.attention.causal is False"),
        ({"attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv is 8.0"),
        ({"attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping is 50.0"),
        ({"final_logit_softcapping": 30.0}, "llama.final_logit_softcapping is 30.0"),
        ({"logit_scale": 0.25}, "llama.logit_scale is 0.25"),
        ({"embedding_scale": 12.0}, "llama.embedding_scale is 12.0"),
        ({"residual_scale": 0.22}, "llama.residual_scale is 0.2"),
        ({"expert_weights_scale": 2.5}, "llama.expert_weights_scale is 2.5"),
        ({"expert_count": 8, "expert_used_count": 2}, "llama.expert_count is 8"),
        ({"attention.value_length": [8, 16]}, r"llama.attention.value_length is \[8, 16\]"),
        ({"steam_pressure": 7}, "llama.steam_pressure is 7"),
    ],
)
def test_a_key_that_nothing_here_computes_is_refused_by_name(
    keys: dict[str, Any], error: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", "llama", tiny(), keys)
    with pytest.raises(UserError, match=error):
        load_causal_lm(path)
    assert error.split(" is ")[0] in refusal(load_config, path)


def test_keys_that_agree_with_the_config_and_keys_of_no_computation_are_fine(tmp_path: Path) -> None:
    hf = tiny()
    keys = {
        "attention.scale": 8**-0.5,
        "attention.causal": True,
        "attention.sliding_window": 0,
        "attention.sliding_window_pattern": 1,
        "logit_scale": 1.0,
        "expert_count": 0,
        "expert_gating_func": 1,
        "expert_weights_scale": 1.0,
        "nextn_predict_layers": 0,
        "tensor_data_layout": "Meta AI original pth",
        f"{SCALING}finetuned": False,
        f"{SCALING}yarn_log_multiplier": 0.1,
        "/general.quantization_version": 2,
        "/quantize.imatrix.file": "imatrix.dat",
        "/someone.quantized_by": "someone",
    }
    assert max(gap(hf, load_causal_lm(write(tmp_path / "m.gguf", "llama", hf, keys)).hf)) < 1e-5


@pytest.mark.parametrize(
    "tensors",
    [
        {"blk__0__attn_q_norm": [1.0] * 8},
        {"blk__1__attn_sinks": [1.0] * 4},
        {"steam": [1.0]},
        {"rope_freqs": [1.0, 2.0]},
        {"rope_factors_long": [1.0] * 4},
    ],
)
def test_a_tensor_that_no_weight_takes_is_refused_by_name(tensors: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", tiny(), **tensors)
    assert next(iter(tensors)).replace("__", ".") + ".weight" in refusal(load_causal_lm, path)


MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "width of a head": ("qwen3", {}, {}),
    "width of a head, unlisted": ("qwen2", {"hidden_size": 64}, {}),
    "rope base": ("starcoder2", {}, {"attention.layer_norm_epsilon": 1e-5}),
    "eps of a layer norm": ("starcoder2", {"norm_epsilon": 0.1}, {"attention.layer_norm_epsilon": 0.1}),
    "no rope base": (
        "qwen3",
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"rope.freq_base": None},
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "part of a head": (
        "phi3",
        {"partial_rotary_factor": 0.5, "sliding_window": 50},
        {"rope.dimension_count": 4, "attention.sliding_window": 50},
    ),
    "caps": (
        "gemma2",
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "a window": (
        "gemma2",
        {"sliding_window": 40, "num_hidden_layers": 3, "query_pre_attn_scalar": 8},
        {"attention.sliding_window": 40},
    ),
    "a pattern": (
        "gemma3",
        {
            "sliding_window": 40,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        {
            "attention.sliding_window": 40,
            "attention.sliding_window_pattern": 2,
            "rope.freq_base_swa": 100.0,
            f"{SCALING}type": "linear",
            f"{SCALING}factor": 4.0,
        },
    ),
    "no window": (
        "gemma3",
        {"query_pre_attn_scalar": 8, "layer_types": ["full_attention"] * 2, "rope_parameters": None},
        {},
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_what_transformers_leaves_out_is_set(case: str, tmp_path: Path) -> None:
    architecture, config, keys = MODELS[case]
    hf = tiny(architecture, **config)
    read = load_causal_lm(write(tmp_path / "m.gguf", architecture, hf, keys))
    assert max(gap(hf, read.hf)) < 1e-5


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_attention_of_the_largest_gemmas_is_scaled_by_another_width(
    architecture: str, layers: int, tmp_path: Path
) -> None:
    for count, scalar in ((layers, 16), (layers - 1, 8)):
        hf = tiny(architecture, num_hidden_layers=count, hidden_size=64, intermediate_size=8)
        path = write(tmp_path / f"{count}.gguf", architecture, hf, {"attention.sliding_window": 40})
        assert load_config(path).query_pre_attn_scalar == scalar
