"""Damaged and hostile inputs of every kind, through the command line: each is one line and exit 2, quickly,
in little memory, and nothing is written. A pickle is refused by its content, whatever its name, and never run.

One function for each kind of file yields its faults: a name, what makes the file, and what the line must say.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_corpus, make_model, make_tokenizer
from safetensors.torch import load_file, save_file

import potstill
from potstill import TorchTeacher, UserError
from potstill.cli.main import main
from potstill.io.safe_open import pickle_in
from potstill.teachers.toy import FixtureTeacher, TableTeacher

GIB = 2**30
CPU_SECONDS, PEAK_BYTES = 5.0, 2 * GIB
Words = list[str]
Damage = Callable[["Good", Path], Words]
"""Writes a damaged input into a folder and gives the words of the command line that meets it."""


@dataclass(frozen=True)
class Good:
    """What is sound, to be copied and damaged."""

    teacher: Path
    texts: Path
    gguf: Path
    run: Path


@dataclass(frozen=True)
class Fault:
    kind: str
    name: str
    make: Damage
    says: str
    """A regular expression that the line must contain."""
    lines: int = 1
    """How many mistakes there are."""


class Canary:
    """What a pickle would do if it were loaded: make a file beside itself."""

    def __reduce__(self) -> Any:
        return open, ("canary", "w")


def pickled(protocol: int) -> bytes:
    return pickle.dumps(Canary(), protocol)


def torch_zip() -> bytes:
    """As `torch.save` writes: a zip with a pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(2))
    return buffer.getvalue()


# ---- how an input reaches the command line

# A student of all layers: what is read is tried, and not whether there is something to learn.
TRIED = ("--smoke", "1", "allow_identical=true")


def recipe(good: Good, folder: Path, *words: str, **sections: str) -> Words:
    """`distill` with a small whole recipe in which sections are replaced by their YAML."""
    text = {
        "corpus": f"{{name: text, path: {good.texts}, tokens_per_row: 32, heldout_rows: 2}}",
        "teacher": f"{{name: torch, model: {good.teacher}}}",
        "student": "{name: cut, layers: 2}",
        "train": "{steps: 4, rows_per_step: 2, lr: 1e-3, device: cpu, save_every: 2}",
    } | sections
    path = folder / "recipe.yaml"
    lines = (f"{key}: {value}\n" for key, value in text.items())
    path.write_text("".join(lines).replace("TEXTS", str(good.texts)))
    return ["distill", str(path), *words, *([] if "--smoke" in words else ["--out", str(folder / "run")])]


def recipe_of(content: bytes | str) -> Damage:
    def make(good: Good, folder: Path) -> Words:
        (folder / "recipe.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["distill", str(folder / "recipe.yaml")]

    return make


def sections(*words: str, **changes: str) -> Damage:
    return lambda good, folder: recipe(good, folder, *words, **changes)


def special(make: Callable[[Path], Any], path: Path) -> Path:
    make(path)
    return path


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with open(path, "wb") as file:
            file.truncate(size)

    return make


SPECIAL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a FIFO": (os.mkfifo, "."),
    "an endless device": (zeros, "."),
    "a link to itself": (loop, "."),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "."),
    "a folder": (Path.mkdir, "."),
}


def corpus(name: str, content: bytes | Callable[[Path], Any], more: str = "") -> Damage:
    """A corpus file of some bytes, or made by a function. The kind of reader goes by the name's ending."""
    reader = {"jsonl": "jsonl", "parquet": "parquet", "txt": "text", "bin": "tokens", "chat": "chat"}
    kind = reader[name.rpartition(".")[2]]

    def make(good: Good, folder: Path) -> Words:
        path = folder / name
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        dtype = ", dtype: uint16" if kind == "tokens" and "dtype" not in more else ""
        said = f"{{name: {kind}, path: {path}, tokens_per_row: 16, heldout_rows: 1{dtype}{more}}}"
        return recipe(good, folder, corpus=said)

    return make


def copied(good: Good, folder: Path) -> Path:
    return Path(shutil.copytree(good.teacher, folder / "model"))


def model_file(name: str, content: bytes | Callable[[Path], Any], section: str = "teacher") -> Damage:
    """The good model with one file replaced; as the teacher, or as the student's config or checkpoint."""

    def make(good: Good, folder: Path) -> Words:
        path = copied(good, folder) / name
        path.unlink(missing_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        kind = {"teacher": "teacher: {name: torch", "config": "student: {name: config"}.get(
            section, "student: {name: checkpoint"
        )
        key, _, value = kind.partition(": ")
        return recipe(good, folder, **{key: f"{value}, model: {path.parent}}}"})

    return make


def changed_json(name: str, change: Callable[[dict[str, Any]], Any], section: str = "teacher") -> Damage:
    """The good model with a JSON file edited."""

    def make(good: Good, folder: Path) -> Words:
        value = json.loads((good.teacher / name).read_text())
        edited = change(value)
        content = json.dumps(value if edited is None else edited).encode()
        return model_file(name, content, section)(good, folder)

    return make


# fmt: off
# ---- the kinds


def recipes() -> Iterator[tuple[Any, ...]]:
    at = r"recipe\.yaml: "
    yield "empty", recipe_of(b""), at + "nothing at the top"
    yield "a comment alone", recipe_of("# soon\n"), at + "nothing at the top"
    yield "a list", recipe_of("- corpus\n"), at + "a list at the top"
    yield "a word", recipe_of("corpus\n"), at + "'corpus' at the top"
    yield "zero bytes", recipe_of(b"corpus:\0\0\0"), at + r"a binary file \(zero byte at 7\)"
    yield "UTF-16", recipe_of("corpus: {}\n".encode("utf-16")), at + "(a binary file|not UTF-8)"
    yield "latin-1", recipe_of("# pré\n".encode("latin-1")), at + r"not UTF-8 \(byte 0xe9 at 4\)"
    yield "a control character", recipe_of("corpus:\n  a: \x07\n"), at + r"line 2: character U\+0007"
    yield "too large", recipe_of(b"#" * (2**20 + 1)), at + "larger than 1048576 bytes"
    yield "an unclosed bracket", recipe_of("corpus: {name: text\n"), at + "line 2, column 1: "
    yield "a tab", recipe_of("corpus:\n\tname: text\n"), at + "line 2, column 1: .*spaces"
    yield "two documents", recipe_of("a: 1\n---\nb: 2\n"), at + "line 2, column 1: a second document"
    yield "a key twice", recipe_of("a: 1\nb: 2\na: 3\n"), at + "a: given twice, in lines 1 and 3", 7
    yield "a key of a number", recipe_of("1: 2\n"), at + "line 1, column 1: the key is 1, not text"
    yield "an alias", recipe_of("a: &x [1]\nb: *x\n"), at + "line 1, column 4: anchors"
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(9))
    yield "a billion laughs", recipe_of(bomb), at + "line 1, column 5: anchors"
    yield "a merge key", recipe_of("<<: {a: 1}\n"), at + "line 1, column 1: merge keys"
    yield "a tag that runs", recipe_of("a: !!python/object/apply:os.system [x]\n"), at + "line 1, column 4: tags"
    yield "10^5 brackets", recipe_of("a: " + "[" * 10**5), at + "line 1, column .*nested deeper than 32"
    yield "10^5 braces", recipe_of("a: " + "{b: " * 10**5), at + "line 1, column .*nested deeper than 32"
    deep = "".join(f"{' ' * i}a:\n" for i in range(1000))
    yield "a thousand indents", recipe_of(deep), at + "line .*nested deeper than 32"
    yield "10^5 dashes", recipe_of("- " * 10**5), at + "line 1, column .*nested deeper than 32"
    yield "half a surrogate pair", recipe_of('a: "\\ud800"\n'), at + "line 1, column 4: half of a surrogate"
    yield "an escape out of range", recipe_of('a: "\\UFFFFFFFF"\n'), at + "line 1, column .*out of range"
    yield "a number of 500 digits", recipe_of(f"a: {'9' * 500}\n"), at + "line 1, column 4: a number of 500"
    yield "a pickle, protocol 0", recipe_of(pickled(0)), r"recipe\.yaml: .*pickle"
    yield "a pickle, protocol 4", recipe_of(pickled(4)), r"recipe\.yaml: .*pickle"

    train = "{{steps: 4, rows_per_step: 2, lr: {}}}".format
    yield "a key of 10^5 letters", sections(train=f"{{steps: 2, ? {'k' * 10**5} : 1}}"), r"recipe\.yaml: train\.kkk.*unknown key", 3
    yield "NaN", sections(train=train(".nan")), r"recipe\.yaml: train\.lr: nan is not a finite number"
    yield "infinity", sections(train=train("1e999")), r"recipe\.yaml: train\.lr: inf is not a finite number"
    yield "a negative rate", sections(train=train("-1")), r"train\.lr: -1 must be greater than 0"
    yield "true for a number", sections(train=train("true")), r"train\.lr: true is not a number"
    yield "no steps", sections(train="{steps: 0, rows_per_step: 2, lr: 1}"), r"train\.steps: 0 must be 1 or more"
    yield "a section of null", sections(train="null"), r"train: null is not a mapping"
    yield "an unknown reader", sections(corpus="{name: excel, path: x}"), "no corpus called 'excel'"
    yield "patterns of numbers", sections(corpus="{name: text, path: ., include: [1]}"), r"corpus\.include\.0: 1 is not text"
    for kind, path in {"300": "x" * 300, "5000": "x/" * 2500}.items():
        yield f"a path of {kind} characters", sections(corpus=f"{{name: text, path: {path}}}"), r"corpus\.path: no file"
        yield f"a model of {kind} characters", sections(teacher=f"{{name: torch, model: {path}}}"), r"teacher\.model: no file"
    hub = f"a/{'x' * 300}"
    yield "a hub id of 300 characters", sections(teacher=f"{{name: torch, model: {hub}}}"), "a/xxx"
    yield "a path with a zero byte", sections(corpus='{name: text, path: "a\\0b"}'), r"corpus\.path: 'a\\x00b' is not a path"
    yield "a path of null", sections(corpus="{name: text, path: null}"), r"corpus\.path: null is not text"
    yield "rows longer than the corpus", sections(corpus="{name: text, path: TEXTS, tokens_per_row: 2000000000}"), "0 held-out rows of 2000000000 tokens"
    yield "more held-out rows than there are", sections(corpus="{name: text, path: TEXTS, heldout_rows: 2000000000}"), "2000000000 held-out rows"
    yield (
        "a step of two billion rows",
        sections("--smoke", "1", train="{steps: 1, rows_per_step: 2000000000, rows_per_micro_batch: 1, lr: 1e-3}"),
        r"train\.rows_per_step: 2000000000 .* \d+ training rows",
    )
    for override in ("train", "train.steps", "=1", "train.steps=[", "a.b.c.d=\x00", "plugins.0.1=2"):
        yield f"the override {override!r}", sections(override), "override"
    for what, (make, _) in SPECIAL.items():

        def as_recipe(good: Good, folder: Path, make: Callable[[Path], Any] = make) -> Words:
            return ["distill", str(special(make, folder / "recipe.yaml"))]

        yield f"{what}", as_recipe, r"recipe\.yaml: "
    yield "a name of 300 characters", lambda g, f: ["distill", "x" * 300], "xxx: "


