"""The sections `rollouts` and `write`: rows that the student writes itself, and a corpus that the teacher writes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from potstill.recipe.fields import Config, Count, CountOrZero, LocalPath, Positive, PositiveOrZero, Seed
from potstill.registry import implementation

PROMPT_TOKENS = 32
"""Of a document without turns, where `prompt_tokens` says nothing."""


@dataclass(frozen=True, kw_only=True)
class RolloutsConfig(Config):
    """On-policy distillation (Agarwal et al. 2023, arXiv 2306.13649): the student completes prompts of the corpus with
    its weights of that step, and the objective is the same one, at the positions that it wrote."""

    fraction: Annotated[float, Interval(ge=0, le=1)] = 1.0
    """Share of the rows of each step that the student writes, rounded down to whole rows; the others are the corpus's.
    0: none."""
    every: Count = 1
    """Steps between two samplings: each writes the rows of so many steps, with the weights before the first of them.
    More is faster, and further from the student's own text."""
    max_new_tokens: Count = 128
    """Longest completion, in tokens."""
    prompt_tokens: Count | None = None
    """Of a document without turns: its first so many tokens are the prompt; null: 32, or what a row has room for."""
    temperature: Positive = 1.0
    """Of sampling; that of the loss is objective.temperature."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens alone that have together so much probability; 1: from all."""
    top_k: CountOrZero = 0
    """Sample from the so many likeliest tokens alone; 0: from all."""
    truncated: Literal["keep", "mask"] = "keep"
    """A completion that max_new_tokens cut off, which has no end, bears loss as others do (keep), or none (mask). A
    step that would have nothing else keeps them."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples: the student in this process, or a vLLM engine in a process of its own, which gets the weights
    before each sampling."""
    vllm_python: LocalPath | None = None
    """The Python of an environment that has vLLM, relative to the recipe; null: the one that runs potstill."""
    max_engine_gap: Positive = 0.05
    """Largest mean difference, in nats, between the engine's log-probabilities of what it wrote and the trainer's; a
    larger one ends the run."""
    keep: CountOrZero = 100
    """Files of `rollouts/` that are kept, the newest, and as many as a checkpoint may need; 0: all."""

    def rows_of(self, rows_per_step: int) -> int:
        """Of a step's rows those that the student writes."""
        return int(self.fraction * rows_per_step + 1e-9)  # 0.7 of 10 rows are 7

    def require(self) -> None:
        """UserError where its engine is not installed; called before the run starts."""
        implementation("potstill.training.engines:require")(self)

    def keeping_since(self, steps: int) -> RolloutsConfig:
        """With files for at least so many steps, where one may be needed that cannot be written again."""
        least = steps // self.every + 2 if self.every > 1 else 0
        return dataclasses.replace(self, keep=max(self.keep, least) if self.keep else 0)


@dataclass(frozen=True, kw_only=True)
class WriteConfig(Config):
    """Sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947): the teacher answers the corpus's prompts, and
    its answers are a corpus."""

    samples: Count = 1
    """Answers to each prompt."""
    max_new_tokens: Count = 256
    """Longest answer, in tokens; with its prompt it fits into corpus.tokens_per_row."""
    temperature: PositiveOrZero = 1.0
    """Of sampling; 0 takes the likeliest token every time."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens alone that have together so much probability; 1: from all."""
    top_k: CountOrZero = 0
    """Sample from the so many likeliest tokens alone; 0: from all."""
    truncated: Literal["drop", "keep"] = "drop"
    """What becomes of an answer that max_new_tokens cut off."""
    min_new_tokens: Count = 1
    """Shortest answer that is kept, in tokens without its end."""
    prompts_at_once: Count = 8
    """Prompts that are answered in one batch."""
    seed: Seed = 0
    """Seed of sampling."""
