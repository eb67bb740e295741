"""Every reader reads what it should, in one order, and refuses by name what it cannot read whole."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import demo_gguf, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from potstill.data import readers
from potstill.data.packing import about_documents
from potstill.data.tokenizers import load_tokenizer, vocab_of
from potstill.errors import Unreadable, UserError
from potstill.recipe.sections_data import ChatCorpusConfig, JsonlCorpusConfig, TextCorpusConfig

EOS = 0
WORDS = [
    "<|im_end|>",
    "<|im_start|>",
    "[unk]",
    "user",
    "assistant",
    "system",
    "hi",
    "yo",
    "bye",
    "now",
    "ok",
    "\n",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
    "{%- if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{%- else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
)
REWRITES = (
    "{% for m in messages %}{% if m['role'] == 'user' and not loop.last %}past{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}"
)
REFUSES = "{{ raise_exception('roles must alternate') }}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def need_data_extra() -> None:
    pytest.importorskip("datasets", reason="the data extra is not installed; not run")


def word_tokenizer(template: str | None) -> Any:
    """One id a word, so that an expected mask can be written by hand."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    made.chat_template = template
    return made


def read(reading: readers.Reading) -> list[tuple[str, list[int]]]:
    return [(document.source, document.ids.tolist()) for document in reading.documents]


def texts_of(reading: readers.Reading, tokenizer: Any) -> list[str]:
    """The texts again; every document must end with the one EOS that was added."""
    found = []
    for document in reading.documents:
        assert document.labels is None and document.ids.dtype == np.uint32
        assert document.ids[-1] == EOS and (document.ids[:-1] != EOS).all()
        found.append(tokenizer.decode(document.ids[:-1].tolist()))
    return found


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- text


def test_a_folder_is_read_in_sorted_order_without_hidden_and_empty_files(
    tmp_path: Path, tokenizer: Any
) -> None:
    for name in ("b.txt", "a/z.py", "a/b.txt", ".hidden", ".git/x", "__pycache__/x.pyc"):
        write(tmp_path / name, name)
    write(tmp_path / "empty.txt", "")
    reading = readers.text.read(tmp_path, tokenizer)
    assert texts_of(reading, tokenizer) == ["a/b.txt", "a/z.py", "b.txt"]


def test_empty_files_do_not_end_the_reading(tmp_path: Path, tokenizer: Any) -> None:
    for number in range(readers.reading.TEXTS_PER_CALL + 5):
        write(tmp_path / f"{number:03}", "")
    write(tmp_path / "999", "at last")
    assert texts_of(readers.text.read(tmp_path, tokenizer), tokenizer) == ["at last"]


def test_patterns_match_a_name_or_a_path(tmp_path: Path, tokenizer: Any) -> None:
    for name in ("keep.py", "deep/er/keep.py", "test/no.py", "note.md"):
        write(tmp_path / name, name)
    reading = readers.text.read(tmp_path, tokenizer, include=["*.py"], exclude=["test/*"])
    assert texts_of(reading, tokenizer) == ["deep/er/keep.py", "keep.py"]
    only = readers.text.read(tmp_path, tokenizer, include=["deep/er/*"])
    assert texts_of(only, tokenizer) == ["deep/er/keep.py"]


