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
    """The tokenizer's list, '' for ids it does not use; `size` is the width of the model's logits.

    A GGUF file writes the padded end of a vocabulary into its list, as [PAD151665]; here it is no token.
    """
    ids = tokenizer.get_vocab()
    tokens = [""] * (max(ids.values(), default=-1) + 1)
    for token, i in ids.items():
        tokens[i] = token
    while tokens and tokens[-1] in ("", f"[PAD{len(tokens) - 1}]"):
        tokens.pop()
    template = tokenizer.chat_template
    return Vocab(
        size=size,
        tokens=tuple(tokens),
        eos_id=tokenizer.eos_token_id,
        bos_id=tokenizer.bos_token_id,
        pad_id=tokenizer.pad_token_id,
        chat_template=template if isinstance(template, str) or template is None else str(template),
        added=frozenset(i for i in tokenizer.added_tokens_decoder if i < len(tokens)),
    )


def require_same(one: Vocab, other: Vocab, one_name: str, other_name: str) -> int:
    """The number of ids that two vocabularies share: all that mean something, of one list.

    Logits may be wider than the list on either side (Qwen2.5 has 151,936 or 152,064 for 151,665 tokens).

    Raises:
        UserError: the lists differ, or a model has no logits for a token of it, or there is no list to tell
            which of the wider one's ids are padding.
    """
    if one.tokens is not None and other.tokens is not None:
        for i, (theirs, ours) in enumerate(zip_longest(one.tokens, other.tokens)):
            if theirs != ours:
                shown = ["no such id" if token is None else repr(token) for token in (theirs, ours)]
                raise UserError(
                    f"{one_name} and {other_name} use different tokenizers: id {i} is {shown[0]} in"
                    f" the one and {shown[1]} in the other. Token-level distillation needs one vocabulary;"
                    " take a student of the teacher's family."
                )
    tokens = one.tokens if one.tokens is not None else other.tokens
    if one.size == other.size:
        return min(one.known, other.known)
    wider, narrower = sorted((one.size, other.size), reverse=True)
    if tokens is None or (one.tokens is None) != (other.tokens is None):
        raise UserError(
            f"{one_name} has logits for {one.size} ids and {other_name} for {other.size}, and not both bring"
            " a tokenizer that would tell which ids are padding. Give each its tokenizer's files, or take a"
            " student with as many ids as its teacher."
        )
    if narrower < len(tokens):
        name = one_name if one.size == narrower else other_name
        raise UserError(
            f"{name} has logits for {narrower} of the {len(tokens)} tokens, the other side for {wider} ids;"
            f" the first without is id {narrower}, {tokens[narrower]!r}. Token-level distillation needs one"
            " vocabulary; take a student with room for it."
        )
    return len(tokens)


def special_differences(teacher: Vocab, student: Vocab) -> list[str]:
    """What differs beside the token list: what it will cause, and the line of the recipe that settles it."""

    def shown(vocab: Vocab, i: int | None) -> str:
        return "none" if i is None else f"id {i} ({vocab.tokens[i]!r})" if vocab.tokens else f"id {i}"

    found = []
    for name, effect in (
        (
            "eos_id",
            "documents are closed with the corpus's, and the student may not stop where it was made to",
        ),
        ("bos_id", "prompts start differently"),
        ("pad_id", "batches of prompts are padded differently"),
    ):
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if theirs != ours:
            token = name.removesuffix("_id").upper()
            found.append(
                f"{token} token: the teacher has {shown(teacher, theirs)}, the student"
                f" {shown(student, ours)}: {effect}"
            )
    if teacher.chat_template != student.chat_template:
        found.append("chat templates differ: conversations are written with the corpus's")
    if differing := sorted(teacher.added ^ student.added):
        has, has_not = ("teacher", "student") if differing[0] in teacher.added else ("student", "teacher")
        found.append(
            f"{len(differing)} tokens are added ones on one side alone, first {shown(teacher, differing[0])}:"
            f" the {has}'s tokenizer takes it whole and the {has_not}'s in pieces"
        )
    settled = "corpus.tokenizer names whose tokenizer reads the corpus and is saved with the student"
    return [f"{what}; {settled}." for what in found]
