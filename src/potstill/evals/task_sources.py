"""Questions with expected answers, of reasoning-gym or of a file, and the verifiers that judge a model's answers.

Some verifiers of reasoning-gym hand an answer to `eval`, or to a parser that does. What a model wrote is not run
outside of a sandbox, so those tasks are refused.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import random
import re
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from potstill.errors import UserError, one_line
from potstill.evals.task_matching import last_number, matches
from potstill.io.hashing import file_sha256
from potstill.io.safe_open import is_encodable, json_lines, names_of
from potstill.recipe.sections_evaluation import TaskConfig
from potstill.registry import nearest

DEFAULT_SIZE = 100
"""Questions that reasoning-gym makes where a recipe gives no number."""
PROBES = ("(1 + 2", '["a", 1]', "1 .real")
"""Wrong answers that a verifier which runs answers would run."""
ROUNDING = 1e-9
PROBED = 5
"""Questions whose verifier gets the probes, and that are made twice."""


@dataclass(frozen=True)
class Question:
    where: str
    """Its place, for errors."""
    text: str
    expected: str
    cluster: str | None = None
    """What it shares with the questions that resemble it."""
    entry: Any = None
    """What a verifier of reasoning-gym knows of it."""


class Task(Protocol):
    """Questions, and a verifier that gives an answer to one of them a score from 0 to 1."""

    @property
    def questions(self) -> Sequence[Question]: ...

    @property
    def expects_answers(self) -> bool:
        """Whether what is expected is itself a right answer, as a regular expression is not."""

    def score(self, question: Question, answer: str) -> float:
        """Exactly 1 where the answer is right. A verifier that adds up parts may give a wrong one 1 and a rounding.

        Raises:
            VerifierFailed: the verifier has an error of its own at this answer.
            UserError: it would run the answer.
        """

    def probe(self) -> None:
        """Raises: UserError: the verifier would run an answer."""

    def describe(self) -> dict[str, Any]:
        """What the questions and the verdicts depend on."""


class VerifierFailed(Exception):
    """A verifier raised an error at an answer, which is therefore not right."""


def open_task(config: TaskConfig) -> Task:
    """The questions of a task, and its verifier.

    Raises:
        UserError: the extra is not installed, no such task, options that it refuses, a file without such questions.
    """
    return _ReasoningGym(config) if config.source == "reasoning_gym" else _JsonLines(config)


def digest(questions: Sequence[Question]) -> str:
    """sha256 over every question and its expected answer, in order."""
    content = json.dumps([(question.text, question.expected) for question in questions])
    return hashlib.sha256(content.encode()).hexdigest()


def require_controls(task: Task, judged: Callable[[str], str] = str.strip) -> dict[str, str]:
    """Check that the verifier accepts what is expected of each question, refuses an empty answer, and runs none.

    Args:
        judged: the part of an answer's text that is judged.

    Raises:
        UserError: a control failed, with the question that it failed at.
    """
    task.probe()
    for question in task.questions:
        part = judged(question.expected)
        if task.expects_answers and (score := _score_of_control(task, question, part)) != 1:
            cut = part != question.expected.strip()
            raise UserError(
                f"{question.where}: control failed: the expected answer {question.expected!r:.60}"
                + (f" ends at {part!r:.60}, which is no right answer. Set stop." if cut else "")
                + ("" if cut else f" gets a score of {score:g}, not 1. Choose another task or other options.")
            )
        if _score_of_control(task, question, "") == 1:
            raise UserError(
                f"{question.where}: control failed: an empty answer is accepted where {question.expected!r:.60} is"
                " expected. Every score would be too high. Leave the question out, or correct what it expects."
            )
    count = len(task.questions)
    return {"empty": f"0/{count}"} | ({"expected": f"{count}/{count}"} if task.expects_answers else {})


def _score_of_control(task: Task, question: Question, answer: str) -> float:
    try:
        return task.score(question, answer)
    except VerifierFailed:
        return 0.0


class _JsonLines:
    """Questions of a file of JSON lines."""

    def __init__(self, config: TaskConfig) -> None:
        self.path, self.match = Path(str(config.path)), config.match or "exact"
        self.fields, self.cluster = (str(config.question), str(config.answer)), config.cluster
        self.expects_answers = self.match != "regex"
        self.questions: list[Question] = []
        for where, record in json_lines(self.path, "Give JSON lines, gzipped if the name ends in .gz."):
            if len(self.questions) == config.size:
                break
            self.questions.append(self._question(where, record))
        if not self.questions:
            raise UserError(
                f"{self.path}: no questions. Give JSON lines with the fields {' and '.join(self.fields)}."
            )
        if self.cluster is not None and len({question.cluster for question in self.questions}) == 1:
            raise UserError(
                f"{self.path}: cluster: the first {len(self.questions)} questions have one and the same"
                f" {self.cluster!r:.60}: nothing is known of others, and there is no interval. Name another field, ask"
                " more questions, or leave cluster out."
            )
        self.sha256 = file_sha256(self.path)

    def _question(self, where: str, record: dict[str, Any]) -> Question:
        named = {"question": self.fields[0], "answer": self.fields[1], "cluster": self.cluster}
        for field, name in named.items():
            if name is not None and name not in record:
                raise UserError(
                    f"{where}: no field {name!r:.60}, but {names_of(record)}. Name it in {field}."
                )
        text, expected = (record[name] for name in self.fields)
        if type(expected) in (int, float) and self.expects_answers:
            expected = str(expected)
        for name, value in zip(self.fields, (text, expected), strict=True):
            if not isinstance(value, str) or not value.strip() or not is_encodable(value):
                raise UserError(
                    f"{where}: {name} is {value!r:.60}, not a text. Correct it, or leave the line out."
                )
        if self.match == "number" and last_number(expected) is None:
            raise UserError(
                f"{where}: {self.fields[1]} is {expected!r:.60}, without a number. Set match: exact."
            )
        if self.match == "regex":
            try:
                re.compile(expected)
            except re.error as error:
                raise UserError(
                    f"{where}: {self.fields[1]} is {expected!r:.60}, not a regular expression: {error}. Correct it."
                ) from error
        return Question(where, text, expected, self._cluster_of(where, record))

    def _cluster_of(self, where: str, record: dict[str, Any]) -> str | None:
        if self.cluster is None:
            return None
        value = record[self.cluster]
        if value is None or value != value or (isinstance(value, str) and not value.strip()):
            raise UserError(
                f"{where}: {self.cluster} is {value!r:.60}, and no cluster. Correct it, or leave the line out."
            )
        return json.dumps(value, sort_keys=True)

    def score(self, question: Question, answer: str) -> float:
        return float(matches(answer, question.expected, self.match))

    def probe(self) -> None:
        """Nothing that matches texts runs them."""

    def describe(self) -> dict[str, Any]:
        question, answer = self.fields
        of = {"file_sha256": self.sha256, "question": question, "answer": answer, "match": self.match}
        return of if self.cluster is None else of | {"cluster": self.cluster}


class _ReasoningGym:
    """Questions that the library reasoning-gym makes, and its verifier of answers to them."""

    expects_answers = True

    def __init__(self, config: TaskConfig) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise UserError(
                "task: the package reasoning-gym is not installed. Run: pip install 'potstill[tasks]'"
            )
        with _quiet():
            from reasoning_gym.factory import DATASETS, create_dataset
        self.version, self.name = importlib.metadata.version("reasoning-gym"), str(config.task)
        if self.name not in DATASETS:
            raise UserError(
                f"task: reasoning-gym {self.version} has no task {self.name!r:.80}.{nearest(self.name, DATASETS)}"
            )
        _require_options(self.name, config.options, DATASETS[self.name][1])
        size = config.size or DEFAULT_SIZE
        try:
            with _quiet(), _own_randomness(config.seed):
                self._dataset = create_dataset(self.name, size=size, seed=config.seed, **config.options)
        except Exception as error:  # its tasks assert, and raise what they like
            raise UserError(
                f"task: options: {self.name} refuses {config.options!r:.120}: {one_line(error)} Correct them."
            ) from error
        self.seed = config.seed
        self.questions = [self._question(number) for number in range(size)]
        for number, question in enumerate(self.questions[:PROBED]):
            if self._question(number).text != question.text:
                raise UserError(
                    f"{question.where}: it is another one each time, whatever the seed, so that no two models would"
                    " be asked the same. Choose another task."
                )

    def _question(self, number: int) -> Question:
        where = f"task: {self.name}: question {number}"
        try:
            with _quiet(), _own_randomness(self.seed + number):
                entry = self._dataset[number]
        except Exception as error:
            raise UserError(f"{where}: it cannot be made: {one_line(error)} Set other options.") from error
        text, expected = entry.get("question"), entry.get("answer")
        if not isinstance(text, str) or not isinstance(expected, str) or not expected.strip():
            raise UserError(
                f"{where}: its expected answer is {expected!r:.60}, so that no control could show that the verifier"
                " accepts right ones. Choose another task."
            )
        return Question(where, text, expected, entry=entry)

    def score(self, question: Question, answer: str) -> float:
        is_trusted = answer in (question.expected, question.expected.strip())
        ran: list[str] = []
        guard = contextlib.nullcontext() if is_trusted else _nothing_run(question.entry, ran)
        try:
            with _quiet(), guard:
                score = float(self._dataset.score_answer(answer, question.entry))
        except _RunsAnswer:
            score = 0.0
        except Exception as error:  # a verifier that was not written for such an answer
            if not ran:
                raise VerifierFailed(f"{type(error).__name__}: {one_line(error)}") from error
        if ran:
            raise UserError(
                f"{question.where}: the verifier of {self.name} runs an answer as Python, by {ran[0]}, and what a model"
                " wrote is not run outside of a sandbox. Choose another task."
            )
        if not 0 <= score <= 1 + ROUNDING:
            raise VerifierFailed(f"a score of {score}")
        return score

    def probe(self) -> None:
        for question in self.questions[:PROBED]:
            for answer in (question.expected, *PROBES, f"{question.expected} ."):
                with contextlib.suppress(VerifierFailed):
                    self.score(question, answer)

    def describe(self) -> dict[str, Any]:
        options = dataclasses.asdict(self._dataset.config)
        return {"reasoning_gym": self.version, "options": json.loads(json.dumps(options, default=str))}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the library's warnings and what its verifiers print are dropped: a result is printed there as JSON."""
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        yield


