"""What data is, by its content, before a recipe says how to read it: for `potstill init`.

Nothing is judged here that a reader judges: a record is a conversation where `data.chats.records` reads it as one.
"""

from __future__ import annotations

import itertools
import json
import shlex
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from potstill.data.chats.messages import parsed
from potstill.data.chats.records import LISTS, Shapes
from potstill.data.chats.templates import ConversationRefused
from potstill.data.readers import chat, hf, hub, jsonl, parquet, prompts
from potstill.data.readers.folders import files_of, listed
from potstill.data.readers.reading import MARK, Reading, lines_of, not_utf8
from potstill.errors import Unreadable, UserError
from potstill.io.safe_open import opened, parse_json

Form = Literal["text", "jsonl", "json", "parquet", "dataset", "tokens", "other"]
RECORDS_LOOKED_AT = 200
FILES_LOOKED_AT = 5000
START_BYTES = 2**16
FEW = 0.01
"""Share of a folder's bytes under which an ending is not named."""
TEXT_KEYS = ("text", "content", "code", "document", "article", "body", "story", "passage")
"""Keys and columns that hold a document in published data, the likeliest first."""
SHORT_TEXT, MUCH_LONGER = 40, 4
"""Characters in the mean that a key is not taken for its name with, where another has so many times as many: a label,
an address or a title."""
TABLES = (".csv", ".tsv")
TO_LINES = (
    "python -c 'import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(sys.stdin{tab})]'"
    " < {file} > {lines}"
)
REMOVE = "Leave it out, or write it again."


