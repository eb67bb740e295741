"""A conversation in the terminal: through the template where there is one, and behind what was said before."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from refusals import refusal
from transformers import AutoModelForCausalLM

from potstill.cli.main import main
from potstill.io.terminal import printable

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", initializer_range=0.6)


@pytest.fixture
def chat_model(model: Path) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    return model


def greedy(model: Path, prompt: str, tokens: int) -> str:
    """What Transformers itself writes behind a text."""
    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    hf = AutoModelForCausalLM.from_pretrained(model)
    out = hf.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=1)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def answered(model: Path, prompt: str, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["chat", str(model), "--prompt", prompt, "--json", "--max-new-tokens", "6", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_one_prompt_has_one_answer(
    model: Path, chat_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = greedy(chat_model, "<user>the cat\n<assistant>", 6)
    found = answered(chat_model, "the cat", capsys, "--temperature", "0")
    assert (found["text"], found["prompt"]) == (wanted, "the cat") and 0 < found["tokens"] <= 6
    assert (
        main(["chat", str(chat_model), "--prompt", "the cat", "--temperature", "0", "--max-new-tokens", "6"])
        == 0
    )
    assert capsys.readouterr().out == f"{printable(wanted)}\n"


def test_a_system_message_stands_before_all_turns(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--system", "be brief", "--temperature", "0")
    wanted = greedy(chat_model, "<system>be brief\n<user>the cat\n<assistant>", 6)
    assert answered(chat_model, "the cat", capsys, *options)["text"] == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO("the dog\n/reset\nthe cat\n"))
    assert main(["chat", str(chat_model), "--max-new-tokens", "6", *options]) == 0
    assert capsys.readouterr().out.endswith(f"{printable(wanted)}\n")


def test_a_system_message_without_a_template_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(["chat", str(model), "--prompt", "the cat", "--system", "be brief"], capsys, tmp_path)
    assert "--system: " in said and "has no chat template" in said


def test_without_a_template_the_text_goes_on(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answered(model, "the cat", capsys, "--temperature", "0")["text"] == greedy(model, "the cat", 6)


def test_a_turn_is_read_with_those_before_it_until_they_are_forgotten(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.models import dialogue

    prompts: list[list[dict[str, str]]] = []
    render = dialogue.chat_prompt

    def recorded(tokenizer: Any, messages: list[dict[str, str]]) -> str:
        prompts.append(list(messages))
        return render(tokenizer, messages)

    monkeypatch.setattr(dialogue, "chat_prompt", recorded)
    lines = ["the cat", "", "sat", "/reset", "on", "/exit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", str(chat_model), "--max-new-tokens", "3", "--seed", "1"]) == 0
    assert [[m["content"] for m in asked if m["role"] == "user"] for asked in prompts] == [
        ["the cat"],
        ["the cat", "sat"],
        ["on"],
    ]
    assert [m["role"] for m in prompts[1]] == ["user", "assistant", "user"]


def test_an_answer_is_written_as_it_is_decoded_and_ctrl_c_ends_it(chat_model: Path) -> None:
    from potstill.data.tokenizers import load_tokenizer
    from potstill.models.dialogue import Dialogue
    from potstill.models.load import load_causal_lm

    tokenizer = load_tokenizer(chat_model)
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    dialogue = Dialogue(load_causal_lm(chat_model), tokenizer, **options)
    pieces: list[str] = []
    whole = dialogue.reply("the cat", pieces.append)
    assert "".join(pieces) == whole.text and len(pieces) > 2
    dialogue.reset()
    cut: list[str] = []

    def interrupting(piece: str) -> None:
        cut.append(piece)
        if len(cut) == 2:
            raise KeyboardInterrupt

    answer = dialogue.reply("the cat", interrupting)
    assert answer.finish == "interrupted" and whole.text.startswith(answer.text) and answer.text != whole.text
    assert [m["role"] for m in dialogue.messages] == ["user", "assistant"]


def test_samples_depend_on_the_seed_alone(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        answered(model, "the cat", capsys, "--temperature", "2", "--seed", seed)["text"] for seed in "112"
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--temperature", "-1"], "--temperature: -1"),
        (["--top-p", "0"], "--top-p: 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: 0"),
        (["--json"], "--json: "),
    ],
)
def test_what_has_no_meaning_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert said in refusal(["chat", str(model), *words], capsys, tmp_path)
