"""What a reasoning model writes before its answer is not judged, and does not end its completion."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import make_tokenizer

from potstill.evals.humaneval_problems import (
    Problem,
    answer_of,
    is_whole,
    opens_thought,
    program_of,
    thought_ids,
)

PROBLEM = Problem(
    task_id="HumanEval/900",
    prompt='from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """The sum."""\n',
    entry_point="add",
    canonical_solution="    return a + b\n",
    test="def check(candidate):\n    assert candidate(1, 2) == 3\n",
)
THOUGHT = "I try\n```python\ndef add(a, b):\n    return 'draft'\n```\nno, better\n"
ANSWER = "Here:\n```python\ndef add(a, b):\n    return 'answer'\n```\n"


@pytest.mark.parametrize(
    "tags",
    [
        ("<think>", "</think>"),
        ("<thinking>", "</thinking>"),
        ("<thought>", "</thought>"),
        ("<seed:think>", "</seed:think>"),
        ("[THINK]", "[/THINK]"),
    ],
)
def test_the_answer_stands_after_the_last_thought(tags: tuple[str, str]) -> None:
    start, end = tags
    for text in (
        ANSWER,
        f"{start}\n{THOUGHT}{end}\n{ANSWER}",
        f"{THOUGHT}{end}\n{ANSWER}",
        f"{start}{end}{ANSWER}",
        f"{start}{THOUGHT}{end}{start}{THOUGHT}{end}{ANSWER}",
        f"{start}{THOUGHT} as in {end} or so {end}{ANSWER}",
    ):
        program = program_of(PROBLEM, "chat", text)
        assert "'answer'" in program and "'draft'" not in program
        opened = program_of(PROBLEM, "chat", text, in_thought=True)
        assert opened == ("" if text == ANSWER else program)
    for cut in (f"{start}\n{THOUGHT}", f"{start}{THOUGHT}{end}\nno\n{start}{THOUGHT}"):
        assert program_of(PROBLEM, "chat", cut) == "" and answer_of(cut) is None


@pytest.mark.parametrize("in_thought", [True, False])
def test_a_completion_does_not_end_in_a_thought(in_thought: bool) -> None:
    """Neither at a closed fence around the function nor at an end of text that is spelled out."""
    whole = is_whole(PROBLEM, "chat", in_thought)
    start = "" if in_thought else "<think>\n"
    text = f"{start}{THOUGHT}<|im_end|>\n{THOUGHT}</think>\n{ANSWER.rstrip()}"
    assert [at for at in range(len(text) + 1) if whole(text[:at])] == [len(text)]
    assert whole(f"{start}</think><|im_end|>") and not whole(f"{start}<|im_end|>")


@pytest.mark.parametrize(
    ("written", "opens"),
    [
        ("<think>\n", True),
        ("<think>\nWell,", True),
        ("[THINK]", True),
        ("", False),
        ("<think>\n\n</think>\n\n", False),
    ],
)
def test_a_thought_that_the_template_opens_is_seen_where_the_turn_starts(written: str, opens: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "You may write <think> before you answer.\n{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n" + written + "{% endif %}"
    )
    assert opens_thought(tokenizer) == opens


def test_only_tags_that_would_be_left_out_of_the_text_are_shown() -> None:
    tokenizer: Any = make_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_tokens(["</think>", "<other>"], special_tokens=True)
    assert thought_ids(tokenizer) == {tokenizer.convert_tokens_to_ids("</think>")}


def test_a_base_completion_has_no_thoughts() -> None:
    body = "\n    # as <think> says\n    return a + b"
    assert program_of(PROBLEM, "base", body) == f"{PROBLEM.prompt.rstrip()}{body}\n"
    assert not is_whole(PROBLEM, "base")(body)


def test_a_future_statement_stays_first() -> None:
    """The prompt's imports come before a function that was written anew."""
    for statement in ("annotations", "(\n    annotations,\n    division,\n)"):
        code = f"from __future__ import {statement}\nimport math\ndef add(a, b):\n    return a + b\n"
        names: dict[str, Any] = {}
        exec(compile(program_of(PROBLEM, "chat", f"```python\n{code}```"), "x", "exec"), names)
        assert names["add"](20, 22) == 42 and "List" in names
