"""What runs the model that an evaluation asks: Transformers, or llama.cpp as it reads a GGUF file for its users."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from potstill.data.tokenizers import load_tokenizer, vocab_of
from potstill.errors import UserError, one_line
from potstill.io.hashing import file_sha256
from potstill.io.silence import quiet_process
from potstill.models import decoding, generate
from potstill.models.causal_lm import CausalLM
from potstill.models.decoding import InferenceFailed, Row
from potstill.models.generate import Completion, Request
from potstill.models.hub import local_copy
from potstill.models.load import (
    choose_device,
    choose_dtype,
    load_causal_lm,
    load_config,
    plain_config,
    weights_sha256,
    without_data,
)
from potstill.models.model_files import check_model_files
from potstill.types import Vocab

TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"
RUNTIMES = (TRANSFORMERS, LLAMA_CPP)
AT_ONCE = 32
"""Tokens asked of llama.cpp in one request; those behind the end of an answer are thrown away."""
FIRST_CONTEXT = 1024
TIMEOUT_S = 3600.0
TOP_K_OFF = 0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how a model runs, which a recipe decides by itself."""

    batch_rows: int = 32
    dtype: str = "float32"
    device: str = "auto"
    runtime: str = TRANSFORMERS

    def mistakes(self) -> dict[str, str]:
        """The fields that cannot be used, each with its problem."""
        found = {}
        if self.batch_rows < 1:
            found["batch_rows"] = f"{self.batch_rows}: must be at least 1."
        if self.runtime not in RUNTIMES:
            found["runtime"] = f"{self.runtime}: is not one of {', '.join(RUNTIMES)}."
        elif self.runtime == LLAMA_CPP:
            for name, default in (("dtype", "float32"), ("device", "auto"), ("batch_rows", 32)):
                if (value := getattr(self, name)) != default:
                    found[name] = f"{value}: has no effect with runtime {LLAMA_CPP}. Leave it out."
        return found


class Runtime(Protocol):
    model: CausalLM
    """On llama.cpp shapes and settings alone."""
    tokenizer: Any
    vocab: Vocab

    def prompt_ids(self, text: str, is_chat: bool, ends: Sequence[int]) -> list[int]:
        """As `generate.prompt_ids`."""

    def decode(self, settings: GenerationConfig, rows: Sequence[Row], beat: Callable[[], None] = ...) -> None:
        """As `decoding.decode`."""

    def describe(self) -> dict[str, Any]:
        """What an answer depends on besides its prompt and the settings of decoding."""


def open_runtime(source: str, placement: Placement) -> Runtime:
    """
    Args:
        source: a model folder, a GGUF file or a hub id; for llama.cpp a GGUF file.

    Raises:
        UserError: the model cannot be read, or the runtime is not installed.
    """
    kind = InLlamaCpp if placement.runtime == LLAMA_CPP else InTransformers
    return kind(source, placement)


def completed(
    runtime: Runtime, settings: GenerationConfig, requests: Sequence[Request], seed: int
) -> list[Completion]:
    """One batch.

    Raises:
        InferenceFailed: whatever the model raises: it must not count as a wrong answer.
    """
    try:
        return generate.complete(runtime.model, runtime.tokenizer, settings, requests, seed, runtime.decode)
    except (InferenceFailed, UserError):
        raise
    except Exception as error:
        raise InferenceFailed(
            f"{requests[0].name} and its batch: {type(error).__name__}: {one_line(error)}"
        ) from error


class InTransformers:
    def __init__(self, source: str, placement: Placement) -> None:
        path = local_copy(source)
        self.placement, self.tokenizer = placement, load_tokenizer(path)
        device = choose_device(placement.device)
        self.model = load_causal_lm(path, dtype=choose_dtype(placement.dtype), device=device)
        self.vocab = vocab_of(self.tokenizer, self.model.vocab_size)
        self.model.mask_from(self.vocab.known)

    def prompt_ids(self, text: str, is_chat: bool, ends: Sequence[int]) -> list[int]:
        return generate.prompt_ids(self.tokenizer, text, is_chat, ends)

    def decode(
        self, settings: GenerationConfig, rows: Sequence[Row], beat: Callable[[], None] = lambda: None
    ) -> None:
        decoding.decode(self.model, settings, rows, beat)

    def describe(self) -> dict[str, Any]:
        return {
            "weights_sha256": weights_sha256(self.model),
            "tokenizer_sha256": self.vocab.fingerprint,
            "batch_rows": self.placement.batch_rows,
            "device": self.model.device.type,
            "torch": torch.__version__,
            "dtype": str(self.model.hf.dtype).removeprefix("torch."),
        }


