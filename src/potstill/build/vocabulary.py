"""Whether teacher, student and corpus mean the same by an id; what only one of them has is masked.

Refused: a student that means other tokens than the teacher.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from potstill.build.resolve import Resolved
from potstill.data import tokenizers
from potstill.errors import UserError
from potstill.models.causal_lm import CausalLM
from potstill.types import Teacher, Vocab


@dataclass(frozen=True)
class Shared:
    """The ids that teacher, student and corpus mean the same by, 0 to `ids` - 1."""

    ids: int
    masked_in_teacher: int
    """Ids after them that the teacher has logits for; their probability is 0."""
    masked_in_student: int
    differences: list[str]
    """What the tokenizers differ in beside their lists."""


def match_vocabularies(
    resolved: Resolved, teacher: Teacher, corpus: Vocab | None, model: CausalLM, origin: dict[str, Any]
) -> Shared:
    """Compare token lists, and mask ids without a meaning on whichever side has them.

    Raises:
        UserError: another token list, with the first id that differs; or a student with fewer ids.
    """
    label = resolved.teacher.label
    student = _student_vocab(resolved, teacher.vocab, corpus, model)
    teacher_vocab = teacher.vocab
    if teacher_vocab.tokens is None and corpus is not None:
        # A teacher without a tokenizer reads what the corpus's wrote.
        teacher_vocab = dataclasses.replace(corpus, size=teacher_vocab.size)
    ids = tokenizers.require_same(teacher_vocab, student, label, model.name)
    if corpus is not None:
        in_corpus = dataclasses.replace(corpus, size=model.vocab_size)
        ids = min(ids, tokenizers.require_same(in_corpus, student, "corpus.tokenizer", model.name))
    ids = teacher.share_ids(ids)
    if model.vocab_size < ids:
        raise UserError(
            f"{model.name} has logits for {model.vocab_size} ids and teacher {label} for {ids}. Token-level"
            " distillation needs one vocabulary; give the student as many."
        )
    model.mask_from(ids)
    differences = _differences_beside_ids(resolved, teacher.vocab, corpus, student, origin)
    return Shared(ids, teacher.vocab_size - ids, model.vocab_size - ids, differences)


def _student_vocab(resolved: Resolved, teacher: Vocab, corpus: Vocab | None, model: CausalLM) -> Vocab:
    """A checkpoint's own; the ids of a student that is cut or made for this run mean what the others mean."""
    source = resolved.student
    if source.config.name == "checkpoint":
        tokenizer = None if source.files is None else source.files.tokenizer
        return (
            Vocab(size=model.vocab_size)
            if tokenizer is None
            else tokenizers.vocab_of(tokenizer, model.vocab_size)
        )
    named = teacher if teacher.tokens is not None else corpus
    return (
        Vocab(size=model.vocab_size) if named is None else dataclasses.replace(named, size=model.vocab_size)
    )


def _differences_beside_ids(
    resolved: Resolved, teacher: Vocab, corpus: Vocab | None, student: Vocab, origin: dict[str, Any]
) -> list[str]:
    """Special ids and templates that differ although the lists are one, and lists that could not be compared."""
    differences, tokenizer = [], resolved.recipe.corpus.tokenizer
    use = "reads the corpus and is saved with the student"
    if student.tokens and teacher.tokens:
        settled = (
            f"as it is, the teacher's {use}; corpus.tokenizer: {origin.get('model')} takes the student's"
        )
        settled = f"settled by corpus.tokenizer: {tokenizer}, which {use}" if tokenizer else settled
        differences += tokenizers.special_differences(teacher, student, settled)
    if tokenizer and corpus is not None and teacher.tokens:
        settled = f"corpus.tokenizer: {tokenizer} {use}; without this line the teacher's does"
        differences += tokenizers.special_differences(teacher, corpus, settled, "corpus")
    missing = {}
    if not teacher.tokens:
        missing["teacher"] = resolved.teacher.lacks_tokenizer
    if not student.tokens and origin["name"] == "checkpoint":
        missing["student"] = "a folder with its tokenizer's files in student.model"
    if corpus is None:
        missing["corpus"] = "its tokenizer in corpus.tokenizer"
    return differences + tokenizers.not_compared(missing)
