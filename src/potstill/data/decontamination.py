"""Documents that hold what a model will be examined on: found, and listed, dropped or refused.

Text is reduced to its words, runs of letters and digits in lower case: whitespace, case, punctuation and
quotes are gone, and identifiers in snake case are several words. A text of the evaluation set is found in
two ways: by `ngram` of its words in a row, and by a whole part of it with its words run together, wherever
they were divided. Both are looked for in a document as it is, and without the comments at the end of its
lines. What neither can tell is counted and not guessed. Called by the assembly, with the documents as the
tokenizer reads them back.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from potstill.data.readers import Document, Reading
from potstill.errors import UserError
from potstill.io.safe_open import json_lines, opened, printable_name, unpacked

ADVICE = "Give JSON lines (.jsonl, .jsonl.gz) or a text file."
WORD = re.compile(r"[^\W_]+")
COMMENT = re.compile(r"(?<!\S)(?:#|//).*")
TRIPLE_QUOTES = re.compile("\"\"\"|'''")
LEAST_LETTERS = 30
"""Of a part that is found whole. `return sorted(list(set(l)))` has 20 and is anybody's."""
LISTED, LISTED_OF_ONE, TOLD = 200, 5, 3
WORDS_SHOWN = 80

Gram = tuple[str, ...]


@dataclass(frozen=True)
class Hit:
    """What a document shares with one text of the evaluation set."""

    document: str
    """Its file, and line or row."""
    text: str
    """The problem and its field."""
    kind: str
    """ngram, or normalised: a whole part of the text."""
    words: str
    """The first that match, shortened."""
    count: int
    """How many different n-grams or parts match."""


class EvaluationTexts:
    """The texts of some files, to be looked for in documents; memory is that of these files.

    Of JSON lines every string is a text, named by the line's `task_id` or else its place, and by its key; any
    other file is one text.

    Raises:
        UserError: a file that is damaged, or with nothing in it long enough to be told.
    """

    def __init__(self, paths: Sequence[Path], ngram: int) -> None:
        self.ngram = ngram
        self.files: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.too_short = 0
        self._grams: dict[Gram, list[int]] = {}
        self._parts: dict[str, list[tuple[int, str, str]]] = {}
        for path in paths:
            before = len(self.names), self.too_short
            for name, text in _texts(path):
                self._add(name, text)
            texts, short = len(self.names) - before[0], self.too_short - before[1]
            if texts == short:
                raise UserError(
                    f"{path}: none of its {texts} texts is long enough to compare with: {ngram} words in a"
                    f" row, half of them different, or {LEAST_LETTERS} letters. {ADVICE}"
                )
            with opened(path, "texts", ADVICE) as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                self.files.append({"path": str(path), "bytes": file.tell(), "sha256": sha256, "texts": texts})

    def hits(self, document: str, text: str) -> list[Hit]:
        """What the text of a document shares with these, the most first."""
        found: dict[tuple[int, str], dict[object, str]] = {}
        for words in _forms(text):
            for gram in _grams(words, self.ngram):
                for number in self._grams.get(gram, ()):
                    found.setdefault((number, "ngram"), {})[gram] = " ".join(gram)
            letters = "".join(words)
            for at in range(len(letters) - LEAST_LETTERS + 1):
                for number, part, as_words in self._parts.get(letters[at : at + LEAST_LETTERS], ()):
                    if letters.startswith(part, at):
                        found.setdefault((number, "normalised"), {})[part] = as_words
        ranked = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
        return [
            Hit(document, self.names[number], kind, next(iter(same.values()))[:WORDS_SHOWN], len(same))
            for (number, kind), same in ranked
        ]

    def _add(self, name: str, text: str) -> None:
        number = len(self.names)
        self.names.append(name)
        grams = {gram for words in _forms(text) for gram in _grams(words, self.ngram) if _tells(gram)}
        parts = {}
        for part in TRIPLE_QUOTES.split(text):  # a docstring and what is around it: a copy may lack either
            for words in _forms(part):
                if len(letters := "".join(words)) >= LEAST_LETTERS:
                    parts[letters] = " ".join(words)
        for gram in grams:
            self._grams.setdefault(gram, []).append(number)
        for letters, as_words in parts.items():
            self._parts.setdefault(letters[:LEAST_LETTERS], []).append((number, letters, as_words))
        self.too_short += not grams and not parts