def test_one_file_is_one_document_and_every_file_is_hashed(tmp_path: Path, tokenizer: Any) -> None:
    content = "two lines\r\nof té́xt\n".encode()
    file = write(tmp_path / "one.txt", content)
    reading = readers.text.read(file, tokenizer)
    assert texts_of(reading, tokenizer) == [content.decode()]
    expected = {"path": str(file), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert reading.files == [expected]


def test_special_tokens_spelled_in_a_text_stay_text(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "x", "say <eos> and <pad>")
    assert tokenizer("<eos>", add_special_tokens=False)["input_ids"] == [EOS]
    assert texts_of(readers.text.read(file, tokenizer), tokenizer) == ["say <eos> and <pad>"]
    # ... and the tokenizer is left as it was, for the chat templates that need them.
    assert tokenizer("<eos>", add_special_tokens=False)["input_ids"] == [EOS]


def test_a_text_longer_than_the_model_is_read_whole_and_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short = make_tokenizer()
    short.model_max_length = 4
    assert texts_of(readers.text.read(write(tmp_path / "x", "much longer than four"), short), short) == [
        "much longer than four"
    ]
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_without_eos_adds_nothing(tmp_path: Path) -> None:
    endless = make_tokenizer()
    endless.eos_token = None
    (found,) = readers.text.read(write(tmp_path / "x", "ab"), endless).documents
    assert found.ids.tolist() == endless("ab", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("reader", ["text", "jsonl"])
def test_a_byte_order_mark_is_no_text_and_line_ends_stay(reader: str, tmp_path: Path, tokenizer: Any) -> None:
    content = "one\r\ntwo \ufeff\n" if reader == "text" else '{"text": "one"}\r\n'
    plain = write(tmp_path / "plain", content)
    marked = write(tmp_path / "marked", b"\xef\xbb\xbf" + content.encode())
    read_ = getattr(readers, reader).read
    (without,), reading = read_(plain, tokenizer).documents, read_(marked, tokenizer)
    assert texts_of(reading, tokenizer) == [content if reader == "text" else "one"]
    assert [found.ids.tolist() for found in read_(marked, tokenizer).documents] == [without.ids.tolist()]
    # The record is of the file as it is on disk.
    assert reading.files[0]["bytes"] == plain.stat().st_size + 3
    assert reading.files[0]["sha256"] == hashlib.sha256(marked.read_bytes()).hexdigest()
    assert texts_of(read_(write(tmp_path / "empty", b"\xef\xbb\xbf"), tokenizer), tokenizer) == []


def test_a_conversation_after_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "chat.jsonl", b"\xef\xbb\xbf" + json.dumps({"messages": CHAT}).encode())
    (found,) = readers.chat.read(file, word_tokenizer(CHATML)).documents
    assert shown(found).startswith("<|im_start|> user / hi")


# ---- which files a folder has


def names_in(folder: Path, *include: str, exclude: tuple[str, ...] = ()) -> list[str]:
    found = readers.files_of(folder, include or ("*",), exclude)
    return [str(file.relative_to(folder)) for file in found]


def test_files_behind_a_linked_folder_are_read_with_every_reader(tmp_path: Path, tokenizer: Any) -> None:
    away, corpus = tmp_path / "away" / "deep", tmp_path / "corpus"
    write(away / "b.txt", "b")
    write(away / "b.jsonl", '{"text": "b"}')
    parquet_file(away / "b.parquet", {"text": ["b"]})
    shard(away / "b.bin", [2])
    write(corpus / "a.txt", "a")
    (corpus / "z").symlink_to(away.parent)
    (corpus / "also").symlink_to("z")  # the same folder again
    assert texts_of(readers.text.read(corpus, tokenizer, ["*.txt"]), tokenizer) == ["a", "b"]
    for reader in (readers.jsonl, readers.parquet):
        reading = reader.read(corpus, tokenizer)
        assert texts_of(reading, tokenizer) == ["b"]
        assert len(reading.files) == 1
    assert read(readers.tokens.read(corpus, "uint16", 9, None, 4)) == [(f"{corpus}/also/deep/b.bin:0", [2])]


def test_a_folder_inside_the_corpus_is_read_once_under_its_own_name(tmp_path: Path) -> None:
    for name in ("2024/a", "2024/sub/b", "2025/c"):
        write(tmp_path / name, name)
    (tmp_path / "2024/sub/up").symlink_to("..")
    (tmp_path / "2024/sub/root").symlink_to(tmp_path)
    (tmp_path / "0-latest").symlink_to("2025")
    assert names_in(tmp_path) == ["2024/a", "2024/sub/b", "2025/c"]
    assert names_in(tmp_path, exclude=("0-latest/*",)) == ["2024/a", "2024/sub/b", "2025/c"]
    with pytest.raises(UserError, match=r"'0-latest/\*' goes through the link '0-latest' .* read as '2025'"):
        names_in(tmp_path, "2024/*", "0-latest/*")


def test_links_of_folders_to_each_other_end(tmp_path: Path) -> None:
    away = [tmp_path / "away" / str(number) for number in range(12)]
    for number, folder in enumerate(away):
        write(folder / "x", str(number))
        for other in away:
            (folder / f"to{other.name}").symlink_to(other)  # 12! paths
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "in").symlink_to(away[3])
    found = readers.files_of(tmp_path / "corpus", ("*",))
    assert sorted(file.read_text() for file in found) == sorted(map(str, range(12)))


def test_a_link_out_of_the_corpus_to_a_folder_that_holds_it_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "outside", "x")
    write(tmp_path / "corpus" / "a", "x")
    (tmp_path / "corpus" / "up").symlink_to("../..")
    with pytest.raises(
        UserError, match=r"corpus/up: a link to a folder that holds corpus\.path\. Remove it\."
    ):
        names_in(tmp_path / "corpus")
    assert names_in(tmp_path / "corpus", exclude=("up/*",)) == ["a"]


def test_a_link_that_leads_nowhere_may_have_led_to_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "{}")
    (tmp_path / "README.md").symlink_to("gone.md")
    assert names_in(tmp_path, "*.jsonl") == ["a.jsonl"]
    (tmp_path / "more").symlink_to("/mnt/not mounted")
    with pytest.raises(UserError, match=r"/more: no such file\."):
        names_in(tmp_path, "*.jsonl")
    assert names_in(tmp_path, "*.jsonl", exclude=("more",)) == ["a.jsonl"]


