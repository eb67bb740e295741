"""Tiny multimodal checkpoints, made by Transformers: a text half, and a tower and a projector for images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

TEXT: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
THREE_POSITIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
}
QWEN_IDS = {
    "image_token_id": 250,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}
KINDS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            "query_pre_attn_scalar": 8,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "mm_tokens_per_image": 4,
        "image_token_id": 250,
        "boi_token_index": 251,
        "eoi_token_index": 252,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_id": 250,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral"},
        "vision_config": {"model_type": "pixtral", "head_dim": 8},
        "image_token_id": 250,
    },
    "qwen2_5_vl": {"text_config": THREE_POSITIONS, "vision_config": QWEN_VISION, **QWEN_IDS},
    "qwen3_vl": {"text_config": THREE_POSITIONS, "vision_config": QWEN_VISION, **QWEN_IDS},
    "qwen3_vl_moe": {
        "text_config": {
            **THREE_POSITIONS,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
        },
        "vision_config": QWEN_VISION,
        **QWEN_IDS,
    },
    "llama4": {
        "text_config": {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "attention_chunk_size": 64,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "pixel_shuffle_ratio": 0.5,
        },
        "tie_word_embeddings": False,
    },
    "aya_vision": {"text_config": {"model_type": "cohere2"}},
}
"""What each kind has besides `TEXT` and `VISION`."""
TEXT_PLACES = ("language_model.", "model.language_model.", "lm_head.")
"""Of the tensors of a text half, in the files; those of Qwen 2.5 have no place of their own."""


def make_multimodal(folder: Path, kind: str, text: dict[str, Any] | None = None, **changes: Any) -> Path:
    options = {"tie_word_embeddings": True} | KINDS[kind] | changes
    options["text_config"] = TEXT | options["text_config"] | (text or {})
    options["vision_config"] = VISION | options.get("vision_config", {})
    config = transformers.CONFIG_MAPPING[kind](**options)
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder
