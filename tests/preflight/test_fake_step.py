"""What a trace leaves out does not change what it finds: against the same trace with every operation and every block
asked of PyTorch.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_mixture, make_model, make_tokenizer

from potstill import load_recipe
from potstill.build.resolve import resolve
from potstill.losses import fused
from potstill.losses.objective import Objective
from potstill.preflight import fake_step
from potstill.preflight.fake_step import Traced
from potstill.preflight.known_outputs import KnownOutputs
from potstill.preflight.memory_tracker import WatchedObjective

Write = Callable[..., Path]
POSITIONS = 8 * 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose layers are alike, differ in their attention, have experts, and dropout."""
    root = tmp_path_factory.mktemp("models")
    made = {"llama": make_model(root / "llama"), "mixtral": make_mixture(root / "mixtral")}
    shape: dict[str, Any] = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 0}
    gemma = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    configs = {
        "gemma3": transformers.Gemma3TextConfig(
            num_hidden_layers=6, head_dim=8, sliding_window=16, pad_token_id=1, **gemma, **shape
        ),
        "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **shape),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
        made[name] = root / name
    return made


def traced(path: Path) -> Traced:
    """Never one that was kept. Some tensors of a model are freed by the garbage collector, whenever it runs."""
    resolved = resolve(load_recipe(path))
    gc.disable()
    try:
        return dataclasses.replace(fake_step._trace(resolved), libraries=0)
    finally:
        gc.enable()


def traced_in_full(path: Path, patch: pytest.MonkeyPatch) -> Traced:
    with patch.context() as whole:
        whole.setattr(KnownOutputs, "__call__", lambda self, func, args, kwargs: func(*args, **kwargs))
        whole.setattr(WatchedObjective, "_each_of", Objective._each_of)
        return traced(path)


PLAIN = "rows_per_micro_batch: 2"
LEAN = "precision: bfloat16, activation_checkpointing: true, optimizer: muon"


@pytest.mark.parametrize(
    ("kind", "train"),
    [
        ("llama", PLAIN),
        ("gpt2", PLAIN),
        ("gemma3", LEAN),
        ("mixtral", LEAN),
        pytest.param("gemma3", PLAIN, marks=pytest.mark.soak),
        pytest.param("mixtral", PLAIN, marks=pytest.mark.soak),
        pytest.param("llama", LEAN, marks=pytest.mark.soak),
        pytest.param("gpt2", LEAN, marks=pytest.mark.soak),
    ],
)
def test_a_trace_is_the_trace_of_every_operation(
    kind: str,
    train: str,
    folders: dict[str, Path],
    corpus_folder: Path,
    tiny_recipe: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora = ", lora: {rank: 2, alpha: 4}" if train.startswith("rows") and kind in ("llama", "gpt2") else ""
    path = tiny_recipe(
        teacher=f"{{name: torch, model: {folders['llama']}}}",
        student=f"{{name: checkpoint, model: {folders[kind]}{lora}}}",
        corpus=f"{{name: text, path: {corpus_folder}, tokens_per_row: 64, heldout_rows: 2}}",
        train=f"{{steps: 2, rows_per_step: 6, lr: 1e-3, device: cpu, {train}}}",
    )
    if lora:
        traced(path)  # what a trace imports may make tensors of its own, once
    assert traced(path) == traced_in_full(path, monkeypatch)


FORWARD, JSD, LABELS = (
    "divergence: forward_kl, temperature: 2.0",
    "divergence: jsd",
    "kd_weight: 0.0, ce_weight: 1.0",
)


@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        (FORWARD, 50),
        (JSD, 103),
        (LABELS, 50),
        (FORWARD, 512),
        *(
            pytest.param(objective, rows, marks=pytest.mark.soak)
            for objective, rows in [(FORWARD, 103), (JSD, 50), (JSD, 512), (LABELS, 103), (LABELS, 512)]
        ),
    ],
)
def test_blocks_of_a_chunk_are_alike(
    objective: str, rows: int, tiny_recipe: Write, corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one, of few, of many, and with a last one that is smaller."""
    monkeypatch.setattr(fused, "BLOCK_NUMBERS", rows * 258)
    path = tiny_recipe(
        corpus=f"{{name: text, path: {corpus_folder}, tokens_per_row: 64, heldout_rows: 2}}",
        objective=f"{{chunk: {POSITIONS}, {objective}}}",
        train="{steps: 2, rows_per_step: 8, lr: 1e-3, device: cpu}",
    )
    found = traced(path)
    assert found == traced_in_full(path, monkeypatch)
    assert found.largest["loss_chunk"] > 0
