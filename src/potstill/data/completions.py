"""Completions of prompts as rows that bear loss on what was written, and as a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from potstill.data.packing import PackedRows
from potstill.data.prompts import Prompt
from potstill.types import Batch

ABOUT = "about"
"""Key of a file's metadata."""
NGRAM = 4
"""Of distinct-4: Li et al. 2016, arXiv 1510.03055."""


@dataclass(frozen=True)
class Completion:
    """What was written behind a prompt."""

    prompt: Prompt
    new: list[int]
    """Its end included, where it has one."""
    logps: list[float]
    """Log-probability of each, under the model at temperature 1."""
    ended: bool

    @property
    def ids(self) -> list[int]:
        return [*self.prompt.ids, *self.new]

    def as_teacher_reads(self) -> Completion:
        """The same behind the teacher's own prompt."""
        prompt = self.prompt
        if prompt.for_teacher is None:
            return self
        return dataclasses.replace(
            self, prompt=dataclasses.replace(prompt, ids=prompt.for_teacher, for_teacher=None)
        )


class CompletionRows(PackedRows):
    """One completion a row, padded to the longest, as rows of a token corpus with these documents are; what was written
    bears loss.
    """

    def __init__(self, completions: Sequence[Completion]) -> None:
        lengths = [len(each.ids) for each in completions]
        bears = [np.arange(len(each.ids)) >= len(each.prompt.ids) for each in completions]
        ids = np.array([i for each in completions for i in each.ids], dtype=np.uint32)
        starts = np.cumsum([0, *lengths], dtype=np.int64)[:-1]
        super().__init__(ids, starts, np.concatenate(bears), max(lengths), "single")
        self.completions = completions

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows, with what the teacher reads in their place."""
        own, chosen = super().batch(rows), [self.completions[row] for row in rows]
        sources = [each.prompt.source for each in chosen if each.prompt.source is not None]
        own = dataclasses.replace(own, sources_B=torch.tensor(sources) if sources else None)
        if all(each.prompt.for_teacher is None for each in chosen):
            return own
        read = CompletionRows([each.as_teacher_reads() for each in chosen]).batch(range(len(chosen)))
        return dataclasses.replace(own, for_teacher=dataclasses.replace(read, rows_B=own.rows_B))


def rollout_batch(completions: Sequence[Completion], numbers: Sequence[int]) -> Batch:
    """A micro-batch of what the student wrote, its rows under these numbers."""
    batch = CompletionRows(completions).batch(range(len(completions)))
    rows_B = torch.tensor(list(numbers), dtype=torch.int64)
    for_teacher = batch.for_teacher and dataclasses.replace(batch.for_teacher, rows_B=rows_B)
    return dataclasses.replace(batch, rows_B=rows_B, is_rollout=True, for_teacher=for_teacher)


def figures(completions: Sequence[Completion]) -> dict[str, float]:
    """How long they are, whether they end, and how much they repeat themselves."""
    if not completions:
        return {}
    ended = sum(each.ended for each in completions) / len(completions)
    grams = [
        gram for each in completions for gram in zip(*(each.new[n:] for n in range(NGRAM)), strict=False)
    ]
    return {
        "rollout/tokens": sum(len(each.new) for each in completions) / len(completions),
        "rollout/ended": ended,
        "rollout/truncated": 1 - ended,
        "rollout/distinct_4": len(set(grams)) / len(grams) if grams else 1.0,
    }


def as_texts(completions: Sequence[Completion], tokenizer: Any | None) -> list[str]:
    """What was written, control tokens included; ids where there is no tokenizer."""
    if tokenizer is None:
        return [" ".join(map(str, each.new)) for each in completions]
    return [str(tokenizer.decode(each.new, clean_up_tokenization_spaces=False)) for each in completions]


def as_file(completions: Sequence[Completion], about: dict[str, Any]) -> bytes:
    """Of `rollouts/`: ids of prompt and completion end to end, and of each row the lengths of both."""
    tensors = {
        "ids": torch.tensor([i for each in completions for i in each.ids], dtype=torch.int32),
        "prompt_lengths": torch.tensor([len(each.prompt.ids) for each in completions], dtype=torch.int32),
        "completion_lengths": torch.tensor([len(each.new) for each in completions], dtype=torch.int32),
        "ended": torch.tensor([each.ended for each in completions]),
        "logps": torch.tensor([logp for each in completions for logp in each.logps], dtype=torch.float32),
    }
    # One entry: safetensors writes several in an order of its own, and the file would have other bytes each time.
    return save(tensors, {ABOUT: json.dumps(about | {"sha256": _hash_of(tensors)})})


def from_file(path: Path, prompts: Sequence[Prompt]) -> list[Completion] | None:
    """The completions of a file; None where it is damaged, or has other prompts."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
    except (SafetensorError, OSError, ValueError):
        return None
    if about.get("sha256") != _hash_of(tensors):
        return None
    found, place, logps = [], 0, iter(tensors["logps"].tolist())
    ids = tensors["ids"].tolist()
    shapes = zip(
        tensors["prompt_lengths"].tolist(),
        tensors["completion_lengths"].tolist(),
        tensors["ended"].tolist(),
        strict=True,
    )
    if len(tensors["ended"]) != len(prompts):
        return None
    for prompt, (before, count, ended) in zip(prompts, shapes, strict=True):
        if ids[place : place + before] != prompt.ids:
            return None
        new = ids[place + before : place + before + count]
        found.append(Completion(prompt, new, [next(logps) for _ in new], ended))
        place += before + count
    return found


def _hash_of(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
