"""Which token ends a turn of a chat template, and which ids end what training rows hold."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import make_tokenizer

from potstill.data.chats import templates
from potstill.data.end_of_turn import end_of_turn, ends_of

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
BLOCK = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% generation %}{{ m['content'] }}"
    "{% endgeneration %}\n<|im_end|>{% endfor %}"
)
THOUGHT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}<|im_start|><think>\n\n"
    "</think>\n\n{{ m['content'] }}<|im_end|><|im_start|>{% endif %}{% endfor %}"
)
NOTHING = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
WORDS = "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n### End\n{% endfor %}"
REFUSES = "{{ raise_exception('no') }}"
REWRITES = "{% for m in messages %}<|im_start|>{{ m['content'] | upper }}<|im_end|>{% endfor %}"


def made(template: str | dict[str, str] | None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<|im", "<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA_2, "<eos>"),
        (BLOCK, "<|im_end|>"),
        (THOUGHT, "<|im_end|>"),
        ({"default": CHATML, "tool_use": LLAMA_2}, "<|im_end|>"),
        (NOTHING, None),
        (WORDS, None),
        (REFUSES, None),
        (REWRITES, None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_the_added_token_behind_an_answer(
    template: str | dict[str, str] | None, token: str | None
) -> None:
    tokenizer = made(template)
    expected = None if token is None else tokenizer.convert_tokens_to_ids(token)
    assert end_of_turn(tokenizer) == expected


def test_a_template_that_does_not_end_has_no_end_of_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1)
    assert end_of_turn(made("{{ 9 ** (9 ** 9) }}" + CHATML)) is None


def test_rows_end_with_eos_and_with_the_end_of_a_turn() -> None:
    tokenizer = made(CHATML)
    assert ends_of(tokenizer) == [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert ends_of(made(LLAMA_2)) == [0] and ends_of(made(None)) == [0]
