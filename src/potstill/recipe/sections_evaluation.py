"""The sections `evaluations` and `sinks`: scores of the finished student, and where metrics are sent."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from annotated_types import MinLen

from potstill.errors import UserError
from potstill.recipe.fields import (
    Config,
    Count,
    LocalPath,
    PositiveOrZero,
    Seed,
    Share,
    check,
    lacks_method,
)
from potstill.registry import implementation, register

if TYPE_CHECKING:
    from potstill.evals.subject import Subject
    from potstill.runs.run_dir import RunDir
    from potstill.runs.trackers import Sink


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Config):
    """Base of every evaluation of a finished student. A plug-in's subclass measures in `run`."""

    def run(self, subject: Subject) -> dict[str, Any]:
        """Scores by name, as the receipt records them.

        Raises:
            UserError: it cannot run here. The receipt records the message, and the run finishes all the same.
        """
        raise lacks_method(self, "run")

    def require(self) -> None:
        """UserError where the evaluation cannot run here; called before the run starts."""

    @classmethod
    def mistakes(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Fields that do not go together as a recipe gives them, of whatever type: (field, what is wrong)."""
        yield from ()

    @property
    def label(self) -> str:
        """What its result and its folder are called."""
        return self.registered_name


def labelled(evaluations: Sequence[EvaluationConfig]) -> dict[str, EvaluationConfig]:
    """Each evaluation of a recipe under a name that no other one has."""
    named: dict[str, EvaluationConfig] = {}
    for config in evaluations:
        named[config.label if config.label not in named else f"{config.label}-{len(named)}"] = config
    return named


@register("evaluation")
@dataclass(frozen=True, kw_only=True)
class HumanEvalConfig(EvaluationConfig):
    name: Literal["humaneval"] = "humaneval"
    """HumanEval in a sandbox: pass@k of the student's completions."""
    samples: Count = 1
    """Completions of each problem."""
    temperature: PositiveOrZero = 0.0
    """Sampling temperature; 0 is greedy."""
    max_new_tokens: Count = 512
    """Longest completion, in tokens."""
    limit: Count | None = None
    """Only the first problems: a subset, which has no score; null: all 164."""
    seed: Seed = 0
    """Seed of sampling."""

    def require(self) -> None:
        implementation("potstill.evals.humaneval:require")(self)

    def run(self, subject: Subject) -> dict[str, float]:
        return cast("dict[str, float]", implementation("potstill.evals.humaneval:of_subject")(self, subject))


@register("evaluation")
@dataclass(frozen=True, kw_only=True)
class LmEvalConfig(EvaluationConfig):
    name: Literal["lm_eval"] = "lm_eval"
    """Tasks of the library lm-eval, an extra."""
    tasks: Annotated[list[str], MinLen(1)]
    """Names of its tasks, groups or tags."""
    limit: Count | None = None
    """Only the first documents of each task; null: all."""
    add_bos_token: bool | None = None
    """Put BOS before each text; null: what the tokenizer puts there, in a chat what the template writes."""
    apply_chat_template: bool | None = None
    """Make each prompt a user's turn; null: if the model ends where its chat template ends a turn."""
    seed: Seed = 0
    """Seed of the examples in a prompt."""

    def require(self) -> None:
        implementation("potstill.evals.lm_eval:require")(self)

    def run(self, subject: Subject) -> dict[str, float]:
        return cast("dict[str, float]", implementation("potstill.evals.lm_eval:of_subject")(self, subject))


def _prompt(value: str, folder: Path) -> str:
    if QUESTION not in value:
        raise UserError(f"{value!r:.60} has no {QUESTION}, so that no question would be asked. Write it in.")
    return value


def _pattern(value: str, folder: Path) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise UserError(f"{value!r:.60} is not a regular expression: {error}. Correct it.") from error
    return value


QUESTION = "{question}"
OF_SOURCE = {
    "reasoning_gym": ("task", "options"),
    "jsonl": ("path", "question", "answer", "match", "cluster"),
}
"""Fields of a task that only one source reads."""
NEEDED = {"reasoning_gym": ("task",), "jsonl": ("path", "question", "answer")}


@register("evaluation")
@dataclass(frozen=True, kw_only=True)
class TaskConfig(EvaluationConfig):
    name: Literal["task"] = "task"
    """Questions with a verifier: the share of right answers, with its interval."""
    source: Literal["reasoning_gym", "jsonl"]
    """Where questions come from: the library reasoning-gym, an extra, which also judges answers; or a file of JSON
    lines."""
    task: str | None = None
    """reasoning_gym: the name of its task, such as chain_sum."""
    options: dict[str, Any] = field(default_factory=dict)
    """reasoning_gym: options of that task, such as max_digits."""
    path: LocalPath | None = None
    """jsonl: the file, gzipped if its name ends in .gz."""
    question: str | None = None
    """jsonl: the field that holds the question."""
    answer: str | None = None
    """jsonl: the field that holds the expected answer."""
    match: Literal["exact", "number", "regex"] | None = None
    """jsonl: what a right answer is: the expected text (exact), a text whose last number is the expected one (number),
    or a text that the expected regular expression matches as a whole (regex); null: exact."""
    cluster: str | None = None
    """jsonl: the field that questions which resemble each other share the value of, such as the passage that they are
    about; the interval is then over clusters of such questions. Null: questions are taken to be independent."""
    size: Count | None = None
    """Number of questions. reasoning_gym makes so many, null: 100; of a file the first are read, null: all."""
    prompt: Annotated[str, check(_prompt)] | None = None
    """What the model is given, with {question} where the question goes; null: the question alone in a chat, else
    "Question: {question}\\nAnswer:"."""
    system: Annotated[str, MinLen(1)] | None = None
    """A system message before the question, in a chat."""
    apply_chat_template: bool | None = None
    """Make each prompt a user's turn; null: if the model has a chat template."""
    stop: list[Annotated[str, MinLen(1)]] | None = None
    """Texts before which an answer ends; null: a line break, and in a chat none."""
    extract: Annotated[str, check(_pattern)] | None = None
    """A regular expression: what its last match in an answer holds, or the match's group, is judged; null: all of
    the answer."""
    samples: Count = 1
    """Answers to each question."""
    temperature: PositiveOrZero = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: Share = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    max_new_tokens: Count = 512
    """Longest answer, in tokens, thoughts included."""
    seed: Seed = 0
    """Seed of the questions that reasoning_gym makes, and of sampling."""

    @classmethod
    def mistakes(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        source = str(given.get("source"))
        for other, fields in OF_SOURCE.items() if source in OF_SOURCE else ():
            for name in fields if other != source else ():
                if given.get(name) not in (None, {}):
                    yield name, f"it is of source {other}, not of {source}. Leave it out."
        for name in NEEDED.get(source, ()):
            if given.get(name) is None:
                yield name, f"missing. Source {source} needs it."
        if source == "jsonl" and given.get("question") == given.get("answer") is not None:
            yield "answer", "question names the same field: the answer would be in the prompt. Name another."
        if given.get("cluster") is not None and given["cluster"] in (
            given.get("question"),
            given.get("answer"),
        ):
            yield (
                "cluster",
                "it is the question or the answer, which no two questions share. Name another field.",
            )
        if given.get("temperature", 0) == 0:
            for name, what in (("samples", "all samples are the same"), ("top_p", "it has no effect")):
                if given.get(name, 1) != 1:
                    yield name, f"{given[name]}: at temperature 0 {what}. Set a temperature above 0."
        if given.get("apply_chat_template") is False and given.get("system") is not None:
            yield (
                "system",
                "it needs a chat template, and apply_chat_template is false. Write it into prompt.",
            )

    @property
    def label(self) -> str:
        name = self.task if self.source == "reasoning_gym" else Path(str(self.path)).name.partition(".")[0]
        return f"task-{re.sub('[^A-Za-z0-9_-]+', '-', str(name))}"

    def require(self) -> None:
        implementation("potstill.evals.tasks:require")(self)

    def run(self, subject: Subject) -> dict[str, Any]:
        return cast("dict[str, Any]", implementation("potstill.evals.tasks:of_subject")(self, subject))


@dataclass(frozen=True, kw_only=True)
class SinkConfig(Config):
    """Base of every sink. A plug-in's subclass opens it in `open`."""

    keeps_what_it_has: ClassVar[bool] = False
    """Whether it keeps what an interrupted run has logged, so that a resumed run must not log it again."""

    def open(self, run: RunDir, first: int) -> Sink:
        """Open it for a run whose next logged step is `first`. An exception disables the sink, not the run."""
        raise lacks_method(self, "open")

    def require(self) -> None:
        """UserError where the sink cannot work here; called before the run starts."""


@dataclass(frozen=True, kw_only=True)
class _LibrarySink(SinkConfig):
    """A sink of a library, which is an extra of the same name."""

    module: ClassVar[str]
    tracker: ClassVar[str] = "potstill.runs.trackers:Tracker"

    def require(self) -> None:
        implementation("potstill.runs.trackers:require_module")(self.registered_name, self.module)

    def open(self, run: RunDir, first: int) -> Sink:
        return cast("Sink", implementation(self.tracker)(importlib.import_module(self.module), run, first))


@register("sink")
@dataclass(frozen=True, kw_only=True)
class TensorBoardConfig(_LibrarySink):
    name: Literal["tensorboard"] = "tensorboard"
    """Event files in the run's folder `tensorboard`."""

    module: ClassVar[str] = "torch.utils.tensorboard"
    tracker: ClassVar[str] = "potstill.runs.trackers:TensorBoard"


@register("sink")
@dataclass(frozen=True, kw_only=True)
class TrackioConfig(_LibrarySink):
    name: Literal["trackio"] = "trackio"
    """A run of the project `potstill`, named like the folder."""

    module: ClassVar[str] = "trackio"
    keeps_what_it_has: ClassVar[bool] = True


@register("sink")
@dataclass(frozen=True, kw_only=True)
class WandbConfig(_LibrarySink):
    name: Literal["wandb"] = "wandb"
    """A run of the project `potstill`, named like the folder."""

    module: ClassVar[str] = "wandb"
