"""Tokenizers load or are refused by name, and two vocabularies are one list or are refused at the first difference."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import demo_gguf, make_tokenizer

from potstill.data.tokenizers import (
    has_tokenizer,
    load_tokenizer,
    require_same,
    special_differences,
    vocab_of,
)
from potstill.errors import UserError
from potstill.types import Vocab


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_tokenizer_is_loaded_from_its_folder(folder: Path) -> None:
    assert has_tokenizer(folder) and not has_tokenizer(folder.parent)
    loaded, made = load_tokenizer(folder), make_tokenizer()
    assert loaded.is_fast
    assert loaded("the cat")["input_ids"] == made("the cat")["input_ids"]
    assert vocab_of(loaded, 258) == vocab_of(made, 258)


def test_the_token_list_is_by_id_with_holes_empty() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    found = vocab_of(tokenizer, 300)
    assert found.tokens is not None and found.tokens[:2] == ("<eos>", "<pad>") and len(found.tokens) == 258
    assert (found.size, found.eos_id, found.bos_id, found.pad_id) == (300, 0, None, 1)
    assert found.chat_template == "{{ messages }}"

    class WithHole:
        eos_token_id = bos_token_id = pad_token_id = chat_template = None
        added_tokens_decoder: ClassVar[dict[int, str]] = {3: "c"}

        def get_vocab(self) -> dict[str, int]:
            return {"c": 3, "a": 0}

    assert vocab_of(WithHole(), 4).tokens == ("a", "", "", "c")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_tokenizer(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}: has no tokenizer.")


@pytest.mark.parametrize("damage", ["{", "", '{"model": 3}', "[]"])
def test_a_damaged_tokenizer_is_refused_with_its_place(folder: Path, damage: str) -> None:
    (folder / "tokenizer.json").write_text(damage)
    with pytest.raises(UserError) as refused:
        load_tokenizer(folder)
    assert str(refused.value).startswith(f"{folder}: its tokenizer cannot be read: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"GGUF\3\0\0\0garbage"])
def test_a_gguf_file_that_is_missing_or_damaged_is_refused_with_its_place(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "x.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_tokenizer(path)
    assert str(refused.value).startswith(f"{path}: its tokenizer cannot be read: ")


def test_code_that_comes_with_a_tokenizer_is_never_run(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        load_tokenizer(folder)
    except UserError as refused:
        assert str(refused).startswith(f"{folder}: its tokenizer cannot be read: ")
    assert not ran.exists()


@pytest.mark.real
def test_a_tokenizer_from_gguf_survives_saving(tmp_path: Path) -> None:
    path = demo_gguf()
    if path is None:
        pytest.skip("real tokenizer: the demo extra is not installed; not run")
    tokenizer = load_tokenizer(path)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "def f(x):\n    return 'naïve'  <|im_end|>\n"
    for split in (False, True):
        assert (
            again(text, split_special_tokens=split)["input_ids"]
            == tokenizer(text, split_special_tokens=split)["input_ids"]
        )
    assert tokenizer.eos_token_id not in tokenizer(text, split_special_tokens=True)["input_ids"]
    assert vocab_of(again, 49152) == vocab_of(tokenizer, 49152)


LIST = Vocab(3, ("a", "b", "c"), eos_id=0, bos_id=1, pad_id=2, chat_template="{{ x }}")


def test_one_list_passes_and_so_does_one_size_without_a_list() -> None:
    assert require_same(LIST, dataclasses.replace(LIST), "T", "S") == 3
    assert require_same(LIST, Vocab(3), "T", "S") == require_same(Vocab(3), LIST, "T", "S") == 3
    assert require_same(Vocab(3), Vocab(3), "T", "S") == 3


def test_a_padded_end_on_either_side_or_on_both_is_not_shared() -> None:
    padded = dataclasses.replace(LIST, size=7)
    for one, other in (
        (LIST, padded),
        (padded, LIST),
        (padded, dataclasses.replace(LIST, size=9)),
        (padded, padded),
    ):
        assert require_same(one, other, "T", "S") == 3


def test_a_padded_end_that_is_written_into_the_list_is_no_token() -> None:
    """As GGUF files do it."""

    class Padded:
        eos_token_id = bos_token_id = pad_token_id = chat_template = None
        added_tokens_decoder: ClassVar[dict[int, str]] = {0: "a", 3: "[PAD3]"}

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "[PAD1]": 1, "b": 2, "[PAD3]": 3, "[PAD4]": 4}

    found = vocab_of(Padded(), 5)
    assert found.tokens == ("a", "[PAD1]", "b") and found.added == {0} and found.known == 3


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (
            Vocab(3, ("a", "x", "y")),
            "T and S use different tokenizers: id 1 is 'b' in the one and 'x' in the other",
        ),
        (
            Vocab(3, ("a", "b")),
            "T and S use different tokenizers: id 2 is 'c' in the one and no such id in the other",
        ),
        (
            Vocab(4, ("a", "b", "c", "d")),
            "T and S use different tokenizers: id 3 is no such id in the one and 'd'",
        ),
        (
            Vocab(2, ("a", "b", "c")),
            "S has logits for 2 of the 3 tokens, the other side for 3 ids; the first without is id 2, 'c'.",
        ),
        (Vocab(5), "T has logits for 3 ids and S for 5, and not both have a tokenizer"),
    ],
)
def test_another_vocabulary_is_refused_at_its_first_difference(student: Vocab, said: str) -> None:
    with pytest.raises(UserError) as refused:
        require_same(LIST, student, "T", "S")
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"eos_id": 2},
            "EOS token: the teacher has id 0 ('a'), the student id 2 ('c')",
        ),
        ({"bos_id": None}, "BOS token: the teacher has id 1 ('b'), the student none: prompts start"),
        ({"pad_id": 0}, "PAD token: the teacher has id 2 ('c'), the student id 0"),
        ({"chat_template": None}, "chat templates of teacher and student differ"),
        (
            {"added": frozenset({1})},
            "1 tokens are added ones on one side only, first id 1 ('b'): the student's",
        ),
    ],
)
def test_each_special_difference_is_told(change: dict[str, Any], said: str) -> None:
    assert special_differences(LIST, LIST, "x") == []
    (line,) = special_differences(LIST, dataclasses.replace(LIST, **change), "corpus.tokenizer: S takes it")
    assert line.startswith(said) and line.endswith("; corpus.tokenizer: S takes it.")
