"""Where a model has to stop: the token that a chat template puts behind an answer, and the tokenizer's EOS.

Many tokenizers have an EOS that ends a document (`<|endoftext|>`), and a template that ends a turn with another token
(`<|im_end|>`). A student that was trained on conversations writes the second, and a program that waits for the first
alone never stops.
"""

from __future__ import annotations

from typing import Any

from potstill.io.silence import quiet_transformers

ANSWER = "potstill"
"""What the assistant says in the conversation that is rendered: a word that templates leave as it is."""
CONVERSATION = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}]


def end_of_turn(tokenizer: Any) -> int | None:
    """Id of the added token that directly follows an assistant's message in the chat template, white space aside.

    None without a chat template, where none follows, and where the template refuses a plain conversation.
    """
    try:
        with quiet_transformers():
            rendered: str = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    except Exception:  # a template may raise anything, and without one it is a ValueError
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
