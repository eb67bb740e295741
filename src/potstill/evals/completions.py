"""What every evaluation that has a model write does the same way: a batch of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig

from potstill.errors import UserError, one_line
from potstill.models import generate
from potstill.models.causal_lm import CausalLM
from potstill.models.generate import Completion, InferenceFailed, Request


def completed(
    model: CausalLM, tokenizer: Any, settings: GenerationConfig, requests: Sequence[Request], seed: int
) -> list[Completion]:
    """One batch.

    Raises:
        InferenceFailed: whatever the model raises: it must not count as a wrong answer.
    """
    try:
        return generate.complete(model, tokenizer, settings, requests, seed)
    except (InferenceFailed, UserError):
        raise
    except Exception as error:
        raise InferenceFailed(
            f"{requests[0].name} and its batch: {type(error).__name__}: {one_line(error)}"
        ) from error