class InLlamaCpp:
    """The server in xllamacpp's wheel, with llama.cpp's own arithmetic, tokenizer and ends of a text; nothing but the
    settings given filters what it samples.
    """

    def __init__(self, source: str, placement: Placement) -> None:
        self.path = local_copy(source)
        if self.path.is_dir():
            raise UserError(
                f"{source}: a folder, and llama.cpp reads GGUF files. Give one: `potstill export` writes them."
            )
        check_model_files(self.path)
        self.tokenizer = load_tokenizer(self.path)
        config = plain_config(load_config(self.path))
        self.model = without_data(config, torch.float32, torch.device("meta"), source)
        self.vocab = vocab_of(self.tokenizer, self.model.vocab_size)
        self.post = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self._start(FIRST_CONTEXT)
        self.letter = self._ask("tokenize", {"content": "a", "add_special": False})["tokens"][0]

    def prompt_ids(self, text: str, is_chat: bool, ends: Sequence[int]) -> list[int]:
        body = {"content": text, "add_special": not is_chat, "parse_special": True}
        return generate.without_end(self._ask("tokenize", body)["tokens"], is_chat, ends)

    def decode(
        self, settings: GenerationConfig, rows: Sequence[Row], beat: Callable[[], None] = lambda: None
    ) -> None:
        for row in rows:
            while not row.finish:
                beat()
                self._go_on(settings, row)

    def describe(self) -> dict[str, Any]:
        return {
            "weights_sha256": file_sha256(self.path),
            "tokenizer_sha256": self.vocab.fingerprint,
            "device": "cpu",
            "runtime": self.version,
            "dtype": "as stored",
        }

    def _start(self, context: int) -> None:
        """For rows of so many tokens, or as many as the model has positions for."""
        try:
            import xllamacpp
        except Exception as error:  # such as a shared library that is missing
            raise UserError(
                f"runtime llama.cpp: xllamacpp cannot be imported: {one_line(error)}"
                " Install it: pip install 'potstill[gguf]'."
            ) from error
        self.version = f"xllamacpp {xllamacpp.__version__}"
        self.context = min(context, generate.context_length(self.model) or context)
        params = xllamacpp.CommonParams()
        params.model.path = os.fspath(self.path)
        params.n_ctx, params.n_parallel = self.context, 1
        params.verbosity, params.warmup = -1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        try:
            with quiet_process():
                self.server = xllamacpp.Server(params)
        except Exception as error:  # llama.cpp raises anything over an architecture that it does not have
            raise UserError(f"{self.path}: llama.cpp cannot load it: {one_line(error)}") from error

    def _go_on(self, settings: GenerationConfig, row: Row) -> None:
        """The row's next tokens."""
        ids = [*row.prompt_ids, *row.new]
        count = min(AT_ONCE, row.max_new - len(row.new))
        if len(ids) + count > self.context:
            self._start(max(len(ids) + count, 2 * self.context))
        sampling: dict[str, Any] = {"temperature": 0}
        if settings.do_sample:
            sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": TOP_K_OFF}
            sampling |= {"min_p": 0, "samplers": ["temperature", "top_p"]}
            sampling |= {"seed": int(row.uniforms[len(row.new)] * 2**32)}
        asked = {"prompt": ids, "n_predict": count, "n_probs": 1, "return_tokens": True, **sampling}
        answer = self._ask("completion", asked)
        tokens = answer["tokens"]
        if not tokens:
            raise InferenceFailed(f"{row.name}: llama.cpp gives no token.")
        logps = [each["logprob"] for each in answer.get("completion_probabilities", ())]
        if len(logps) != len(tokens):
            logps = [self._logp([*ids, *tokens[:at]], token) for at, token in enumerate(tokens)]
        for token, logp in zip(tokens, logps, strict=True):
            row.logps.append(logp)
            row.add(token)
            if row.finish:
                return
        if answer["stop_type"] == "eos":  # a token that llama.cpp alone takes for an end
            row.new.pop()
            row.finish = "eos"

    def _logp(self, ids: list[int], token: int) -> float:
        """The token's log-probability after `ids`. The server leaves out that of a token whose bytes end inside a
        character; it has those of every token where it samples a whole one, which a bias makes it do.
        """
        asked: dict[str, Any] = {"prompt": ids, "n_predict": 1, "temperature": 0}
        asked |= {"n_probs": self.model.vocab_size, "logit_bias": [[self.letter, 1e9]]}
        (first,) = self._ask("completion", asked)["completion_probabilities"]
        return float(next(each["logprob"] for each in first["top_logprobs"] if each["id"] == token))

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.server.listening_address}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with self.post(request, timeout=TIMEOUT_S) as answer:
                return json.load(answer)
        except (OSError, ValueError) as error:
            why = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
            raise InferenceFailed(f"llama.cpp gives no answer: {one_line(error)} {why:.200}") from error
