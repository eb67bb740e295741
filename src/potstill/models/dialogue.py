"""A conversation with a model: each answer is decoded behind all that was said before it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from transformers import GenerationConfig

from potstill.data.chats.templates import DATE, ChatTemplate
from potstill.data.end_of_turn import ends_of
from potstill.models import generate
from potstill.models.causal_lm import CausalLM
from potstill.models.generate import Completion, Request, make_settings, prompt_ids

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for the first bytes of a character."""


class Dialogue:
    """Turns through the tokenizer's chat template; without one, a text that both sides go on with."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        *,
        system: str | None = None,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        ends = ends_of(tokenizer)
        self.settings: GenerationConfig = make_settings(
            model,
            tokenizer,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            end_ids=ends,
        )
        self.is_chat = bool(tokenizer.chat_template)
        self.system = system
        self.messages: list[dict[str, str]]
        self.text: str
        self.reset()

    def reset(self) -> None:
        """Forget what was said, but for the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.text = ""

    def reply(self, words: str, write: Callable[[str], None] = lambda piece: None) -> Completion:
        """The model's answer, which is kept, as `words` are.

        Args:
            write: called with each piece of the answer as it is decoded. A KeyboardInterrupt ends the answer there.

        Raises:
            InferenceFailed: a logit is not finite.
            UserError: the template refuses the conversation.
        """
        prompt = f"{self.text}{words}"
        if self.is_chat:
            asked = [*self.messages, {"role": "user", "content": words}]
            prompt = chat_prompt(self.tokenizer, asked)
        so_far = ""

        def wrote(text: str) -> bool:
            nonlocal so_far
            if not text.endswith(UNFINISHED):
                write(text[len(so_far) :])
                so_far = text
            return False

        name = f"turn {len(self.messages) // 2}" if self.is_chat else f"at {len(prompt)}"
        ids = prompt_ids(self.tokenizer, prompt, self.is_chat, self.settings.eos_token_id)
        answer = Completion(so_far, 0, "interrupted", 0.0)
        with contextlib.suppress(KeyboardInterrupt):
            (answer,) = generate.complete(
                self.model, self.tokenizer, self.settings, [Request(name, ids, wrote)], self.seed
            )
            write(answer.text[len(so_far) :])
            so_far = answer.text
        if self.is_chat:
            self.messages = [*asked, {"role": "assistant", "content": so_far}]
        self.text = f"{prompt}{so_far}"
        return replace(answer, text=so_far)


def chat_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """A conversation as the chat template writes it, up to where the assistant answers."""
    with ChatTemplate(tokenizer, DATE) as template:
        return template.render("the conversation", list(messages), prompt=True)


def is_chat(corpora: Iterable[Any], tokenizer: Any) -> bool:
    """Whether a student of these corpora (their configs) answers turns: all of them are conversations, or prompts that
    are a user's turn.
    """
    has_template = bool(tokenizer.chat_template)
    return has_template and all(each.is_chat or getattr(each, "chat", False) is not False for each in corpora)
