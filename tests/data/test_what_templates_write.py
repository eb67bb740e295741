"""What a chat template writes nothing of: mended where that is possible, and counted where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model
from data.chat_templates import tokenizer_for
from test_chats import assistant, reading_of, shown, user
from test_real_templates import real_tokenizer

from potstill.build.corpus import make_corpus
from potstill.build.resolve import resolve
from potstill.data import readers
from potstill.data.chats.turns import unused
from potstill.errors import UserError
from potstill.recipe.load import load

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
FIVE_ROLES = """
{%- for m in messages %}
{%- if m.role in ['system', 'user', 'assistant', 'tool'] %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{- '<call>' + call.function.name + (call.function.arguments | tojson) }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""Writes nothing of other roles, without a word, as those of Qwen and QwQ do."""
NO_TOOLS = FIVE_ROLES.replace(", 'tool'", "")
NO_SYSTEM = FIVE_ROLES.replace("'system', ", "")
PARTS = """
{%- for m in messages %}
{{- m.role | capitalize + ': ' }}
{%- for part in m.content %}{%- if part.type == 'text' %}{{- part.text }}{%- endif %}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant: ' }}{%- endif %}
"""
"""As those of Idefics 3 and SmolVLM: content is a list of parts."""
REWRITING_BLOCKS = """
{%- set last = namespace(at=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.at = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if m.reasoning_content and loop.last %}
{%- generation %}{{- '<|im_start|>thought\\n' + m.reasoning_content + '<|im_end|>' }}{%- endgeneration %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""A block a thought, which earlier turns lose: in a text of two turns the first has a block less than by itself."""


def counts_of(folder: Path, tokenizer: Any, *records: Any) -> dict[str, Any]:
    reading = reading_of(folder, tokenizer, *records)
    for _ in reading.documents:
        pass
    return reading.counts


@pytest.mark.parametrize(
    ("role", "template", "written"),
    [
        ("function", FIVE_ROLES, "tool"),
        ("ipython", FIVE_ROLES, "tool"),
        ("environment", FIVE_ROLES, "tool"),
        ("tool", FIVE_ROLES.replace("'tool'", "'ipython'"), "ipython"),
    ],
)
def test_a_result_gets_the_role_that_the_template_writes(
    role: str, template: str, written: str, tmp_path: Path
) -> None:
    chat = [
        user("1?"),
        assistant("", tool_calls=[CALL]),
        {"role": role, "content": "RES"},
        assistant("it is RES"),
    ]
    tokenizer = tokenizer_for(template)
    (text,) = shown(tmp_path, tokenizer, chat)
    assert f"<|im_start|>{written}\nRES<|im_end|>\n<|im_start|>assistant\n[it is RES<|im_end|>\n]" in text
    assert counts_of(tmp_path, tokenizer, chat)["roles"] == {f"{role} as {written}": 1}


def test_the_developers_words_are_the_systems_where_the_template_knows_no_developer(tmp_path: Path) -> None:
    chat = [{"role": "developer", "content": "In French"}, user("hi"), assistant("salut")]
    (text,) = shown(tmp_path, tokenizer_for(FIVE_ROLES), chat)
    assert text.startswith("<|im_start|>system\nIn French<|im_end|>\n<|im_start|>user\nhi")


def test_an_answer_to_what_is_not_written_bears_no_loss_and_is_counted(tmp_path: Path) -> None:
    chat = [
        user("1?"),
        assistant("I add"),
        {"role": "tool", "content": "RES"},
        assistant("it is RES"),
        user("2?"),
        assistant("4"),
    ]
    tokenizer = tokenizer_for(NO_TOOLS)
    (text,) = shown(tmp_path, tokenizer, chat)
    assert "[I add<|im_end|>\n]" in text and "[4<|im_end|>\n]" in text and "[it is RES" not in text
    counts = counts_of(tmp_path, tokenizer, chat)
    assert counts["turns_without_their_question"] == 1
    assert any(
        "1 turns bear no loss: the chat template writes nothing of" in note
        for note in readers.chat.notes(counts)
    )


def test_instructions_that_are_not_written_are_counted_and_the_answers_are_learnt(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be kind"}, user("hi"), assistant("yo")]
    tokenizer = tokenizer_for(NO_SYSTEM)
    (text,) = shown(tmp_path, tokenizer, chat)
    assert "Be kind" not in text and "[yo<|im_end|>\n]" in text
    assert counts_of(tmp_path, tokenizer, chat)["without_their_instructions"] == 1


ADDED = "{{- '<call>' + call.function.name + (call.function.arguments | tojson) }}"
FIRST_ALONE = FIVE_ROLES.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
NAMES_ALONE = FIVE_ROLES.replace(" + (call.function.arguments | tojson)", "")
ARGUMENTS_ALONE = FIVE_ROLES.replace("call.function.name + ", "")
ONE_ARGUMENT = FIVE_ROLES.replace(
    "(call.function.arguments | tojson)", "(call.function.arguments.a | tojson)"
)
NO_CALLS = FIVE_ROLES.replace(ADDED, "")
assert len({FIRST_ALONE, NAMES_ALONE, ARGUMENTS_ALONE, ONE_ARGUMENT, NO_CALLS, FIVE_ROLES}) == 6


def called(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("template", "content", "calls"),
    [
        (NO_CALLS, "I will get_weather for Rome.", [called("get_weather", city="Rome")]),
        (NO_CALLS, "", [called("end", a=1)]),
        (NO_CALLS, "", [called("im_end")]),
        (NO_CALLS, "add 1", [called("add", a=1)]),
        (FIRST_ALONE, "", [called("add", a=1), called("add", a=2)]),
        (FIRST_ALONE, "", [called("add", a=1), called("add", a=1)]),
        (FIRST_ALONE, "", [called("add", a=1), called("call", a=1)]),
        (NAMES_ALONE, "", [called("add", a=1)]),
        (ARGUMENTS_ALONE, "", [called("call", a=1)]),
        (ONE_ARGUMENT, "", [called("add", a=1, b=1)]),
    ],
)
def test_a_call_that_is_not_written_whole_bears_no_loss_and_is_counted(
    template: str, content: str, calls: list[Any], tmp_path: Path
) -> None:
    result = {"role": "tool", "content": "RES"}
    chat = [user("?"), assistant(content, tool_calls=calls), result, assistant("it is RES")]
    tokenizer = tokenizer_for(template)
    (text,) = shown(tmp_path, tokenizer, chat)
    assert text.count("[") == 1 and text.endswith("[it is RES<|im_end|>\n]")
    assert counts_of(tmp_path, tokenizer, chat)["turns_without_their_calls"] == 1


@pytest.mark.parametrize(
    "written",
    [
        "call.function.name + (call.function.arguments | tojson)",
        "(call.function.name | upper) + (call.function.arguments | tojson | upper)",
        "call.function.name + (call.function.arguments | tojson(ensure_ascii=true))",
        "call.function.name + (call.function.arguments.a | int | string) + (call.function.arguments.b | string)",
        "call.function.name + (call.function.arguments.values() | join(' '))",
        "'add' + '1' + (call.function.arguments | tojson) if call.function.name in ['add', 'end'] else"
        " raise_exception('no such tool')",
    ],
)
def test_calls_in_another_form_are_written(written: str, tmp_path: Path) -> None:
    template = FIVE_ROLES.replace("call.function.name + (call.function.arguments | tojson)", written)
    calls = [called("add", a=1, b="x"), called("add", a=2, b="é"), called("end", a=1, b={"c": [1]})]
    chat = [user("?"), assistant("so", tool_calls=calls)]
    if "raise" in written:
        chat = [user("?"), assistant("so", tool_calls=calls[:2])]
    counts = counts_of(tmp_path, tokenizer_for(template), chat)
    assert "turns_without_their_calls" not in counts
    bare = [user("?"), assistant("so", tool_calls=[called("add")])]
    if ".a" not in written:
        assert "turns_without_their_calls" not in counts_of(tmp_path, tokenizer_for(template), bare)


@pytest.mark.parametrize(
    "template",
    [
        FIVE_ROLES.replace("m.content }}", "(m.content | upper) }}"),
        FIVE_ROLES.replace("m.content }}", "(m.content | tojson) }}"),
        FIVE_ROLES.replace("m.content }}", "(m.content | replace(' ', '_')) }}"),
    ],
)
def test_words_that_are_written_in_another_form_are_written(template: str, tmp_path: Path) -> None:
    chat = [
        user('what "is" it'),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": 'R "E" S'},
        assistant("yo"),
    ]
    counts = counts_of(tmp_path, tokenizer_for(template), chat)
    assert not {"turns_without_their_question", "roles", "without_their_instructions"} & counts.keys()


def test_a_template_that_wants_parts_gets_parts(tmp_path: Path) -> None:
    chat = [user("one"), assistant("two"), user([{"type": "text", "text": "three"}]), assistant("four")]
    (text,) = shown(tmp_path, tokenizer_for(PARTS), chat)
    assert (
        text
        == "User: one<|im_end|>\nAssistant:[ two<|im_end|>\n]User: three<|im_end|>\nAssistant:[ four<|im_end|>\n]".replace(
            "Assistant:[ ", "Assistant: ["
        )
    )


def test_a_turn_has_its_own_blocks_alone(tmp_path: Path) -> None:
    """Also where the template writes earlier turns otherwise, with fewer blocks."""
    tokenizer = tokenizer_for(REWRITING_BLOCKS)
    first = assistant("A1", reasoning_content="R1", weight=0)
    chat = [user("Q1"), first, user("Q2"), assistant("A2", reasoning_content="R2")]
    (text,) = shown(tmp_path, tokenizer, chat)
    assert "A1" in text and "R1" not in text
    bearing = [part.partition("]")[0] for part in text.split("[")[1:]]
    # The generation prompt begins with the same token as the thought: at inference it is there already.
    assert bearing == ["thought\nR2<|im_end|>", "A2<|im_end|>"]
    trained = [user("Q1"), assistant("A1", reasoning_content="R1"), *chat[2:]]
    texts = shown(tmp_path, tokenizer, trained)
    assert [text.count("[") for text in texts] == [2, 2]
    assert "[A1<|im_end|>]" in texts[0] and "A1" in texts[1] and "[A1" not in texts[1]


# ---- what data sets write -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["parameters", "input", "arguments"])
def test_the_arguments_of_a_call_have_three_names(key: str, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", key: {"a": 7}}}
    (text,) = shown(tmp_path, tokenizer_for(FIVE_ROLES), [user("?"), assistant("", tool_calls=[call])])
    assert '<call>add{"a": 7}' in text


def test_functions_are_tools(tmp_path: Path) -> None:
    template = "{%- for tool in tools or [] %}{{- '<tool>' + tool.function.name }}{%- endfor %}" + FIVE_ROLES
    chat = [
        user("?"),
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}},
    ]
    (text,) = shown(tmp_path, tokenizer_for(template), {"messages": chat, "functions": [{"name": "add"}]})
    assert text.startswith("<tool>add") and "[<call>add{}" in text


WITH_TOOLS = "{%- for tool in tools or [] %}{{- '<tool>' + (tool | tojson) }}{%- endfor %}" + FIVE_ROLES


@pytest.mark.parametrize(
    ("tokenizer", "is_written"),
    [
        (tokenizer_for(FIVE_ROLES), False),
        (real_tokenizer("gemma3"), False),
        (real_tokenizer("deepseek_r1_distill"), False),
        (real_tokenizer("qwen3"), True),
        (real_tokenizer("llama3_1"), True),
        (tokenizer_for(WITH_TOOLS), True),
    ],
)
def test_tools_that_are_not_written_are_counted(tokenizer: Any, is_written: bool, tmp_path: Path) -> None:
    chat = [user("the user"), assistant("yo"), user("function"), assistant("zork")]
    for tool in ({"name": "zork", "parameters": {}}, {"name": "user"}):
        counts = counts_of(tmp_path, tokenizer, {"messages": chat, "tools": [tool]}, chat)
        assert counts.get("without_their_tools", 0) == (0 if is_written else 1)
        noted = [each for each in readers.chat.notes(counts) if each.startswith("the tools of 1 of 2")]
        assert len(noted) == (0 if is_written else 1) and all("chat.jsonl:1" in each for each in noted)


def test_tools_are_counted_by_the_template_for_tools(tmp_path: Path) -> None:
    tokenizer, record = (
        tokenizer_for(FIVE_ROLES),
        {"messages": [user("a"), assistant("b")], "tools": [{"name": "z"}]},
    )
    tokenizer.chat_template = {
        "default": FIVE_ROLES,
        "tool_use": FIVE_ROLES + " ",
    }
    assert counts_of(tmp_path, tokenizer, record)["without_their_tools"] == 1
    tokenizer.chat_template = {"default": FIVE_ROLES, "tool_use": WITH_TOOLS}
    assert "without_their_tools" not in counts_of(tmp_path, tokenizer, record)


def test_a_prompt_that_is_json_in_a_string_is_its_messages(tmp_path: Path) -> None:
    record = {
        "prompt": '[{"role": "system", "content": "Be kind"}, {"role": "user", "content": "hi"}]',
        "completion": "yo",
    }
    (text,) = shown(tmp_path, tokenizer_for(FIVE_ROLES), record)
    assert (
        text
        == "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[yo<|im_end|>\n]"
    )
    (text,) = shown(tmp_path, tokenizer_for(FIVE_ROLES), {"prompt": "[1, 2]", "completion": "yo"})
    assert "user\n[1, 2]<|im_end|>" in text


def test_an_answer_of_null_bears_no_loss_and_is_counted(tmp_path: Path) -> None:
    chat = [user("hi"), assistant(None), user("and?"), assistant("yo")]
    (text,) = shown(tmp_path, tokenizer_for(FIVE_ROLES), chat)
    assert text.count("[") == 1 and "[yo<|im_end|>\n]" in text
    assert counts_of(tmp_path, tokenizer_for(FIVE_ROLES), chat)["unanswered"] == 1
    called = [user("hi"), assistant(None, tool_calls=[CALL])]
    assert "unanswered" not in counts_of(tmp_path, tokenizer_for(FIVE_ROLES), called)


def test_there_is_a_mark_for_every_text(tmp_path: Path) -> None:
    nonsense = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    assert len(unused(nonsense, 2)) == 2 and not {*unused(nonsense, 2)} & {*nonsense}
    chat = [user(f"{nonsense} <|im_end|>"), assistant("yo")]
    (text,) = shown(tmp_path, tokenizer_for(FIVE_ROLES), chat)
    assert text.count("[") == 1 and "[yo<|im_end|>\n]" in text


def test_a_prompt_that_writes_what_the_answer_lacks_is_counted(tmp_path: Path) -> None:
    opened = FIVE_ROLES.replace(
        "'<|im_start|>assistant\\n' }}{%- endif %}", "'<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    )
    assert opened != FIVE_ROLES
    counts = counts_of(
        tmp_path, tokenizer_for(opened), [user("hi"), assistant("yo"), user("and?"), assistant("so")]
    )
    assert counts["turns_prompted_otherwise"] == 2
    assert any(
        note.startswith("in 2 turns the generation prompt writes what is missing")
        for note in readers.chat.notes(counts)
    )
    assert "turns_prompted_otherwise" not in counts_of(
        tmp_path, tokenizer_for(FIVE_ROLES), [user("hi"), assistant("yo")]
    )


def test_a_text_without_end_is_refused(tmp_path: Path) -> None:
    """68 MB of it, within a second and a gibibyte."""
    endless = "{%- for i in range(68) %}{{- 'x' * 1000000 }}{%- endfor %}" + FIVE_ROLES
    with pytest.raises(UserError, match="took more than 1 GiB of memory"):
        shown(tmp_path, tokenizer_for(endless), [user("hi"), assistant("yo")])


# ---- conversations that cannot be learnt from ------------------------------------------------------------

STRICT = FIVE_ROLES.replace(
    "{%- if m.role in",
    "{%- if 'forbidden' in m.content %}{{ raise_exception('no') }}{%- endif %}\n{%- if m.role in",
)


def test_what_a_template_refuses_ends_the_reading_or_is_left_out_and_counted(tmp_path: Path) -> None:
    tokenizer = tokenizer_for(STRICT)
    chats = [
        [user("hi"), assistant("yo")],
        [user("forbidden"), assistant("no")],
        [user("and?"), assistant("so")],
    ]
    with pytest.raises(UserError, match=r"chat\.jsonl:2: the chat template refuses this conversation"):
        shown(tmp_path, tokenizer, *chats)
    assert len(shown(tmp_path, tokenizer, *chats, skip_refused=True)) == 2
    reading = reading_of(tmp_path, tokenizer, *chats, skip_refused=True)
    assert len([*reading.documents]) == 2
    assert reading.counts["conversations"] == 3 and reading.counts["refused"] == 1
    (note,) = [note for note in readers.chat.notes(reading.counts) if "left out" in note]
    assert note.startswith("1 of 3 conversations are left out") and "chat.jsonl:2" in note
    with pytest.raises(UserError, match="all of 1 conversations are refused"):
        shown(tmp_path, tokenizer, chats[1], skip_refused=True)


def test_a_recipe_leaves_refused_conversations_out(tmp_path: Path, tiny_recipe: Any) -> None:
    tokenizer = tokenizer_for(STRICT)
    folder = make_model(tmp_path / "teacher", with_tokenizer=False, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    chats = [[user(f"{'forbidden' if n % 5 == 0 else 'hi'} {n}"), assistant("yo")] for n in range(60)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    corpus = "{name: chat, path: c.jsonl, tokens_per_row: 64, heldout_rows: 2, skip_refused: %s}"

    def recipe(skip: str) -> Path:
        written: Path = tiny_recipe(corpus=corpus % skip, teacher=f"{{name: torch, model: {folder}}}")
        return written

    found, _ = make_corpus(resolve(load(recipe("true"))))
    assert found.manifest["documents"] == 48 and found.manifest["reading"]["refused"] == 12
    with pytest.raises(UserError, match=r"c\.jsonl:1: the chat template refuses"):
        make_corpus(resolve(load(recipe("false"))))
