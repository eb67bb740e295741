"""From a recipe to its rows: whose tokenizer reads, what it is compared with, where tokens are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from potstill.data import packing, readers, token_cache, tokenizers
from potstill.data.decontamination import Decontamination, EvaluationTexts
from potstill.errors import UserError
from potstill.models.gguf_files import check_gguf
from potstill.models.load import local_copy, vocab_size_of
from potstill.recipe.load import Recipe
from potstill.store.reader import Store, read_manifest
from potstill.teachers.toy import TableTeacher
from potstill.types import Vocab


def make_corpus(recipe: Recipe, beat: Callable[[], None] = lambda: None) -> tuple[packing.Corpus, Any | None]:
    """Rows, and the tokenizer that read them: `corpus.tokenizer`, else the teacher's, else the student's."""
    asked = recipe.corpus
    size = teacher_vocab_size(recipe)
    sources = [
        local_copy(source) for source in ([asked.tokenizer] if asked.tokenizer else readers_of(recipe))
    ]
    with_tokenizer = [path for path in sources if asked.tokenizer or tokenizers.has_tokenizer(path)]
    if with_tokenizer and with_tokenizer[0].suffix == ".gguf":
        check_gguf(with_tokenizer[0])
    tokenizer = tokenizers.load_tokenizer(with_tokenizer[0]) if with_tokenizer else None
    if tokenizer is None and asked.name != "tokens":
        raise UserError(
            f"corpus.tokenizer: neither teacher {called(recipe.teacher)} nor the student brings a tokenizer"
            f" to read {asked.path} with. Name a folder, hub id or GGUF file that has one."
        )
    vocabulary = Vocab(size=size) if tokenizer is None else tokenizers.vocab_of(tokenizer, size)
    vocabulary = dataclasses.replace(vocabulary, size=vocabulary.known)
    compared = make_decontamination(recipe, tokenizer)

    def build(folder: Path | None) -> packing.Corpus:
        reading = read_documents(asked, tokenizer, vocabulary)
        documents = dataclasses.replace(reading, documents=_alive(reading.documents, beat))
        corpus = packing.build(
            documents if compared is None else compared.apply(documents, tokenizer),
            tokens_per_row=asked.tokens_per_row,
            heldout_rows=asked.heldout_rows,
            vocab=vocabulary,
            folder=folder,
        )
        found = {"decontamination": None if compared is None else compared.manifest()}
        return dataclasses.replace(corpus, manifest=corpus.manifest | found)

    if asked.shards is None:
        return build(None), tokenizer
    against = None if compared is None else compared.texts.files
    made_of = token_cache.provenance(asked, tokenizer, vocabulary, against)
    return token_cache.load_or_build(asked, made_of, build, beat), tokenizer


def readers_of(recipe: Recipe) -> list[str | Path]:
    """Whose tokenizers may read the corpus: the teacher's, the one kept in a store, then the student's."""
    if recipe.teacher.name != "store":
        return checkpoints(recipe)
    kept = Store(Path(recipe.teacher.path)).tokenizer_folder
    return [*([] if kept is None else [kept]), *checkpoints(recipe)]


def make_decontamination(recipe: Recipe, tokenizer: Any | None) -> Decontamination | None:
    asked = recipe.corpus.decontaminate
    if asked is None:
        return None
    if tokenizer is None:
        raise UserError(
            f"corpus.decontaminate: texts are compared, and neither teacher {called(recipe.teacher)} nor the"
            f" student brings a tokenizer that tells what {recipe.corpus.path} says. Set corpus.tokenizer."
        )
    return Decontamination(EvaluationTexts([Path(path) for path in asked.against], asked.ngram), asked.action)


def read_documents(asked: Any, tokenizer: Any, vocabulary: Vocab) -> Any:
    path = Path(asked.path)
    match asked.name:
        case "text":
            return readers.text.read(path, tokenizer, asked.include, asked.exclude)
        case "jsonl":
            return readers.jsonl.read(path, tokenizer, asked.field)
        case "chat":
            return readers.chat.read(path, tokenizer, asked.field)
        case "parquet":
            return readers.parquet.read(path, tokenizer, asked.column)
        case "hf":
            return readers.hf.read(path, tokenizer, asked.split, asked.column)
        case _:
            end = vocabulary.eos_id if asked.document_end is None else asked.document_end
            return readers.tokens.read(path, asked.dtype, vocabulary.size, end, asked.tokens_per_row)


def _alive(documents: Iterator[readers.Document], beat: Callable[[], None]) -> Iterator[readers.Document]:
    for document in documents:
        beat()
        yield document


def called(teacher: Any) -> str:
    """What a person would call the teacher: its folder or file, or its kind."""
    match teacher.name:
        case "torch":
            return Path(teacher.model).name
        case "store":
            return f"store {Path(teacher.path).name}"
        case _:
            return str(teacher.name)


def checkpoints(recipe: Recipe, saved_student: str | Path | None = None) -> list[str | Path]:
    """Checkpoints that the recipe names, the teacher's first."""
    asked = recipe.teacher
    teacher = [of for of in (asked.model, asked.reference) if of] if asked.name == "torch" else []
    student = [recipe.student.model] if recipe.student.name == "checkpoint" else []
    return [*teacher, *([saved_student] if saved_student is not None else student)]


def teacher_vocab_size(recipe: Recipe) -> int:
    """Width of its logits, read without loading it."""
    asked = recipe.teacher
    match asked.name:
        case "torch":
            return vocab_size_of(local_copy(asked.model))
        case "table":
            return TableTeacher.load(Path(asked.path)).vocab_size
        case "store":
            return int(read_manifest(Path(asked.path))["vocabulary"]["size"])
        case _:
            return int(asked.vocab_size)
