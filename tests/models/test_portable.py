"""What a saved folder has for other programs: the ends of its rows, flags of generation, the chat template twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer

from potstill.losses.objective import Objective
from potstill.models.portable import add_ends, write_portable_config
from potstill.models.student import Student, from_checkpoint

CPU = torch.device("cpu")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<turn>\n{% endfor %}"
TOOLS = "tools: {{ tools }}"


def chat_tokenizer(template: Any = TEMPLATE) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    tokenizer.chat_template = template
    return tokenizer


def saved(tmp_path: Path, tokenizer: Any, known: int | None = None, **generation: Any) -> Path:
    folder = make_model(tmp_path / "base", with_tokenizer=False, vocab_size=264)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    model = from_checkpoint(folder, CPU)
    if known is not None:
        model.mask_from(known)
    Student(model, Objective()).save(tmp_path / "student", tokenizer)
    return tmp_path / "student"


def settings(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "generation_config.json").read_text()))


@pytest.mark.parametrize(
    ("own", "template", "listed"),
    [
        ({"eos_token_id": 0}, TEMPLATE, [0, 258]),
        ({"eos_token_id": [5, 0]}, TEMPLATE, [5, 0, 258]),
        ({"eos_token_id": 258}, TEMPLATE, [258, 0]),
        ({"eos_token_id": 0}, None, 0),
        ({"max_length": 9}, TEMPLATE, [0, 258]),
    ],
)
def test_a_student_ends_where_its_rows_do(
    tmp_path: Path, own: dict[str, Any], template: str | None, listed: Any
) -> None:
    folder = saved(tmp_path, chat_tokenizer(template), **own)
    assert settings(folder)["eos_token_id"] == listed
    again = transformers.GenerationConfig.from_pretrained(folder)
    assert again.eos_token_id == listed


def test_padding_ends_nothing(tmp_path: Path) -> None:
    """The template's token is none of the ids that teacher and student share."""
    folder = saved(tmp_path, chat_tokenizer(), known=258, eos_token_id=0)
    assert settings(folder)["eos_token_id"] == 0


FLAGS: list[dict[str, Any]] = [
    {"do_sample": False, "temperature": 0.9, "top_p": 0.6},
    {"early_stopping": True, "num_beams": 1, "length_penalty": 2.0},
    {"do_sample": False, "min_p": 0.1, "top_k": 5},
]


@pytest.mark.parametrize("known", [None, 260])
@pytest.mark.parametrize("flags", FLAGS)
def test_flags_of_generation_are_saved_as_they_are(
    tmp_path: Path, flags: dict[str, Any], known: int | None
) -> None:
    found = settings(saved(tmp_path, chat_tokenizer(), known, eos_token_id=0, **flags))
    meant = {name: value for name, value in flags.items() if value not in (False, 1)}  # the rest are defaults
    assert {name: found[name] for name in meant} == meant and found["eos_token_id"] == [0, 258]
    assert found.get("suppress_tokens") == ([260, 261, 262, 263] if known else None)


def test_the_chat_template_is_in_a_file_and_in_the_config(tmp_path: Path) -> None:
    folder = saved(tmp_path, chat_tokenizer())
    assert (folder / "chat_template.jinja").read_bytes().decode() == TEMPLATE
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == TEMPLATE
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


def test_a_template_of_the_config_alone_gets_its_file(tmp_path: Path) -> None:
    folder = saved(tmp_path, chat_tokenizer())
    (folder / "chat_template.jinja").unlink()
    write_portable_config(folder)
    assert (folder / "chat_template.jinja").read_bytes().decode() == TEMPLATE


def test_named_templates_are_in_the_config_and_the_folder_has_files_alone(tmp_path: Path) -> None:
    named = {"default": TEMPLATE, "tool_use": TOOLS}
    folder = saved(tmp_path, chat_tokenizer(named))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == [{"name": n, "template": t} for n, t in named.items()]
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == named
    assert all(file.is_file() for file in folder.iterdir())


def test_no_template_stays_none(tmp_path: Path) -> None:
    folder = saved(tmp_path, chat_tokenizer(None))
    assert not (folder / "chat_template.jinja").exists()
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_ends_that_are_listed_change_no_byte(tmp_path: Path) -> None:
    folder = saved(tmp_path, chat_tokenizer(), eos_token_id=0)
    before = (folder / "generation_config.json").read_bytes()
    add_ends(folder, [258, 0])
    assert (folder / "generation_config.json").read_bytes() == before