class Decontamination:
    """What is done about a corpus's documents that share something with evaluation texts.

    Args:
        action: list (they stay), drop (they leave, from both sides of the split) or refuse.
    """

    def __init__(self, texts: EvaluationTexts, action: str) -> None:
        self.texts, self.action = texts, action
        self.documents = self.documents_hit = self.num_hits = 0
        self.listed: list[Hit] = []

    def of(self, reading: Reading, tokenizer: Any) -> Reading:
        """The reading with the action taken, while it is read.

        Raises:
            UserError: when all of it is read, and there are hits to refuse, or nothing is left.
        """
        return Reading(self._kept(reading, tokenizer), reading.files)

    def _kept(self, reading: Reading, tokenizer: Any) -> Iterator[Document]:
        for document in reading.documents:
            text = tokenizer.decode(document.ids.tolist(), skip_special_tokens=True)
            hits = self.texts.hits(document.source, text)
            self.documents += 1
            self.documents_hit += bool(hits)
            self.num_hits += len(hits)
            self.listed += hits[: min(LISTED_OF_ONE, LISTED - len(self.listed))]
            if self.action != "drop" or not hits:
                yield document
        if self.action == "refuse" and self.documents_hit:
            raise UserError(
                f"corpus.decontaminate: {self._counted()}: {self._examples()}."
                " Leave them out, with action: drop for one; action: list keeps them."
            )
        if self.action == "drop" and self.documents_hit == self.documents > 0:
            raise UserError(
                f"corpus.decontaminate: {self._counted()}, and nothing is left: {self._examples()}."
                " Give another corpus."
            )

    def manifest(self) -> dict[str, Any]:
        """What was compared and what was found, once the reading is used up."""
        return {
            "against": self.texts.files,
            "ngram": self.texts.ngram,
            "action": self.action,
            "texts": len(self.texts.names),
            "texts_too_short": self.texts.too_short,
            "documents": self.documents,
            "documents_hit": self.documents_hit,
            "documents_dropped": self.documents_hit if self.action == "drop" else 0,
            "hits": self.num_hits,
            "first_hits": [asdict(hit) for hit in self.listed],
        }

    def _counted(self) -> str:
        return counted(self.manifest())

    def _examples(self) -> str:
        of = list({hit.document: hit for hit in reversed(self.listed)}.values())[::-1]
        first = [f"{h.document} has {h.text} ({h.kind}: {h.words!r})" for h in of[:TOLD]]
        more = [f"and {self.documents_hit - TOLD} more"] if self.documents_hit > TOLD else []
        return ", ".join([*first, *more])


def counted(manifest: dict[str, Any]) -> str:
    """The count in words, of a `decontamination` entry of a corpus's manifest."""
    against = ", ".join(Path(file["path"]).name for file in manifest["against"])
    return f"{manifest['documents_hit']} of {manifest['documents']} documents overlap with {against}"


def told(manifest: dict[str, Any] | None) -> str:
    """The count, and what was done about it, in one line."""
    if manifest is None:
        return "not run"
    if not manifest["documents_hit"]:
        return counted(manifest)
    dropped = manifest["action"] == "drop"
    return f"{counted(manifest)}; {'dropped' if dropped else 'kept'}, corpus.json lists them"


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Each text of a file with its name."""
    if ".jsonl" in path.suffixes:
        for where, record in json_lines(path, ADVICE):
            task = record.get("task_id")
            task = task if isinstance(task, str | int) else f"{path.name}:{where.rpartition(':')[2]}"
            stack: list[tuple[str, Any]] = [(str(task), {k: v for k, v in record.items() if k != "task_id"})]
            while stack:  # JSON may be nested deeper than Python calls
                name, value = stack.pop()
                if isinstance(value, str):
                    yield printable_name(name), value
                elif isinstance(value, dict | list):
                    inside = value.items() if isinstance(value, dict) else enumerate(value)
                    stack += reversed([(f"{name} {key}", each) for key, each in inside])
        return
    if ".json" in path.suffixes:
        raise UserError(f"{path}: one JSON value, not lines of JSON. {ADVICE}")
    content = unpacked(path, "text", ADVICE)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text at byte {error.start} of {len(content)}. {ADVICE}"
        ) from error
    if "\0" in text:
        raise UserError(f"{path}: not a text: zero byte at {content.index(0)} of {len(content)}. {ADVICE}")
    yield printable_name(path.name), text


def _forms(text: str) -> list[list[str]]:
    """The words of a text, and without its comments if they are others."""
    text = unicodedata.normalize("NFKC", text).casefold()
    whole, code = WORD.findall(text), WORD.findall(COMMENT.sub("", text))
    return [whole] if len(whole) == len(code) else [whole, code]


def _grams(words: list[str], n: int) -> Iterator[Gram]:
    return zip(*(islice(words, start, None) for start in range(n)), strict=False)


def _tells(gram: Gram) -> bool:
    """Half of its words are different ones of two letters or more: no row of numbers, no head of a loop."""
    return len({word for word in gram if len(word) > 1 and word.isalpha()}) >= len(gram) // 2
