"""Rollouts before a run: the memory and disk that they take, and what the untrained student writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from potstill.build.resolve import Resolved
from potstill.build.setup import RunSetup
from potstill.evals.own_samples import own_samples
from potstill.recipe.load import Recipe
from potstill.training.sampling import ROWS_AT_ONCE
from potstill.types import Finding

NUMBERS_PER_LOGIT = 4 + 4 + 8 + 8
"""Bytes: logits and their tempered copy in float32, probabilities and their running sum in float64."""
BYTES_PER_TOKEN = 4 + 4
"""Of a file of `rollouts/`: an id and a log-probability."""


def rows_of_block(recipe: Recipe) -> int:
    """Rows that the student writes before a step; 0 where it writes none."""
    config = recipe.rollouts
    if config is None:
        return 0
    return config.rows_of(recipe.train.rows_per_step) * config.every


def rollout_bytes(resolved: Resolved) -> int:
    """Memory that is taken while the student writes: the key-value cache of rows as long as the recipe's, a layer's
    copy while it grows, and the logits of one token a row.
    """
    recipe, rows = resolved.recipe, min(rows_of_block(resolved.recipe), ROWS_AT_ONCE)
    config: Any = resolved.student.model_config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_number = 2 if recipe.train.precision == "bfloat16" else 4
    # The caches of groups of similar prompts and the one that joins them are there together.
    layer = 2 * rows * recipe.corpus.tokens_per_row * heads * width * of_number
    return int(layer * (config.num_hidden_layers + 1) + rows * config.vocab_size * NUMBERS_PER_LOGIT)


def rollout_disk_bytes(recipe: Recipe, steps: int) -> int:
    """Of the files that are kept."""
    if recipe.rollouts is None:
        return 0
    files = -(-steps // recipe.rollouts.every)
    files = min(files, recipe.rollouts.keep) if recipe.rollouts.keep else files
    return files * rows_of_block(recipe) * recipe.corpus.tokens_per_row * BYTES_PER_TOKEN


def student_writes(setup: RunSetup) -> Iterator[Finding]:
    """What the untrained student writes behind held-out prompts. Where none of it ends, no end can be graded."""
    given = setup.rollouts
    if given is None:
        return
    rows = setup.recipe.train.micro_batch_rows
    own, _ = own_samples(setup.student, setup.teacher, given.heldout, given.config, given.ends, rows)
    theirs = own.get("own/teacher_nll")
    figure = (
        f"of {len(given.heldout)} answers of {own['own/tokens']:.0f} tokens {own['own/ended']:.0%} end by themselves;"
        f" {own['own/student_nll']:.3f} nats a token under the student"
        + ("" if theirs is None else f", {theirs:.3f} under the teacher")
        + f"; KL to the teacher {own['own/reverse_kl']:.3f}; {own['own/distinct_4']:.0%} of 4-grams are distinct"
    )
    advice = (
        "No answer ends within rollouts.max_new_tokens: raise it, or train on answers first, so that the student knows"
        " how to end"
    )
    yield Finding("rollouts", figure, own["own/ended"] > 0, advice, own, ends_run=False)
