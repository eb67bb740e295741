"""Where a model has to stop: the token that a chat template puts behind an answer, and the tokenizer's EOS.

Many tokenizers have an EOS that ends a document (`<|endoftext|>`), and a template that ends a turn with another token
(`<|im_end|>`). A student that was trained on conversations writes the second, and a program that waits for the first
alone never stops.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from potstill.data.chats.templates import DATE, ChatTemplate
from potstill.errors import UserError

ANSWER = "potstill"
"""What the assistant says in the conversation that is rendered: a word that templates leave as it is."""
CONVERSATION = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}]


def end_of_turn(tokenizer: Any) -> int | None:
    """Id of the added token that directly follows an assistant's message in the chat template, white space aside.

    None without a chat template, where none follows, and where the template refuses a plain conversation, or does not
    end with it. Asked for at every save, it is rendered once.
    """
    return _end_of_turn(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=4)
def _end_of_turn(tokenizer: Any, template_text: str) -> int | None:
    """`template_text` is the part of the cache key that may change."""
    try:
        with ChatTemplate(tokenizer, DATE) as template:
            rendered = template.render("a plain conversation", CONVERSATION)
    except UserError:
        return None
    _, answer, behind = rendered.rpartition(ANSWER)
    behind = behind.lstrip()
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    # The longest: of <|end|> and <|end|><|x|> a tokenizer takes the second.
    following = max((token for token in added if token and behind.startswith(token)), key=len, default=None)
    return None if not answer or following is None else added[following]


def ends_of(tokenizer: Any) -> list[int]:
    """Ids that end what training rows hold: the EOS behind a document, and the chat template's end of turn."""
    ends = (tokenizer.eos_token_id, end_of_turn(tokenizer))
    return list(dict.fromkeys(end for end in ends if end is not None))


def answer_ends(tokenizer: Any | None, named: Iterable[int], ids: int) -> frozenset[int]:
    """Ids below `ids` that end an answer: `ends_of` the tokenizer, where there is one, and those that models name."""
    return frozenset(end for end in {*(() if tokenizer is None else ends_of(tokenizer)), *named} if end < ids)