@dataclass(frozen=True)
class Look:
    """A path, and what the first files and records there are."""

    path: str
    """Absolute; or a data set of the hub."""
    form: Form
    files: list[Path] = field(default_factory=list)
    """Those of that form, sorted; none of a data set."""
    others: list[str] = field(default_factory=list)
    """Names of a folder's other files."""
    selection: dict[str, Any] = field(default_factory=dict)
    """Of a data set: the split and subset that are read."""
    records: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """The first ones, each with its place."""
    vocab_size: int = 2**16
    """Of the teacher."""
    exclude: list[str] = field(default_factory=list)
    """Patterns of files that were not looked at."""

    @property
    def is_folder(self) -> bool:
        return Path(self.path).is_dir()

    @property
    def patterns(self) -> list[str] | None:
        """Of a folder with other files than texts: names of the texts, by their endings, without those that are hardly
        any; None where all is text.
        """
        if not self.others:
            return None
        sizes = Counter[str]()
        for file in self.files:
            sizes[f"*{file.suffix}" if file.suffix else file.name] += file.stat().st_size
        few = sum(sizes.values()) * FEW
        return [pattern for pattern, number in sizes.most_common() if number >= few]

    @property
    def id_dtype(self) -> str:
        """Of token shards: ids of four bytes are read as such where all are in the vocabulary, since two narrow ids in
        one are beyond any.
        """
        with opened(self.files[0], "token ids", REMOVE) as stream:
            start = stream.read(START_BYTES)
        numbers = np.frombuffer(start[: len(start) // 4 * 4], "<u4")
        is_whole = self.files[0].stat().st_size % 4 == 0 and len(numbers) > 0
        return "uint32" if is_whole and int(numbers.max()) < self.vocab_size else "uint16"

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def keys(self) -> list[tuple[str, int]]:
        """Keys of the records, and how many have something under each."""
        found = Counter(key for _, record in self.records for key in record if record[key] is not None)
        return list(found.items())

    @cached_property
    def conversations(self) -> tuple[str | None, int] | None:
        """Key of the list of messages, None for the shape that a record has, and how many records are conversations
        with an answer; None where most are none.
        """
        keys = sorted({key for _, record in self.records for key, value in record.items() if _is_list(value)})
        preferred = [key for key in ("chosen", *keys) if key in keys and key not in (*LISTS, "rejected")]
        for key in (None, *dict.fromkeys(preferred)):
            number = sum(_is_conversation(Shapes(key), where, record) for where, record in self.records)
            if 2 * number > len(self.records):
                return key, number
        return None

    @cached_property
    def questions(self) -> tuple[str, int] | None:
        """Key of a prompt that nothing answers, and how many records have it."""
        have = {
            key: number
            for key, number in self.keys()
            if key in prompts.FIELDS and 2 * number > len(self.records)
        }
        if self.conversations is not None or any(key in TEXT_KEYS for key, _ in self.keys()):
            return None
        return next(((key, have[key]) for key in prompts.FIELDS if key in have), None)

    @cached_property
    def texts(self) -> tuple[str, int]:
        """Key of the documents, and how many records have it: by its name, else the longest of all; what is short by
        any name is none where another is long.

        Raises:
            UserError: no key has texts.
        """
        words = {
            key: [record[key] for _, record in self.records if isinstance(record.get(key), str)]
            for key, _ in self.keys()
        }
        often = {key: each for key, each in words.items() if 2 * len(each) > len(self.records) and any(each)}
        if not often:
            raise UserError(
                f"{self.records[0][0]}: no text, no conversation and no prompt; {self._kinds_of_values()} Write each"
                " document as a string under `text`."
            )
        means = {key: statistics.fmean(map(len, each)) for key, each in often.items()}
        longest = max(means, key=lambda key: means[key])
        named = [
            key
            for key in TEXT_KEYS
            if key in often and not (means[key] < SHORT_TEXT and MUCH_LONGER * means[key] < means[longest])
        ]
        chosen = [*named, longest][0]
        return chosen, len(often[chosen])

    @property
    def longer_text(self) -> str | None:
        """The key of much longer texts than `texts` has; None where there is none."""
        means = {
            key: statistics.fmean(
                len(record[key]) for _, record in self.records if isinstance(record.get(key), str)
            )
            for key, _ in self.keys()
            if any(isinstance(record.get(key), str) for _, record in self.records)
        }
        longest = max(means, key=lambda key: means[key])
        return longest if means[longest] > MUCH_LONGER * means[self.texts[0]] else None

    def _kinds_of_values(self) -> str:
        """What the records have, where it is no text."""
        strings = Counter(
            key for _, record in self.records for key, value in record.items() if isinstance(value, str)
        )
        if strings:  # each in fewer than half
            names = ", ".join(f"{key!r:.40} in {count}" for key, count in strings.most_common(4))
            return f"of {len(self.records)} records none has one key in most: {names}."
        kinds = ", ".join(
            f"{key!r:.40} ({type(value).__name__})" for key, value in list(self.records[0][1].items())[:4]
        )
        return f"a record has {kinds or 'nothing'}."

    @cached_property
    def num_records(self) -> int | None:
        """How many there are: counted, or of JSON lines estimated by their length; None where that is not known."""
        if len(self.records) < RECORDS_LOOKED_AT:
            return len(self.records)
        if self.form == "parquet":
            return sum(_rows_of(file) for file in self.files)
        if self.form == "dataset":
            return None
        sizes = [len(json.dumps(record, ensure_ascii=False).encode()) + 1 for _, record in self.records]
        return round(self.num_bytes / statistics.fmean(sizes))


def look(
    path: str,
    vocab_size: int,
    split: str | None = None,
    subset: str | None = None,
    exclude: Sequence[str] = (),
) -> Look:
    """Open the first files of a path, and the first records.

    Args:
        path: absolute, or a data set of the hub.
        vocab_size: of the teacher, which tells how wide token ids are.
        split, subset: of a data set, where they are known.
        exclude: patterns of a folder's files that are none of the data.

    Raises:
        UserError: a file that cannot be read, or records that are none.
    """
    if hf.is_dataset(path):
        return _look_at_dataset(path, split, subset)
    place = Path(path)
    if not place.is_dir():
        return _with_records(Look(path, _form_of(place), [place], vocab_size=vocab_size))
    files = [file for file in files_of(place, ("*",), exclude) if file.stat().st_size]
    forms = {file: _form_in_folder(file) for file in files[:FILES_LOOKED_AT]}
    sizes = Counter[Form]()
    for file, form in forms.items():
        if form != "other":
            sizes[form] += file.stat().st_size
    if not sizes:
        return Look(path, "other", files, vocab_size=vocab_size)
    chosen = sizes.most_common(1)[0][0]
    others = [str(file.relative_to(place)) for file, form in forms.items() if form != chosen]
    its_files = [file for file in files if forms.get(file, chosen) == chosen]
    return _with_records(Look(path, chosen, its_files, others, {}, [], vocab_size, [*exclude]))


def refuse(data: Look) -> NoReturn:
    """Say what data are of which no kind of corpus reads anything.

    Raises:
        UserError: always.
    """
    if data.is_folder:
        names = [str(file.relative_to(data.path)) for file in data.files] or ["empty files alone"]
        endings = Counter(file.suffix.lower() for file in data.files)
        todo, (ending, _) = "", (endings.most_common(1) or [("", 0)])[0]
        if ending in TABLES:
            todo = f" Tables are not read: {_to_lines(data.files[0])} makes records of one."
        elif ending == ".json":
            todo = (
                " In a folder files of one object each are taken for descriptions. If they are the records, join them:"
                f" find {shlex.quote(data.path)} -name '*.json' -exec jq -c . {{}} + > data.jsonl."
            )
        raise UserError(
            f"{data.path}: no file with text, JSON lines, Parquet or token ids (*.bin); it has {listed(names)}.{todo}"
        )
    (file,) = data.files
    with opened(file, "data", REMOVE) as stream:
        if not stream.read(START_BYTES).strip():
            raise UserError(f"{file}: an empty file. Name one with data.")
    next(lines_of(file, Reading(iter(()))), None)  # refuses what is compressed or encoded otherwise
    if file.suffix.lower() in TABLES:
        raise UserError(f"{file}: a table, which is not read. Make records of it: {_to_lines(file)}.")
    with opened(file, "data", REMOVE) as stream:
        content = stream.read(START_BYTES)
    if b"\0" not in content:
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(str(file), error) from error
    raise UserError(
        f"{file}: neither text, JSON lines, Parquet nor token ids. Token ids are read from files named *.bin."
    )


def _to_lines(table: Path) -> str:
    """The command that makes JSON lines of a table."""
    tab = ', delimiter="\\t"' if table.suffix.lower() == ".tsv" else ""
    return TO_LINES.format(
        tab=tab, file=shlex.quote(str(table)), lines=shlex.quote(table.with_suffix(".jsonl").name)
    )


def _look_at_dataset(path: str, split: str | None, subset: str | None) -> Look:
    """Of several splits the one named train, where the recipe names none."""
    described, is_here = Path(path) / "dataset_dict.json", Path(path).exists()
    if split is None:
        splits = [] if is_here else hub.splits_of(path, subset)
        if described.is_file():
            splits = parse_json(described.read_bytes()).get("splits", [])
        split = "train" if len(splits) > 1 and "train" in splits else None
    count = None if is_here else RECORDS_LOOKED_AT
    selection = {key: value for key, value in (("subset", subset), ("split", split)) if value is not None}
    return _with_records(Look(path, "dataset", selection=selection), count)


def _with_records(data: Look, count: int | None = None) -> Look:
    if data.form in ("text", "tokens", "other"):
        return data
    split, subset = data.selection.get("split"), data.selection.get("subset")
    found = chat.records_at(data.path, Reading(iter(())), split, subset, count, chat.PATTERNS)
    data.records.extend(itertools.islice(found, RECORDS_LOOKED_AT))
    if not data.records:
        raise UserError(f"{data.path}: not one record in it. Name a file with data.")
    return data


def _form_in_folder(file: Path) -> Form:
    """An archive, or another file that is no data by its first bytes, is none of the data."""
    try:
        return _form_of(file, is_alone=False)
    except Unreadable:
        raise
    except UserError:
        return "other"


def _form_of(file: Path, is_alone: bool = True) -> Form:
    """By its name and its first bytes. Of a folder's files JSON lines are read by their name alone, and one object
    describes the data."""
    ending = file.suffix.lower()
    with opened(file, "data", REMOVE) as stream:
        start = stream.read(START_BYTES)
    if not start.strip():
        return "other"
    if ending == ".parquet" or start.startswith(b"PAR1"):
        return "parquet"
    if ending == ".bin":
        return "tokens"
    if f"*{ending}" in jsonl.PATTERNS:
        return "jsonl"
    if ending in TABLES or not _is_text(start):
        return "other"
    words = start.decode("utf-8", "ignore").removeprefix(MARK).lstrip()
    if ending == ".json" and (words[:1] == "[" or is_alone):
        return "json"
    if ending == ".json" and words[:1] == "{":
        return "other"
    return "jsonl" if is_alone and _is_object(words.partition("\n")[0]) else "text"


def _is_text(start: bytes) -> bool:
    if b"\0" in start:
        return False
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        return len(start) == START_BYTES and error.start > START_BYTES - 4  # cut inside of a character
    return True


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(parse_json(line.encode()), dict)
    except ValueError:
        return False


def _is_list(value: Any) -> bool:
    found = parsed(value)
    return isinstance(found, list) and bool(found) and all(map(_is_message, found))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and bool(value.keys() & {"role", "from"})


def _is_conversation(shapes: Shapes, where: str, record: dict[str, Any]) -> bool:
    try:
        found = shapes.conversation(where, record)
    except ConversationRefused:
        return False
    return found is None or bool(found.trained)


def _rows_of(file: Path) -> int:
    return int(parquet.import_parquet().ParquetFile(file).metadata.num_rows)
