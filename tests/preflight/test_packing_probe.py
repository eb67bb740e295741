"""Models that cannot keep packed documents apart: refused by plan and distill alike, taken with one document a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_tokenizer

from potstill.cli.main import main

SIZES = {
    "vocab_size": len(make_tokenizer()),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 4},
    "gpt_oss": {
        "intermediate_size": 32,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
}


def made(folder: Path, family: str, seed: int) -> Path:
    torch.manual_seed(seed)
    specials = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family] | specials)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.soak] * (family == "mamba")) for family in FAMILIES]
)
def test_a_model_that_mixes_packed_documents_learns_from_one_document_a_row(
    family: str, tmp_path: Path, tiny_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student = made(tmp_path / "T", family, 0), made(tmp_path / "S", family, 1)
    recipe = str(
        tiny_recipe(
            teacher=f"{{name: torch, model: {teacher}}}", student=f"{{name: checkpoint, model: {student}}}"
        )
    )
    for command in (["plan", recipe], ["distill", recipe, "--out", str(tmp_path / "refused")]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "corpus.packing" in error and "Set it to false" in error and "Traceback" not in error
    assert not (tmp_path / "refused").exists()

    alone = "corpus.packing=false"
    assert main(["plan", recipe, alone]) == 0
    assert main(["distill", recipe, alone, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [step["heldout/kl"] for step in steps if "heldout/kl" in step]
    assert losses[-1] < losses[0]
