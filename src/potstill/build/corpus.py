"""From a recipe to its packed rows: choose the tokenizer, decontaminate the documents, cache their tokens."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from potstill.build.resolve import Resolved
from potstill.data import mixing, packing, readers, token_cache, tokenizers
from potstill.data.decontamination import Decontamination, EvaluationTexts, together
from potstill.errors import UserError
from potstill.models.gguf_files import check_gguf
from potstill.models.hub import tokenizer_files
from potstill.types import Vocab


@dataclasses.dataclass(frozen=True)
class Source:
    """What a corpus is read with."""

    tokenizer: Any | None
    """None for a corpus of ids without one."""
    vocabulary: Vocab
    bos_ids: list[int]
    """Ids before each text."""
    decontamination: Decontamination | None
    teacher_tokenizer: Any | None = None
    """The teacher's own, whose chat template it reads prompts by; None: the same, or it has none."""

    def afresh(self) -> Source:
        """For another corpus: its own counts of what is found in it."""
        if self.decontamination is None:
            return self
        own = Decontamination(self.decontamination.texts, self.decontamination.action)
        return dataclasses.replace(self, decontamination=own)

    def read(self, config: Any, beat: Callable[[], None] = lambda: None) -> readers.Reading:
        """The documents that are packed."""
        beside = self.teacher_tokenizer if self.teacher_tokenizer is not None else self.tokenizer
        reading: readers.Reading = config.read_for_both(self.tokenizer, beside, self.vocabulary)
        reading = dataclasses.replace(reading, documents=_with_beat(reading.documents, beat))
        if self.decontamination is not None:
            reading = self.decontamination.apply(reading, self.tokenizer)
        if self.bos_ids:
            reading = dataclasses.replace(reading, documents=_with_bos(reading, self.bos_ids))
        return reading


def open_source(resolved: Resolved) -> Source:
    """Tokenizer, vocabulary and evaluation texts; no document is read. Of a mix, those of all its parts.

    Raises:
        UserError: a text corpus or decontamination without a tokenizer, or a tokenizer that does not fit the teacher.
    """
    size = resolved.teacher.vocab_size
    tokenizer = _tokenizer(resolved)
    vocabulary = Vocab(size=size) if tokenizer is None else tokenizers.vocab_of(tokenizer, size)
    # Logits may be padded beyond the last token; an id of the corpus may not.
    vocabulary = dataclasses.replace(vocabulary, size=vocabulary.known)
    if tokenizer is not None and vocabulary.eos_id is not None and vocabulary.eos_id >= vocabulary.size:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer ends texts with {tokenizer.eos_token!r:.60}, id"
            f" {vocabulary.eos_id}, and teacher {resolved.teacher.label} has the ids from 0 to"
            f" {vocabulary.size - 1}. Set eos_token in tokenizer_config.json to a token of the model's."
        )
    return Source(
        tokenizer,
        vocabulary,
        _bos_ids(resolved.recipe.corpus, tokenizer),
        make_decontamination(resolved, tokenizer),
        # Of prompts alone: of other rows, a tokenizer that cannot be read is one that nobody needs.
        teacher_tokenizer(resolved) if resolved.recipe.corpus.is_prompts else None,
    )


def make_corpus(
    resolved: Resolved, beat: Callable[[], None] = lambda: None
) -> tuple[packing.Corpus, Any | None]:
    """The packed rows, and the tokenizer that encoded them; None for a corpus of ids without one.

    Args:
        beat: called with every document that is read, a sign of life for a watchdog.

    Raises:
        UserError: whatever `open_source` or a reader refuses; of a mix it names the source.
    """
    config, source = resolved.recipe.corpus, open_source(resolved)
    parts: dict[str, packing.Corpus] = {}
    for name, part in config.parts.items():
        with errors_of(config, name):
            parts[name] = _packed(part, source.afresh(), beat)
    if not parts:
        return _packed(config, source, beat), source.tokenizer
    corpus = mixing.mixed(parts, [part.weight or 1.0 for part in config.parts.values()])
    overlaps = [each for part in parts.values() if (each := part.manifest["decontamination"]) is not None]
    manifest = corpus.manifest | {"decontamination": together(overlaps) if overlaps else None}
    return dataclasses.replace(corpus, manifest=manifest), source.tokenizer


@contextlib.contextmanager
def errors_of(config: Any, name: str) -> Iterator[None]:
    """Say which source of a mix an error is about."""
    try:
        yield
    except UserError as error:
        number = list(config.parts).index(name)
        raise UserError(*(f"corpus.sources.{number} ({name}): {each}" for each in error.mistakes)) from error


