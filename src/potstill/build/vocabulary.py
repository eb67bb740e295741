"""Match the vocabularies of teacher, student and corpus: an id must be the same token in all three.

Refused: a student whose tokens differ from the teacher's. Ids that only one side has are masked.
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
    """The ids that are the same token for teacher, student and corpus: 0 to `ids` - 1."""

    ids: int
    masked_in_teacher: int
    """Ids after them that the teacher has logits for; their probability is set to 0."""
    masked_in_student: int
    """The same of the student."""
    differences: list[str]
    """How the tokenizers differ apart from their token lists, one line each; warnings, not errors."""


def match_vocabularies(
    resolved: Resolved, teacher: Teacher, corpus: Vocab | None, model: CausalLM, origin: dict[str, Any]
) -> Shared:
    """Compare the token lists, and mask the ids that only one side has.

    Args:
        resolved: the recipe and its model sources.
        teacher: its ids beyond the shared ones are masked.
        corpus: the vocabulary of the tokenizer that encoded the corpus; None for ids without a tokenizer.
        model: the student's, which is masked too.
        origin: where its weights came from.

    Raises:
        UserError: token lists that differ, with the first such id; or a student with too few ids.
    """
    label = resolved.teacher.label
    student = _student_vocab(resolved, teacher.vocab, corpus, model)
    teacher_vocab = teacher.vocab
    if teacher_vocab.tokens is None and corpus is not None:
        # A teacher without a tokenizer is taken to use the corpus's.
        teacher_vocab = dataclasses.replace(corpus, size=teacher_vocab.size)
    ids = tokenizers.require_same(teacher_vocab, student, label, model.name)
    if corpus is not None:
        in_corpus = dataclasses.replace(corpus, size=model.vocab_size)
        ids = min(ids, tokenizers.require_same(in_corpus, student, "corpus.tokenizer", model.name))
    # A teacher that cannot mask ids answers with all of its own; then the student must have them, too.
    ids = teacher.share_ids(ids)
    if model.vocab_size < ids:
        raise UserError(
            f"{model.name} has logits for {model.vocab_size} ids and teacher {label} for {ids}. Token-level"
            f" distillation needs one vocabulary: give the student at least {ids}."
        )
    ends = model.ends
    if ends and min(ends) >= ids:
        raise UserError(
            f"{model.name} ends texts with id {min(ends)}, and only the ids from 0 to {ids - 1} are tokens of teacher"
            f" and corpus: it would never stop. Set eos_token_id in its config.json to one of them."
        )
    model.mask_from(ids)
    differences = _differences_beside_ids(resolved, teacher.vocab, corpus, student, origin)
    return Shared(ids, teacher.vocab_size - ids, model.vocab_size - ids, differences)


def require_one_vocabulary(resolved: Resolved) -> None:
    """`match_vocabularies` of two models whose weights are not loaded, by their tokenizers and widths.

    Raises:
        UserError: token lists that differ, or a student without logits for all tokens.
    """
    source, teacher = resolved.student, resolved.teacher
    assert source.files is not None, "a student that is cut has its teacher's tokens"
    path = next((path for path in teacher.tokenizers if tokenizers.has_tokenizer(path)), None)
    theirs = Vocab(size=teacher.vocab_size)
    if path is not None:
        theirs = tokenizers.vocab_of(tokenizers.load_tokenizer(path), teacher.vocab_size)
    size = source.model_config.get_text_config().vocab_size
    own = dataclasses.replace(theirs, size=size) if theirs.tokens is not None else Vocab(size=size)
    if source.config.name == "checkpoint":
        tokenizer = source.files.tokenizer
        own = Vocab(size=size) if tokenizer is None else tokenizers.vocab_of(tokenizer, size)
    tokenizers.require_same(theirs, own, teacher.label, source.files.source)


def _student_vocab(resolved: Resolved, teacher: Vocab, corpus: Vocab | None, model: CausalLM) -> Vocab:
    """A checkpoint brings its own; a student that is cut or newly initialised takes the teacher's or corpus's."""
    source = resolved.student
    if source.config.name == "checkpoint":
        tokenizer = None if source.files is None else source.files.tokenizer
        return (
            Vocab(size=model.vocab_size)
            if tokenizer is None
            else tokenizers.vocab_of(tokenizer, model.vocab_size)
        )
    known = teacher if teacher.tokens is not None else corpus
    return (
        Vocab(size=model.vocab_size) if known is None else dataclasses.replace(known, size=model.vocab_size)
    )


def _differences_beside_ids(
    resolved: Resolved, teacher: Vocab, corpus: Vocab | None, student: Vocab, origin: dict[str, Any]
) -> list[str]:
    """Special ids and chat templates that differ although the token lists agree, and lists that are unknown."""
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
