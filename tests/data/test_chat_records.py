"""Records of every shape as conversations: nothing that they say is lost or taken for something else without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data.chat_templates import CHATML, tokenizer_for
from test_chats import CALL, TWO_TURNS, assistant, reading_of, shown, user

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
    "no shape": ({"question": "q", "answer": "a"}, "no conversation"),
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
