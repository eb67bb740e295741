"""A causal LM that says what a test wrote down: its logits follow a table of prompts and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from conftest import make_tokenizer, tiny_config
from torch import Tensor, nn
from transformers import GenerationConfig

from potstill.models.causal_lm import CausalLM

TOKENIZER = make_tokenizer()
EOS, PAD = 0, 1


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


class Said:
    """The key-value cache of a model without keys or values: what each row has read."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def batch_select_indices(self, kept: Tensor) -> None:
        self.rows = [self.rows[i] for i in kept.tolist()]


class Body(nn.Module):
    def __init__(self, table: Mapping[tuple[int, ...], Sequence[int]], width: int) -> None:
        super().__init__()
        self.table, self.width = table, width

    def next_of(self, said: list[int]) -> int:
        for prompt, answer in self.table.items():
            new = said[len(prompt) :]
            if tuple(said[: len(prompt)]) == prompt and list(answer[: len(new)]) == new:
                return answer[len(new)] if len(new) < len(answer) else EOS
        raise KeyError(TOKENIZER.decode(said))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache: Said | None = None,
        use_cache: bool = True,
    ) -> Any:
        before = cache.rows if cache else [[] for _ in input_ids]
        masks = attention_mask[:, -input_ids.shape[1] :]
        read = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, masks, strict=True)]
        rows = [old + new for old, new in zip(before, read, strict=True)]
        assert [int(p) for p in position_ids[:, -1]] == [len(row) - 1 for row in rows]
        hidden = torch.zeros(*input_ids.shape, self.width)
        for number, row in enumerate(rows):
            hidden[number, -1, self.next_of(row)] = 20.0
        return SimpleNamespace(last_hidden_state=hidden, cache=Said(rows))


class Scripted(nn.Module):
    """What `CausalLM` asks of a Transformers model, over the identity as its head."""

    def __init__(
        self, table: Mapping[tuple[int, ...], Sequence[int]], width: int = 258, context: int = 4096
    ) -> None:
        super().__init__()
        self.base_model = Body(table, width)
        self.out = nn.Linear(width, width, bias=False)
        self.out.weight.data = torch.eye(width)
        self.config = tiny_config(max_position_embeddings=context)
        self.generation_config = GenerationConfig(eos_token_id=EOS)
        self.dtype = torch.float32

    def get_output_embeddings(self) -> nn.Module:
        return self.out


def scripted(answers: Mapping[str, str | Sequence[int]], **options: Any) -> CausalLM:
    """Answers each prompt with its text and an end, or with its ids as they are."""
    table = {
        tuple(ids_of(prompt)): ([*ids_of(answer), EOS] if isinstance(answer, str) else [*answer])
        for prompt, answer in answers.items()
    }
    return CausalLM(Scripted(table, **options), "scripted")
