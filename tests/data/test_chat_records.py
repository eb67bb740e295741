"""Records of every shape as conversations: nothing that they say is lost or taken for something else without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data.chat_templates import CHATML, LLAMA_3_1, QWEN_3, tokenizer_for
from test_chats import CALL, TWO_TURNS, assistant, counts_of, reading_of, shown, user

from potstill.data import readers
from potstill.data.chats import templates
from potstill.errors import UserError

NOT_LEARNT: dict[str, tuple[Any, str]] = {
    "role": ([user("q"), {"role": "narrator", "content": "n"}], "role 'narrator' is none"),
    "picture": ([{"role": "user", "content": [{"type": "image"}]}], "a part of its content is 'image'"),
    "arguments": ([user("q"), assistant("", tool_calls=[CALL | {"arguments": "{a"}])], "a string that is no"),
    "calls": ([user("q"), assistant("", tool_calls="none")], "tool_calls is"),
    "no name": ([user("q"), assistant("", tool_calls=[{"arguments": {}}])], "a call of tool_calls without"),
    "tools": ({"messages": TWO_TURNS, "tools": "add"}, "tools is"),
    "half a character": ([user("q"), assistant("\ud800")], "half of a surrogate pair"),
    "no content": ([user("q"), {"role": "assistant"}], "a message must have a `role` and a `content`"),
    "weight": ([user("q"), assistant("a", weight=0.5)], "'weight' is 0.5"),
    "no question": ([assistant("a")], "with nothing to answer"),
    "no messages": ({"messages": []}, "an empty list of messages"),
    "no list": ({"messages": 5}, "is not a list of messages"),
    "no shape": ({"title": "q", "body": "a"}, "no conversation"),
}


@pytest.mark.parametrize("name", NOT_LEARNT)
def test_a_record_that_cannot_be_learnt_from_is_refused_or_skipped(name: str, tmp_path: Path) -> None:
    record, said = NOT_LEARNT[name]
    tokenizer = tokenizer_for(CHATML)
    with pytest.raises(templates.ConversationRefused) as error:
        shown(tmp_path, tokenizer, record, TWO_TURNS)
    assert f"{tmp_path / 'chat.jsonl'}:1: " in str(error.value) and said in str(error.value)
    assert str(error.value).endswith(f", or {templates.SKIP}.") and "\n" not in str(error.value)
    reading = reading_of(tmp_path, tokenizer, record, TWO_TURNS, skip_refused=True)
    assert len(list(reading.documents)) == 1
    assert reading.counts["refused"] == 1 and said in reading.counts["first"]["refused"]


@pytest.mark.parametrize("key", ["training", "loss_mask", "trainable", "learn", "loss", "weight", "train"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_every_mark_of_a_turn_that_is_not_trained_on_is_read(key: str, value: Any, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(CHATML)
    chat = [TWO_TURNS[0], TWO_TURNS[1] | {key: value}, *TWO_TURNS[2:]]
    (text,) = shown(tmp_path, tokenizer, chat)
    assert "[yo" not in text and "[so it is" in text
    assert shown(tmp_path, tokenizer, [each | {key: 1} for each in TWO_TURNS]) == shown(
        tmp_path, tokenizer, TWO_TURNS
    )


@pytest.mark.parametrize(
    "mark", [{"mask": True}, {"loss_weight": 0}, {"do_train": False}, {"train_detail": [{"train": False}]}]
)
def test_a_mark_that_may_say_so_is_refused(mark: dict[str, Any], tmp_path: Path) -> None:
    tokenizer, (key,) = tokenizer_for(CHATML), mark
    with pytest.raises(
        templates.ConversationRefused, match=rf"jsonl:1: message 1: '{key}' is .* Rename the key"
    ):
        shown(tmp_path, tokenizer, [user("q"), assistant("a", **mark)])
    assert shown(tmp_path, tokenizer, [user("q"), assistant("a", **{key: "words"})])


@pytest.mark.parametrize(
    "mark", [{"label": False}, {"kto_tag": False}, {"weight": 0}, {"train": False}, {"trainable": 0.0}]
)
def test_a_record_that_says_it_is_not_trained_on_is_left_out_and_counted(
    mark: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = tokenizer_for(CHATML)
    record = {"prompt": "q", "completion": "a"}
    for left_out in (record | mark, {"messages": TWO_TURNS} | mark):
        reading = reading_of(tmp_path, tokenizer, record | {"label": True}, left_out)
        assert len(list(reading.documents)) == 1
        assert reading.counts["marked_as_untrained"] == 1
        (note,) = readers.chat.notes(reading.counts)
        assert note.startswith("1 of 2 conversations are left out: their records say") and ":2)" in note
    with pytest.raises(UserError, match="none of 1 conversations has a token of the assistant's to learn"):
        shown(tmp_path, tokenizer, record | mark)
    assert shown(tmp_path, tokenizer, record | {"label": 0, "loss": 0.0})  # a class, and what was measured
    with pytest.raises(templates.ConversationRefused, match="jsonl:1: 'weight' is 2"):
        shown(tmp_path, tokenizer, record | {"weight": 2})


@pytest.mark.parametrize(
    ("record", "advice"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "rename `chosen` to `completion`"),
        (
            {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
            "rename `chosen`",
        ),
        ({"chosen": TWO_TURNS, "rejected": TWO_TURNS}, "set corpus.field: chosen"),
        (
            {"messages": [user("q")], "chosen": assistant("a"), "rejected": assistant("b")},
            "put them at the end",
        ),
        (
            {"instruction": "q", "chosen": "a", "rejected": "b"},
            "rename `chosen` to `output`",
        ),
    ],
)
def test_a_record_of_two_answers_is_refused_with_advice(record: Any, advice: str, tmp_path: Path) -> None:
    with pytest.raises(templates.ConversationRefused, match=f"jsonl:1: two answers, .*{advice}"):
        shown(tmp_path, tokenizer_for(CHATML), record)
    both = {"messages": TWO_TURNS, "chosen": TWO_TURNS, "rejected": TWO_TURNS}
    assert shown(tmp_path, tokenizer_for(CHATML), both)
    assert shown(tmp_path, tokenizer_for(CHATML), both, field="chosen")


PAIR = [["Q1", "A1"]]
ALPACA = {"instruction": "Q2", "output": "A2"}
FOUR = [user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]


@pytest.mark.parametrize(
    "history",
    [
        PAIR,
        json.dumps(PAIR),
        FOUR[:2],
        json.dumps(FOUR[:2]),
        [{"from": "human", "value": "Q1"}, {"from": "gpt", "value": "A1"}],
    ],
)
def test_a_history_is_the_same_however_the_data_spells_it(history: Any, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(CHATML)
    assert shown(tmp_path, tokenizer, ALPACA | {"history": history}) == shown(tmp_path, tokenizer, FOUR)
    for none in (None, [], "", "[]"):
        assert shown(tmp_path, tokenizer, ALPACA | {"history": none}) == shown(tmp_path, tokenizer, FOUR[2:])


@pytest.mark.parametrize(
    "history",
    [
        "Q1 A1",
        [["Q1"]],
        [["Q1", "A1", "B1"]],
        [[None, "A1"]],
        [["Q1", 5]],
        ["Q1", "A1"],
        {"Q1": "A1"},
        5,
        [{}],
    ],
)
def test_a_history_of_anything_else_is_refused(history: Any, tmp_path: Path) -> None:
    with pytest.raises(
        templates.ConversationRefused, match=r"jsonl:1: element 0 of 'history' is .*no pair of"
    ):
        shown(tmp_path, tokenizer_for(CHATML), ALPACA | {"history": history})


def test_an_answer_of_null_in_a_history_bears_no_loss(tmp_path: Path) -> None:
    counts = counts_of(tmp_path, tokenizer_for(CHATML), ALPACA | {"history": [["Q1", None]]})
    assert counts["unanswered"] == 1


@pytest.mark.parametrize(
    "record",
    [
        {"question": "Q2", "answer": "A2"},
        {"problem": "Q2", "solution": "A2", "answer": "final"},
        {"query": "Q2", "response": "A2"},
        {"input": "Q2", "output": "A2"},
        {"id": 3, "question": "Q2", "answer": "A2", "choices": []},
    ],
)
def test_a_question_and_its_answer_are_a_conversation(record: Any, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(CHATML)
    assert shown(tmp_path, tokenizer, record) == shown(tmp_path, tokenizer, [user("Q2"), assistant("A2")])
    about = [user("Q2\n\nwhat it is about"), assistant("A2")]
    more = record | {"context": "what it is about"}
    assert shown(tmp_path, tokenizer, more) == shown(tmp_path, tokenizer, about)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "Q", "choices": ["A", "B"], "answer": 1}, "with 'choices'"),
        ({"question": "Q", "answer": 1}, "both strings"),
        ({"question": {"text": "Q"}, "answer": "A"}, "no conversation"),
        ({"question": "Q", "chosen": "A", "rejected": "B"}, "two answers"),
        ({"question": "Q"}, "no conversation"),
    ],
)
def test_a_question_that_is_not_one_with_an_answer_is_refused(record: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(templates.ConversationRefused, match=said):
        shown(tmp_path, tokenizer_for(CHATML), record)


@pytest.mark.parametrize("key", ["input", "context"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1, 2, 3], "[1, 2, 3]"),
        ({"a": "é"}, '{"a": "é"}'),
        (5, "5"),
        (["one", "two"], "one\n\ntwo"),
        ([{"type": "text", "text": "one"}, {"type": "text", "text": " two"}], "one two"),
    ],
)
def test_what_an_instruction_is_about_may_be_data(key: str, value: Any, said: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(CHATML)
    chat = [user(f"Q2\n\n{said}"), assistant("A2")]
    assert shown(tmp_path, tokenizer, ALPACA | {key: value}) == shown(tmp_path, tokenizer, chat)
    for none in (None, "", [], {}):
        assert shown(tmp_path, tokenizer, ALPACA | {key: none}) == shown(tmp_path, tokenizer, FOUR[2:])


SYSTEM = {"role": "system", "content": "Be kind"}


@pytest.mark.parametrize(
    ("beside", "first", "said"),
    [
        ({"system": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}]}, [], "Be brief"),
        ({"system": "Be brief"}, [SYSTEM], "Be brief\n\nBe kind"),
        ({"system": "Be kind "}, [SYSTEM], "Be kind "),
        ({"system": "Be brief", "system_prompt": "Be kind"}, [], "Be brief\n\nBe kind"),
        ({"system": ""}, [SYSTEM], "Be kind"),
        ({"system": "Be brief"}, [SYSTEM | {"content": ""}], "Be brief"),
    ],
)
def test_no_words_of_a_system_are_lost(beside: Any, first: Any, said: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(CHATML)
    wanted = shown(tmp_path, tokenizer, [SYSTEM | {"content": said}, *TWO_TURNS])
    assert shown(tmp_path, tokenizer, {"messages": first + TWO_TURNS} | beside) == wanted


@pytest.mark.parametrize(
    "more", [{"system": {"a": 1}}, {"system": 5}, {"system": [{"type": "image"}]}, {"instruction": {"a": 1}}]
)
def test_a_text_that_is_none_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(templates.ConversationRefused, match=f"jsonl:1: '{next(iter(more))}'"):
        shown(tmp_path, tokenizer_for(CHATML), ALPACA | more)


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "", "input": "", "output": "x"},
        {"instruction": None, "output": "x"},
        {"prompt": " ", "completion": "x"},
        {"messages": [{"role": "user", "content": None}, assistant("x")]},
        {"messages": [SYSTEM | {"content": ""}, assistant("x")]},
    ],
)
def test_an_answer_to_an_empty_question_bears_no_loss_and_is_counted(record: Any, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(CHATML)
    reading = reading_of(tmp_path, tokenizer, record, [*TWO_TURNS, user(""), assistant("x")])
    (document,) = reading.documents
    assert "x" not in tokenizer.decode(document.ids[document.labels])
    assert reading.counts["turns_of_an_empty_question"] == 2 and reading.counts["without_an_answer"] == 1
    assert any(
        "the question that they answer is empty" in note for note in readers.chat.notes(reading.counts)
    )


def test_an_instruction_or_an_empty_result_is_something_to_answer(tmp_path: Path) -> None:
    called = [user("q"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": ""}, assistant("x")]
    instructed = [SYSTEM, user(""), assistant("x")]
    for chat in (called, instructed):
        assert "turns_of_an_empty_question" not in counts_of(tmp_path, tokenizer_for(CHATML), chat)


def nested(levels: int) -> str:
    return '{"a": ' * levels + "1" + "}" * levels


DEEP = {
    "arguments": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls":'
    ' [{"name": "f", "arguments": @}]}]',
    "arguments in a string": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls":'
    ' [{"name": "f", "arguments": "@"}]}]',
    "another key": '[{"role": "user", "content": "q", "more": @}, {"role": "assistant", "content": "a"}]',
    "content": '[{"role": "user", "content": @}, {"role": "assistant", "content": "a"}]',
    "tools": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": [{"name": "f",'
    ' "parameters": @}]',
    "tools in a string": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": "[@]"',
    "input": '[], "instruction": "q", "output": "a", "input": @',
    "history": '[], "instruction": "q", "output": "a", "history": @',
}


@pytest.mark.parametrize("levels", [120, 900])
@pytest.mark.parametrize("name", DEEP)
def test_what_is_nested_too_deeply_is_one_line(name: str, levels: int, tmp_path: Path) -> None:
    text, inner = DEEP[name], nested(levels)
    inner = json.dumps(inner)[1:-1] if '"@"' in text or '"[@]"' in text else inner
    text = '{"messages": ' + text.replace("@", inner) + "}"
    text = text.replace('"messages": [], ', "")
    file = tmp_path / "chat.jsonl"
    file.write_text(text)
    with pytest.raises(templates.ConversationRefused, match=r"jsonl:1: .*") as error:
        list(readers.chat.read(file, tokenizer_for(QWEN_3)).documents)
    assert "levels" in str(error.value) or "no pair" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_nested_as_data_is_nested_is_read(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": nested(80)}
    assert "1" in shown(tmp_path, tokenizer_for(QWEN_3), [user("q"), assistant("", tool_calls=[call])])[0]
    brackets = "[" * 900 + "]" * 900  # words
    assert shown(tmp_path, tokenizer_for(QWEN_3), [user(brackets), assistant("a")])
    assert shown(tmp_path, tokenizer_for(QWEN_3), {"prompt": brackets, "completion": "a"})


THOUGHT = [user("1+1"), assistant("2", reasoning_content="Add.")]


@pytest.mark.parametrize("key", ["reasoning", "thinking", "thought", "thoughts", "reason"])
@pytest.mark.parametrize("value", ["Add.", [{"type": "text", "text": "Add."}]], ids=["text", "parts"])
def test_a_thought_is_read_under_every_key(key: str, value: Any, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(QWEN_3)
    (wanted,) = shown(tmp_path, tokenizer, THOUGHT)
    assert "[<think>\nAdd.\n</think>" in wanted
    assert shown(tmp_path, tokenizer, [user("1+1"), assistant("2", **{key: value})]) == [wanted]
    assert shown(
        tmp_path, tokenizer, [user("1+1"), assistant("2", reasoning_content="", **{key: value})]
    ) == [wanted]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought", "thoughts"])
def test_a_thought_beside_the_answer_is_read(key: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(QWEN_3)
    wanted = shown(tmp_path, tokenizer, THOUGHT)
    for record in (
        {"prompt": "1+1", "completion": "2"},
        {"prompt": [user("1+1")], "completion": [assistant("2")]},
        {"instruction": "1+1", "output": "2"},
        {"messages": [user("1+1"), assistant("2")]},
    ):
        assert shown(tmp_path, tokenizer, record | {key: "Add."}) == wanted
        plain = shown(tmp_path, tokenizer, record)
        assert shown(tmp_path, tokenizer, record | {key: "off"}) == plain != wanted
    own = {"messages": THOUGHT, key: "another"}
    assert shown(tmp_path, tokenizer, own) == wanted
    earlier = {"instruction": "1+1", "output": "2", "history": PAIR, key: "Add."}
    assert "[<think>\nAdd.\n</think>\n\n2<" in shown(tmp_path, tokenizer, earlier)[-1]
    with pytest.raises(
        templates.ConversationRefused, match=f"'{key}' beside the messages may be .* of 2 answers"
    ):
        shown(tmp_path, tokenizer, {"messages": TWO_TURNS, key: "Add."})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"thought": 5}, "message 1: 'thought' is 5, no text"),
        ({"reasoning": {"a": "b"}}, "message 1: 'reasoning' is "),
        ({"reasoning": "a", "thought": "b"}, "message 1: two thoughts, 'reasoning' and 'thought'"),
    ],
)
def test_a_thought_that_is_none_is_refused(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(templates.ConversationRefused, match=f"jsonl:1: {said}"):
        shown(tmp_path, tokenizer_for(QWEN_3), [user("q"), assistant("a", **more)])


def test_variables_of_a_template_are_refused(tmp_path: Path) -> None:
    record = {"messages": TWO_TURNS, "chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(templates.ConversationRefused, match="jsonl:1: 'chat_template_kwargs' is "):
        shown(tmp_path, tokenizer_for(QWEN_3), record)
    for none in (None, {}, {"enable_thinking": None}):
        assert shown(tmp_path, tokenizer_for(QWEN_3), record | {"chat_template_kwargs": none})


def test_keys_of_messages_that_the_template_does_not_name_are_noted(tmp_path: Path) -> None:
    tokenizer = tokenizer_for(CHATML.replace("m.role", "(m.role + (m.name or ''))"))
    chat = [user("q") | {"name": "Ann", "mood": "glad"}, assistant("a", mood="sad", weight=1)]
    reading = reading_of(tmp_path, tokenizer, chat, with_result({"tool_call_id": "1"}))
    assert len(list(reading.documents)) == 2
    assert reading.counts["message_keys_not_read"] == {"mood": 2}
    assert next(readers.chat.notes(reading.counts)) == "keys of messages that are not read: mood in 2"


def with_result(more: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        user("q"),
        assistant("add", tool_calls=[CALL]),
        {"role": "tool", "content": "2"} | more,
        assistant("2"),
    ]


@pytest.mark.parametrize("template", [QWEN_3, LLAMA_3_1], ids=["Qwen 3", "Llama 3.1"])
def test_arguments_that_were_encoded_again_are_the_same(template: str, tmp_path: Path) -> None:
    def chat(arguments: Any) -> list[dict[str, Any]]:
        return [user("q"), assistant("", tool_calls=[{"name": "f", "arguments": arguments}])]

    tokenizer, arguments = tokenizer_for(template), '{"a": 1}'
    wanted = shown(tmp_path, tokenizer, chat({"a": 1}))
    for _ in range(4):
        assert shown(tmp_path, tokenizer, chat(arguments)) == wanted
        arguments = json.dumps(arguments)
    assert '"5"' in shown(tmp_path, tokenizer_for(LLAMA_3_1), chat(json.dumps("5")))[0]  # no object


def test_content_of_null_is_the_same_in_a_table(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the data extra is not installed; not run")
    tokenizer = tokenizer_for(CHATML)
    silent: list[Any] = [
        {"messages": [*TWO_TURNS, user("more?"), assistant(None)]},
        {"messages": [user("q"), assistant("a"), {"role": "user", "content": None}, assistant("b")]},
        {"messages": with_result({"tool_call_id": "1"})},
    ]
    silent[2]["messages"][1]["content"] = None  # beside a call
    wanted = reading_of(tmp_path, tokenizer, *silent)
    ids = [each.ids.tolist() for each in wanted.documents]
    datasets.Dataset.from_list(silent).to_parquet(tmp_path / "c.parquet")
    reading = readers.chat.read(tmp_path / "c.parquet", tokenizer)
    assert [each.ids.tolist() for each in reading.documents] == ids
    for name in ("unanswered", "turns_of_an_empty_question"):
        assert reading.counts[name] == wanted.counts[name] == 1
