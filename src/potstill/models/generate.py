"""Batched generation: left-padded prompts over a key-value cache, from which a row is removed once it ends.

Transformers' `generate` keeps every row until the last one ends, and silently applies whatever the model's
own generation config contains (a repetition penalty, a top-k). Here one settings object drives the loop, and
the settings in a result are read from that same object.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from potstill.models.causal_lm import CausalLM

DECODE_CONTEXT = 8
"""Prompt tokens decoded together with a completion: some decoders drop the space that a text starts with."""
APPLIED = {"eos_token_id", "suppress_tokens"}
IRRELEVANT = {"bos_token_id", "pad_token_id", "transformers_version", "use_cache"}
"""Fields of a model's own generation config: those that apply here, and those that change no token."""


class InferenceFailed(Exception):
    """The model produced nothing that could be scored."""


@dataclass(frozen=True)
class Request:
    """One prompt to complete. Generation ends once `should_stop` is true of the text so far."""

    name: str
    prompt_ids: list[int]
    should_stop: Callable[[str], bool]


@dataclass(frozen=True)
class Completion:
    """`finish` is eos, stop (`should_stop`), length (`max_new_tokens`) or context (the model's is full)."""

    text: str
    tokens: int
    finish: str


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
        "dtype": str(model.hf.dtype).removeprefix("torch."),
        "model_settings_not_followed": {n: v for n, v in sorted(own.items()) if n not in omitted},
    }


def context_length(model: CausalLM) -> int | None:
    """The model's maximum length in tokens; None if its config does not give one."""
    config = model.hf.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(length) if length else None


@dataclass
class _Row:
    request: Request
    max_new: int
    limit: str
    """Which limit `max_new` is: the `finish` of a row that reaches it."""
    uniforms: list[float]
    new: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""


@torch.no_grad()
def complete(
    model: CausalLM, tokenizer: Any, settings: GenerationConfig, requests: Sequence[Request], seed: int = 0
) -> list[Completion]:
    """One completion for each request, all of them in one batch.

    What is sampled depends on the logits, the seed and the request's name, not on the rest of the batch.

    Raises:
        InferenceFailed: a logit is not finite.
    """
    was_training = model.training
    model.eval()
    try:
        rows = [_start(request, settings, context_length(model), seed) for request in requests]
        _generate(model, tokenizer, settings, [row for row in rows if not row.finish])
    finally:
        model.train(was_training)
    return [Completion(row.text, len(row.new), row.finish) for row in rows]


@torch.no_grad()
def greedy_text(model: CausalLM, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """A sample for a person to read: what the model writes after `prompt`, up to its EOS.

    By Transformers' own `generate`, so this one does follow the model's generation config.
    """
    was_training = model.training
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    ids_BT = model.hf.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    model.train(was_training)
    text: str = tokenizer.decode(ids_BT[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def _generate(model: CausalLM, tokenizer: Any, settings: GenerationConfig, live: list[_Row]) -> None:
    if not live:
        return
    ids_BT, mask_BT = _left_padded(
        [row.request.prompt_ids for row in live], settings.pad_token_id, model.device
    )
    warpers, ends, cache = _warpers(settings), set(_ids(settings.eos_token_id)), None
    # Transformers calls it `cache` since 5.24 and warns about the old name.
    parameters = inspect.signature(model.body.forward).parameters
    cache_name = "cache" if "cache" in parameters else "past_key_values"
    while live:
        positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
        out = model.body(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            use_cache=True,
            **{cache_name: cache},
        )
        cache = getattr(out, cache_name, None)
        if cache is None:
            raise InferenceFailed(
                f"{live[0].request.name}: {type(model.hf).__name__} keeps no key-value cache"
            )
        next_B = _next_tokens(model, settings, warpers, out.last_hidden_state[:, -1], live)
        for row, token in zip(live, next_B.tolist(), strict=True):
            _append(row, token, tokenizer, ends)
        kept = [i for i, row in enumerate(live) if not row.finish]
        if len(kept) < len(live):
            kept_B = torch.tensor(kept, dtype=torch.long, device=next_B.device)
            live = [live[i] for i in kept]
            mask_BT, next_B = mask_BT[kept_B], next_B[kept_B]
            if live:
                cache.batch_select_indices(kept_B)
        ids_BT = next_B[:, None]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], 1)


def _start(request: Request, settings: GenerationConfig, context: int | None, seed: int) -> _Row:
    wanted = int(settings.max_new_tokens)
    max_new = wanted if context is None else min(wanted, context - len(request.prompt_ids))
    limit = "length" if max_new == wanted else "context"
    uniforms: list[float] = []
    if settings.do_sample and max_new > 0:
        digest = hashlib.sha256(f"{seed} {request.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        uniforms = torch.rand(max_new, generator=generator, dtype=torch.float64).tolist()
    return _Row(request, max_new, limit, uniforms, finish="" if max_new > 0 else limit)


def _append(row: _Row, token: int, tokenizer: Any, ends: set[int]) -> None:
    if token in ends:
        row.finish = "eos"
        return
    row.new.append(token)
    row.text = _decode(tokenizer, row.request.prompt_ids[-DECODE_CONTEXT:], row.new)
    if row.request.should_stop(row.text):
        row.finish = "stop"
    elif len(row.new) >= row.max_new:
        row.finish = row.limit


def _decode(tokenizer: Any, before: list[int], new: list[int]) -> str:
    """The text of `new` as it reads after `before`, leading white space included."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text: str = tokenizer.decode([*before, *new], **options)
    return text[len(tokenizer.decode(before, **options)) :]


def _next_tokens(
    model: CausalLM,
    settings: GenerationConfig,
    warpers: LogitsProcessorList,
    hidden_BD: Tensor,
    live: list[_Row],
) -> Tensor:
    logits_BV = model.logits(hidden_BD)
    finite_B = torch.isfinite(logits_BV[:, : model.known]).all(-1)
    if not bool(finite_B.all()):
        name = live[int(finite_B.int().argmin())].request.name
        raise InferenceFailed(f"{name}: logits are not finite after {len(live[0].new)} new tokens")
    if settings.suppress_tokens:
        logits_BV[:, settings.suppress_tokens] = -torch.inf
    if not settings.do_sample:
        return logits_BV.argmax(-1)
    # Inverse transform sampling, from the row's own uniforms: the rest of the batch has no influence.
    warped_BV = warpers(logits_BV.new_zeros(len(live), 0).long(), logits_BV)
    cumulated_BV = warped_BV.double().softmax(-1).cumsum(-1)
    uniform_B1 = cumulated_BV.new_tensor([[row.uniforms[len(row.new)]] for row in live])
    drawn_B = torch.searchsorted(cumulated_BV, uniform_B1 * cumulated_BV[:, -1:], right=True)[:, 0]
    return drawn_B.clamp_max(logits_BV.shape[1] - 1)


def _warpers(settings: GenerationConfig) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if settings.do_sample and settings.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.do_sample and settings.top_p < 1.0:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return warpers


def _left_padded(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(map(len, prompts))
    ids_BT = torch.tensor([[pad] * (length - len(ids)) + ids for ids in prompts])
    mask_BT = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    return ids_BT.to(device), mask_BT.to(device)


def _ids(value: Any) -> list[int]:
    """Transformers allows one id, a list of ids, or None."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