def _packed(config: Any, source: Source, beat: Callable[[], None]) -> packing.Corpus:
    """The rows of one corpus, out of its cache where it has one."""
    tokenizer, vocabulary, decontamination = source.tokenizer, source.vocabulary, source.decontamination

    def build(folder: Path | None) -> packing.Corpus:
        corpus = packing.build(
            source.read(config, beat),
            tokens_per_row=config.tokens_per_row,
            heldout_rows=config.heldout_rows,
            vocab=vocabulary,
            layout=config.layout,
            folder=folder,
            may_be_short=config.is_prompts,
        )
        # After packing: its counts are complete once every document has been read.
        overlaps = {"decontamination": None if decontamination is None else decontamination.manifest()}
        return dataclasses.replace(corpus, manifest=corpus.manifest | overlaps)

    if config.shards is None:
        if config.is_streamed and not config.is_prompts:  # which have no cache, and are few
            raise UserError(
                f"corpus.shards: name a folder. {config.origin} is read from the hub once, and a run and its"
                " --resume read its tokens from there."
            )
        return build(None)
    evaluation_files = None if decontamination is None else decontamination.texts.files
    provenance = token_cache.provenance(config, tokenizer, vocabulary, source.bos_ids, evaluation_files)
    return token_cache.load_or_build(config, provenance, build, beat)


def _bos_ids(config: Any, tokenizer: Any | None) -> list[int]:
    """The ids before each text: what `corpus.bos` says, else what the tokenizer itself puts there."""
    if tokenizer is None or config.bos is False:
        return []
    if config.bos is None:
        return tokenizers.bos_ids(tokenizer)
    if tokenizer.bos_token_id is None:
        raise UserError(f"corpus.bos: {tokenizer.name_or_path} has no BOS token. Set it to null.")
    return [tokenizer.bos_token_id]


def _with_bos(reading: readers.Reading, bos_ids: list[int]) -> Iterator[readers.Document]:
    before = np.array(bos_ids, dtype=np.uint32)
    for document in reading.documents:
        if document.is_text:
            reading.counts["bos_ids"] = bos_ids
            own, for_teacher = np.concatenate([before, document.ids]), document.for_teacher
            if for_teacher is not None:
                for_teacher = np.concatenate([before, for_teacher])
            document = dataclasses.replace(document, ids=own, for_teacher=for_teacher)
        yield document


def _tokenizer(resolved: Resolved) -> Any | None:
    """That of `corpus.tokenizer`, else the teacher's, else the student's."""
    config = resolved.recipe.corpus
    if config.tokenizer is not None:
        paths = [tokenizer_files(config.tokenizer)]
    else:
        sources = [*resolved.teacher.tokenizers, *(files.path for files in resolved.student.checkpoints)]
        paths = [path for path in sources if tokenizers.has_tokenizer(path)]
    if paths and paths[0].suffix == ".gguf":
        check_gguf(paths[0])  # before a library parses it
    if not paths and any(each.needs_tokenizer for each in config.each):
        raise UserError(
            f"corpus.tokenizer: neither teacher {resolved.teacher.label} nor the student has a tokenizer"
            f" to read {config.origin} with. Name a folder, hub id or GGUF file that has one."
        )
    return tokenizers.load_tokenizer(paths[0]) if paths else None


def teacher_tokenizer(resolved: Resolved) -> Any | None:
    """That which came with the teacher, where `corpus.tokenizer` names another one."""
    if resolved.recipe.corpus.tokenizer is None:
        return None  # then the corpus is read by it
    path = next((path for path in resolved.teacher.tokenizers if tokenizers.has_tokenizer(path)), None)
    return None if path is None else tokenizers.load_tokenizer(path)


def make_decontamination(resolved: Resolved, tokenizer: Any | None) -> Decontamination | None:
    """What compares documents with evaluations; None where the recipe does not ask for it."""
    config = resolved.recipe.corpus.decontaminate
    if config is None:
        return None
    if tokenizer is None:
        raise UserError(
            f"corpus.decontaminate: compares texts, and neither teacher {resolved.teacher.label} nor the"
            f" student has a tokenizer to decode {resolved.recipe.corpus.origin} with. Set corpus.tokenizer."
        )
    texts = EvaluationTexts([Path(path) for path in config.against], config.ngram)
    return Decontamination(texts, config.action)


def _with_beat(documents: Iterator[readers.Document], beat: Callable[[], None]) -> Iterator[readers.Document]:
    for document in documents:
        beat()
        yield document
