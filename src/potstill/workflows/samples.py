"""What teacher and student write behind the prompts of `eval.sample_prompt` and `eval.sample_prompts`, for a person to
read. Of a corpus of conversations a prompt is a user's turn, and goes through the chat template.
"""

from __future__ import annotations

from typing import Any

from potstill.build.setup import RunSetup
from potstill.data.end_of_turn import answer_ends, ends_of
from potstill.data.prompts import Prompt
from potstill.errors import UserError
from potstill.models.dialogue import chat_prompt, is_chat
from potstill.models.generate import greedy_text, prompt_ids
from potstill.recipe.sections_rollouts import WriteConfig
from potstill.training.sampling import write


def of_student(setup: RunSetup, prompt: str | None) -> str:
    """Greedy, by the student as it is now; empty without a prompt or a tokenizer."""
    tokenizer, most = setup.tokenizer, setup.recipe.eval.sample_tokens
    if prompt is None or tokenizer is None:
        return ""
    asked, ends = _asked(setup, tokenizer, prompt)
    return greedy_text(setup.student.model, tokenizer, asked, most, ends)


def of_teacher(setup: RunSetup, prompt: str | None) -> str | None:
    """The same by the teacher; None where it cannot write: targets that were stored are no teacher of new text."""
    teacher, tokenizer, ids = setup.teacher, setup.tokenizer, setup.shared.ids
    if prompt is None or tokenizer is None or not teacher.reads_new_text:
        return None
    asked, chat_ends = _asked(setup, tokenizer, prompt)
    named = set() if teacher.model is None else teacher.model.ends
    ends = answer_ends(tokenizer, named, ids)
    read = Prompt(0, prompt_ids(tokenizer, asked, bool(chat_ends), sorted(ends)))
    settings = WriteConfig(max_new_tokens=setup.recipe.eval.sample_tokens, temperature=0.0)
    try:
        (written,) = write(teacher.decoder(ids), [("sample", read)], settings, ends, seed=0)
    except UserError as error:  # the run does not depend on it
        setup.teacher.note(f"sample of the teacher: {error.mistakes[0]}")
        return None
    return str(tokenizer.decode(written.new, skip_special_tokens=True))


def _asked(setup: RunSetup, tokenizer: Any, prompt: str) -> tuple[str, list[int]]:
    """The text that is gone on with and, where a chat template wrote it, the ids that end an answer."""
    if not is_chat(setup.recipe.corpus.each, tokenizer):
        return prompt, []
    said = (
        [] if (system := setup.recipe.eval.sample_system) is None else [{"role": "system", "content": system}]
    )
    return chat_prompt(tokenizer, [*said, {"role": "user", "content": prompt}]), ends_of(tokenizer)