def _require_options(name: str, given: dict[str, Any], config: Any) -> None:
    """Raises: UserError: with every option that the task does not have."""
    known = {each.name for each in dataclasses.fields(config)} - {"size", "seed"}
    mistakes = []
    for option in given:
        if option in ("size", "seed"):
            mistakes.append(f"task: options.{option}: it is a field of its own. Set {option} beside options.")
        elif option not in known:
            mistakes.append(f"task: options.{option:.60}: {name} has no such option.{nearest(option, known)}")
    if mistakes:
        raise UserError(*mistakes)


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Inside, what draws from the generators that a process shares draws the same each time; they go on as before."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class _RunsAnswer(BaseException):
    """A verifier was about to run an answer. Not an Exception, which it would catch."""


@contextlib.contextmanager
def _nothing_run(entry: Any, ran: list[str]) -> Iterator[None]:
    """Inside, `eval` and `exec` run nothing in this thread but the task's own texts and modules that are imported.

    What they were called for otherwise is added to `ran`, since a verifier may catch whatever is raised.
    """
    own, thread = {*_texts(entry)}, threading.get_ident()
    originals = {name: getattr(builtins, name) for name in ("eval", "exec")}

    def guarded(name: str) -> Callable[..., Any]:
        def call(source: Any, *arguments: Any, **options: Any) -> Any:
            is_module = isinstance(source, types.CodeType) and os.path.exists(source.co_filename)
            if threading.get_ident() == thread and not is_module and source not in own:
                ran.append(name)
                raise _RunsAnswer
            return originals[name](source, *arguments, **options)

        return call

    for name in originals:
        setattr(builtins, name, guarded(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(builtins, name, original)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