@pytest.mark.parametrize("reader", ["text", "jsonl", "parquet", "tokens"])
def test_a_folder_that_cannot_be_read_is_named(
    reader: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reader == "parquet":
        need_data_extra()
    ending = {"text": "txt", "tokens": "bin"}.get(reader, reader)
    for name in ("0", "shut/1", "shut/deep/2"):
        write(tmp_path / f"{name}.{ending}", '{"text": "a"}')
    scan = os.scandir

    def shut(path: Any) -> Any:
        if Path(path) == tmp_path / "shut":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", shut)
    arguments = ("uint16", 2**16, None, 4) if reader == "tokens" else (tokenizer,)
    with pytest.raises(Unreadable) as refused:
        read(getattr(readers, reader).read(tmp_path, *arguments))
    assert str(refused.value).startswith(
        f"{tmp_path}/shut: cannot be read: Permission denied. Make it readable"
    )


def test_a_folder_that_is_left_out_may_be_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "a/lost+found/x", "x")
    write(tmp_path / ".git/x", "x")
    scan = os.scandir

    def shut(path: Any) -> Any:
        if Path(path).name in ("lost+found", ".git"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", shut)
    assert names_in(tmp_path, exclude=("*/lost+found/*",)) == ["a.txt"]
    with pytest.raises(Unreadable, match=r"lost\+found: cannot be read"):
        names_in(tmp_path, exclude=("lost+found", "lost+found/x"))


def test_what_is_no_plain_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket may have 107 bytes
    write(tmp_path / "a.txt", "a")

    def bound(path: str) -> None:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path)

    special: dict[str, tuple[Callable[[str], Any], str]] = {
        "fifo": (os.mkfifo, "a FIFO, not a file"),
        "device": (lambda path: os.symlink("/dev/null", path), "a device, not a file"),
        "kernel": (
            lambda path: os.symlink("/proc/self/status", path),
            r"made by the kernel \(proc\), not a file",
        ),
        "folder": (
            lambda path: os.symlink("/proc", path),
            r"made by the kernel \(proc\), not a folder of files",
        ),
        "socket": (bound, "a socket, not a file"),
    }
    for name, (make, said) in special.items():
        make(name)
        with pytest.raises(UserError, match=rf"/{name}: {said}\."):
            names_in(tmp_path)
        (tmp_path / name).unlink()
    assert names_in(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("place", ["", "train"])
def test_a_dataset_that_would_be_waited_for_is_refused(place: str, tmp_path: Path, tokenizer: Any) -> None:
    path = dataset_folder(tmp_path / "d", {"text": ["a"]}, ("train",))
    os.mkfifo(path / place / "pipe")
    with pytest.raises(UserError, match=r"/pipe: a FIFO, not a file\."):
        readers.hf.read(path, tokenizer)


def test_names_that_are_not_utf_8_are_read_and_the_folder_of_a_dataset_is_one_line(
    tmp_path: Path, tokenizer: Any
) -> None:
    corpus = tmp_path / os.fsdecode(b"d\xe9p\xf4t")
    write(corpus / os.fsdecode(b"caf\xe9.txt"), "one")
    write(corpus / os.fsdecode(b"caf\xe9.jsonl"), '{"text": "two"}')
    shard(corpus / os.fsdecode(b"caf\xe9.bin"), [2])
    parquet_file(tmp_path / "x.parquet", {"text": ["three"]}).rename(corpus / os.fsdecode(b"caf\xe9.parquet"))
    data = dataset_folder(tmp_path / "data", {"text": ["four"]}).rename(tmp_path / os.fsdecode(b"\xe9"))
    assert texts_of(readers.text.read(corpus, tokenizer, ["*.txt"]), tokenizer) == ["one"]
    assert texts_of(readers.jsonl.read(corpus, tokenizer), tokenizer) == ["two"]
    assert [ids for _, ids in read(readers.tokens.read(corpus, "uint16", 9, None, 4))] == [[2]]
    assert texts_of(readers.parquet.read(corpus, tokenizer), tokenizer) == ["three"]
    with pytest.raises(UserError, match="not a dataset that save_to_disk wrote: 'utf-8' codec can't encode"):
        readers.hf.read(data, tokenizer)


# ---- jsonl


def test_jsonl_is_one_document_a_line_and_only_jsonl_files_of_a_folder_are_read(
    tmp_path: Path, tokenizer: Any
) -> None:
    write(tmp_path / "b.jsonl", '{"text": "three", "other": 1}')
    file = write(
        tmp_path / "a.jsonl", '{"text": "one"}\n\n{"text": ""}\n{"text": "two\\u2028lines \\ud83d\\ude00"}\n'
    )
    write(tmp_path / "info.json", "{\n}")
    reading = readers.jsonl.read(tmp_path, tokenizer)
    assert texts_of(reading, tokenizer) == ["one", "two\u2028lines 😀", "three"]
    assert reading.files[0]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert [f["bytes"] for f in reading.files] == [file.stat().st_size, 29]
    assert [source for source, _ in read(readers.jsonl.read(file, tokenizer))] == [f"{file}:1", f"{file}:4"]


FOLDER = ("a.jsonl", "b.JSONL", "sub/d.ndjson", "f.jsonlines", "e.jsonl.txt", "g.jsonl.gz", "i.json")


def test_files_of_lines_are_read_under_every_name_and_others_are_counted(
    tmp_path: Path, tokenizer: Any
) -> None:
    for name in FOLDER:
        write(tmp_path / name, json.dumps({"text": name}))
    reading = readers.jsonl.read(tmp_path, tokenizer)
    assert texts_of(reading, tokenizer) == ["a.jsonl", "b.JSONL", "f.jsonlines", "sub/d.ndjson"]
    (note,) = about_documents({"reading": reading.counts})
    assert note == (
        "files of the folder that are not read: 3 (e.jsonl.txt, g.jsonl.gz (decompress it first), i.json)"
    )
    config = JsonlCorpusConfig(path=str(tmp_path))
    assert [str(file) for file in config.files_now([])] == [file["path"] for file in reading.files]


def test_a_note_of_many_files_names_the_first(tmp_path: Path, tokenizer: Any) -> None:
    for number in range(30):
        write(tmp_path / f"{number:02}.md", "")
    write(tmp_path / "a.jsonl", '{"text": "a"}')
    reading = readers.jsonl.read(tmp_path, tokenizer)
    assert texts_of(reading, tokenizer) == ["a"]
    (note,) = about_documents({"reading": reading.counts})
    assert ": 30 (00.md, 01.md" in note and note.endswith("07.md, 22 more)")


def test_tables_are_read_whatever_the_capitals_of_their_names(tmp_path: Path, tokenizer: Any) -> None:
    need_data_extra()
    parquet_file(tmp_path / "a.parquet", {"text": ["one"]}).rename(tmp_path / "A.PARQUET")
    assert texts_of(readers.parquet.read(tmp_path, tokenizer), tokenizer) == ["one"]


def test_a_folder_without_files_to_read_says_what_it_has(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "g.jsonl.gz", "x")
    write(tmp_path / "info.json", "{}")
    for reader in (readers.jsonl.read, readers.chat.read):
        with pytest.raises(
            UserError, match=r"matches \*\.jsonl.*; it has g\.jsonl\.gz \(decompress it first\), inf"
        ):
            read(reader(tmp_path, word_tokenizer(CHATML)))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="it has none"):
        read(readers.jsonl.read(tmp_path / "none", tokenizer))


