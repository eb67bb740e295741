"""Texts that a model writes: completions of prompts, up to an end, a stop rule or a limit.

The settings in a result are read from the object that drives the decoding (`decoding.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from potstill.models import decoding
from potstill.models.causal_lm import CausalLM
from potstill.models.decoding import Decode, InferenceFailed, Row, uniforms

__all__ = [
    "Completion",
    "InferenceFailed",
    "Request",
    "complete",
    "describe_settings",
    "greedy_text",
    "make_settings",
    "prompt_ids",
]

DECODE_CONTEXT = 8
"""Prompt tokens decoded together with a completion: some decoders drop the space that a text starts with."""
APPLIED = {"eos_token_id", "suppress_tokens"}
IRRELEVANT = {"bos_token_id", "pad_token_id", "transformers_version", "use_cache"}
"""Fields of a model's own generation config: those that apply here, and those that change no token."""


@dataclass(frozen=True)
class Request:
    """One prompt to complete. Generation ends once `should_stop` is true of the text so far."""

    name: str
    prompt_ids: list[int]
    should_stop: Callable[[str], bool]
    shown: frozenset[int] = frozenset()
    """Special tokens that are in the completion's text; all others are left out of it."""


@dataclass(frozen=True)
class Completion:
    """`finish` is eos, stop (`should_stop`), length (`max_new_tokens`) or context (the model's is full)."""

    text: str
    tokens: int
    finish: str
    logp: float
    """Nats, of all its tokens and its end, under the model itself."""


def make_settings(
    model: CausalLM,
    tokenizer: Any,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    end_ids: Sequence[int] = (),
) -> GenerationConfig:
    """The settings that the loop reads. Temperature 0 is greedy.

    Every id that the model, its tokenizer or `end_ids` names as an end ends a row: some published chat models
    have a config that names only the end of the text, not the end of a turn.
    """
    own = model.hf.generation_config
    ends = {*end_ids, *_ids(own.eos_token_id), *_ids(model.hf.config.get_text_config().eos_token_id)}
    ends |= set(_ids(tokenizer.eos_token_id))
    pad = next((i for i in (tokenizer.pad_token_id, *sorted(ends)) if i is not None), 0)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        suppress_tokens=own.suppress_tokens,
        **sampling,
    )


def describe_settings(settings: GenerationConfig, model: CausalLM) -> dict[str, Any]:
    """The settings in effect, and those of the model's own config that are not applied."""
    own = model.hf.generation_config.to_diff_dict()
    omitted = APPLIED | IRRELEVANT | {name for name in own if name.startswith(("_", "output_"))}
    return {
        "do_sample": settings.do_sample,
        "temperature": settings.temperature if settings.do_sample else 0.0,
        "top_p": settings.top_p if settings.do_sample else 1.0,
        "max_new_tokens": settings.max_new_tokens,
        "eos_token_ids": settings.eos_token_id,
        "suppressed_ids": len(settings.suppress_tokens or ()),
        "context": context_length(model),
        "model_settings_not_followed": {n: v for n, v in sorted(own.items()) if n not in omitted},
    }


def context_length(model: CausalLM) -> int | None:
    """The model's maximum length in tokens; None if its config does not give one."""
    config = model.hf.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(length) if length else None


@dataclass(kw_only=True)
class _Text(Row):
    """A row that is decoded as a text."""

    request: Request
    tokenizer: Any
    ends: frozenset[int]
    limit: str
    """Which limit `max_new` is: the `finish` of a row that reaches it."""
    text: str = ""

    def add(self, token: int) -> None:
        if token in self.ends:
            self.finish = "eos"
            return
        self.new.append(token)
        before = self.prompt_ids[-DECODE_CONTEXT:]
        self.text = _decode(self.tokenizer, before, self.new, self.request.shown)
        if self.request.should_stop(self.text):
            self.finish = "stop"
        elif len(self.new) >= self.max_new:
            self.finish = self.limit


def complete(
    model: CausalLM,
    tokenizer: Any,
    settings: GenerationConfig,
    requests: Sequence[Request],
    seed: int = 0,
    decode: Decode | None = None,
) -> list[Completion]:
    """One completion for each request, all of them in one batch.

    What is sampled depends on the logits, the seed and the request's name, not on the rest of the batch.

    Args:
        decode: where something else than `model` decodes; its limits are read all the same.

    Raises:
        InferenceFailed: a logit is not finite.
    """
    rows = [_start(request, tokenizer, settings, context_length(model), seed) for request in requests]
    if decode is None:
        decoding.decode(model, settings, rows)
    else:
        decode(settings, rows, lambda: None)
    return [Completion(row.text, len(row.new), row.finish, sum(row.logps)) for row in rows]


def prompt_ids(tokenizer: Any, text: str, is_chat: bool, ends: Sequence[int]) -> list[int]:
    """The ids of a prompt. A chat template writes the special tokens itself; an EOS that a tokenizer appends to plain
    text is left out, since what it ends would not be gone on with.
    """
    return without_end(tokenizer(text, add_special_tokens=not is_chat)["input_ids"], is_chat, ends)


def without_end(ids: list[int], is_chat: bool, ends: Sequence[int]) -> list[int]:
    """The ids of plain text without an EOS at their end."""
    while not is_chat and len(ids) > 1 and ids[-1] in ends:
        ids.pop()
    return ids


@torch.no_grad()
def greedy_text(
    model: CausalLM, tokenizer: Any, prompt: str, max_new_tokens: int, chat_ends: Sequence[int] = ()
) -> str:
    """A sample for a person to read: what the model writes after `prompt`, up to its EOS.

    By Transformers' own `generate`, so this one does follow the model's generation config.

    Args:
        chat_ends: of a prompt that a chat template wrote, special tokens included: ids that end the answer.
    """
    was_training = model.training
    model.eval()
    options = {"return_tensors": "pt", "return_token_type_ids": False}
    inputs = tokenizer(prompt, add_special_tokens=not chat_ends, **options).to(model.device)
    ends = {"eos_token_id": [*chat_ends]} if chat_ends else {}
    ids_BT = model.hf.generate(
        **inputs,
        **ends,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    model.train(was_training)
    text: str = tokenizer.decode(ids_BT[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def _start(
    request: Request, tokenizer: Any, settings: GenerationConfig, context: int | None, seed: int
) -> _Text:
    wanted = int(settings.max_new_tokens)
    max_new = wanted if context is None else min(wanted, context - len(request.prompt_ids))
    limit = "length" if max_new == wanted else "context"
    own = uniforms(seed, request.name, max_new) if settings.do_sample and max_new > 0 else []
    return _Text(
        name=request.name,
        prompt_ids=request.prompt_ids,
        max_new=max_new,
        uniforms=own,
        finish="" if max_new > 0 else limit,
        request=request,
        tokenizer=tokenizer,
        ends=frozenset(_ids(settings.eos_token_id)),
        limit=limit,
    )


def _decode(tokenizer: Any, before: list[int], new: list[int], shown: frozenset[int]) -> str:
    """The text of `new` as it reads after `before`, leading white space included."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    if not shown.isdisjoint([*before, *new]):
        added = tokenizer.added_tokens_decoder
        before, new = (
            [i for i in ids if i in shown or i not in added or not added[i].special] for ids in (before, new)
        )
        options["skip_special_tokens"] = False
    text: str = tokenizer.decode([*before, *new], **options)
    return text[len(tokenizer.decode(before, **options)) :]


def _ids(value: Any) -> list[int]:
    """Transformers allows one id, a list of ids, or None."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
