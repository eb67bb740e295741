"""A fork server, and two students: a GPT-2 with dropout and a Llama of four layers, taught by another one."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import make_corpus, make_model

from soak.forkserver import ForkServer
from soak.lab import SHORT, Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> Lab:
    """GPT-2 with dropout, so that the random state matters, and a Llama; both taught by another Llama."""
    folder = tmp_path_factory.mktemp("soak")
    make_corpus(folder / "texts")
    make_model(folder / "teacher")
    make_model(folder / "llama", seed=1)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "gpt2")
    lab = Lab(folder, forks)
    for student in ("gpt2", "llama"):
        forks.prepare(["distill", str(lab.recipe(student, SHORT)), "--out", str(folder / "first" / student)])
    return lab
