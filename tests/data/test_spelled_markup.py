"""Tags and control tokens that somebody's words spell stay words, and those that the data means stay what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data.chat_templates import (
    CHATML,
    DEEPSEEK_V3_1,
    PHI_3,
    QWEN_3,
    QWQ,
    R1_DISTILL,
    SPECIAL,
    WORDS,
    tokenizer_for,
)
from test_chats import assistant, counts_of, reading_of, shown, user
from test_real_templates import real_tokenizer

from potstill.data import readers

NO_THOUGHT = "<think>\n\n</think>\n\n"
MENTIONS = [
    "Write `</think>` behind it.",
    "First `<think>`, then `</think>`.",
    "A thought ends with </think> and goes on.",
    "Such as\n```\n<think>\nhm\n</think>\n```\nin code.",
    "```\n</think>\n\n```\nis all.",
    "</think>",
]


def ids_of(folder: Path, tokenizer: Any, record: Any) -> list[int]:
    """Those that bear loss, of the last document."""
    *_, document = reading_of(folder, tokenizer, record).documents
    assert document.labels is not None
    return [int(each) for each in document.ids[document.labels]]


@pytest.mark.parametrize("words", MENTIONS)
def test_an_answer_that_talks_of_tags_is_learnt_as_it_is(words: str, tmp_path: Path) -> None:
    for tokenizer in (tokenizer_for(QWEN_3), tokenizer_for(QWEN_3, words=[]), real_tokenizer("qwen3")):
        (text,) = shown(tmp_path, tokenizer, [user("?"), assistant(words)])
        assert text.endswith(f"assistant\n[{NO_THOUGHT}{words}<|im_end|>\n]")
        tags = [tokenizer.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>")]
        found = ids_of(tmp_path, tokenizer, [user("?"), assistant(words)])
        assert [found.count(tag) for tag in tags if tag is not None] in ([1, 1], [])
    for tokenizer in (tokenizer_for(R1_DISTILL), tokenizer_for(QWQ), real_tokenizer("deepseek_r1_distill")):
        (text,) = shown(tmp_path, tokenizer, [user("?"), assistant(words)])
        assert f"[{words}<" in text
    (text,) = shown(tmp_path, tokenizer_for(DEEPSEEK_V3_1), [user("?"), assistant(words)])
    assert text.endswith(f"<|Assistant|></think>[{words}<|end|>]")


@pytest.mark.parametrize("words", MENTIONS)
@pytest.mark.parametrize(
    ("content", "reasoning"),
    [("<think>\nhm\n</think>\n\n", None), ("hm\n</think>\n\n", None), ("hm</think>\n\n", None), ("", "hm")],
)
def test_a_thought_before_an_answer_that_talks_of_tags(
    content: str, reasoning: str | None, words: str, tmp_path: Path
) -> None:
    chat = [user("?"), assistant(content + words, **({"reasoning_content": reasoning} if reasoning else {}))]
    for tokenizer in (tokenizer_for(QWEN_3), real_tokenizer("qwen3")):
        (text,) = shown(tmp_path, tokenizer, chat)
        assert text.endswith(f"assistant\n[<think>\nhm\n</think>\n\n{words}<|im_end|>\n]")
    for tokenizer in (tokenizer_for(R1_DISTILL), real_tokenizer("deepseek_r1_distill")):
        (text,) = shown(tmp_path, tokenizer, chat)
        thought = content.removeprefix("<think>\n") or "hm\n</think>\n\n"
        assert f"<think>\n[{thought}{words}<" in text


def test_a_thought_that_talks_of_tags(tmp_path: Path) -> None:
    said = "<think>\nI say `</think>` and <think>.\n</think>\n\nyo"
    (text,) = shown(tmp_path, tokenizer_for(QWEN_3), [user("?"), assistant(said)])
    assert text.endswith(f"[{said}<|im_end|>\n]")
    apart = assistant("yo", reasoning_content="I say </think> and <think>.")
    (text,) = shown(tmp_path, tokenizer_for(QWEN_3), [user("?"), apart])
    assert text.endswith("[<think>\nI say </think> and <think>.\n</think>\n\nyo<|im_end|>\n]")
    tokenizer = tokenizer_for(QWEN_3)
    assert (
        ids_of(tmp_path, tokenizer, [user("?"), apart]).count(tokenizer.convert_tokens_to_ids("</think>"))
        == 1
    )


@pytest.mark.parametrize("tag", ["</seed:think>", "</thought>", "</reasoning>", "[/THINK]"])
def test_tags_of_thoughts_by_another_name(tag: str, tmp_path: Path) -> None:
    opening = tag.replace("/", "")
    tokenizer = tokenizer_for(QWEN_3.replace("</think>", tag).replace("<think>", opening))
    words = f"Write `{tag}` behind it."
    (text,) = shown(tmp_path, tokenizer, [user("?"), assistant(words)])
    assert text.endswith(f"[{opening}\n\n{tag}\n\n{words}<|im_end|>\n]")
    (text,) = shown(tmp_path, tokenizer, [user("?"), assistant(f"{opening}hm{tag}{words}")])
    assert text.endswith(f"[{opening}\nhm\n{tag}\n\n{words}<|im_end|>\n]")


@pytest.mark.parametrize(
    "written",
    [
        "m.content.split('###')[-1]",
        "m.content[:5]",
        "m.content.split('###') | reverse | join('###')",
    ],
)
@pytest.mark.parametrize("words", ["What was said before ### is not written", "one ### two"])
def test_an_answer_of_which_words_are_lost_or_moved_bears_no_loss_and_is_counted(
    written: str, words: str, tmp_path: Path
) -> None:
    tokenizer = tokenizer_for(CHATML.replace("m.content", f"({written})"))
    chat = [user("a"), assistant(words), user("b"), assistant("yo")]
    (text,) = shown(tmp_path, tokenizer, chat)
    assert text.count("[") == 1 and text.endswith("[yo<|im_end|>\n]")
    counts = counts_of(tmp_path, tokenizer, chat)
    assert counts["turns_without_their_answer"] == 1
    assert any(
        "1 turns bear no loss: the chat template does not write all" in each
        for each in readers.chat.notes(counts)
    )


@pytest.mark.parametrize(
    "written", ["m.content | upper", "m.content | e", "m.content | tojson", "m.content | trim"]
)
@pytest.mark.parametrize("words", ["yo", "  it's so, and\n\n<so> it is \n"])
def test_an_answer_that_is_written_in_another_form_is_learnt(
    written: str, words: str, tmp_path: Path
) -> None:
    tokenizer = tokenizer_for(CHATML.replace("m.content", f"({written})"))
    counts = counts_of(tmp_path, tokenizer, [user("hi"), assistant(words)])
    assert "turns_without_their_answer" not in counts


# ---- control tokens that are not flagged as special ------------------------------------------------------


def tokens_of(folder: Path, tokenizer: Any, record: Any) -> list[str]:
    """Added tokens of the last document."""
    *_, document = reading_of(folder, tokenizer, record).documents
    added = tokenizer.get_added_vocab().values()
    return [str(tokenizer.decode([each])) for each in document.ids.tolist() if each in added]


R1_ROLES = "<｜User｜> and <｜Assistant｜>"
WITHOUT_A_FLAG = {
    # What words spell, and the added tokens of the document: a question and its answer.
    "R1": (
        tokenizer_for(R1_DISTILL),
        "<|User|> and <|Assistant|> and </think>",
        ["<|begin|>", "<|User|>", "<|Assistant|>", "<|end|>"],
    ),
    "published R1": (
        real_tokenizer("deepseek_r1_distill"),
        f"{R1_ROLES} and <think>",
        ["<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
    ),
    "Qwen 3": (
        tokenizer_for(QWEN_3),
        "by <tool_call> and </tool_call> or <think>",
        ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>", "<|im_end|>"],
    ),
    "put together from parts": (
        tokenizer_for(PHI_3, special=["<s>"], words=SPECIAL[PHI_3]),
        "by <|end|> or <|user|> or <|assistant|>",
        ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
    ),
}


@pytest.mark.parametrize("name", WITHOUT_A_FLAG)
def test_control_tokens_without_a_flag_stay_words(name: str, tmp_path: Path) -> None:
    tokenizer, forged, written = WITHOUT_A_FLAG[name]
    chat = [user(forged), assistant(f"yo {forged}")]
    assert tokens_of(tmp_path, tokenizer, chat) == written
    assert shown(tmp_path, tokenizer, chat)[0].count(forged) == 2
    assert counts_of(tmp_path, tokenizer, chat)["spell_control_tokens"] == 1
    plain = [user("hi"), assistant("yo")]
    assert "spell_control_tokens" not in counts_of(tmp_path, tokenizer, plain)
    tools = [{"type": "function", "function": {"name": "add", "description": forged}}]
    with_tools = {"messages": plain, "tools": tools}
    assert counts_of(tmp_path, tokenizer, with_tools)["spell_control_tokens"] == 1


def test_words_that_are_added_tokens_stay_tokens(tmp_path: Path) -> None:
    """Of what the template writes only what looks like a control token is one."""
    tokenizer = tokenizer_for(CHATML, words=["assistant", "\n", "```", "<unused>"])
    chat = [user("assistant\n```\n<unused>"), assistant("yo")]
    assert "spell_control_tokens" not in counts_of(tmp_path, tokenizer, chat)
    assert tokens_of(tmp_path, tokenizer, chat).count("<unused>") == 1


CALLS = [
    '<tool_call>\n{"name": "add", "arguments": {"a": "%s"}}\n</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"a": "%s"}}</tool_call>',
    "<tool_call>\n<function=add>\n<parameter=a>\n%s\n</parameter>\n</function>\n</tool_call>",
    "<tool_call>\n{'name': 'add', 'arguments': {'a': '%s'}}\n</tool_call>",
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("before", ["", "<think>\nhm\n</think>\n\n", "I add, by <tool_call>:\n"])
def test_calls_in_an_answer_s_text_are_markup(call: str, before: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(QWEN_3)
    both = call % "x" + "\n" + call % ("a <tool_call>" if '"name"' in call else "y")
    document = tokens_of(tmp_path, tokenizer, [user("?"), assistant(before + both)])
    assert document[-6:] == ["</think>", *["<tool_call>", "</tool_call>"] * 2, "<|im_end|>"]


@pytest.mark.parametrize(
    "words",
    [
        "<tool_call> opens a call, and </tool_call> closes it",
        "Such as `<tool_call>`.\n</tool_call>",
        '```\n<tool_call>\n{"name": "add"}\n</tool_call>\n```',
        '<tool_call>\n{"name": "add"} is not closed by </tool_call>',
    ],
)
def test_an_answer_that_talks_of_calls(words: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(QWEN_3)
    assert tokens_of(tmp_path, tokenizer, [user("?"), assistant(words)])[-2:] == ["</think>", "<|im_end|>"]
    (text,) = shown(tmp_path, tokenizer, [user("?"), assistant(words)])
    assert text.endswith(f"[{NO_THOUGHT}{words}<|im_end|>\n]")


def test_results_in_a_user_s_message_are_no_question(tmp_path: Path) -> None:
    """Qwen's template looks for their tags, and keeps the thought before them."""
    words = [*WORDS, "<tool_response>", "</tool_response>"]
    tokenizer = real_tokenizer("qwen3")
    tokenizer = tokenizer_for(tokenizer.chat_template, special=["<|im_start|>", "<|im_end|>"], words=words)
    calling = assistant("<think>\nhm\n</think>\n\n" + CALLS[0] % "x")
    result = user("<tool_response>\na </tool_response> b\n</tool_response>")
    (text,) = shown(tmp_path, tokenizer, [user("?"), calling, result, assistant("yo")])
    assert text.count("[<think>") == 2
    found = tokens_of(tmp_path, tokenizer, [user("?"), calling, result, assistant("yo")])
    assert found.count("</tool_response>") == 1


def test_deep_arguments_that_spell_markup(tmp_path: Path) -> None:
    arguments: Any = "<tool_call>"
    for _ in range(90):
        arguments = {"a": arguments}
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    counts = counts_of(tmp_path, tokenizer_for(QWEN_3), [user("?"), assistant("", tool_calls=[call])])
    assert counts["spell_control_tokens"] == 1
