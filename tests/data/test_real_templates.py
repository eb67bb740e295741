"""Chat templates as they are published: what bears loss is what their models write at inference.

Where TRL has a version for training of the same template, its blocks are an independent word on that.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from chat_templates import WORDS, tokenizer_for
from test_chats import TWO_TURNS, assistant, counts_of, reading_of, shown, user

TEMPLATES = Path(__file__).parent / "trl_templates"
CONTROL = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|<(?:start_of_turn|end_of_turn)>")
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Sum",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
WITH_CALL = {
    "messages": [
        user("hi"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "name": "add", "content": "two"},
        assistant("so it is"),
    ],
    "tools": [ADD],
}
CONVERSATIONS = {
    "one turn": {"messages": TWO_TURNS[:2]},
    "two turns": {"messages": TWO_TURNS},
    "instructions": {"messages": [{"role": "system", "content": "Be kind"}, *TWO_TURNS[:2]]},
    "a call": WITH_CALL,
}


def read(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


NOT_FLAGGED = ["<｜User｜>", "<｜Assistant｜>"]
"""Control tokens that the tokenizers of R1 do not flag as special."""


def real_tokenizer(name: str, control_of: str | None = None) -> Any:
    found = {*CONTROL.findall(read(control_of or name))}
    words = [*WORDS, *(each for each in NOT_FLAGGED if each in found)]
    return tokenizer_for(read(name), special=sorted(found - {*words}), words=words)


def runs(tokenizer: Any, ids: list[int], marks: list[int]) -> list[str]:
    """The text of each unbroken run of marked tokens."""
    pairs = zip(ids, marks, strict=True)
    return [
        tokenizer.decode([number for number, _ in run])
        for marked, run in itertools.groupby(pairs, key=lambda pair: bool(pair[1]))
        if marked
    ]


def labelled(folder: Path, tokenizer: Any, record: Any) -> list[str]:
    documents = reading_of(folder, tokenizer, record).documents
    return [
        text
        for each in documents
        if each.labels is not None
        for text in runs(tokenizer, each.ids.tolist(), each.labels.tolist())
    ]


@pytest.mark.parametrize(
    ("name", "conversation"),
    [
        *itertools.product(
            ["qwen3", "llama3", "gemma3", "phi3", "lfm2_v2"], ["one turn", "two turns", "instructions"]
        ),
        ("qwen3", "a call"),
        ("lfm2_v2", "a call"),
    ],
)
def test_what_bears_loss_is_what_trl_s_version_for_training_marks(
    name: str, conversation: str, tmp_path: Path
) -> None:
    record = CONVERSATIONS[conversation]
    marking = real_tokenizer(f"{name}_training")
    encoded = marking.apply_chat_template(
        record["messages"], tools=record.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    expected = runs(marking, encoded["input_ids"], encoded["assistant_masks"])
    assert labelled(tmp_path, real_tokenizer(name, f"{name}_training"), record) == expected
    assert len(expected) == sum(message["role"] == "assistant" for message in record["messages"])


R1 = ("<｜User｜>hi<｜Assistant｜>", "<｜end▁of▁sentence｜>")
GPT_OSS = "<|start|>user<|message|>hi<|end|><|start|>assistant"
WRITTEN = {
    # By template and what is asked: how each document ends, labels in brackets.
    ("llama3_1", "two turns"): [
        "<|start_header_id|>assistant<|end_header_id|>\n\n[yo<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\nand?"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[so it is<|eot_id|>]"
    ],
    ("llama3_1", "a call"): [
        '[{"name": "add", "parameters": {"a": 1}}<|eot_id|>]<|start_header_id|>ipython<|end_header_id|>\n\n"two"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n[so it is<|eot_id|>]"
    ],
    ("qwen2_5", "a call"): [
        '[<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n]<|im_start|>user\n<tool_response>\n'
        "two\n</tool_response><|im_end|>\n<|im_start|>assistant\n[so it is<|im_end|>\n]"
    ],
    ("deepseek_r1_distill", "two turns"): [
        f"{R1[0]}[yo{R1[1]}]<｜User｜>and?<｜Assistant｜>[so it is{R1[1]}]"
    ],
    ("deepseek_r1_distill", "thoughts"): [
        f"{R1[0]}<think>\n[hmm\n</think>\n\nyo{R1[1]}]",
        f"{R1[0]}yo{R1[1]}<｜User｜>and?<｜Assistant｜><think>\n[well\n</think>\n\nso it is{R1[1]}]",
    ],
    ("qwen3", "thoughts"): [
        "<|im_start|>assistant\n[<think>\nhmm\n</think>\n\nyo<|im_end|>\n]",
        "<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n"
        "<|im_start|>assistant\n[<think>\nwell\n</think>\n\nso it is<|im_end|>\n]",
    ],
    ("gptoss", "two turns"): [
        f"{GPT_OSS}[<|channel|>final<|message|>yo<|return|>]",
        f"{GPT_OSS}<|channel|>final<|message|>yo<|end|><|start|>user<|message|>and?<|end|><|start|>assistant"
        "[<|channel|>final<|message|>so it is<|return|>]",
    ],
    ("gptoss", "thoughts"): [
        f"{GPT_OSS}[<|channel|>analysis<|message|>hmm<|end|><|start|>assistant<|channel|>final<|message|>yo<|return|>]",
        "<|start|>assistant[<|channel|>analysis<|message|>well<|end|>"
        "<|start|>assistant<|channel|>final<|message|>so it is<|return|>]",
    ],
    ("gptoss", "a call"): [
        f'{GPT_OSS}[ to=functions.add<|channel|>commentary json<|message|>{{"a": 1}}<|call|>]<|start|>functions.add'
        ' to=assistant<|channel|>commentary<|message|>"two"<|end|><|start|>assistant'
        "[<|channel|>final<|message|>so it is<|return|>]"
    ],
}
THOUGHTS = [
    user("hi"),
    assistant("yo", reasoning_content="hmm"),
    user("and?"),
    assistant("so it is", reasoning_content="well"),
]


@pytest.mark.parametrize(("name", "asked"), WRITTEN)
def test_a_published_template_teaches_what_its_model_writes(name: str, asked: str, tmp_path: Path) -> None:
    record = {"messages": THOUGHTS} if asked == "thoughts" else CONVERSATIONS[asked]
    found, expected = shown(tmp_path, real_tokenizer(name), record), WRITTEN[name, asked]
    assert len(found) == len(expected)
    for text, end in zip(found, expected, strict=True):
        assert text.endswith(end)


@pytest.mark.parametrize(
    ("name", "count"),
    [("deepseek_r1_distill", "turns_without_their_calls"), ("llama3", "turns_without_their_calls")],
)
def test_a_call_that_a_published_template_does_not_write_bears_no_loss_and_is_counted(
    name: str, count: str, tmp_path: Path
) -> None:
    tokenizer = real_tokenizer(name)
    assert labelled(tmp_path, tokenizer, WITH_CALL)[1:] == []
    assert counts_of(tmp_path, tokenizer, WITH_CALL)[count] == 1
