"""The sections `evaluations` and `sinks`: scores of the finished student, and where metrics are sent."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

from annotated_types import MinLen

from potstill.recipe.fields import Config, Count, PositiveOrZero, Seed, lacks_method
from potstill.registry import implementation, register

if TYPE_CHECKING:
    from potstill.evals.subject import Subject
    from potstill.runs.run_dir import RunDir
    from potstill.runs.trackers import Sink


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Config):
    """Base of every evaluation of a finished student. A plug-in's subclass measures in `run`."""

    def run(self, subject: Subject) -> dict[str, float]:
        """Scores by name, as the receipt records them.

        Raises:
            UserError: it cannot run here. The receipt records the message, and the run finishes all the same.
        """
        raise lacks_method(self, "run")

    def require(self) -> None:
        """UserError where the evaluation cannot run here; called before the run starts."""


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
