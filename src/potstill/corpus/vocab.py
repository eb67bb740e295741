"""What ids mean: tokenizers read from a folder or a GGUF file, and two vocabularies compared id by id.

Token-level distillation is only right where both models mean the same token by the same id, so lists are
compared and not sizes. A model that came without a tokenizer can only be compared by its size. Refuses two
lists that differ, with the first id that does. Called by the assembly and by teachers.
"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

import transformers

from potstill.errors import UserError, one_line
from potstill.quiet import quiet_transformers
from potstill.types import Vocab

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def has_tokenizer(path: Path) -> bool:
    return path.suffix == ".gguf" or any((path / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer of a Hugging Face folder or of a GGUF file; code that comes with it is never run."""
    if not has_tokenizer(path):
        raise UserError(
            f"{path}: no tokenizer there. Name a folder with tokenizer.json, a hub id or a GGUF file."
        )
    try:
        with quiet_transformers():
            if path.suffix == ".gguf":
                return transformers.AutoTokenizer.from_pretrained(
                    path.parent, gguf_file=path.name, trust_remote_code=False
                )
            return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise UserError(f"{path}: its tokenizer cannot be read: {one_line(error)}") from error


def vocab_of(tokenizer: Any, size: int) -> Vocab:
    """The tokenizer's list, '' for ids it does not use; `size` is the width of the model's logits."""
    known = tokenizer.get_vocab()
    tokens = [""] * (max(known.values(), default=-1) + 1)
    for token, i in known.items():
        tokens[i] = token
    template = tokenizer.chat_template
    return Vocab(
        size=size,
        tokens=tuple(tokens),
        eos_id=tokenizer.eos_token_id,
        bos_id=tokenizer.bos_token_id,
        pad_id=tokenizer.pad_token_id,
        chat_template=template if isinstance(template, str) or template is None else str(template),
    )


def require_same(teacher: Vocab, student: Vocab, teacher_name: str, student_name: str) -> None:
    """Refuse two vocabularies that are not one list."""
    if teacher.tokens is not None and student.tokens is not None:
        for i, (theirs, ours) in enumerate(zip_longest(teacher.tokens, student.tokens)):
            if theirs != ours:
                shown = ["no such id" if token is None else repr(token) for token in (theirs, ours)]
                raise UserError(
                    f"{teacher_name} and {student_name} use different tokenizers: id {i} is {shown[0]} in"
                    f" the one and {shown[1]} in the other. Token-level distillation needs one vocabulary;"
                    " take a student of the teacher's family."
                )
    if teacher.size != student.size:
        raise UserError(
            f"{teacher_name} has logits for {teacher.size} ids and {student_name} for {student.size}."
            " Token-level distillation needs one vocabulary; take a student with as many ids as its teacher."
        )


def special_differences(teacher: Vocab, student: Vocab) -> list[str]:
    """What differs beside the token list, each with what it will cause."""
    found = []
    for name, effect in (
        ("eos_id", "the student may not stop where the teacher does"),
        ("bos_id", "prompts start differently"),
        ("pad_id", "padded batches are cut differently"),
    ):
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if theirs != ours:
            token = name.removesuffix("_id")
            found.append(f"{token} token: the teacher has id {theirs}, the student {ours}: {effect}.")
    if teacher.chat_template != student.chat_template:
        found.append(
            "chat templates differ: the saved student carries the corpus's tokenizer (corpus.tokenizer)."
        )
    return found
