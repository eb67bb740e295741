"""Documents that contain evaluation texts: found, and then listed, dropped or refused.

Text is reduced to its words, runs of letters and digits in lower case: whitespace, case, punctuation and
quotes are gone, and an identifier in snake case is several words. An evaluation text is found in two ways: by
`ngram` consecutive words, and by a whole part of it as one string of letters, wherever it was divided into
words. Both are looked for in a document as it is, and without the comments at the ends of its lines. Texts
too short for either are counted. The documents compared are those that the tokenizer decodes.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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
MIN_LETTERS = 30
"""Of a part that is compared whole. `return sorted(list(set(l)))` has 20 and proves nothing."""
MAX_LISTED, MAX_LISTED_OF_ONE, MAX_EXAMPLES = 200, 5, 3
MAX_WORDS = 80  # characters

Gram = tuple[str, ...]


@dataclass(frozen=True)
class Hit:
    """What a document shares with one evaluation text."""

    document: str
    """Its file, and line or row number."""
    text: str
    """The problem and its field."""
    kind: str
    """ngram, or normalised: a whole part of the text."""
    words: str
    """The first that match, shortened."""
    count: int
    """How many different n-grams or parts match."""


class EvaluationTexts:
    """The evaluation texts of some files, indexed for search; takes memory in proportion to these files.

    In JSON lines every string is a text, named by the line's `task_id`, or else its number, and its key. Any
    other file is one text.

    Raises:
        UserError: a file is damaged, or has no text that is long enough to compare.
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
                    f" row, half of them different, or {MIN_LETTERS} letters. {ADVICE}"
                )
            with opened(path, "texts", ADVICE) as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                self.files.append({"path": str(path), "bytes": file.tell(), "sha256": sha256, "texts": texts})

    def hits(self, document: str, text: str) -> list[Hit]:
        """What a document shares with these texts, the largest overlap first."""
        matches: dict[tuple[int, str], dict[object, str]] = {}
        for words in _forms(text):
            for gram in _grams(words, self.ngram):
                for number in self._grams.get(gram, ()):
                    matches.setdefault((number, "ngram"), {})[gram] = " ".join(gram)
            letters = "".join(words)
            for at in range(len(letters) - MIN_LETTERS + 1):
                for number, part, as_words in self._parts.get(letters[at : at + MIN_LETTERS], ()):
                    if letters.startswith(part, at):
                        matches.setdefault((number, "normalised"), {})[part] = as_words
        ranked = sorted(matches.items(), key=lambda item: (-len(item[1]), item[0]))
        return [
            Hit(document, self.names[number], kind, next(iter(same.values()))[:MAX_WORDS], len(same))
            for (number, kind), same in ranked
        ]

    def _add(self, name: str, text: str) -> None:
        number = len(self.names)
        self.names.append(name)
        grams = {
            gram for words in _forms(text) for gram in _grams(words, self.ngram) if _is_distinctive(gram)
        }
        parts = {}
        for part in TRIPLE_QUOTES.split(text):  # a docstring and the code around it: a copy may lack either
            for words in _forms(part):
                if len(letters := "".join(words)) >= MIN_LETTERS:
                    parts[letters] = " ".join(words)
        for gram in grams:
            self._grams.setdefault(gram, []).append(number)
        for letters, as_words in parts.items():
            self._parts.setdefault(letters[:MIN_LETTERS], []).append((number, letters, as_words))
        self.too_short += not grams and not parts


class Decontamination:
    """Finds a corpus's documents that overlap with evaluation texts, and acts on them.

    Args:
        action: list (keep them), drop (from both sides of the split) or refuse.
    """

    def __init__(self, texts: EvaluationTexts, action: str) -> None:
        self.texts, self.action = texts, action
        self.documents = self.documents_hit = self.num_hits = 0
        self.listed: list[Hit] = []

    def apply(self, reading: Reading, tokenizer: Any) -> Reading:
        """The reading without the documents to drop; the comparison happens while it is consumed.

        Raises:
            UserError: at the end of the reading, if there are hits to refuse or no document is left.
        """
        return replace(reading, documents=self._kept(reading, tokenizer))

    def _kept(self, reading: Reading, tokenizer: Any) -> Iterator[Document]:
        for document in reading.documents:
            text = tokenizer.decode(document.ids.tolist(), skip_special_tokens=True)
            hits = self.texts.hits(document.source, text)
            self.documents += 1
            self.documents_hit += bool(hits)
            self.num_hits += len(hits)
            self.listed += hits[: min(MAX_LISTED_OF_ONE, MAX_LISTED - len(self.listed))]
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
        """What was compared and found, once the reading is consumed."""
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
        return overlap(self.manifest())

    def _examples(self) -> str:
        by_document = list({hit.document: hit for hit in reversed(self.listed)}.values())[::-1]
        first = [f"{h.document} has {h.text} ({h.kind}: {h.words!r})" for h in by_document[:MAX_EXAMPLES]]
        more = self.documents_hit - MAX_EXAMPLES
        return ", ".join([*first, *([f"and {more} more"] if more > 0 else [])])


def together(manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Those of several corpora that were compared with the same texts in the same way, as one."""
    counts = ("documents", "documents_hit", "documents_dropped", "hits")
    hits = [hit for each in manifests for hit in each["first_hits"]][:MAX_LISTED]
    return manifests[0] | {name: sum(m[name] for m in manifests) for name in counts} | {"first_hits": hits}


def overlap(manifest: dict[str, Any]) -> str:
    """How many documents overlap, in words, from the `decontamination` entry of a corpus's manifest."""
    against = ", ".join(Path(file["path"]).name for file in manifest["against"])
    return f"{manifest['documents_hit']} of {manifest['documents']} documents overlap with {against}"


def summary(manifest: dict[str, Any] | None) -> str:
    """How many documents overlap and what was done with them, in one line."""
    if manifest is None:
        return "not run"
    if not manifest["documents_hit"]:
        return overlap(manifest)
    dropped = manifest["action"] == "drop"
    return f"{overlap(manifest)}; {'dropped' if dropped else 'kept'}, corpus.json lists them"


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Name and content of each text of a file."""
    if ".jsonl" in path.suffixes:
        for where, record in json_lines(path, ADVICE):
            task = record.get("task_id")
            task = task if isinstance(task, str | int) else f"{path.name}:{where.rpartition(':')[2]}"
            stack: list[tuple[str, Any]] = [(str(task), {k: v for k, v in record.items() if k != "task_id"})]
            while stack:  # no recursion: JSON may be nested deeper than Python's stack
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
    """The words of a text, and those without its comments if they differ."""
    text = unicodedata.normalize("NFKC", text).casefold()
    whole, code = WORD.findall(text), WORD.findall(COMMENT.sub("", text))
    return [whole] if len(whole) == len(code) else [whole, code]


def _grams(words: list[str], n: int) -> Iterator[Gram]:
    return zip(*(islice(words, start, None) for start in range(n)), strict=False)


def _is_distinctive(gram: Gram) -> bool:
    """Whether half its words are distinct ones of two letters or more: no row of numbers, no loop head."""
    return len({word for word in gram if len(word) > 1 and word.isalpha()}) >= len(gram) // 2