def plugins() -> Iterator[tuple[Any, ...]]:
    def plugin(name: str, content: bytes | Callable[[Path], Any]) -> Damage:
        def make(good: Good, folder: Path) -> Words:
            path = folder / name
            path.write_bytes(content) if isinstance(content, bytes) else content(path)
            return recipe(good, folder, plugins=f"[{name}]")

        return make

    at = r"recipe\.yaml: plugins\.0: "
    yield "not named .py", plugin("loss.txt", b"x = 1\n"), at + r".*loss\.txt.*\.py"
    yield "without an ending", plugin("loss", b"x = 1\n"), at + r".*loss.*\.py"
    yield "compiled code", plugin("loss.pyc", b"\xa7\r\r\n" + bytes(12)), at + r".*loss\.pyc.*\.py"
    yield "a library", plugin("loss.so", b"\x7fELF"), at + r".*loss\.so.*\.py"
    yield "a syntax error", plugin("loss.py", b"def :\n"), at + r".*loss\.py.*line 1"
    yield "zero bytes", plugin("loss.py", bytes(100)), at + r".*loss\.py"
    yield "a pickle", plugin("loss.py", pickled(4)), at + r".*loss\.py"
    yield "latin-1", plugin("loss.py", b"x = '\xe9'\n"), at + r".*loss\.py"
    yield "one that raises", plugin("loss.py", b"1 / 0\n"), at + r".*loss\.py: ZeroDivisionError"
    yield "one that leaves", plugin("loss.py", b"raise SystemExit(0)\n"), at + r".*loss\.py: SystemExit"
    yield "10^5 brackets", plugin("loss.py", b"(" * 10**5), at + r".*loss\.py"
    option = b"from potstill.registry import register\n@register('divergence')\ndef odd_loss(s, t, *, a: 3 = 1): ...\n"
    yield "an option of no type", plugin("loss.py", option), r"recipe\.yaml: plugins: divergence odd_loss"
    yield "a folder", plugin("loss.py", Path.mkdir), at + r".*loss\.py"
    yield "a FIFO", plugin("loss.py", os.mkfifo), at + r".*loss\.py"


def texts() -> Iterator[tuple[Any, ...]]:
    yield "empty", corpus("a.txt", b""), r"corpus\.path: not one document"
    yield "latin-1", corpus("a.txt", b"ok\n\xe9t\xe9\n"), r"a\.txt: not UTF-8 text: byte 0xe9 at 3 of 7"
    yield "UTF-16", corpus("a.txt", "the cat".encode("utf-16")), r"a\.txt: UTF-16 text .*ff fe.*, not UTF-8"
    yield "UTF-32", corpus("a.txt", "the cat".encode("utf-32")), r"a\.txt: UTF-32 text .*ff fe 00 00.*, not UTF-8"
    yield "UTF-16 without a mark", corpus("a.txt", "the cat".encode("utf-16-le")), r"a\.txt: .*zero byte at 1"
    yield "half a character", corpus("a.txt", "the é".encode()[:-1]), r"a\.txt: not UTF-8 text: byte 0xc3 at 4 of 5"
    yield "zero bytes", corpus("a.txt", b"the cat\n" + bytes(500)), r"a\.txt: .*zero byte at 8"
    yield "10 GiB of nothing", corpus("a.txt", sparse(10 * GIB)), r"a\.txt: .*10737418240 bytes"
    yield "a pickle, protocol 0", corpus("a.txt", pickled(0)), r"a\.txt: .*pickle"
    yield "a pickle, protocol 5", corpus("a.txt", pickled(5)), r"a\.txt: .*pickle"
    yield "a pickle in a zip", corpus("a.txt", torch_zip()), r"a\.txt: compressed \(zip\), not text"
    for what in SPECIAL:
        yield what, corpus("a.txt", SPECIAL[what][0]), r"a\.txt"

    def in_a_folder(good: Good, folder: Path) -> Words:
        path = Path(shutil.copytree(good.texts, folder / "texts"))
        loop(path / "000a.txt")
        return recipe(good, folder, corpus=f"{{name: text, path: {path}}}")

    yield "a folder with a link to itself", in_a_folder, r"000a\.txt: cannot be read"

    def beside_texts(name: str, make: Callable[[Path], Any]) -> Damage:
        def made(good: Good, folder: Path) -> Words:
            path = Path(shutil.copytree(good.texts, folder / "texts"))
            make(path / name)
            return recipe(good, folder, corpus=f"{{name: text, path: {path}}}")

        return made

    yield "a FIFO in a folder", beside_texts("pipe", os.mkfifo), r"texts/pipe: a FIFO, not a file"
    yield "a device in a folder", beside_texts("zero", zeros), r"texts/zero: a device, not a file"
    yield "a folder of the kernel's in a folder", beside_texts("p", lambda path: path.symlink_to("/proc")), r"texts/p: made by the kernel \(proc\)"
    yield "a folder that holds itself", beside_texts("up", lambda path: path.symlink_to("../..")), r"texts/up: a link to a folder that holds"
    yield "a linked folder that is gone", beside_texts("more", lambda path: path.symlink_to("gone/")), r"texts/more: no such file"
    bad = os.fsdecode(b"\xe9.txt")
    yield "a name that is not UTF-8", beside_texts(bad, lambda path: path.write_bytes(b"\xff")), r"texts/\\udce9\.txt: not UTF-8 text: byte 0xff at 0"
    for place in ("/proc/kmsg", "/proc", "/proc/self/pagemap", "/dev"):
        if os.path.exists(place):
            yield place, sections(corpus=f"{{name: text, path: {place}}}"), rf"{place}.*, not a (file|folder)"
    yield "a data set of the hub", sections(corpus="{name: hf, path: owner/name}"), r"corpus\.path: owner/name@main: no such file or folder here"


def jsonl() -> Iterator[tuple[Any, ...]]:
    good = [json.dumps({"text": f"the cat sat on mat {n}"}).encode() for n in range(40)]

    def line(content: bytes, number: int = 17) -> Damage:
        return corpus("c.jsonl", b"\n".join([*good[: number - 1], content, *good[number:]]) + b"\n")

    at = r"c\.jsonl:17: "
    yield "empty", corpus("c.jsonl", b""), r"corpus\.path: not one document"
    yield "blank", corpus("c.jsonl", b"\n \n\n"), r"corpus\.path: not one document"
    yield "cut off in a record", corpus("c.jsonl", b"\n".join(good)[:-9]), r"c\.jsonl:40: not a line of JSON"
    yield "a record cut off", line(b'{"text": "the"'), at + "not a line of JSON: Expecting ',' delimiter"
    yield "two records on a line", line(good[0] * 2), at + "not a line of JSON: Extra data"
    yield "a number for a text", line(b'{"text": 5}'), at + "'text' is int, not a string"
    yield "null for a text", line(b'{"text": null}'), at + "'text' is null, not a string. Drop such records: jq"
    yield "NaN for a text", line(b'{"text": NaN}'), at + "'text' is float"
    yield "a list for a text", line(b'{"text": ["a"]}'), at + "'text' is list"
    yield "a list for a record", line(b'["text"]'), at + "a list, not an object"
    yield "a number for a record", line(b"7"), at + "a number, not an object"
    yield "another key", line(b'{"txt": "a"}'), at + "'text' is missing; found txt"
    yield "a key of 10^5 letters", line(b'{"%s": 1}' % (b"k" * 10**5)), at + "'text' is missing; found kkk"
    yield "10^4 keys", line(json.dumps(dict.fromkeys(map(str, range(10**4)))).encode()), at + "'text' is missing; found 0, 1, "
    yield "a key twice", line(b'{"text": "a", "text": "b"}'), at + ".*text is there twice"
    yield "half a surrogate pair", line(b'{"text": "\\ud800"}'), at + "'text' holds half of a surrogate pair"
    yield "a byte-order mark in the middle", line(b"\xef\xbb\xbf" + good[0]), at + ".*BOM"
    yield "UTF-16", corpus("c.jsonl", b"\n".join(good).decode().encode("utf-16")), r"c\.jsonl: UTF-16 text"
    yield "latin-1", line(b'{"text": "\xe9"}'), at + ".*byte 0xe9 at 10"
    yield "a zero byte", line(b'{"text": "a\0b"}'), at + "not a line of JSON: Invalid control character"
    yield "zero bytes", line(bytes(5000)), at + "not a line of JSON"
    yield "10^5 brackets", line(b"[" * 10**5), at + "not a line of JSON: .*(recursion|nested)"
    yield "10^5 objects", line(b'{"text":' * 10**5), at + "not a line of JSON: .*(recursion|nested)"
    yield "a number of 10^5 digits", line(b'{"text": ' + b"9" * 10**5 + b"}"), at + "not a line of JSON: .*digits"
    yield "CSV", corpus("c.jsonl", b"text\nthe cat\n"), r"c\.jsonl:1: not a line of JSON"
    yield "compressed", corpus("c.jsonl", gzip.compress(b"\n".join(good))), r"c\.jsonl: compressed \(gzip\), not text"
    yield "a line of 10 GiB", corpus("c.jsonl", sparse(10 * GIB)), r"c\.jsonl:1: .*longer than"
    yield "a pickle, protocol 0", corpus("c.jsonl", pickled(0)), r"c\.jsonl: .*pickle"
    yield "a pickle, protocol 4", corpus("c.jsonl", pickled(4)), r"c\.jsonl: .*pickle"
    for what in SPECIAL:
        yield what, corpus("c.jsonl", SPECIAL[what][0]), r"c\.jsonl"

    def chat(record: Any) -> Damage:
        def make(good: Good, folder: Path) -> Words:
            words = corpus("c.chat", json.dumps(record).encode() + b"\n")(good, folder)
            model = copied(good, folder)
            (model / "chat_template.jinja").write_text(
                "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
                "{% if add_generation_prompt %}assistant: {% endif %}"
            )
            return [*words, f"corpus.tokenizer={model}"]

        return make

    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    yield "chat without messages", chat({"messages": []}), r"c\.chat:1: 'messages' is an empty list"
    yield "chat of texts", chat({"messages": ["a"]}), r"c\.chat:1: message 0: a message must have"
    yield "chat with a number", chat({"messages": [user, answer | {"content": 5}]}), r"c\.chat:1: message 1: a message must have"
    yield "chat that begins with an answer", chat({"messages": [answer]}), r"c\.chat:1: message 0 is the assistant's"
    yield "chat with half a pair", chat({"messages": [user | {"content": "\ud800"}]}), r"c\.chat:1: holds half of a surrogate pair"


