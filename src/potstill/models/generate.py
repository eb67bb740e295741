"""Completions from a model, many prompts at once: left-padded rows over a key-value cache, out of which a row
is dropped as soon as it ends.

Transformers' `generate` keeps every row until the last one ends, and quietly adds what a model's generation
config asks for (a repetition penalty, a top-k). Here the settings are one object that the loop reads, and
that the result is written from.
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

PRECEDING = 8
"""Tokens of the prompt that are decoded before a completion: a decoder may eat the space it begins with."""
FOLLOWED = {"eos_token_id", "suppress_tokens"}
NO_MATTER = {"bos_token_id", "pad_token_id", "transformers_version", "use_cache"}


class InferenceFailed(Exception):
    """The model gave no completion that could be judged."""


@dataclass(frozen=True)
class Ask:
    """One completion that is wanted. `is_whole` says of the text so far whether more of it would be cut."""

    name: str
    prompt_ids: list[int]
    is_whole: Callable[[str], bool]


@dataclass(frozen=True)
class Completion:
    """`finish` is eos, stop (the text was whole), length (`max_new_tokens`) or context (of the model)."""

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
    """What the loop will read. Temperature 0 is greedy.

    Generation ends at every id that the model, its tokenizer or `end_ids` calls an end: chat models are
    published whose config names only the end of a text, and not of a turn.
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


def read_back(settings: GenerationConfig, model: CausalLM) -> dict[str, Any]:
    """The settings as the loop has them, and those of the model's own config that it does not follow."""
    own = model.hf.generation_config.to_diff_dict()
    aside = FOLLOWED | NO_MATTER | {name for name in own if name.startswith(("_", "output_"))}
    return {
        "do_sample": settings.do_sample,
        "temperature": settings.temperature if settings.do_sample else 0.0,
        "top_p": settings.top_p if settings.do_sample else 1.0,
        "max_new_tokens": settings.max_new_tokens,
        "eos_token_ids": settings.eos_token_id,
        "suppressed_ids": len(settings.suppress_tokens or ()),
        "context": context_of(model),
        "dtype": str(model.hf.dtype).removeprefix("torch."),
        "model_settings_not_followed": {n: v for n, v in sorted(own.items()) if n not in aside},
    }


def context_of(model: CausalLM) -> int | None:
    """Tokens that the model can see; None where its config does not say."""
    config = model.hf.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(found) if found else None


@dataclass
class _Row:
    ask: Ask
    room: int
    out_of_room: str
    uniforms: list[float]
    new: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""


@torch.no_grad()
def complete(
    model: CausalLM, tokenizer: Any, settings: GenerationConfig, asks: Sequence[Ask], seed: int = 0
) -> list[Completion]:
    """One completion for each of `asks`, all of them in one batch.

    What is sampled is a function of the logits, the seed and an ask's name, and not of its neighbours.

    Raises:
        InferenceFailed: a logit is not finite.
    """
    was_training = model.training
    model.eval()
    try:
        rows = [_row(ask, settings, context_of(model), seed) for ask in asks]
        _run(model, tokenizer, settings, [row for row in rows if not row.finish])
    finally:
        model.train(was_training)
    return [Completion(row.text, len(row.new), row.finish) for row in rows]


def _run(model: CausalLM, tokenizer: Any, settings: GenerationConfig, live: list[_Row]) -> None:
    if not live:
        return
    ids_BT, mask_BT = _left_padded([row.ask.prompt_ids for row in live], settings.pad_token_id, model.device)
    warpers, ends, cache = _warpers(settings), set(_ids(settings.eos_token_id)), None
    # Transformers calls it `cache` from 5.24 on, and warns of the old name.
    known = inspect.signature(model.hf.base_model.forward).parameters
    cache_name = "cache" if "cache" in known else "past_key_values"
    while live:
        positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
        out = model.hf.base_model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            use_cache=True,
            **{cache_name: cache},
        )
        cache = getattr(out, cache_name, None)
        if cache is None:
            raise InferenceFailed(f"{live[0].ask.name}: {type(model.hf).__name__} keeps no key-value cache")
        next_B = _choose(model, settings, warpers, out.last_hidden_state[:, -1], live)
        for row, token in zip(live, next_B.tolist(), strict=True):
            _take(row, token, tokenizer, ends)
        kept = [i for i, row in enumerate(live) if not row.finish]
        if len(kept) < len(live):
            kept_B = torch.tensor(kept, dtype=torch.long, device=next_B.device)
            live = [live[i] for i in kept]
            mask_BT, next_B = mask_BT[kept_B], next_B[kept_B]
            if live:
                cache.batch_select_indices(kept_B)
        ids_BT = next_B[:, None]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], 1)


def _row(ask: Ask, settings: GenerationConfig, context: int | None, seed: int) -> _Row:
    limit = int(settings.max_new_tokens)
    room = limit if context is None else min(limit, context - len(ask.prompt_ids))
    reason = "length" if room == limit else "context"
    uniforms: list[float] = []
    if settings.do_sample and room > 0:
        digest = hashlib.sha256(f"{seed} {ask.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        uniforms = torch.rand(room, generator=generator, dtype=torch.float64).tolist()
    return _Row(ask, room, reason, uniforms, finish="" if room > 0 else reason)


def _take(row: _Row, token: int, tokenizer: Any, ends: set[int]) -> None:
    if token in ends:
        row.finish = "eos"
        return
    row.new.append(token)
    row.text = _decoded(tokenizer, row.ask.prompt_ids[-PRECEDING:], row.new)
    if row.ask.is_whole(row.text):
        row.finish = "stop"
    elif len(row.new) >= row.room:
        row.finish = row.out_of_room


def _decoded(tokenizer: Any, before: list[int], new: list[int]) -> str:
    """The text of `new` as it stands after `before`, with the white space that it begins with."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text: str = tokenizer.decode([*before, *new], **options)
    return text[len(tokenizer.decode(before, **options)) :]


def _choose(
    model: CausalLM,
    settings: GenerationConfig,
    warpers: LogitsProcessorList,
    hidden_BD: Tensor,
    live: list[_Row],
) -> Tensor:
    logits_BV = model.logits(hidden_BD)
    if not bool(torch.isfinite(logits_BV[:, : model.known]).all()):
        names = [r.ask.name for r, v in zip(live, logits_BV[:, : model.known], strict=True) if _odd(v)]
        raise InferenceFailed(f"{names[0]}: logits are not finite after {len(live[0].new)} new tokens")
    if settings.suppress_tokens:
        logits_BV[:, settings.suppress_tokens] = -torch.inf
    if not settings.do_sample:
        return logits_BV.argmax(-1)
    # One uniform number a row, from the row's own generator, through the inverse of its distribution.
    warped_BV = warpers(logits_BV.new_zeros(len(live), 0).long(), logits_BV)
    cumulated_BV = warped_BV.double().softmax(-1).cumsum(-1)
    uniform_B1 = cumulated_BV.new_tensor([[row.uniforms[len(row.new)]] for row in live])
    drawn_B = torch.searchsorted(cumulated_BV, uniform_B1 * cumulated_BV[:, -1:], right=True)[:, 0]
    return drawn_B.clamp_max(logits_BV.shape[1] - 1)


def _odd(logits_V: Tensor) -> bool:
    return not bool(torch.isfinite(logits_V).all())


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


def _ids(one_or_more: Any) -> list[int]:
    """Transformers lets an id be one number, a list of them, or none."""
    if one_or_more is None:
        return []
    return list(one_or_more) if isinstance(one_or_more, list | tuple) else [one_or_more]
