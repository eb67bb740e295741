"""What names and shapes do not show: weights that are not finite, and positions that depend on the input's length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from potstill.errors import UserError
from potstill.models.causal_lm import CausalLM
from potstill.models.load import load_causal_lm

ORIGINAL = 16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.3.mlp.down_proj.weight"])
def test_a_tensor_with_a_value_that_is_not_finite_is_named(tmp_path: Path, name: str, value: float) -> None:
    folder = make_model(tmp_path / "m", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights[name][-1, 0] = value  # in the embedding of an id that no probe uses
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"tensor {name} has 1 of .* not finite, first at"):
        load_causal_lm(folder)


def scaled(kind: str) -> CausalLM:
    """A model whose positions are stretched from 16 to 128 tokens."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if kind == "longrope":
        factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0, 6.0, 9.0, 16.0]}
        rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL} | factors
        config: Any = transformers.Phi3Config(
            **sizes,
            rope_parameters=rope,
            max_position_embeddings=128,
            original_max_position_embeddings=ORIGINAL,
        )
    else:
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 8.0}
        config = transformers.LlamaConfig(**sizes, rope_parameters=rope, max_position_embeddings=ORIGINAL)
    return CausalLM(transformers.AutoModelForCausalLM.from_config(config), kind).eval()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@torch.no_grad()
def test_a_document_has_the_positions_of_its_own_length_whatever_stands_beside_it(kind: str) -> None:
    lengths = [[10, 40, 14], [16, 17, 31], [64]]  # of three rows of 64 tokens, around the original 16
    ids_BT = torch.randint(1, 64, (3, 64), generator=torch.Generator().manual_seed(1))
    places_BT = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    alone_BTD = torch.stack([alone(kind, ids_T, row) for ids_T, row in zip(ids_BT, lengths, strict=True)])

    model = scaled(kind)
    together_BTD = model.hidden(ids_BT, places_BT)
    apart_BTD = torch.cat([model.hidden(ids_BT[b : b + 1], places_BT[b : b + 1]) for b in (2, 0, 1)])
    assert (together_BTD - alone_BTD).abs().max() < 1e-5
    assert (apart_BTD[[1, 2, 0]] - alone_BTD).abs().max() < 1e-5


def alone(kind: str, ids_T: Tensor, lengths: list[int]) -> Tensor:
    """hidden_TD of documents end to end, each by a model of its own that Transformers made and we do not touch."""
    parts = []
    for document_T in ids_T.split(lengths):
        config = scaled(kind).hf.config
        torch.manual_seed(0)
        hf = transformers.AutoModelForCausalLM.from_config(config).eval()
        parts.append(hf.base_model(input_ids=document_T[None], use_cache=False).last_hidden_state[0])
    return torch.cat(parts)