def parquet() -> Iterator[tuple[Any, ...]]:
    buffer = io.BytesIO()
    table = pa.table({"text": [f"the cat sat on mat {n}" for n in range(64)]})
    pq.write_table(table, buffer, compression="snappy")
    good = buffer.getvalue()

    def data(content: bytes) -> Damage:
        return corpus("d.parquet", content)

    def flipped(at: int, count: int) -> bytes:
        return good[:at] + bytes(byte ^ 0xFF for byte in good[at : at + count]) + good[at + count :]

    def column(values: Any, name: str = "text", more: str = "") -> Damage:
        def write(path: Path) -> None:
            pq.write_table(pa.table({name: values}), path)

        return corpus("d.parquet", write, more)

    at = r"d\.parquet"
    yield "empty", data(b""), at + ": not a readable Parquet file"
    yield "the magic alone", data(b"PAR1"), at + ": not a readable Parquet file"
    for name, end in {"header": 3, "middle": len(good) // 2, "footer": len(good) - 20, "end": len(good) - 1}.items():
        yield f"cut off in the {name}", data(good[:end]), at + ": not a readable Parquet file"
    yield "another magic", data(b"PAR2" + good[4:-4] + b"PAR2"), at + ": not a readable Parquet file"
    for size in (0, 2**31 - 1, 2**32 - 1):
        footer = good[:-8] + struct.pack("<I", size) + b"PAR1"
        yield f"a footer of {size} bytes", data(footer), at + ": not a readable Parquet file"
    yield "a flipped footer", data(flipped(len(good) - 200, 100)), at + ": not a readable Parquet file"
    yield "a flipped page header", data(flipped(4, 20)), at + "(:[0-9]+)?: not a readable Parquet file"
    yield "a flipped page", data(flipped(40, 200)), at + "(:[0-9]+)?: not a readable Parquet file"
    yield "numbers", column(list(range(9))), at + ":0: 'text' is int, not a string"
    yield "lists", column([["a"]] * 9), at + ":0: 'text' is list"
    yield "structs", column([{"a": 1}] * 9), at + ":0: 'text' is dict"
    yield "bytes", column([b"\xff\xfe"] * 9), at + ":0: 'text' is bytes"
    yield "a null in record 17", column(["a"] * 17 + [None]), at + ":17: 'text' is null, not a string. Drop such records"
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(struct.pack("<3i", 0, 2, 4)), pa.py_buffer(b"ab\xff\xfe")]
    )
    yield "a text that is not UTF-8", column(bad), at + ":1: .*utf-8"
    yield "no such column", column(["a"], "body"), at + ": no column 'text'; found body"
    yield "a column inside another", column([{"text": "a"}], "a", ", column: a.text"), at + r": no column 'a\.text'"
    yield "a pickle", data(pickled(4)), at + ": .*pickle"
    yield "a pickle in a zip", data(torch_zip()), at + ": .*pickle"
    yield "CSV", data(b"text\nthe cat\n"), at + ": not a readable Parquet file"
    yield "10 GiB of nothing", corpus("d.parquet", sparse(10 * GIB)), at + ": not a readable Parquet file"
    for what in SPECIAL:
        yield what, corpus("d.parquet", SPECIAL[what][0]), at


def shards() -> Iterator[tuple[Any, ...]]:
    def ids(*values: int, dtype: str = "<u2", more: str = "") -> Damage:
        return corpus("ids.bin", np.array([*range(5), *values] * 40, dtype=dtype).tobytes(), more)

    at = r"ids\.bin: "
    yield "empty", corpus("ids.bin", b""), at + "an empty shard"
    yield "half an id", corpus("ids.bin", bytes(401)), at + "401 bytes are not a whole number of uint16"
    yield "three quarters of an id", corpus("ids.bin", bytes(403), ", dtype: uint32"), at + "403 bytes are not"
    yield "an id beyond the vocabulary", ids(258), at + "id 258 at token 5 is outside the vocabulary of 258"
    yield "the largest id", ids(2**32 - 1, dtype="<u4", more=", dtype: uint32"), at + "id 4294967295 at token 5"
    yield "the other width", ids(7, more=", dtype: uint32"), at + "ids of 2 bytes, not uint32: id 65536 at token 0"
    yield "twice the width", ids(7, dtype="<u4"), at + "ids of 4 bytes, not uint16: .*Set corpus.dtype: uint32"
    yield "four times the width", ids(7, dtype="<i8"), at + "ids of 8 bytes, not uint16: .*Write them as uint32"
    yield "the other byte order", ids(7, dtype=">u2"), at + "id 512 at token 2"
    yield "an end beyond the vocabulary", ids(7, more=", document_end: 258"), r"corpus\.document_end: id 258"
    yield "an unknown width", ids(7, more=", dtype: uint8"), r"corpus\.dtype: 'uint8' is not one of"
    for protocol in (0, 2, 4):
        even = pickled(protocol) + b"\0" * (len(pickled(protocol)) % 2)
        yield f"a pickle, protocol {protocol}", corpus("ids.bin", even, ", dtype: uint16"), at + ".*pickle"
    archive = torch_zip()
    yield "a pickle in a zip", corpus("ids.bin", archive + b"\0" * (len(archive) % 2)), at + ".*pickle"
    yield "10 GiB of nothing", corpus("ids.bin", sparse(10 * GIB), ", dtype: uint32"), at
    for what in SPECIAL:
        yield what, corpus("ids.bin", SPECIAL[what][0]), r"ids\.bin"


