"""Tiny Transformers models as GGUF files, written by the gguf package alone: an independent writer for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

ARCHITECTURES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "starcoder2": "Starcoder2",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3Text",
    "phi3": "Phi3",
}
"""llama.cpp's name -> what the class of Transformers' config begins with."""


def tiny(architecture: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    config = getattr(transformers, f"{ARCHITECTURES[architecture]}Config")(**options | changes)
    hf = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith(("norm.weight", ".bias")):  # ones and zeros would hide a mix-up
                parameter.add_(0.2 * torch.randn_like(parameter))
    return hf.eval()


def write(path: Path, architecture: str, hf: Any, keys: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """The model's file.

    Args:
        keys: of the architecture, beside or instead of those that describe the shapes and the rope's base;
            None leaves one out.
        tensors: more of them; `__` stands for a dot in a name, and `.weight` is added.
    """
    config, writer = hf.config, gguf.GGUFWriter(path, architecture)
    rope = config.rope_parameters
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "rope.dimension_count": 8,
        "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
        "vocab_size": config.vocab_size,
    }
    if hasattr(config, "rms_norm_eps"):
        values["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    for key, value in (values | (keys or {})).items():
        if value is not None:
            kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
            name = key.removeprefix("/") if key.startswith("/") else f"{architecture}.{key}"
            getattr(writer, f"add_{kinds[type(value)]}")(name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    numbers = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    arrays = {f"{name.replace('__', '.')}.weight": np.float32(value) for name, value in tensors.items()}
    for name, parameter in hf.named_parameters():
        array = parameter.detach().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if architecture == "llama" and (count := heads.get(name.split(".")[-2])):
            array = array.reshape(count, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        arrays[names.get_name(name, (".weight", ".bias"))] = array
    for name, array in arrays.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gap(hf: Any, other: Any, tokens: int = 320) -> tuple[float, float]:
    """Largest difference of logits relative to the largest, near the beginning and at the last positions."""
    ids = torch.randint(3, 96, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = hf(input_ids=ids).logits[0], other(input_ids=ids).logits[0]
    off = (one - two).abs().amax(-1) / one.abs().max()
    return float(off[:9].max()), float(off[-20:].max())
