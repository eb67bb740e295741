"""Records of every shape as conversations: nothing that they say is lost or taken for something else without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data.chat_templates import CHATML, tokenizer_for
from test_chats import CALL, TWO_TURNS, assistant, reading_of, shown, user

from potstill.data.chats import templates


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
