"""Completions of prompts, sampled from any model that decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import GenerationConfig

from potstill.data.completions import Completion
from potstill.data.prompts import Prompt
from potstill.errors import RankError
from potstill.models.decoding import Decode, InferenceFailed, Row, uniforms

ROWS_AT_ONCE = 64
"""Of a batch: its cache and logits are in memory together."""


class Sampling(Protocol):
    """How a model is sampled from: `RolloutsConfig`, `WriteConfig`."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...


@dataclass(kw_only=True)
class _Written(Row):
    """A row whose end is kept: the student learns to stop by it."""

    ends: frozenset[int]

    def add(self, token: int) -> None:
        self.new.append(token)
        if token in self.ends:
            self.finish = "eos"
        elif len(self.new) >= self.max_new:
            self.finish = "length"


def write(
    decode: Decode,
    prompts: Sequence[tuple[str, Prompt]],
    config: Sampling,
    ends: frozenset[int],
    seed: int,
    beat: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """Sample a completion of each prompt, `ROWS_AT_ONCE` in a batch; at temperature 0, the likeliest token every time.

    Args:
        decode: `Student.decode`, or `Teacher.decoder`.
        prompts: each with its name, from which its random numbers come.
        ends: ids that end a completion.

    Raises:
        RankError: a logit that is not finite, or a model without a cache.
    """
    is_random = config.temperature > 0
    sampled = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    settings = GenerationConfig(
        do_sample=is_random,
        pad_token_id=min(ends, default=0),
        eos_token_id=sorted(ends) or None,
        **(sampled if is_random else {}),
    )
    rows = [
        _Written(
            name=name,
            prompt_ids=prompt.ids,
            max_new=config.max_new_tokens,
            uniforms=uniforms(seed, name, config.max_new_tokens) if is_random else [],
            ends=ends,
            source=prompt.source,
        )
        for name, prompt in prompts
    ]
    try:
        for at in range(0, len(rows), ROWS_AT_ONCE):
            decode(settings, rows[at : at + ROWS_AT_ONCE], beat)
    except InferenceFailed as error:
        # Of several ranks, one alone may have seen it.
        raise RankError(f"rollouts: {error}. The model cannot be sampled from.") from error
    return [
        Completion(prompt, row.new, row.logps, row.finish == "eos")
        for row, (_, prompt) in zip(rows, prompts, strict=True)
    ]