def safetensors_bytes(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    """By the written layout, not by the library: so that it can be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(shape: Any = (2,), span: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


def safetensors() -> Iterator[tuple[Any, ...]]:
    name = "model.safetensors"
    at = r"model\.safetensors: "

    def weights(content: bytes | Callable[[Path], Any]) -> Damage:
        return model_file(name, content)

    def header(value: Any, data: bytes = bytes(8), size: int | None = None) -> Damage:
        return weights(safetensors_bytes(value, data, size))

    def edited(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
        def make(good: Good, folder: Path) -> Words:
            tensors = load_file(good.teacher / name)
            change(tensors)
            return weights(lambda path: save_file(tensors, path, metadata={"format": "pt"}))(good, folder)

        return make

    def cut(keep: Callable[[int], int]) -> Damage:
        def make(good: Good, folder: Path) -> Words:
            content = (good.teacher / name).read_bytes()
            return weights(content[: keep(len(content))])(good, folder)

        return make

    yield "empty", weights(b""), at + "ends early"
    yield "seven bytes", weights(bytes(7)), at
    yield "cut off in the header", cut(lambda n: 100), at + "ends early: .* the file has 100"
    yield "cut off in the middle", cut(lambda n: n // 2), at + "ends early"
    yield "cut off at the end", cut(lambda n: n - 1), at + "ends early"
    yield "a header of 2^60 bytes", header({}, size=2**60), at + "not safetensors: a header of 1152921504606846976"
    yield "a header of 2^64-1 bytes", header({}, size=2**64 - 1), at + "not safetensors: a header of"
    yield "a header longer than the file", header({}, size=10**6), at + "ends early"
    yield "an empty header", header(b""), at + "not safetensors: byte 8"
    yield "a header of no JSON", header(b"{'a': 1}"), at + "not JSON: .* column 2"
    yield "a header of an array", header([1]), at + "not safetensors: byte 8 is b'\\['"
    yield "a header in UTF-16", header("{}".encode("utf-16")), at + "not safetensors: byte 8"
    yield "a header in latin-1", header(b'{"\xe9": 1}'), at + "not JSON: .*byte 0xe9 in position 2"
    yield "a header of 10^5 brackets", header(b'{"a":' + b"[" * 10**5), at + "not JSON: .*(recursion|nested)"
    twice = b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2)
    yield "a tensor twice", header(twice), at + "a is there twice"
    yield "an infinite offset", header({"a": tensor(span=(0, float("inf")))}), at + ".*(Infinity|data_offsets)"
    yield "a tensor of null", header({"a": None}), at + "tensor a: dtype None is unknown"
    yield "an unknown dtype", header({"a": tensor(dtype="F128")}), at + "tensor a: dtype 'F128' is unknown"
    yield "a negative size", header({"a": tensor((-2,))}), at + r"tensor a: shape \[-2\] is not"
    yield "sizes of true", header({"a": tensor((True, 2))}), at + r"tensor a: shape \[True, 2\] is not"
    yield "a size of 2^60", header({"a": tensor((2**60,))}), at + "tensor a: F32 .* takes .* bits"
    yield "sizes that overflow", header({"a": tensor((2**62, 4))}), at + "tensor a: F32 .* takes .* bits"
    yield "negative offsets", header({"a": tensor(span=(-8, 0))}), at + "tensor a: data_offsets"
    yield "offsets backwards", header({"a": tensor(span=(8, 0))}), at + "tensor a: .*data_offsets"
    yield "offsets of 2^60", header({"a": tensor(span=(2**60, 2**60 + 8))}), at + "tensor a starts at byte 1152921504606846976"
    overlap = {"a": tensor(), "b": tensor(span=(4, 12))}
    yield "tensors that overlap", header(overlap, bytes(12)), at + "tensor b starts at byte 4 of the data, not at 8"
    gap = {"a": tensor(), "b": tensor(span=(16, 24))}
    yield "a gap", header(gap, bytes(24)), at + "tensor b starts at byte 16 of the data, not at 8"
    yield "bytes behind the end", header({"a": tensor()}, bytes(9)), at + "too long"
    yield "metadata of numbers", header({"__metadata__": {"a": 1}, "a": tensor()}), at + "__metadata__"
    yield "half a surrogate pair", header(b'{"\\ud800": %s}' % json.dumps(tensor()).encode()), "model"
    yield "no tensors", header({}, b""), "model: its weight files hold 0 tensors"
    yield "a pickle, protocol 0", weights(pickled(0)), at + ".*pickle"
    yield "a pickle, protocol 2", weights(pickled(2)), at + ".*pickle"
    yield "a pickle, protocol 5", weights(pickled(5)), at + ".*pickle"
    yield "a pickle in a zip", weights(torch_zip()), at + ".*pickle"
    yield "a web page", weights(b"<!doctype html><html>404</html>"), at + "not safetensors"
    yield "a Git LFS pointer", weights(b"version https://git-lfs.github.com/spec/v1\n"), at + "not safetensors but a Git LFS"
    yield "zero bytes", weights(bytes(5000)), at + "not safetensors"
    yield "10 GiB of nothing", weights(sparse(10 * GIB)), at + "not safetensors"
    for what in SPECIAL:
        yield what, weights(SPECIAL[what][0]), r"model\.safetensors"
    yield "a tensor missing", edited(lambda t: t.pop("model.norm.weight")), r"1 tensor.* first model\.norm\.weight"
    yield "a tensor too many", edited(lambda t: t.update(odd=torch.ones(2))), r"1 tensor.* first odd"
    yield "another shape", edited(lambda t: t.update({"model.norm.weight": torch.ones(9)})), r"tensor model\.norm\.weight is \[9\]"
    yield "weights of NaN", edited(lambda t: t["model.norm.weight"].mul_(float("nan"))), "not finite"
    yield "weights of whole numbers", edited(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)})), "model"

    def only_a_pickle(good: Good, folder: Path) -> Words:
        model = copied(good, folder)
        (model / name).unlink()
        (model / "pytorch_model.bin").write_bytes(torch_zip())
        return recipe(good, folder, teacher=f"{{name: torch, model: {model}}}")

    yield "only a pickle", only_a_pickle, r"only pytorch_model\.bin: a pickle can run code"


def indexes() -> Iterator[tuple[Any, ...]]:
    def index(change: Callable[[dict[str, str]], Any] | bytes) -> Damage:
        """The good model in two shards, with an index that is wrong."""

        def make(good: Good, folder: Path) -> Words:
            model = copied(good, folder)
            tensors = load_file(model / "model.safetensors")
            (model / "model.safetensors").unlink()
            half = len(tensors) // 2
            weight_map: dict[str, str] = {}
            for number, names in enumerate((sorted(tensors)[:half], sorted(tensors)[half:]), start=1):
                file = f"model-{number:05}-of-00002.safetensors"
                save_file({name: tensors[name] for name in names}, model / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(names, file)
            if isinstance(change, bytes):
                content = change
            else:
                value = change(weight_map)
                content = json.dumps({"weight_map": weight_map if value is None else value}).encode()
            (model / "model.safetensors.index.json").write_bytes(content)
            return recipe(good, folder, teacher=f"{{name: torch, model: {model}}}")

        return make

    norm = "model.norm.weight"
    at = r"index\.json: "
    yield "empty", index(b""), at + "not JSON"
    yield "an array", index(b"[]"), at + "a JSON list, not an object"
    yield "a pickle", index(pickled(4)), at + ".*pickle"
    yield "10^5 brackets", index(b"[" * 10**5), at + "not JSON: .*(recursion|nested)"
    yield "no weight_map", index(b"{}"), at + "weight_map is not a table"
    yield "a weight_map of a list", index(lambda m: [1]), at + "weight_map is not a table"
    yield "a shard that is not there", index(lambda m: m.update({norm: "gone.safetensors"})), "1 of 3 shards named by .*missing, first gone"
    yield "a path upwards", index(lambda m: m.update({norm: "../recipe.safetensors"})), at + r".*'\.\./recipe\.safetensors', not the name"
    yield "an absolute path", index(lambda m: m.update({norm: "/etc/x.safetensors"})), at + ".*not the name"
    yield "a number for a shard", index(lambda m: m.update({norm: 5})), at + ".*in 5, not the name"
    yield "a pickle for a shard", index(lambda m: m.update({norm: "x.bin"})), at + r".*'x\.bin', not the name"
    yield "a tensor that is nowhere", index(lambda m: m.update(odd=m[norm])), r"1 of \d+ tensors that .*first odd"


def tables() -> Iterator[tuple[Any, ...]]:
    """The table teacher's own safetensors file."""

    def table(content: Any) -> Damage:
        def make(good: Good, folder: Path) -> Words:
            path = folder / "t.safetensors"
            if isinstance(content, dict):
                save_file(content, path)
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content(path)
            words = corpus("ids.bin", bytes(800))(good, folder)
            student = f"{{name: checkpoint, model: {good.teacher}}}"
            said = (folder / "recipe.yaml").read_text().replace("student: {name: cut, layers: 2}", f"student: {student}")
            old = f"teacher: {{name: torch, model: {good.teacher}}}"
            (folder / "recipe.yaml").write_text(said.replace(old, f"teacher: {{name: table, path: {path}}}"))
            return words

        return make

    at = r"t\.safetensors: "
    yield "empty", table(b""), at
    yield "a header of 2^60 bytes", table(safetensors_bytes({}, size=2**60)), at
    yield "a size of 2^60", table(safetensors_bytes({"logits": tensor((2**60, 1))}, bytes(8))), at
    yield "a pickle", table(pickled(4)), at + ".*pickle"
    yield "a pickle in a zip", table(torch_zip()), at + ".*pickle"
    yield "another name", table({"weights": torch.ones(3, 3)}), at + "holds weights"
    yield "two tensors", table({"logits": torch.ones(3, 3), "b": torch.ones(1)}), at + "holds b, logits"
    yield "not square", table({"logits": torch.ones(3, 4)}), r"t\.safetensors: .*shape \[3, 4\]"
    yield "whole numbers", table({"logits": torch.ones(3, 3, dtype=torch.int32)}), r"t\.safetensors: .*int32"
    yield "NaN", table({"logits": torch.full((3, 3), float("nan"))}), r"t\.safetensors: .*finite"
    for what in SPECIAL:
        yield what, table(SPECIAL[what][0]), r"t\.safetensors"


# ---- GGUF


def gguf_file(
    path: Path, tensors: dict[str, np.ndarray], changes: dict[str, Any], drop: tuple[str, ...] = ()
) -> Path:
    """A Llama of two layers with its tokenizer; `changes` and `drop` are of its metadata."""
    alphabet = sorted(make_tokenizer().get_vocab(), key=make_tokenizer().get_vocab().__getitem__)
    values: dict[str, Any] = {
        "llama.context_length": 512,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 8,
        "llama.vocab_size": 259,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*alphabet, "th"],
        "tokenizer.ggml.token_type": [3, 3, *[1] * 257],
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
    } | changes
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
    for key, value in values.items():
        if key not in drop:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            add[type(value)](key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (259, 32), "output_norm": (32,)}
    for n in range(2):
        shapes |= {
            f"blk.{n}.{name}": shape
            for name, shape in {
                "attn_q": (32, 32),
                "attn_k": (16, 32),
                "attn_v": (16, 32),
                "attn_output": (32, 32),
                "ffn_gate": (64, 32),
                "ffn_up": (64, 32),
                "ffn_down": (32, 64),
                "attn_norm": (32,),
                "ffn_norm": (32,),
            }.items()
        }
    return {f"{name}.weight": generator.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def ggufs() -> Iterator[tuple[Any, ...]]:
    at = r"m\.gguf: "

    def as_teacher(good: Good, folder: Path, path: Path) -> Words:
        return recipe(good, folder, teacher=f"{{name: torch, model: {path}}}")

    def raw(content: bytes | Callable[[Path], Any]) -> Damage:
        def make(good: Good, folder: Path) -> Words:
            path = folder / "m.gguf"
            path.write_bytes(content) if isinstance(content, bytes) else content(path)
            return as_teacher(good, folder, path)

        return make

    def patched(patch: Callable[[bytes], bytes]) -> Damage:
        return lambda good, folder: raw(patch(good.gguf.read_bytes()))(good, folder)

    def over(place: int, code: str, value: Any, behind: bytes = b"") -> Damage:
        """A number written over another, so many bytes behind the first occurrence of a text."""

        def patch(content: bytes) -> bytes:
            start = (content.index(behind) + len(behind) if behind else 0) + place
            return content[:start] + struct.pack(f"<{code}", value) + content[start + struct.calcsize(f"<{code}") :]

        return patched(patch)

    def meta(drop: tuple[str, ...] = (), tensors: dict[str, Any] | None = None, **changes: Any) -> Damage:
        keys = {key.replace("__", "."): value for key, value in changes.items()}

        def make(good: Good, folder: Path) -> Words:
            arrays = {name: array for name, array in (gguf_tensors() | (tensors or {})).items() if array is not None}
            return as_teacher(good, folder, gguf_file(folder / "m.gguf", arrays, keys, drop))

        return make

    yield "empty", raw(b""), at + "not a model but a file that begins with b''"
    yield "the magic alone", raw(b"GGUF"), at + "ends early"
    yield "another magic", patched(lambda c: b"GGML" + c[4:]), at + "not a model but a file that begins with b'GGML'"
    for version in (0, 1, 4, 99):
        yield f"version {version}", over(4, "I", version), at + f"GGUF version {version};"
    yield "a big-endian version", over(4, ">I".replace(">", ""), 3 << 24), at + "GGUF version 50331648 of a big-endian"
    yield "2^60 tensors", over(8, "Q", 2**60), at + "the number of tensors is 1152921504606846976"
    yield "2^64-1 keys", over(16, "Q", 2**64 - 1), at + "the number of key/values is 18446744073709551615"
    yield "a key of 2^60 bytes", over(24, "Q", 2**60), at + "ends early: key 0 needs"
    yield "an unknown type of value", over(0, "I", 99, b"general.architecture"), at + "the value of general.architecture has type 99"
    yield "a text of 2^60 bytes", over(4, "Q", 2**60, b"general.architecture"), at + "ends early: the value of general.architecture"
    yield "a list of 2^60 texts", over(8, "Q", 2**60, b"tokenizer.ggml.tokens"), at + "the length of the value of tokenizer.ggml.tokens is"
    yield "a list of lists", over(4, "I", 9, b"tokenizer.ggml.tokens"), at + ".*array of arrays"
    yield "a name that is not UTF-8", patched(lambda c: c.replace(b"llama.block_count", b"llama.block\xffcount")), at + "key .* is not UTF-8 at byte"
    yield "a key twice", patched(lambda c: c.replace(b"llama.rope.dimension_count", b"llama.attention.head_count")), at
    yield "a tensor twice", patched(lambda c: c.replace(b"blk.1.attn_k.weight", b"blk.1.attn_q.weight")), at + "tensor blk.1.attn_q.weight is there twice"
    name = b"output_norm.weight"
    yield "65535 dimensions", over(0, "I", 65535, name), at + "tensor output_norm.weight has 65535 dimensions"
    yield "a size of 2^60", over(4, "Q", 2**60, name), at
    yield "a size of 2^63", over(4, "Q", 2**63, name), at
    yield "a size of 0", over(4, "Q", 0, name), at
    yield "an unknown type of tensor", over(12, "I", 4242, name), at + "tensor output_norm.weight has ggml type 4242"
    yield "a type of odd blocks", over(12, "I", 10, name), at
    yield "an offset out of the file", over(16, "Q", 2**40, name), at + "tensor output_norm.weight starts at byte 1099511627776"
    yield "an offset of 2^64-1", over(16, "Q", 2**64 - 1, name), at + "tensor output_norm.weight starts at byte"
    yield "tensors that overlap", over(16, "Q", 0, name), at + "tensor output_norm.weight starts at byte 0"
    yield "cut off in the header", patched(lambda c: c[:300]), at
    yield "cut off in the weights", patched(lambda c: c[: len(c) // 2]), at + "ends early: its header needs"
    yield "cut off at the end", patched(lambda c: c[:-1]), at + "ends early: its header needs"
    yield "bytes behind the end", patched(lambda c: c + bytes(64)), at + "too long"
    yield "a pickle, protocol 0", raw(pickled(0)), at + ".*pickle"
    yield "a pickle, protocol 4", raw(pickled(4)), at + ".*pickle"
    yield "a pickle in a zip", raw(torch_zip()), at + ".*pickle"
    yield "safetensors", raw(safetensors_bytes({"a": tensor()}, bytes(8))), at + "not a model"
    yield "10 GiB of nothing", raw(sparse(10 * GIB)), at + "not a model but a file that begins with"
    for what in SPECIAL:
        yield what, raw(SPECIAL[what][0]), r"m\.gguf"
    yield "an unknown architecture", meta(general__architecture="steam"), at
    yield "no weights", meta(tensors=dict.fromkeys(gguf_tensors())), at + "its weight files hold 0 tensors"
    yield "an alignment of 3", meta(general__alignment=3), at + "general.alignment is 3, not a power of two"
    for count in (0, 1, 3, 2**31):
        yield f"{count} layers", meta(llama__block_count=count), at
    yield "layers as text", meta(llama__block_count="two"), at
    yield "no number of layers", meta(("llama.block_count",)), at
    yield "no heads", meta(llama__attention__head_count=0), at + ".*head_count is 0"
    yield "no heads of keys", meta(llama__attention__head_count_kv=0), at + ".*head_count_kv is 0"
    yield "five heads", meta(llama__attention__head_count=5), at
    yield "a width of 2^31", meta(llama__embedding_length=2**31), at
    yield "a width of 0", meta(llama__embedding_length=0), at
    yield "an infinite epsilon", meta(llama__attention__layer_norm_rms_epsilon=float("nan")), at
    yield "a tensor missing", meta(tensors={"blk.1.ffn_up.weight": None}), at + r".*1 tensor"
    yield "a tensor of another shape", meta(tensors={"blk.1.ffn_up.weight": np.ones((9, 32), np.float32)}), at
    yield "no embedding", meta(tensors={"token_embd.weight": None}), at + "no token embedding"
    yield "an embedding of a vector", meta(tensors={"token_embd.weight": np.ones(259, np.float32)}), at
    yield "fewer tokens than embeddings", meta(tokenizer__ggml__tokens=["a", "b"]), at
    yield "tokens of numbers", meta(tokenizer__ggml__tokens=[1, 2, 3]), at
    yield "no tokens", meta(("tokenizer.ggml.tokens",)), at
    yield "merges of unknown tokens", meta(tokenizer__ggml__merges=["qq zz"]), at
    yield "merges of one word", meta(tokenizer__ggml__merges=["th"]), at
    yield "an unknown tokenizer", meta(tokenizer__ggml__model="runes"), at
    yield "an end beyond the vocabulary", meta(tokenizer__ggml__eos_token_id=2**31), at


# ---- tokenizer.json and config.json


def tokenizers() -> Iterator[tuple[Any, ...]]:
    name = "tokenizer.json"
    at = r"(model|tokenizer\.json): "

    def content(value: bytes | Callable[[Path], Any]) -> Damage:
        return model_file(name, value)

    def change(edit: Callable[[dict[str, Any]], Any]) -> Damage:
        return changed_json(name, edit)

    yield "empty", content(b""), at
    yield "an array", content(b"[]"), at
    yield "an empty object", content(b"{}"), at
    yield "null", content(b"null"), at
    yield "a truncated one", lambda g, f: content((g.teacher / name).read_bytes()[:900])(g, f), at + ".*line"
    yield "zero bytes", content(bytes(500)), at
    yield "UTF-16", lambda g, f: content((g.teacher / name).read_text().encode("utf-16"))(g, f), at
    yield "a byte-order mark", lambda g, f: content(b"\xef\xbb\xbf" + (g.teacher / name).read_bytes())(g, f), at
    yield "10^5 brackets", content(b'{"a":' + b"[" * 10**5), at
    yield "a key twice", lambda g, f: content((g.teacher / name).read_bytes().replace(b'"model":', b'"model": {}, "model":', 1))(g, f), at
    yield "half a surrogate pair", lambda g, f: content((g.teacher / name).read_bytes().replace(b'"A"', b'"\\ud800"', 1))(g, f), at
    yield "a pickle, protocol 0", content(pickled(0)), at + ".*pickle"
    yield "a pickle, protocol 4", content(pickled(4)), at + ".*pickle"
    yield "a pickle in a zip", content(torch_zip()), at + ".*pickle"
    for what in SPECIAL:
        yield what, content(SPECIAL[what][0]), r"model|tokenizer\.json"
    yield "an unknown kind of model", change(lambda t: t["model"].update(type="Runes")), at
    yield "no model", change(lambda t: t.pop("model")and None), at
    yield "a model of null", change(lambda t: t.update(model=None)), at
    yield "no vocabulary", change(lambda t: t["model"].update(vocab={})), at
    yield "a vocabulary of a list", change(lambda t: t["model"].update(vocab=["a"])), at
    yield "a negative id", change(lambda t: t["model"]["vocab"].update(A=-1)), at
    yield "an id of 1.5", change(lambda t: t["model"]["vocab"].update(A=1.5)), at
    yield "an id of text", change(lambda t: t["model"]["vocab"].update(A="5")), at
    for number in (10**6, 2**31, 2**32 - 1, 2**32, 2**60):
        yield f"the id {number}", change(lambda t, n=number: t["model"]["vocab"].update(A=n)), at
    yield "an id twice", change(lambda t: t["model"]["vocab"].update(A=t["model"]["vocab"]["B"])), at + ".*'[AB]'"
    yield "merges of unknown tokens", change(lambda t: t["model"].update(merges=[["qq", "zz"]])), at + ".*(qq|merge)"
    yield "merges of numbers", change(lambda t: t["model"].update(merges=[[1, 2]])), at
    yield "merges of one word", change(lambda t: t["model"].update(merges=["th"])), at
    yield "an unknown normalizer", change(lambda t: t.update(normalizer={"type": "Runes"})), at
    yield "a damaged normalizer", change(lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"})), at
    yield "a regular expression unclosed", change(lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False})), at
    backtracks = {"type": "Split", "pattern": {"Regex": r"(\w|\w\w|\s)+$0"}, "behavior": "Isolated", "invert": False}
    yield "a regular expression that backtracks", change(lambda t: t.update(pre_tokenizer=backtracks)), at + "its tokenizer fails on .*retry-limit"
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}], "pair": [], "special_tokens": {}}
    yield "a template of unknown tokens", change(lambda t: t.update(post_processor=template)), at
    yield "an added token of a number", change(lambda t: t.update(added_tokens=[5])), at
    token = {"content": "<z>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    yield "an added token with a taken id", change(lambda t: t["added_tokens"].append(token | {"id": 5})), at
    yield "an added token with a far id", change(lambda t: t["added_tokens"].append(token | {"id": 2**31})), at

    def far_end(good: Good, folder: Path) -> Words:
        words = change(lambda t: t["added_tokens"].append(token | {"id": 258}))(good, folder)
        path = folder / "model" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<z>"}))
        return words

    for config in (b"", b"[]", b"{", b"[" * 10**5, b"\xff\xfe", pickled(4), b'{"eos_token": 5}', b'{"eos_token": "<eos>", "eos_token": "A"}'):
        yield f"the configuration {config[:24]!r}", model_file("tokenizer_config.json", config), r"model|tokenizer_config\.json"
    yield "an end that it does not have", changed_json("tokenizer_config.json", lambda c: c.update(eos_token="<z>")), r"eos_token is '<z>', which is none of its tokens"
    yield "an end that the model does not have", far_end, r"model: its tokenizer ends texts with '<z>', id 258, .* 0 to 257"
    yield "a FIFO beside it", model_file("special_tokens_map.json", os.mkfifo), r"special_tokens_map\.json"
    yield "a device beside it", model_file("added_tokens.json", zeros), r"added_tokens\.json"

    def code(good: Good, folder: Path) -> Words:
        words = changed_json("tokenizer_config.json", lambda c: c.update(tokenizer_class="Runes", auto_map={"AutoTokenizer": ["runes.Runes", "runes.Runes"]}))(good, folder)
        (folder / "model" / "runes.py").write_text("open('canary', 'w')\nclass Runes: pass\n")
        (folder / "model" / name).unlink()
        return words

    yield "code that comes with it", code, r"model"


def configs() -> Iterator[tuple[Any, ...]]:
    name = "config.json"
    at = r"(model|config\.json): "
    for section in ("teacher", "config"):

        def content(value: bytes | Callable[[Path], Any], section: str = section) -> Damage:
            return model_file(name, value, section)

        def field(section: str = section, **changes: Any) -> Damage:
            return changed_json(name, lambda c: c.update(changes), section)

        role = {"teacher": "a teacher's", "config": "a student's"}[section]
        yield f"{role}, empty", content(b""), at
        yield f"{role}, an array", content(b"[]"), at
        yield f"{role}, truncated", content(b'{"model_type": "llama", '), at
        yield f"{role}, UTF-16", content('{"model_type": "llama"}'.encode("utf-16")), at
        yield f"{role}, 10^5 brackets", content(b'{"a":' + b"[" * 10**5), at
        yield f"{role}, a key twice", content(b'{"model_type": "llama", "model_type": "gpt2"}'), at
        yield f"{role}, a pickle, protocol 0", content(pickled(0)), at + ".*pickle"
        yield f"{role}, a pickle, protocol 4", content(pickled(4)), at + ".*pickle"
        for what in SPECIAL:
            yield f"{role}, {what}", content(SPECIAL[what][0]), r"model|config\.json"
        yield f"{role}, no kind of model", content(b"{}"), at
        yield f"{role}, an unknown kind", field(model_type="steam"), at
        yield f"{role}, a kind of a number", field(model_type=5), at
        yield f"{role}, a kind that is no language model", field(model_type="vit"), at
        yield f"{role}, a kind without a vocabulary", content(b'{"model_type": "vit"}'), at
        for size in (-1, 0, 10**12, 1e12, "many", None, [258], True):
            yield f"{role}, a vocabulary of {size!r}", field(vocab_size=size), at
        for count in (-1, 0, 10**9, 2**63, 1.5, "many"):
            yield f"{role}, {count!r} layers", field(num_hidden_layers=count), at
        for size in (-32, 0, 33, 10**7, 2**40):
            yield f"{role}, a width of {size}", field(hidden_size=size), at
        for count in (-4, 0, 3, 10**9):
            why = ".*num_attention_heads is 0" if count == 0 else ""
            yield f"{role}, {count} heads", field(num_attention_heads=count), at + why
        yield f"{role}, three heads of keys", field(num_key_value_heads=3), at
        yield f"{role}, no heads of keys", field(num_key_value_heads=0), at + ".*num_key_value_heads is 0"
        yield f"{role}, heads of no width", field(head_dim=0), at + ".*head_dim is 0"
        yield f"{role}, heads of 10^9", field(head_dim=10**9), at
        yield f"{role}, an inner width of 10^12", field(intermediate_size=10**12), at
        for section_name, value in (("text_config", {"vocab_size": 258}), ("text_config", [1]), ("decoder", {})):
            inside = {section_name: value}
            yield f"{role}, {inside} inside", field(**inside), at + f".*{section_name} is in a config of llama"
        yield f"{role}, two configs inside", field(text_config={}, decoder={}), at + ".*[Mm]ultiple"
        for end in (258, -1, [0, 258], "0", 1.0, True):
            yield f"{role}, the end {end!r}", field(eos_token_id=end), at + ".*(eos_token_id|[Ee]os)"
        yield f"{role}, an epsilon of NaN", field(rms_norm_eps=float("nan")), at
        yield f"{role}, an infinite epsilon", field(rms_norm_eps=float("inf")), at
        yield f"{role}, an unknown activation", field(hidden_act="steam"), at
        yield f"{role}, an unknown dtype", field(dtype="float7"), at
        yield f"{role}, rotary settings of a text", field(rope_parameters="steam"), at
        yield f"{role}, an unknown rotary kind", field(rope_parameters={"rope_type": "steam", "rope_theta": 1e4}), at

        def code(good: Good, folder: Path, section: str = section) -> Words:
            edit = {"model_type": "steam", "auto_map": {"AutoConfig": "steam.Config", "AutoModelForCausalLM": "steam.Model"}}
            words = changed_json(name, lambda c: c.update(edit), section)(good, folder)
            (folder / "model" / "steam.py").write_text("open('canary', 'w')\nclass Config: pass\nclass Model: pass\n")
            return words

        yield f"{role}, code that comes with it", code, at
    yield "generation settings with an end beyond the vocabulary", model_file("generation_config.json", b'{"eos_token_id": [0, 258]}'), r"generation_config\.json: eos_token_id is 258.* 0 to 257"
    yield "generation settings cut off", model_file("generation_config.json", b'{"eos_'), r"generation_config\.json"
    yield "generation settings of a pickle", model_file("generation_config.json", pickled(4)), r"generation_config\.json: .*pickle"
    yield "generation settings of a FIFO", model_file("generation_config.json", os.mkfifo), r"generation_config\.json"


# ---- what a run leaves behind


def run_copy(good: Good, folder: Path) -> Path:
    return Path(shutil.copytree(good.run, folder / "run"))


def records() -> Iterator[tuple[Any, ...]]:
    def record(name: str, content: bytes | Callable[[Path], Any], verb: str = "show") -> Damage:
        def make(good: Good, folder: Path) -> Words:
            path = run_copy(good, folder) / name
            path.unlink(missing_ok=True)
            path.write_bytes(content) if isinstance(content, bytes) else content(path)
            return [verb, str(folder / "run")]

        return make

    at = r"metrics\.jsonl:2: "
    first, last = b'{"step": 1, "train/loss": 2.0}\n', b'{"step": 3, "train/loss": 1.0}\n'
    for what, line in {
        "no JSON": b"{",
        "zero bytes": bytes(60),
        "latin-1": b'{"step": 2, "\xe9": 1}',
        "a list": b"[1]",
        "no step": b'{"train/loss": 1}',
        "a step of text": b'{"step": "two", "train/loss": 1}',
        "a metric of text": b'{"step": 2, "train/loss": "low"}',
        "a metric of null": b'{"step": 2, "train/loss": null}',
        "a metric of a list": b'{"step": 2, "train/loss": [1]}',
        "a metric twice": b'{"step": 2, "step": 2}',
        "10^5 brackets": b"[" * 10**5,
        "a metric of 400 digits": b'{"step": 2, "a": ' + b"9" * 400 + b"}",
        "a number of 10^5 digits": b'{"step": 2, "train/loss": ' + b"9" * 10**5 + b"}",
        "a pickle": pickled(0).replace(b"\n", b" "),
    }.items():
        yield f"metrics, line 2 {what}", record("metrics.jsonl", first + line + b"\n" + last), at
    yield "metrics, UTF-16", record("metrics.jsonl", first.decode().encode("utf-16") + b"\n"), r"metrics\.jsonl:1: "
    yield "metrics, a pickle", record("metrics.jsonl", pickled(4)), r"metrics\.jsonl: .*pickle"
    for name in ("status.json", "receipt.json"):
        at = name.replace(".", r"\.") + ": "
        for what, content in {
            "empty": b"",
            "cut off": b'{"state": "fin',
            "an array": b"[]",
            "a text": b'"finished"',
            "null": b"null",
            "a key twice": b'{"state": "finished", "state": "failed"}',
            "UTF-16": '{"state": 1}'.encode("utf-16"),
            "zero bytes": bytes(40),
            "10^5 brackets": b"[" * 10**5,
            "a pickle": pickled(4),
        }.items():
            yield f"{name}, {what}", record(name, content), at
    for name in ("status.json", "receipt.json", "metrics.jsonl", "resolved.yaml"):
        for what in ("a FIFO", "an endless device", "a link to itself", "a folder"):
            yield f"{name}, {what}", record(name, SPECIAL[what][0]), name.replace(".", r"\.")
    yield "no resolved.yaml", record("resolved.yaml", lambda path: None), "run: not a run directory"
    yield "eval, resolved.yaml of a list", record("resolved.yaml", b"[]", "eval"), r"resolved\.yaml: "
    yield "eval, no student", lambda g, f: (shutil.rmtree(run_copy(g, f) / "student"), ["eval", str(f / "run")])[1], "student"
    yield "eval, weights cut off", record("student/model.safetensors", bytes(100), "eval"), r"student/model\.safetensors"
    yield "eval, weights of a pickle", record("student/model.safetensors", pickled(2), "eval"), r"model\.safetensors: .*pickle"
    for verb in ("show", "eval"):
        yield f"{verb}, a name of 300 characters", lambda g, f, v=verb: [v, "x" * 300], "xxx: "
        yield f"{verb}, a name with a zero byte", lambda g, f, v=verb: [v, "a\0b"], "a.*b: "
        yield f"{verb}, a link to itself", lambda g, f, v=verb: [v, str(special(loop, f / "run"))], "run: "
        yield f"{verb}, a file", lambda g, f, v=verb: [v, str(special(Path.touch, f / "run"))], "run: "
    yield "--out of 300 characters", lambda g, f: [*recipe(g, f)[:2], "--out", "x" * 300], "xxx: "
    yield "--resume of 300 characters", lambda g, f: [*recipe(g, f)[:2], "--resume", "--out", "x" * 300], "xxx: "


def resumed(damage: Callable[[Path], Any], seal: bool = True) -> Damage:
    """A run with one checkpoint; after the damage its manifest is made true again, or is left alone."""

    def make(good: Good, folder: Path) -> Words:
        run = run_copy(good, folder)
        checkpoint = run / "checkpoints" / "00000002"
        damage(checkpoint)
        if seal:
            manifest = {
                name: {
                    "bytes": (checkpoint / name).stat().st_size,
                    "sha256": hashlib.sha256((checkpoint / name).read_bytes()).hexdigest(),
                }
                for name in ("tensors.safetensors", "state.json")
            }
            (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        return ["distill", str(run / "resolved.yaml"), "--resume", "--out", str(run)]

    return make


def checkpoints() -> Iterator[tuple[Any, ...]]:
    place = r"checkpoints: none of 1 checkpoints is sound: 00000002: "

    def manifest(content: bytes | Callable[[dict[str, Any]], Any]) -> Damage:
        def damage(folder: Path) -> None:
            path = folder / "manifest.json"
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                value = json.loads(path.read_text())
                edited = content(value)
                path.write_text(json.dumps(value if edited is None else edited))

        return resumed(damage, seal=False)

    def file(name: str, make: Callable[[Path], Any] | bytes, seal: bool = True) -> Damage:
        def damage(folder: Path) -> None:
            path = folder / name
            path.unlink(missing_ok=True)
            path.write_bytes(make) if isinstance(make, bytes) else make(path)

        return resumed(damage, seal)

    def state(edit: Callable[[dict[str, Any]], Any]) -> Damage:
        def damage(folder: Path) -> None:
            value = json.loads((folder / "state.json").read_text())
            edited = edit(value)
            (folder / "state.json").write_text(json.dumps(value if edited is None else edited))

        return resumed(damage)

    def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
        def damage(folder: Path) -> None:
            value = load_file(folder / "tensors.safetensors")
            edit(value)
            save_file(value, folder / "tensors.safetensors")

        return resumed(damage)

    def of(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda value: value[name]

    weights, saved = "tensors.safetensors", "state.json"
    at = place + r".*manifest\.json"
    yield "manifest, empty", manifest(b""), at
    yield "manifest, an array", manifest(b"[]"), at
    yield "manifest, cut off", manifest(b'{"tensors'), at
    yield "manifest, 10^5 brackets", manifest(b"[" * 10**5), at
    yield "manifest, UTF-16", manifest("{}".encode("utf-16")), at
    yield "manifest, a pickle", manifest(pickled(4)), at
    yield "manifest, a file twice", manifest(b'{"state.json": 1, "state.json": 2}'), at
    yield "manifest, a file missing from it", manifest(lambda m: m.pop(weights) and None), at
    yield "manifest, an entry of a list", manifest(lambda m: m.update({weights: []})), at
    for size in (-1, "many", None, 1.5, True, 2**70):
        yield f"manifest, {size!r} bytes", manifest(lambda m, s=size: m[weights].update(bytes=s)), place + r".*tensors\.safetensors"
    for digest in ("", "ab", "g" * 64, "a" * 63, 5, None):
        yield f"manifest, the hash {digest!r:.9}", manifest(lambda m, d=digest: m[weights].update(sha256=d)), place + r".*tensors\.safetensors"
    yield "manifest, missing", file("manifest.json", lambda path: None, seal=False), at
    for what in SPECIAL:
        yield f"manifest, {what}", file("manifest.json", SPECIAL[what][0], seal=False), at
        yield f"state, {what}", file(saved, SPECIAL[what][0], seal=False), place + r".*state\.json"
        yield f"tensors, {what}", file(weights, SPECIAL[what][0], seal=False), place + r".*tensors\.safetensors"
    yield "tensors, a flipped bit", file(weights, bytes(100), seal=False), place + r".*tensors\.safetensors"

    at = place + r".*state\.json"
    for what, content in {
        "empty": b"",
        "an array": b"[]",
        "null": b"null",
        "cut off": b'{"outcome": {',
        "latin-1": b'{"\xe9": 1}',
        "10^5 brackets": b"[" * 10**5,
        "a key twice": b'{"outcome": {}, "outcome": {}, "inputs": {}}',
        "a pickle": pickled(4),
    }.items():
        yield f"state, {what}", file(saved, content), at
    yield "state, no outcome", state(lambda s: s.pop("outcome") and None), at + ".*outcome"
    yield "state, no inputs", state(lambda s: s.pop("inputs") and None), at + ".*inputs"
    yield "state, inputs of a list", state(lambda s: s.update(inputs=[])), at + ".*inputs"
    yield "state, an outcome of a list", state(lambda s: s.update(outcome=[])), at + ".*outcome"
    yield "state, an unknown key", state(lambda s: s["outcome"].update(odd=1)), at + ".*odd"
    yield "state, no step", state(lambda s: s["outcome"].pop("step") and None), at + ".*step"
    for step in (-1, 3, 10**9, 1.5, "two", None, True, float("nan")):
        yield f"state, the step {step!r}", state(lambda s, n=step: s["outcome"].update(step=n)), at + ".*step"
    yield "state, no best", state(lambda s: s["outcome"].pop("best") and None), at + ".*best"
    yield "state, a best of a number", state(lambda s: s["outcome"].update(best=1)), at + ".*best"
    yield "state, a best of nothing", state(lambda s: s["outcome"].update(best={})), at + ".*best"
    yield "state, a best of text", state(lambda s: s["outcome"]["best"].update({"heldout/loss": "low"})), at + ".*best"
    yield "state, a best step to come", state(lambda s: s["outcome"].update(best_step=99)), at + ".*best_step"
    yield "state, seconds of text", state(lambda s: s["outcome"].update(seconds="few")), at + ".*seconds"
    yield "state, seconds of NaN", state(lambda s: s["outcome"].update(seconds=float("nan"))), at
    yield "state, an evaluation of text", state(lambda s: s["outcome"].update(evaluated="two")), at + ".*evaluated"
    yield "state, steps left out of a text", state(lambda s: s["outcome"].update(left_out="ab")), at + ".*left_out"
    yield "state, a step left out of a text", state(lambda s: s["outcome"].update(left_out=["a"])), at + ".*left_out"
    yield "state, a last of other metrics", state(lambda s: s["outcome"].update(last={"heldout/loss": 1.0})), at + ".*last"
    yield "state, negative positions", state(lambda s: s["outcome"].update(positions=-5)), at + ".*positions"
    yield "state, another corpus", state(lambda s: s["inputs"].update(corpus="ab")), "00000002: made with another corpus"

    at = place + r".*tensors\.safetensors"
    norm = "weights/model.hf.model.norm.weight"
    yield "tensors, empty", file(weights, b""), at
    yield "tensors, a pickle", file(weights, pickled(2)), at + ".*pickle"
    yield "tensors, a header of 2^60", file(weights, safetensors_bytes({}, size=2**60)), at
    yield "tensors, none", file(weights, safetensors_bytes({})), at
    yield "tensors, one missing", tensors(lambda t: t.pop(norm)), at + ".*norm"
    yield "tensors, another shape", tensors(lambda t: t.update({norm: torch.ones(9)})), at + ".*norm"
    yield "tensors, a shape that would broadcast", tensors(lambda t: t.update({norm: torch.ones(1)})), at + ".*norm"
    yield "tensors, another dtype", tensors(lambda t: t.update({norm: torch.ones(32, dtype=torch.float64)})), at + ".*norm"
    yield "tensors, one too many", tensors(lambda t: t.update({"weights/odd": torch.ones(9)})), at + ".*odd"
    yield "tensors, a strange kind", tensors(lambda t: t.update({"odd/odd": torch.ones(9)})), at + ".*odd"
    yield "tensors, no optimizer", tensors(lambda t: [t.pop(n) for n in list(t) if n.startswith("optimizer/")]), at + ".*optimizer"
    yield "tensors, a moment missing", tensors(lambda t: t.pop("optimizer/0/exp_avg")), at + ".*optimizer/0"
    yield "tensors, a moment of another shape", tensors(lambda t: t.update({"optimizer/0/exp_avg": torch.ones(3)})), at + ".*optimizer/0"
    yield "tensors, a moment of NaN", tensors(lambda t: t["optimizer/0/exp_avg"].fill_(float("nan"))), at + ".*optimizer/0"
    yield "tensors, weights of NaN", tensors(lambda t: t[norm].fill_(float("nan"))), at + ".*norm"
    yield "tensors, moments of no parameter", tensors(lambda t: t.update({"optimizer/999/exp_avg": torch.ones(3)})), at + ".*optimizer/999"
    yield "tensors, moments of a word", tensors(lambda t: t.update({"optimizer/x/exp_avg": torch.ones(3)})), at + ".*optimizer/x"
    yield "tensors, an unknown moment", tensors(lambda t: t.update({"optimizer/0/odd": torch.ones(3)})), at + ".*optimizer/0/odd"
    yield "tensors, no random state", tensors(lambda t: t.pop("random/cpu")), at + ".*random/cpu"
    yield "tensors, a random state of three bytes", tensors(lambda t: t.update({"random/cpu": torch.zeros(3, dtype=torch.uint8)})), at + ".*random/cpu"
    yield "tensors, a random state of floats", tensors(lambda t: t.update({"random/cpu": torch.zeros(5056)})), at + ".*random/cpu"

    def metrics(line: bytes) -> Damage:
        def damage(folder: Path) -> None:
            path = folder.parent.parent / "metrics.jsonl"
            lines = path.read_bytes().splitlines(keepends=True)
            path.write_bytes(b"".join([lines[0], line + b"\n", *lines[1:]]))

        return resumed(damage)

    yield "metrics, a line of no JSON", metrics(b"{"), r"metrics\.jsonl:2: "
    yield "metrics, a line without a step", metrics(b"{}"), r"metrics\.jsonl:2: "


# fmt: on
KINDS = {
    "recipe": recipes,
    "plug-in": plugins,
    "text": texts,
    "JSONL": jsonl,
    "Parquet": parquet,
    "token shard": shards,
    "safetensors": safetensors,
    "safetensors index": indexes,
    "table": tables,
    "GGUF": ggufs,
    "tokenizer.json": tokenizers,
    "config.json": configs,
    "run": records,
    "checkpoint": checkpoints,
}
FAULTS = [Fault(kind, *fault) for kind, faults in KINDS.items() for fault in faults()]

# ---- the tests


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return make_good(tmp_path_factory.mktemp("good"))


def make_good(folder: Path) -> Good:
    teacher = make_model(folder / "teacher", num_hidden_layers=2)
    texts = make_corpus(folder / "texts", documents=12)
    made = Good(teacher, texts, gguf_file(folder / "m.gguf", gguf_tensors(), {}), folder / "run")
    assert main([*recipe(made, folder), "student.layers=1"]) == 0
    shutil.rmtree(made.run / "checkpoints" / "00000004")
    (made.run / "status.json").write_text('{"state": "running"}')
    return made


def tree(folder: Path) -> dict[str, Any]:
    """Everything under a folder, with what would tell that it was written; a run may note that it failed."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        is_written = path.is_file() and path.name != "status.json"
        found[str(path.relative_to(folder))] = (
            status.st_mode,
            (status.st_size, status.st_mtime_ns) * is_written,
        )
    return found


def require_refusal(fault: Fault, code: int, err: str) -> None:
    """Exit 2, each mistake on one whole line with its place, and nothing of a library's."""
    assert code == 2, err
    assert "Traceback" not in err and "panicked" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == fault.lines, err
    assert err.splitlines()[-len(lines) :] == lines, err
    assert all(line.isprintable() and len(line) < 1000 for line in lines), err
    assert any(re.search(fault.says, line) for line in lines), err


class TooLong(BaseException):
    """Not an OSError, as TimeoutError is: those are told as the user's."""


@contextlib.contextmanager
def limits(wall_s: int = 10) -> Iterator[None]:
    """Whatever hangs or asks for more than 2 GiB beside what is there fails here, and not the machine."""

    def too_long(*_: Any) -> None:
        raise TooLong(f"more than {wall_s} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + PEAK_BYTES, before[1]))
    signal.alarm(wall_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


EVERY = 3
"""One fault of so many is tried by `make test`, the others by `make soak`."""


def named(fault: Fault) -> str:
    return f"{fault.kind}: {fault.name}"


def test_there_are_faults_of_every_kind() -> None:
    assert len(FAULTS) >= 600 and min(sum(f.kind == kind for f in FAULTS) for kind in KINDS) >= 10
    assert len({(fault.kind, fault.name) for fault in FAULTS}) == len(FAULTS)
    kinds = {fault.kind for fault in FAULTS if "pickle" in fault.name}
    assert kinds == KINDS.keys()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=[] if number % EVERY == 0 else [pytest.mark.soak], id=named(fault))
        for number, fault in enumerate(FAULTS)
    ],
)
def test_a_damaged_input_is_one_line_with_its_place(
    fault: Fault,
    good: Good,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = fault.make(good, tmp_path)
    before = tree(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # whoever asks to run code is told yes
    capfd.readouterr()
    with limits(60):
        code = main(words)
    require_refusal(fault, code, capfd.readouterr().err)
    assert tree(tmp_path) == before


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS, ids=named)
def test_a_damaged_input_costs_a_fresh_process_little(fault: Fault, good: Good, tmp_path: Path) -> None:
    """5 s of processor time, imports included, and 2 GiB.

    Wall time is not measured, since cores are shared; a busy neighbour on the same core doubles processor time
    too, so that the least of three runs counts.
    """
    words = fault.make(good, tmp_path)
    if any("\0" in word for word in words):
        pytest.skip("the system passes no word with a zero byte on to a process; not run")
    before = tree(tmp_path)
    seconds = math.inf
    for _ in range(3):
        code, err, used = in_a_fresh_process(words, tmp_path)
        require_refusal(fault, code, err)
        assert tree(tmp_path) == before
        assert used.ru_maxrss * 1024 < PEAK_BYTES
        seconds = min(seconds, used.ru_utime + used.ru_stime)
        if seconds < CPU_SECONDS:
            return
    raise AssertionError(f"{seconds:.1f} s of processor time")


def in_a_fresh_process(words: Words, folder: Path) -> tuple[int, str, resource.struct_rusage]:
    """Exit code, stderr and what was used, of a process that is killed after a minute."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            [sys.executable, "-m", "potstill", *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stderr=err,
            env=environment,
        )
        timer = threading.Timer(60, child.kill)
        timer.start()
        _, status, used = os.wait4(child.pid, 0)
        timer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        err.seek(0)
        return child.returncode, err.read(), used


def test_what_is_sound_passes(
    good: Good, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the same files and recipes, undamaged, are read and run."""
    monkeypatch.chdir(tmp_path)
    records = [{"text": f"the cat sat on mat {n}"} for n in range(40)]
    rows = pa.table({"text": [record["text"] for record in records]})
    ids = np.arange(640, dtype="<u2") % 250 + 2
    sound: dict[str, Damage] = {
        "text": sections(),
        "jsonl": corpus("c.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode()),
        "parquet": corpus("d.parquet", lambda path: pq.write_table(rows, path)),
        "shard": corpus("ids.bin", ids.tobytes()),
        "gguf": lambda g, f: recipe(g, f, teacher=f"{{name: torch, model: {g.gguf}}}"),
        "config": model_file("config.json", (good.teacher / "config.json").read_bytes(), "config"),
        "checkpoint": model_file("config.json", (good.teacher / "config.json").read_bytes(), "checkpoint"),
    }
    for name, make in sound.items():
        (tmp_path / name).mkdir()
        words = make(good, tmp_path / name)
        assert main([*words[:2], *TRIED]) == 0, (name, capfd.readouterr().err)
    run = run_copy(good, tmp_path)
    assert main(["show", str(run)]) == 0
    assert main(["eval", str(run)]) == 0
    capfd.readouterr()
    assert main(["distill", str(run / "resolved.yaml"), "--resume", "--out", str(run)]) == 0
    assert "resumed from" in capfd.readouterr().err


# ---- flipped bits


def flips() -> dict[str, tuple[Callable[[Good], bytes], Callable[[bytes], Damage]]]:
    """For each kind: the sound bytes, and how damaged ones reach the command line."""

    def parquet_bytes(good: Good) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"text": [f"the cat sat on mat {n}" for n in range(64)]}), buffer)
        return buffer.getvalue()

    def as_gguf(content: bytes) -> Damage:
        def make(good: Good, folder: Path) -> Words:
            (folder / "m.gguf").write_bytes(content)
            return recipe(good, folder, teacher=f"{{name: torch, model: {folder / 'm.gguf'}}}")

        return make

    def in_checkpoint(name: str) -> Callable[[bytes], Damage]:
        return lambda content: resumed(
            lambda folder: (folder / name).write_bytes(content), name != "manifest.json"
        )

    def in_run(name: str) -> Callable[[bytes], Damage]:
        def show(content: bytes) -> Damage:
            def make(good: Good, folder: Path) -> Words:
                (run_copy(good, folder) / name).write_bytes(content)
                return ["show", str(folder / "run")]

            return make

        return show

    models = (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    )
    saved = ("tensors.safetensors", "state.json", "manifest.json")
    found: dict[str, tuple[Callable[[Good], bytes], Callable[[bytes], Damage]]] = {
        "parquet": (parquet_bytes, lambda content: corpus("d.parquet", content)),
        "gguf": (lambda good: good.gguf.read_bytes(), as_gguf),
    }
    for name in models:
        found[name] = (
            lambda good, n=name: (good.teacher / n).read_bytes(),
            lambda c, n=name: model_file(n, c),
        )
    for name in saved:
        found[name] = (
            lambda good, n=name: (good.run / "checkpoints/00000002" / n).read_bytes(),
            in_checkpoint(name),
        )
    for name in ("metrics.jsonl", "status.json", "receipt.json"):
        found[name] = (lambda good, n=name: (good.run / n).read_bytes(), in_run(name))
    return found


def flip(good: Good, kind: str, seed: int, folder: Path) -> tuple[Words, str]:
    """A word of the command line that meets a file with one flipped bit, written over bytes or a hole; half of
    them in the first 4 KiB.
    """
    source, reach = flips()[kind]
    content, generator = bytearray(source(good)), random.Random(f"{kind} {seed}")
    at = generator.randrange(min(len(content), 4096) if seed % 2 else len(content))
    if seed % 5 == 4:
        del content[at : at + generator.choice((1, 4, 50))]
    elif seed % 5 == 3:
        size = generator.choice((1, 4, 8))
        content[at : at + size] = generator.choice((b"\0", b"\xff")) * size
    else:
        content[at] ^= 1 << generator.randrange(8)
    words = reach(bytes(content))(good, folder)
    is_new = words[0] == "distill" and "--resume" not in words
    return [*words[:2], *TRIED] if is_new else words, f"{kind}, byte {at}, seed {seed}"


def require_refusal_or_none(
    good: Good, kind: str, seeds: range, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit is refused in one line, or changes nothing that can be known: never anything else."""
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        words, what = flip(good, kind, seed, place)
        with limits():
            code = main(words)
        err = capfd.readouterr().err
        assert code in (0, 2) and "Traceback" not in err and "panicked" not in err, (what, err)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        checked = all(line.startswith("error: check: ") for line in lines)  # each red line is told
        assert len(lines) == (code == 2) or (code == 2 and checked), (what, err)
        shutil.rmtree(place)


@pytest.mark.parametrize("kind", flips())
def test_flipped_bits_are_refused_or_harmless(
    kind: str, good: Good, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    require_refusal_or_none(good, kind, range(6), tmp_path, capfd)


@pytest.mark.soak
@pytest.mark.parametrize("kind", flips())
def test_many_flipped_bits_are_refused_or_harmless(
    kind: str, good: Good, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    require_refusal_or_none(good, kind, range(6, 306), tmp_path, capfd)


# ---- code that comes with data


def test_remote_code_is_never_trusted() -> None:
    """Every call that could run a checkpoint's code says that it may not."""
    calls = []
    for path in sorted(Path(potstill.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if named and node.func.attr in ("from_pretrained", "from_config"):
                said = [ast.unparse(k.value) for k in node.keywords if k.arg == "trust_remote_code"]
                calls.append((path.name, node.lineno, said))
    assert len(calls) >= 6
    assert [call for call in calls if call[2] != ["False"]] == []


def test_no_pickle_is_ever_loaded() -> None:
    """Neither by name nor through a library's own door."""
    doors = re.compile(
        r"\b(import pickle\b|pickle\.loads?|cPickle|joblib|torch\.load|np\.load|numpy\.load|marshal|shelve|dill)"
    )
    sources = sorted(Path(potstill.__file__).parent.rglob("*.py"))
    assert [f"{p.name}: {m[0]}" for p in sources for m in doors.finditer(p.read_text())] == []


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_known_by_its_opcodes_and_nothing_else_is(protocol: int) -> None:
    for value in (Canary(), [Canary(), "x" * 10], {"weights": Canary()}):
        content = pickle.dumps(value, protocol)
        assert pickle_in(content, len(content)) == "a pickle"
    long = pickle.dumps([Canary(), *map(float, range(20000))], protocol)
    assert protocol < 2 or pickle_in(long[:65536], len(long)) == "a pickle"
    for ids in ([640, 46, 7], [640, 82, 5], [640, 11875], [1152, 149, 8], list(range(600, 700))):
        content = np.array(ids * 5, dtype="<u2").tobytes()
        assert pickle_in(content, len(content)) == ""
    for text in ("", ".", "the cat.", "changes\n=======\n.. note:: one\n", "(see\n below)", "I\n.", "N."):
        assert pickle_in(text.encode(), len(text)) == ""


class TestTheTeachersOwnInterface:
    """What the command line cannot reach."""

    @pytest.mark.parametrize("config", [5, [1], {"num_hidden_layers": "many"}, {"hidden_size": 33}])
    def test_a_config_that_is_none(self, good: Good, config: Any) -> None:
        with pytest.raises(UserError, match="config: "):
            TorchTeacher.for_inference(good.teacher, config=config, device="cpu")

    @pytest.mark.parametrize("source", [5, None, b"x", "x" * 300, "a/" + "x" * 300, "a\0b"])
    def test_a_source_that_is_none(self, source: Any) -> None:
        with pytest.raises(UserError):
            TorchTeacher.for_inference(source, device="cpu")

    @pytest.mark.parametrize(
        "ids", [[[1, 2], [3]], "the cat", None, [[{}]], [[2**70]], [[1.5]], [[True]], [1], 5]
    )
    def test_ids_that_are_none(self, good: Good, ids: Any) -> None:
        real = TorchTeacher.for_inference(good.teacher, device="cpu")
        for teacher in (real, FixtureTeacher(258), TableTeacher(torch.zeros(258, 258))):
            for ask in (teacher.logits_for_batch, teacher.logits_per_position):
                with pytest.raises(UserError, match=r"^teacher (torch|fixture|table): input_ids "):
                    ask(ids)
        with pytest.raises(UserError, match="attention_mask"):
            real.logits_for_batch([[1, 2]], [[1, 1], [1]])