@pytest.mark.parametrize("form", ["array", "lines", "one line of an array"])
def test_a_json_file_is_an_array_or_lines(form: str, tmp_path: Path, tokenizer: Any) -> None:
    records = [{"text": "one"}, {"text": "two"}]
    content = {
        "array": json.dumps(records, indent=1),
        "lines": "\ufeff" + "".join(json.dumps(record) + "\n" for record in records),
        "one line of an array": json.dumps(records),
    }
    file = write(tmp_path / "data.json", content[form])
    assert texts_of(readers.jsonl.read(file, tokenizer), tokenizer) == ["one", "two"]
    chats = [json.dumps({"messages": CHAT}) for _ in range(2)]
    write(file, "\n".join(chats) if form == "lines" else f"[{','.join(chats)}]")
    assert len(list(readers.chat.read(file, word_tokenizer(CHATML)).documents)) == 2


MARKS = {
    "gzip": b"\x1f\x8b\x08\0", "zstd": b"\x28\xb5\x2f\xfd\x24", "bzip2": b"BZh91AY&SY", "xz": b"\xfd7zXZ\0\0",
    "zip": b"PK\x03\x04\x14",
}  # fmt: skip


@pytest.mark.parametrize("kind", MARKS)
@pytest.mark.parametrize("reader", ["text", "jsonl", "chat"])
def test_a_compressed_file_is_refused_as_one(kind: str, reader: str, tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.json"):
        file = write(tmp_path / name, MARKS[kind] + bytes(range(256)))
        with pytest.raises(UserError) as error:
            read(getattr(readers, reader).read(file, word_tokenizer(CHATML)))
        assert str(error.value).startswith(f"{file}: compressed ({kind}), not text. Decompress it first (")


# ---- chat

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo now"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ok"},
]


def conversation(tmp_path: Path, messages: Any = CHAT) -> Path:
    return write(tmp_path / "chat.jsonl", json.dumps({"messages": messages}) + "\n")


def shown(document: readers.Document) -> str:
    """Each token, those that bear loss in brackets."""
    assert document.labels is not None and len(document.labels) == len(document.ids)
    words = [WORDS[i].replace("\n", "/") for i in document.ids]
    return " ".join(f"[{w}]" if may else w for w, may in zip(words, document.labels, strict=True))


def test_only_the_assistant_s_tokens_and_its_end_of_turn_bear_loss(tmp_path: Path) -> None:
    (found,) = readers.chat.read(conversation(tmp_path), word_tokenizer(CHATML)).documents
    assert shown(found) == (
        "<|im_start|> user / hi <|im_end|> / <|im_start|> assistant / [yo] [now] [<|im_end|>] [/]"
        " <|im_start|> user / bye <|im_end|> / <|im_start|> assistant / [ok] [<|im_end|>] [/]"
    )


def test_a_generation_block_says_what_the_assistant_s_tokens_are_and_the_end_of_turn_is_added(
    tmp_path: Path,
) -> None:
    (found,) = readers.chat.read(conversation(tmp_path), word_tokenizer(GENERATION)).documents
    assert shown(found) == (
        "<|im_start|> user / hi <|im_end|> / <|im_start|> assistant / [yo] [now] [<|im_end|>] /"
        " <|im_start|> user / bye <|im_end|> / <|im_start|> assistant / [ok] [<|im_end|>] /"
    )


MACRO = (
    "{% macro turn(m) %}<|im_start|>{{ m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}"
)
INDENTED = """
  {%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\n' }}
    {%- if m['role'] == 'assistant' %}
    {%- generation -%}
        {%+ if true %}{{ m['content'] + '<|im_end|>' }}{% endif -%}
    {%- endgeneration %}
    {%- else %}
        {{- m['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
  {%- endfor -%}
"""


@pytest.mark.parametrize("template", [MACRO, INDENTED, f"{{# it says so #}}\n{GENERATION}"])
def test_a_generation_block_is_found_wherever_the_template_has_it(tmp_path: Path, template: str) -> None:
    tokenizer = word_tokenizer(template)
    (found,) = readers.chat.read(conversation(tmp_path), tokenizer).documents
    assert shown(found) == (
        "<|im_start|> user / hi <|im_end|> / <|im_start|> assistant / [yo] [now] [<|im_end|>] /"
        " <|im_start|> user / bye <|im_end|> / <|im_start|> assistant / [ok] [<|im_end|>] /"
    )
    assert found.ids.tolist() == tokenizer(tokenizer.apply_chat_template(CHAT, tokenize=False))["input_ids"]


@pytest.mark.parametrize("trim", [False, True])
def test_spaces_at_an_answer_s_ends_are_the_answer_s_whatever_the_tokenizer_s_offsets(
    tmp_path: Path, trim: bool
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.chat_template = GENERATION.replace("<|im_start|>", "> ").replace("<|im_end|>", " <eos>")
    file = conversation(
        tmp_path, [{"role": "user", "content": " a "}, {"role": "assistant", "content": " é😀 b "}]
    )
    (found,) = readers.chat.read(file, tokenizer).documents
    assert found.labels is not None and tokenizer.decode(found.ids[found.labels]) == " é😀 b  <eos>"


def test_conversations_of_a_folder_are_read_out_of_every_file_that_holds_some(tmp_path: Path) -> None:
    record = {"messages": CHAT}
    for name in FOLDER:
        write(tmp_path / name, json.dumps(record) + "\n")
    write(tmp_path / "c.json", f"\ufeff\n{json.dumps([record, record])}")
    write(tmp_path / "H.JSON", json.dumps([record]))
    reading = readers.chat.read(tmp_path, word_tokenizer(CHATML))
    names = [Path(each.source).name for each in reading.documents]
    assert names == [
        "H.JSON:0",
        "a.jsonl:1",
        "b.JSONL:1",
        "c.json:0",
        "c.json:1",
        "f.jsonlines:1",
        "d.ndjson:1",
    ]
    assert reading.counts["files_not_read"] == {
        "number": 3,
        "first": ["e.jsonl.txt", "g.jsonl.gz", "i.json"],
    }
    config = ChatCorpusConfig(path=str(tmp_path))
    assert [str(file) for file in config.files_now([])] == [file["path"] for file in reading.files]
    alone = readers.chat.read(tmp_path / "H.JSON", word_tokenizer(CHATML))
    assert len(list(alone.documents)) == 1 and "files_not_read" not in alone.counts


def test_a_template_that_changes_what_its_blocks_write_is_one_line(tmp_path: Path) -> None:
    measured = "{% for m in messages %}{% set x %}" + "{% generation %}{{ m['content'] }}{% endgeneration %}"
    template = measured + "{% endset %}{{ x | length }}{% endfor %}"
    with pytest.raises(UserError, match=r"chat\.jsonl:1: the chat template changes"):
        read(readers.chat.read(conversation(tmp_path), word_tokenizer(template)))


def test_an_answer_that_merges_with_the_prompt_is_still_told_apart(tmp_path: Path) -> None:
    # The tokenizer joins the prompt's line end to the answer's: ids of the prompt are no prefix, its text is.
    inner = Tokenizer(
        models.WordLevel({"<eos>": 0, "?": 1, "\n\n": 2, "\n": 3, "a": 4, "u\na": 5}, unk_token="?")
    )
    inner.pre_tokenizer = pre_tokenizers.Split("\n\n", "isolated")
    joining = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    joining.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}\n{{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}a\n{% endif %}"
    )
    file = conversation(tmp_path, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\na"}])
    (found,) = readers.chat.read(file, joining).documents
    assert found.ids.tolist() == [5, 0, 4, 2, 4, 0]
    assert found.labels is not None and found.labels.tolist() == [False] * 4 + [True] * 2


def test_a_conversation_without_an_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    both = "".join(json.dumps({"messages": each}) + "\n" for each in (CHAT[:1], CHAT))
    reading = readers.chat.read(write(tmp_path / "chat.jsonl", both), word_tokenizer(CHATML))
    assert len(read(reading)) == 1
    first = {"without_an_answer": f"{tmp_path / 'chat.jsonl'}:1"}
    assert reading.counts == {"conversations": 2, "without_an_answer": 1, "first": first}


def test_conversations_without_any_answer_are_one_line(tmp_path: Path) -> None:
    reading = readers.chat.read(conversation(tmp_path, CHAT[:1]), word_tokenizer(CHATML))
    with pytest.raises(UserError, match=r"none of 1 conversations has a token of the assistant's to learn"):
        read(reading)


@pytest.mark.real
def test_the_real_tokenizer_s_template_marks_the_answers(tmp_path: Path) -> None:
    path = demo_gguf()
    if path is None:
        pytest.skip("real tokenizer: the demo extra is not installed; not run")
    tokenizer = load_tokenizer(path)
    (found,) = readers.chat.read(conversation(tmp_path), tokenizer).documents
    assert found.labels is not None
    assert tokenizer.decode(found.ids[found.labels]) == "yo now<|im_end|>\nok<|im_end|>\n"


# ---- parquet and datasets


def parquet_file(path: Path, columns: dict[str, list[Any]]) -> Path:
    pa = pytest.importorskip("pyarrow", reason="the data extra is not installed; not run")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def dataset_folder(path: Path, columns: dict[str, list[Any]], splits: tuple[str, ...] = ()) -> Path:
    datasets = pytest.importorskip("datasets", reason="the data extra is not installed; not run")
    data = datasets.Dataset.from_dict(columns)
    (datasets.DatasetDict({split: data for split in splits}) if splits else data).save_to_disk(str(path))
    return path


def test_parquet_is_one_document_a_record(tmp_path: Path, tokenizer: Any) -> None:
    many = [f"number {i}" for i in range(150)]
    parquet_file(tmp_path / "b.parquet", {"body": ["last"]})
    file = parquet_file(tmp_path / "a.parquet", {"body": many, "n": list(range(150))})
    reading = readers.parquet.read(tmp_path, tokenizer, column="body")
    assert texts_of(reading, tokenizer) == [*many, "last"]
    assert reading.files[0]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert read(readers.parquet.read(file, tokenizer, column="body"))[149][0] == f"{file}:149"


def test_a_dataset_is_one_document_a_record_and_its_split_s_files_are_hashed(
    tmp_path: Path, tokenizer: Any
) -> None:
    columns = {"body": ["one", "two"], "n": [1, 2]}
    plain = readers.hf.read(dataset_folder(tmp_path / "plain", columns), tokenizer, column="body")
    assert texts_of(plain, tokenizer) == ["one", "two"]
    split = readers.hf.read(
        dataset_folder(tmp_path / "two", columns, ("train", "test")), tokenizer, "test", "body"
    )
    assert texts_of(split, tokenizer) == ["one", "two"]
    folder = tmp_path / "two" / "test"
    names = [folder.parent / "dataset_dict.json", folder / "state.json", folder / "dataset_info.json"]
    assert split.files == [
        {
            "path": str(file),
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in (*names, *folder.glob("*.arrow"))
    ]
    only = readers.hf.read(dataset_folder(tmp_path / "one", columns, ("train",)), tokenizer, column="body")
    assert texts_of(only, tokenizer) == ["one", "two"]


# ---- token shards


def shard(path: Path, ids: list[int], dtype: str = "uint16") -> Path:
    return write(path, np.array(ids, np.dtype(dtype).newbyteorder("<")).tobytes())


@pytest.mark.parametrize(
    ("dtype", "raw"), [("uint16", "0100ff000200"), ("uint32", "01000000ff00000002000000")]
)
def test_shards_are_little_endian_whatever_the_machine(tmp_path: Path, dtype: str, raw: str) -> None:
    file = write(tmp_path / "x.bin", bytes.fromhex(raw))
    assert read(readers.tokens.read(file, dtype, 256, None, 4)) == [(f"{file}:0", [1, 255, 2])]


def test_a_document_ends_after_its_end_id_and_with_its_shard(tmp_path: Path) -> None:
    first = shard(tmp_path / "0.bin", [1, 2, 9, 3, 9, 4])
    second = shard(tmp_path / "1.bin", [5, 9])
    write(tmp_path / "index.json", "{}")
    reading = readers.tokens.read(tmp_path, "uint16", 10, 9, 4)
    assert read(reading) == [
        (f"{first}:0", [1, 2, 9]), (f"{first}:3", [3, 9]), (f"{first}:5", [4]), (f"{second}:0", [5, 9]),
    ]  # fmt: skip
    assert [f["bytes"] for f in reading.files] == [12, 4]
    assert reading.files[1]["sha256"] == hashlib.sha256(second.read_bytes()).hexdigest()


@pytest.mark.parametrize("document_end", [None, 99])
def test_a_shard_without_document_ends_is_cut_so_that_some_can_be_held_out(
    tmp_path: Path, document_end: int | None
) -> None:
    ids = (np.arange(150) % 90).tolist()
    file = shard(tmp_path / "all", ids)
    found = read(readers.tokens.read(tmp_path, "uint16", 100, document_end, tokens_per_row=4))
    assert [source for source, _ in found] == [f"{file}:0", f"{file}:64", f"{file}:128"]
    assert [id_ for _, part in found for id_ in part] == ids


def text_ids(vocab_size: int, count: int = 4000, dtype: str = "<u4") -> Any:
    """Ids as a text has them: small ones often, and 0 after every document."""
    generator = np.random.default_rng(0)
    ids = (generator.pareto(0.3, count) * 20 + 1).clip(max=vocab_size - 1)
    ids[generator.random(count) < 0.05] = 0
    return ids.astype(dtype)


WIDER = {
    "uint32 of a small vocabulary": (text_ids(49152), "uint16", 49152, "ids of 4 bytes, not uint16: ", "uint32"),
    "uint32 of a large vocabulary": (text_ids(151936), "uint16", 151936, "ids of 4 bytes, not uint16: ", "uint32"),
    "uint32 of ids of all sizes": (
        np.random.default_rng(0).integers(0, 262144, 4000).astype("<u4"),
        *("uint16", 262144, "ids of 4 bytes, not uint16: ", "uint32"),
    ),
    "uint32 of another, larger vocabulary": (
        np.where(np.arange(4000) % 16 == 5, 100_000, text_ids(49152)).astype("<u4"),
        *("uint16", 49152, "ids of 4 bytes, not uint16: ", "uint32"),
    ),
    "uint32 of ten ids": ((np.arange(400) % 10).astype("<u4"), "uint16", 49152, "ids of 4 bytes, not ", "uint32"),
    "uint32, mostly padding": (
        np.r_[text_ids(49152, 200), np.zeros(10**5), 7].astype("<u4"), "uint16", 49152, "ids of 4 bytes, ", "uint32"
    ),
    "int64 as uint16": (text_ids(49152).astype("<i8"), "uint16", 49152, "ids of 8 bytes, not uint16: ", "uint32"),
    "int64 as uint32": (text_ids(151936).astype("<i8"), "uint32", 151936, "ids of 8 bytes, not uint32: ", "uint32"),
    "uint16 of a small vocabulary": (
        text_ids(49152, dtype="<u2"), "uint32", 49152, "ids of 2 bytes, not uint32: id ", "uint16"
    ),
    "uint16 of a large vocabulary": (
        text_ids(65535, dtype="<u2"), "uint32", 151936, "ids of 2 bytes, not uint32: id ", "uint16"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDER)
def test_ids_of_another_width_are_refused(name: str, tmp_path: Path) -> None:
    ids, dtype, vocab_size, said, todo = WIDER[name]
    file = write(tmp_path / "x.bin", ids.tobytes())
    with pytest.raises(UserError) as refused:
        read(readers.tokens.read(file, dtype, vocab_size, 0, 64))
    message = str(refused.value)
    assert message.startswith(f"{file}: {said}") and message.endswith(f"et corpus.dtype: {todo}."), message


HONEST = {
    "a text": text_ids(49152),
    "ids that are small": text_ids(4),
    "padded documents": np.where(np.arange(10**5) % 512 < 7, 9, 0),
    "a text before much padding": np.r_[text_ids(49152, 300), np.zeros(10**5), 7],
    "padding before a text": np.r_[1, np.zeros(9999), text_ids(49152, 300)],
    "every third an end": np.where(np.arange(3000) % 3 == 2, 0, 77),
    "words and ends by turns, and then not": np.r_[[5, 0] * 2000, text_ids(49152)],
    "a short file of ends and words": np.array([5, 0] * 60),
    "one long line of one id": np.full(5000, 3),
}


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_shard_is_not_taken_for_another_width(name: str, dtype: str, tmp_path: Path) -> None:
    ids = HONEST[name].astype(np.dtype(dtype).newbyteorder("<"))
    for vocab_size in (49152, 151936):
        file = write(tmp_path / "x.bin", ids.tobytes())
        parts = [part for _, part in read(readers.tokens.read(file, dtype, vocab_size, None, 64))]
        assert [id_ for part in parts for id_ in part] == ids.tolist()


def test_some_wrong_ids_are_no_other_width(tmp_path: Path) -> None:
    ids = text_ids(151936)
    ids[7::40] = 2**31
    with pytest.raises(UserError, match=r"id 2147483648 at token 7 is outside the vocabulary of 151936 ids"):
        read(readers.tokens.read(write(tmp_path / "x.bin", ids.tobytes()), "uint32", 151936, None, 64))


# ---- refusals: each names the place and both sides


def text_of(name: str, content: str | bytes) -> Callable[[Path], readers.Reading]:
    return lambda folder: readers.text.read(
        write(folder / name, content).parent, make_tokenizer(), include=["*.txt"]
    )


def jsonl_of(content: str | bytes) -> Callable[[Path], readers.Reading]:
    return lambda folder: readers.jsonl.read(write(folder / "x.jsonl", content), make_tokenizer())


def chat_of(content: str, template: str | None = CHATML) -> Callable[[Path], readers.Reading]:
    return lambda folder: readers.chat.read(write(folder / "x.jsonl", content), word_tokenizer(template))


def tokens_of(raw: bytes, dtype: str = "uint16", document_end: int | None = None) -> Callable[[Path], Any]:
    return lambda folder: readers.tokens.read(
        write(folder / "x.bin", raw).parent, dtype, 300, document_end, 4
    )


def dangling(folder: Path) -> readers.Reading:
    shard(folder / "0.bin", [1, 2])
    (folder / "1.bin").symlink_to(folder / "gone")
    return readers.tokens.read(folder, "uint16", 10, None, 4)


def hf_of(split: str | None, column: str, splits: tuple[str, ...]) -> Callable[[Path], readers.Reading]:
    def make(folder: Path) -> readers.Reading:
        return readers.hf.read(
            dataset_folder(folder / "d", {"text": ["a"]}, splits), make_tokenizer(), split, column
        )

    return make


def cut_dataset(folder: Path) -> readers.Reading:
    path = dataset_folder(folder / "d", {"text": ["a", "b"]})
    (file,) = path.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:40])
    return readers.hf.read(path, make_tokenizer())


GOOD = json.dumps({"messages": CHAT})
REFUSALS: dict[str, tuple[Callable[[Path], readers.Reading], str]] = {
    "no such path": (lambda f: readers.text.read(f / "gone", make_tokenizer()), "corpus.path: no file or folder {f}/gone."),
    "no file matches": (text_of("x.md", "a"), "corpus.path: no file of {f} matches *.txt."),
    "not UTF-8": (text_of("x.txt", b"abc\xff"), "{f}/x.txt: not UTF-8 text: byte 0xff at 3 of 4. Convert it (iconv"),
    "UTF-16": (text_of("x.txt", "a".encode("utf-16")), "{f}/x.txt: UTF-16 text (it begins with the bytes ff fe), not UTF-8. Convert it: iconv"),
    "big-endian UTF-16": (text_of("x.txt", b"\xfe\xff\0a"), "{f}/x.txt: UTF-16 text (it begins with the bytes fe ff)"),
    "UTF-32": (text_of("x.txt", "a".encode("utf-32")), "{f}/x.txt: UTF-32 text (it begins with the bytes ff fe 00 00)"),
    "big-endian UTF-32": (text_of("x.txt", b"\0\0\xfe\xff\0\0\0a"), "{f}/x.txt: UTF-32 text (it begins with the bytes 00 00 fe ff)"),
    "UTF-16 lines": (jsonl_of('{"text": "a"}'.encode("utf-16")), "{f}/x.jsonl: UTF-16 text"),
    "not UTF-8 after a mark": (text_of("x.txt", b"\xef\xbb\xbfabc\xff"), "{f}/x.txt: not UTF-8 text: byte 0xff at 6 of 7."),
    "half a line of JSON": (jsonl_of('{"text": "a"}\n{"text": "b'), "{f}/x.jsonl:2: not a line of JSON: "),
    "a line of bytes": (jsonl_of(b'{"text": "\xff"}'), "{f}/x.jsonl:1: not UTF-8 text: byte 0xff at 10 of 13."),
    "a line that is a list": (jsonl_of('["a"]'), "{f}/x.jsonl:1: a list, not an object"),
    "deep nesting": (jsonl_of("[" * 200_000), "{f}/x.jsonl:1: not a line of JSON: "),
    "no such field": (jsonl_of('{"body": "a", "n": 1}'), "{f}/x.jsonl:1: 'text' is missing; found body, n."),
    "no field at all": (jsonl_of("{}"), "{f}/x.jsonl:1: 'text' is missing; found nothing."),
    "not a string": (jsonl_of('{"text": 3, "n": 1}'), "{f}/x.jsonl:1: 'text' is int, not a string; found text, n."),
    "null": (jsonl_of('{"text": null}'), "{f}/x.jsonl:1: 'text' is null, not a string. Drop such records: jq "),
    "lone surrogate": (jsonl_of('{"text": "\\ud800"}'), "{f}/x.jsonl:1: 'text' holds half of a surrogate pair"),
    "no chat template": (chat_of(GOOD, None), "corpus.name: chat needs a tokenizer with a chat template"),
    "no messages": (chat_of('{"text": "a"}'), "{f}/x.jsonl:1: no conversation; the line has text. A record is a list of messages"),
    "empty messages": (chat_of('{"messages": []}'), "{f}/x.jsonl:1: 'messages' is an empty list of messages."),
    "message without a role": (
        chat_of('{"messages": [{"content": "a"}]}'), "{f}/x.jsonl:1: message 0: a message must have a `role` and a `content`"
    ),
    "message with a picture": (
        chat_of('{"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}]}'),
        "{f}/x.jsonl:1: message 0: a message must have a `role` and a `content`, both strings; a part of its content is",
    ),
    "a role that nobody has": (
        chat_of('{"messages": [{"role": "user", "content": "a"}, {"role": "bard", "content": "b"}]}'),
        "{f}/x.jsonl:1: message 1: role 'bard' is none that a chat template knows",
    ),
    "a weight that is none": (
        chat_of('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]}'),
        "{f}/x.jsonl:1: message 1: 'weight' is 0.5",
    ),
    "message that is text": (chat_of('{"messages": ["hi"]}'), '{f}/x.jsonl:1: message 0: a message must have a `role` and a'),
    "message of half a character": (
        chat_of('{"messages": [{"role": "user", "content": "\\ud800"}]}'), "{f}/x.jsonl:1: holds half of a surrogate pair"
    ),
    "an answer to nothing": (
        chat_of('{"messages": [{"role": "assistant", "content": "yo"}]}'),
        "{f}/x.jsonl:1: message 0 is the assistant's",
    ),
    "a template that rewrites": (chat_of(GOOD, REWRITES), "{f}/x.jsonl:1: the chat template rewrites earlier turns"),
    "a template that refuses": (
        chat_of(GOOD, REFUSES), "{f}/x.jsonl:1: the chat template refuses this conversation: roles must alternate."
    ),
    "not a Parquet file": (
        lambda f: readers.parquet.read(write(f / "x.parquet", "text"), make_tokenizer()),
        "{f}/x.parquet: not a readable Parquet file: ",
    ),
    "no such Parquet column": (
        lambda f: readers.parquet.read(parquet_file(f / "x.parquet", {"body": ["a"], "n": [1]}), make_tokenizer()),
        "{f}/x.parquet: no column 'text'; found body, n. Set corpus.column.",
    ),
    "a Parquet record without text": (
        lambda f: readers.parquet.read(parquet_file(f / "x.parquet", {"text": ["a", None]}), make_tokenizer()),
        "{f}/x.parquet:1: 'text' is null, not a string. Drop such records: table.filter(",
    ),
    "a record of a dataset without text": (
        lambda f: readers.hf.read(dataset_folder(f / "d", {"text": ["a", "", None]}), make_tokenizer()),
        "{f}/d:2: 'text' is null, not a string. Drop such records: dataset.filter(",
    ),
    "not a dataset": (lambda f: readers.hf.read(f, make_tokenizer()), "{f}: not a dataset that save_to_disk wrote: "),
    "a dataset cut off": (cut_dataset, "{f}/d: not a dataset that save_to_disk wrote: "),
    "no split named": (hf_of(None, "text", ("train", "test")), "corpus.split: {f}/d has the splits train, test; the recipe names none."),
    "no such split": (hf_of("dev", "text", ("train",)), "corpus.split: {f}/d has the splits train; the recipe names 'dev'."),
    "a split of none": (hf_of("train", "text", ()), "corpus.split: {f}/d is one dataset without splits; "),
    "no such column": (hf_of(None, "body", ()), "{f}/d: no column 'body'; found text. Set corpus.column."),
    "an empty shard": (tokens_of(b""), "{f}/x.bin: an empty shard."),
    "an odd byte": (tokens_of(bytes(5)), "{f}/x.bin: 5 bytes are not a whole number of uint16 ids of 2 bytes."),
    "half an id": (tokens_of(bytes(6), "uint32"), "{f}/x.bin: 6 bytes are not a whole number of uint32 ids of 4 bytes."),
    "an id too large": (
        tokens_of(bytes.fromhex("010000002c01")), "{f}/x.bin: id 300 at token 2 is outside the vocabulary of 300 ids."
    ),
    "an id too large in a later document": (
        tokens_of(bytes.fromhex("0100070001002c01"), document_end=7), "{f}/x.bin: id 300 at token 3 is outside the"
    ),
    "a document end too large": (
        tokens_of(bytes(2), document_end=300), "corpus.document_end: id 300 is outside the vocabulary of 300 ids."
    ),
    "a shard that leads nowhere": (dangling, "{f}/1.bin: no such file."),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_it_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    make, said = REFUSALS[name]
    if "Parquet" in name or "dataset" in name:
        need_data_extra()
    with pytest.raises(UserError) as refused:
        read(make(tmp_path))
    assert str(refused.value).startswith(said.replace("{f}", str(tmp_path)))


@pytest.mark.parametrize("reader", [readers.text.read, readers.jsonl.read])
def test_a_file_that_cannot_be_opened_is_named(
    reader: Callable[..., readers.Reading], tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "x.jsonl", '{"text": "a"}')

    def locked(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(UserError, match="cannot be read: Permission denied") as refused:
        read(reader(file, tokenizer))
    assert str(refused.value).startswith(str(file))


@pytest.mark.parametrize(
    ("reader", "library"), [(readers.parquet.read, "pyarrow"), (readers.hf.read, "datasets")]
)
def test_without_the_data_extra_its_command_is_named(
    reader: Callable[..., readers.Reading], library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}.*pip install 'potstill\[data\]'"):
        reader(tmp_path, None)


def test_a_long_file_may_be_several_documents_none_of_which_is_longer_than_sixteen_rows(
    tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / "a.txt").write_text("a" * 70)
    (tmp_path / "b.txt").write_text("b" * 10)
    whole = TextCorpusConfig(path=str(tmp_path), tokens_per_row=2)
    vocab = vocab_of(tokenizer, len(tokenizer))
    one = list(whole.read(tokenizer, vocab).documents)
    pieces = list(replace(whole, split_files=True).read(tokenizer, vocab).documents)
    assert [len(each.ids) for each in one] == [71, 11]  # the EOS
    assert [len(each.ids) for each in pieces] == [32, 32, 7, 11]
    assert [i for each in pieces for i in each.ids.tolist()] == [i for each in one for i in each.ids.tolist()]
    # Only where a file begins does a text begin, before which a BOS may stand.
    assert [each.is_text for each in pieces] == [True, False, False, True]
    assert all(each.part_of is None for each in pieces)  # a part of a file can be held out
