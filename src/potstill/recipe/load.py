"""A recipe: one YAML file that describes a whole run, as plain frozen dataclasses that only `load` makes from text.

All mistakes of a file are reported together, each with its dotted field. Refused: unknown keys, values of another
type (a quoted "5" is not 5), numbers that are not finite, paths that do not exist. Torch is not imported, so that
a typo is reported within a moment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field, TypeAdapter

from potstill import registry
from potstill.errors import UserError
from potstill.io import yaml
from potstill.io.safe_open import opened
from potstill.recipe.fields import Config, LocalPath, documented
from potstill.recipe.messages import explain, shown
from potstill.recipe.plugins import Registered, config_types, load_plugins
from potstill.recipe.sections_data import CorpusConfig, DecontaminationConfig
from potstill.recipe.sections_evaluation import EvaluationConfig, SinkConfig, TaskConfig
from potstill.recipe.sections_mixture import MemberConfig
from potstill.recipe.sections_models import (
    CheckpointStudentConfig,
    ConfigStudentConfig,
    CutStudentConfig,
    HiddenCaptureConfig,
    LoraConfig,
    SampledCaptureConfig,
    TeacherConfig,
    TopkCaptureConfig,
)
from potstill.recipe.sections_rollouts import RolloutsConfig, WriteConfig
from potstill.recipe.sections_training import (
    CompareConfig,
    EvalConfig,
    GuardConfig,
    ObjectiveConfig,
    PublishConfig,
    TrainConfig,
)
from potstill.recipe.synonyms import meant_field

AnyCapture = SampledCaptureConfig | TopkCaptureConfig | HiddenCaptureConfig
AnyStudent = CutStudentConfig | CheckpointStudentConfig | ConfigStudentConfig


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    corpus: Annotated[CorpusConfig, Registered("corpus")]
    """What the student reads."""
    teacher: Annotated[TeacherConfig, Registered("teacher")]
    """What the student learns from."""
    student: Annotated[AnyStudent, Field(discriminator="name")]
    """What is trained."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss that a step minimises."""
    train: TrainConfig
    """How the student is trained."""
    rollouts: RolloutsConfig | None = None
    """Rows that the student writes itself, for the teacher to grade; null: the corpus's rows alone."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured during training."""
    evaluations: list[Annotated[EvaluationConfig, Registered("evaluation", short=True)]] = field(
        default_factory=list
    )
    """What is measured on the finished student, beside the held-out rows; the receipt has the results."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What ends a run that has gone wrong."""
    capture: Annotated[AnyCapture, Field(discriminator="name")] = field(default_factory=SampledCaptureConfig)
    """How `potstill capture` keeps the teacher's targets."""
    write: WriteConfig = field(default_factory=WriteConfig)
    """How `potstill write` has the teacher write a corpus."""
    compare: CompareConfig | None = None
    """Run the untouched student and plain training beside KD, under one budget; null: KD alone."""
    publish: PublishConfig = field(default_factory=PublishConfig)
    """What the model card needs and the run cannot know."""
    allow_identical: bool = False
    """Distil although teacher and student have the same weights; the receipt says so."""
    allow_weak_teacher: bool = False
    """Do not fail the check of a teacher that predicts the held-out rows no better than chance or than the student."""
    allow_coarse_store: bool = False
    """Do not fail the check of a store whose targets give another gradient than the teacher's own."""
    allow_any_divergence: bool = False
    """Use a plug-in's divergence that is negative or not 0 where student and teacher are equal."""
    sinks: list[Annotated[SinkConfig, Registered("sink", short=True)]] = field(default_factory=list)
    """Where each step's metrics are sent during the run, besides metrics.jsonl; built-in ones need an extra."""
    plugins: list[LocalPath] = field(default_factory=list)
    """Python files, relative to the recipe, that register divergences, teachers, corpora, evaluations or
    sinks of your own."""

    def without_places(self) -> Recipe:
        """Without the fields that say where rows are cached and a teacher is reached; for comparing recipes."""
        teacher, corpus = self.teacher.without_places(), self.corpus.without_places()
        return dataclasses.replace(self, teacher=teacher, corpus=corpus)

    def require_available(self) -> None:
        """UserError before a run where a sink, an evaluation or an engine cannot work on this machine."""
        for sink in self.sinks:
            sink.require()
        for evaluation in self.evaluations:
            evaluation.require()
        if self.rollouts is not None:
            self.rollouts.require()

    @property
    def corpus_rows_per_step(self) -> int:
        """Of a step's rows those that the student does not write."""
        rows = self.train.rows_per_step
        return rows if self.rollouts is None else rows - self.rollouts.rows_of(rows)

    @property
    def lora(self) -> LoraConfig | None:
        """Adapters to train instead of the student's weights; a student with random weights has none."""
        return None if self.student.name == "config" else self.student.lora


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, fill in defaults and check it.

    Args:
        path: the YAML file.
        overrides: `a.b=value`, as on the command line.

    Raises:
        UserError: with every mistake of the file and of the overrides.
    """
    path = Path(path)
    with opened(path, "a recipe", "Give the recipe's YAML file.") as file:
        data = file.read(yaml.MAX_BYTES + 1)
    text = yaml.decode(data, str(path))
    return parse(text, where=str(path), folder=path.absolute().parent, overrides=overrides)


def parse(text: str, *, where: str, folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """`load` of a text. `where` names it in messages; its paths are relative to `folder`."""
    tree, mistakes = yaml.read(text, where)
    if not isinstance(tree, dict):
        content = "nothing" if tree is None else shown(tree)
        raise UserError(
            f"{where}: {content} at the top, not a mapping. Write corpus:, teacher:, student: and train:."
        )
    overridden: dict[str, str] = {}
    for override in overrides:
        try:
            overridden[yaml.override(tree, override, SHORT_FORMS)] = override
        except UserError as error:
            mistakes += error.mistakes

    def report(path: tuple[str, ...], what: str) -> None:
        """Add a mistake, under the override that caused it where there is one."""
        dotted = ".".join(path)
        by = next((o for at, o in overridden.items() if dotted == at or dotted.startswith(f"{at}.")), None)
        if by is None:
            mistakes.append(f"{where}: {dotted}: {what}")
        else:
            mistakes.append(
                f"override {by:.200}: {what}"
                if by.startswith(f"{dotted}=")
                else f"override {by:.200}: {dotted}: {what}"
            )

    if isinstance(tree.get("capture"), dict):
        tree["capture"].setdefault("name", SampledCaptureConfig.name)
    # Plug-ins first: the schema is made of what they register.
    faulty_plugins = list(load_plugins(tree, folder))
    filled = set(_complete_corpus(tree))
    for path, what in (*faulty_plugins, *_across_fields(tree)):
        report(path, what)
    try:
        schema = _schema()
    except UserError as error:
        raise UserError(*mistakes, *(f"{where}: plugins: {m}" for m in error.mistakes)) from error
    try:
        recipe = _adapter().validate_json(json.dumps(tree), strict=True, context=folder)
    except pydantic.ValidationError as error:
        for finding in error.errors(include_url=False):
            path, what = explain(finding, tree, schema)
            # Of a field that was filled in, where it was written.
            if not any(path[: len(each)] == each for each in filled):
                report(path, what)
    if mistakes:
        raise UserError(*dict.fromkeys(mistakes))
    return recipe


def parse_task(text: str, *, where: str, folder: Path, given: Mapping[str, Any]) -> TaskConfig:
    """An evaluation of kind `task`, written as one entry of a recipe's `evaluations`, or a task of reasoning-gym by
    its name alone.

    Args:
        where: names the text in messages; its paths are relative to `folder`.
        given: further fields, which take the place of those in the text.

    Raises:
        UserError: with every mistake.
    """
    tree, mistakes = yaml.read(text, where)
    if isinstance(tree, str):
        tree = {"source": "reasoning_gym", "task": tree}
    if not isinstance(tree, dict):
        raise UserError(
            f"{where}: {shown(tree)} is no task. Give {{source: …, …}}, or a reasoning-gym task's name."
        )
    tree = {"name": TaskConfig.name} | tree | dict(given)
    at = ("evaluations", "0")
    found = list(TaskConfig.mistakes(tree))
    try:
        config = TypeAdapter(TaskConfig).validate_json(json.dumps(tree), strict=True, context=folder)
    except pydantic.ValidationError as error:
        schema: dict[tuple[str, ...], tuple[Any, ...]] = {("evaluations", "*"): config_types("evaluation")}
        for finding in error.errors(include_url=False):
            located = dict(finding) | {"loc": (*at, TaskConfig.name, *finding["loc"])}
            path, what = explain(located, {"evaluations": [tree]}, schema)
            found.append((".".join(path[len(at) :]), what.replace(f"{'.'.join(at)}.", "")))
    mistakes += [f"{where}: {name}: {what}" for name, what in found]
    if mistakes:
        raise UserError(*dict.fromkeys(mistakes))
    return config


def publish_section(
    text: str, where: str, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], PublishConfig]:
    """The recipe of a finished run as a tree, and its section `publish` with overrides applied.

    Paths are not checked: a run is published from its own folder, and its inputs may be gone.

    Raises:
        UserError: the text is damaged, or an override sets another section.
    """
    tree, mistakes = yaml.read(text, where)
    if mistakes or not isinstance(tree, dict):
        raise UserError(*(mistakes or [f"{where}: damaged: no mapping at the top."]))
    for override in overrides:
        if not override.startswith("publish."):
            raise UserError(
                f"override {override:.200}: a finished run cannot be changed. Only publish.… may be set."
            )
        yaml.override(tree, override)
    try:
        given = json.dumps(tree.get("publish") or {})
        return tree, TypeAdapter(PublishConfig).validate_json(given, strict=True, context=Path())
    except pydantic.ValidationError as error:
        mistaken = [explain(finding, tree.get("publish") or {}, SECTIONS) for finding in error.errors()]
        raise UserError(*(f"publish.{'.'.join(path)}: {what}" for path, what in mistaken)) from error


def dump(recipe: Recipe) -> str:
    """The recipe with every default filled in and absolute paths, as YAML that loads as an equal recipe."""
    return yaml.write(dataclasses.asdict(recipe, dict_factory=_name_first))


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors; the entries of loaded plug-ins are in it."""
    registered = [config for kind in registry.HOMES for config in config_types(kind)]
    with documented():
        schema = TypeAdapter(Recipe).json_schema()
        for config in (*registered, *typing.get_args(AnyCapture)):
            properties = schema["$defs"][config.__name__]["properties"]
            # pydantic reads the docstrings of a class's own fields alone.
            for base in [base for base in config.__mro__[1:] if dataclasses.is_dataclass(base)]:
                base_schema: Any = TypeAdapter(base)  # type: ignore[arg-type]
                for name, inherited in base_schema.json_schema().get("properties", {}).items():
                    if "description" in inherited:
                        properties[name].setdefault("description", inherited["description"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "potstill recipe"}


SHORT_FORMS = {("objective", "divergence")}
SECTIONS: dict[tuple[str, ...], tuple[Any, ...]] = {
    (): (Recipe,),
    ("corpus", "decontaminate"): (DecontaminationConfig,),
    ("student",): typing.get_args(AnyStudent),
    ("student", "lora"): (LoraConfig,),
    ("objective",): (ObjectiveConfig,),
    ("train",): (TrainConfig,),
    ("rollouts",): (RolloutsConfig,),
    ("write",): (WriteConfig,),
    ("eval",): (EvalConfig,),
    ("guard",): (GuardConfig,),
    ("capture",): typing.get_args(AnyCapture),
    ("compare",): (CompareConfig,),
    ("publish",): (PublishConfig,),
}
REGISTERED: dict[tuple[str, ...], str] = {
    ("corpus",): "corpus",
    ("teacher",): "teacher",
    ("objective", "divergence"): "divergence",
    ("evaluations", "*"): "evaluation",
    ("sinks", "*"): "sink",
}
"""Where a recipe names an entry of the registry; * stands for an index of a list."""


def _schema() -> dict[tuple[str, ...], tuple[Any, ...]]:
    """The config classes that each section accepts, plug-ins' included."""
    registered = {path: config_types(kind) for path, kind in REGISTERED.items()}
    nested: dict[tuple[str, ...], tuple[Any, ...]] = {
        ("corpus", "sources", "*"): config_types("corpus", "can_be_mixed"),
        ("teacher", "teachers", "*"): (MemberConfig,),
        ("teacher", "teachers", "*", "teacher"): config_types("teacher", "can_be_mixed"),
    }
    return SECTIONS | registered | nested


def dotted_fields() -> set[str]:
    """Every field of a recipe that an override can set, but for the entries of lists."""
    return {
        ".".join((*section, each.name))
        for section, kinds in _schema().items()
        if "*" not in section
        for kind in kinds
        for each in dataclasses.fields(kind)
    }


def fields_called(name: str) -> list[str]:
    """Dotted fields of a recipe that someone may mean by a name: its own, its last part, or another trainer's."""
    name = name.replace("-", "_")
    fields = dotted_fields()
    meant = (meant_field(name) or "").split(",")[0].split(" ")[0].rstrip(":")
    found = sorted(each for each in fields if name in (each, each.rpartition(".")[2]))
    # Of several the one of training: a seed is train.seed, not that of a capture.
    return [meant] if meant in fields else [each for each in found if each.startswith("train.")] or found


def _adapter() -> TypeAdapter[Recipe]:
    return _adapter_of(tuple(config_types(kind) for kind in registry.HOMES))


@functools.lru_cache(maxsize=4)
def _adapter_of(registered: tuple[Any, ...]) -> TypeAdapter[Recipe]:
    """A validator; `registered` is its cache key, since building it reads the registry as it is now."""
    return TypeAdapter(Recipe)


def _name_first(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(sorted(items, key=lambda item: item[0] != "name"))


def _corpus_of(tree: dict[str, Any]) -> tuple[type[CorpusConfig] | None, dict[str, Any]]:
    """The config class that the section names, where there is one, and the section as it was written."""
    given = tree["corpus"] if isinstance(tree.get("corpus"), dict) else {}
    kind = registry.entries("corpus").get(str(given.get("name")))
    return (kind if isinstance(kind, type) and issubclass(kind, CorpusConfig) else None), given


def _complete_corpus(tree: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Fill in what the corpus's own fields say for others; yields the path of each."""
    kind, given = _corpus_of(tree)
    for path in () if kind is None else kind.complete(given):
        yield ("corpus", *path)


def _across_fields(tree: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Mistakes of several fields together. Read from the tree, so that a mistake elsewhere does not hide them."""
    student, objective, train, guard = (
        tree[s] if isinstance(tree.get(s), dict) else {} for s in ("student", "objective", "train", "guard")
    )
    if student.get("name") == "cut":
        yield from _across_cut(student)
    if objective.get("kd_weight") == objective.get("ce_weight") == 0:
        yield (
            ("objective", "kd_weight"),
            "kd_weight and ce_weight are both 0: nothing would be learned. Raise one.",
        )
    if student.get("lora") is not None and train.get("quantize") is not None:
        yield (
            ("train", "quantize"),
            "student.lora trains adapters, and the file rounds what they are added to. Leave one out.",
        )
    if student.get("lora") is not None and train.get("freeze"):
        yield ("train", "freeze"), "student.lora trains adapters alone already. Leave one out."
    if student.get("keep") is not None and student.get("rule") not in (None, "first_last"):
        yield ("student", "rule"), "keep lists the layers, so that no rule chooses them. Leave one out."
    yield from _across_train(train)
    kind, corpus = _corpus_of(tree)
    for name, what in () if kind is None else kind.mistakes(corpus):
        yield ("corpus", *name.split(".")), what
    yield from _across_rollouts(tree)
    yield from _across_write(tree["write"] if isinstance(tree.get("write"), dict) else {})
    yield from _across_teacher(tree["teacher"] if isinstance(tree.get("teacher"), dict) else {}, corpus)
    yield from _across_capture(tree["capture"] if isinstance(tree.get("capture"), dict) else {})
    if guard.get("policy") == "rollback" and train.get("save_every") == 0:
        yield (
            ("guard", "policy"),
            "rollback needs checkpoints, and train.save_every is 0. Raise it, or set guard.policy: skip.",
        )
    yield from _across_evaluations(tree)
    compare = tree["compare"] if isinstance(tree.get("compare"), dict) else None
    if compare is not None:
        yield from _across_arms(compare, tree)


def _across_cut(student: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """How many layers are left has one answer."""
    given = [name for name in ("layers", "keep", "weights", "fraction") if student.get(name) is not None]
    if not given:
        yield (
            ("student", "layers"),
            "layers, keep, weights or fraction must be given: how small the student is.",
        )
    if len(given) > 1 and given not in (["keep", "weights"], ["keep", "fraction"]):
        both = "both given" if len(given) == 2 else "all given"
        yield ("student", given[0]), f"{' and '.join(given)} are {both}. Give one of them."
    if given in (["weights"], ["fraction"]):
        for name in ("rule", "ffn_width", "kv_heads"):
            if student.get(name) is not None:
                yield (
                    ("student", name),
                    f"{given[0]} chooses layers, channels and heads by itself. Leave one out.",
                )
        if student.get("hidden_size") is not None:
            yield (
                ("student", "hidden_size"),
                f"{given[0]} chooses among students of the teacher's hidden size. Leave one out.",
            )


def _across_train(train: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Fields that are read only beside others, and steps."""
    optimizer, schedule = train.get("optimizer", "adamw"), train.get("schedule", "cosine")
    for name, default in (("beta1", 0.9), ("beta2", 0.95)):
        if optimizer == "sgd" and train.get(name, default) != default:
            yield ("train", name), "sgd has no moments. Leave it out, or set train.optimizer: adamw."
    if optimizer in ("adamw", "sgd") and train.get("momentum", 0.95) != 0.95:
        yield (
            ("train", "momentum"),
            f"it is Muon's, not {optimizer}'s. Leave it out, or set train.optimizer: muon.",
        )
    if schedule in ("cosine", "linear") and train.get("decay", 0.2) != 0.2:
        yield (
            ("train", "decay"),
            f"it is of wsd, not of {schedule}. Leave it out, or set train.schedule: wsd.",
        )
    steps, warmup = train.get("steps"), train.get("warmup")
    if train and steps is None and train.get("epochs") is None:
        yield ("train", "steps"), "missing. Give steps or epochs."
    if isinstance(steps, int) and isinstance(warmup, int) and warmup > steps > 0:
        yield (
            ("train", "warmup"),
            f"{warmup} steps of warm-up in a run of {steps}. Lower it, or raise train.steps.",
        )


def _across_rollouts(tree: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Of rows that the student writes, and of prompts, which have no other use."""
    corpus, teacher, objective, train = (
        tree[s] if isinstance(tree.get(s), dict) else {} for s in ("corpus", "teacher", "objective", "train")
    )
    sources = corpus.get("sources")
    parts = [part for part in sources if isinstance(part, dict)] if isinstance(sources, list) else []
    has_prompts = any(part.get("name") == "prompts" for part in (corpus, *parts))
    given = tree.get("rollouts")
    rollouts = given if isinstance(given, dict) else {}
    share = rollouts.get("fraction", 1)
    if has_prompts and type(share) in (int, float) and 0 <= share < 1:
        yield (
            ("rollouts", "fraction"),
            f"{shown(rollouts['fraction'])} leaves rows to the corpus, and prompts have no answers. Set it to 1.",
        )
    if has_prompts and tree.get("compare") is not None:
        yield ("compare",), "plain training needs answers, and prompts have none. Leave compare out."
    for name in ("shards", "whole_documents"):
        if has_prompts and corpus.get(name):
            yield ("corpus", name), "is for rows of text, and each prompt is a row of its own. Leave it out."
    if given is None or rollouts.get("fraction", 1) == 0:
        return
    if teacher.get("name") == "store":
        yield (
            ("teacher",),
            "a store has no targets for text that the student writes. Name the teacher itself.",
        )
    if objective.get("kd_weight") == 0:
        yield (
            ("objective", "kd_weight"),
            "is 0, and on rows that it wrote itself the student learns from the teacher alone. Raise it.",
        )
    engine_fields = {"vllm_python": None, "max_engine_gap": RolloutsConfig.max_engine_gap}
    for name, default in engine_fields.items():
        is_changed = rollouts.get(name, default) != default
        if is_changed and rollouts.get("engine", "transformers") == "transformers":
            yield ("rollouts", name), "is of engine: vllm, and the student samples by itself. Leave it out."
    rows, start = train.get("rows_per_step"), rollouts.get("prompt_tokens")
    if train.get("epochs") is not None:
        yield ("train", "epochs"), "counts rows of the corpus, and the student writes rows. Give train.steps."
    if start is not None and corpus.get("name") in ("prompts", "chat"):
        yield (
            ("rollouts", "prompt_tokens"),
            f"is of documents without turns, not of corpus.name: {corpus['name']}. Leave it out.",
        )
    if type(rows) is int and type(share) in (int, float) and 0 < share * rows < 1:
        yield (
            ("rollouts", "fraction"),
            f"{shown(share)} of {rows} rows (train.rows_per_step) is no whole row. Raise one of them.",
        )
    tokens, most = corpus.get("tokens_per_row", 256), rollouts.get("max_new_tokens", 128)
    if type(tokens) is int and type(most) is int and most >= tokens:
        yield (
            ("rollouts", "max_new_tokens"),
            f"{most} tokens leave no room for a prompt in rows of {tokens}. Lower it, or raise corpus.tokens_per_row.",
        )
    elif type(tokens) is type(most) is type(start) is int and start + most > tokens:
        yield (
            ("rollouts", "prompt_tokens"),
            f"{start} tokens and {most} of rollouts.max_new_tokens are more than a row of {tokens}. Lower one of them,"
            " or raise corpus.tokens_per_row.",
        )


def _across_write(write: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    least, most = write.get("min_new_tokens", 1), write.get("max_new_tokens", 256)
    if type(least) is int and type(most) is int and least > most:
        yield ("write", "min_new_tokens"), f"{least} tokens are more than max_new_tokens, {most}. Lower it."
    for name, every in (("top_p", 1), ("top_k", 0)):
        if write.get("temperature", 1) == 0 and write.get(name, every) != every:
            yield (
                ("write", name),
                "temperature: 0 takes the likeliest token, and samples from none. Leave it out.",
            )
    if write.get("temperature", 1) == 0 and write.get("samples", 1) != 1:
        yield (
            ("write", "samples"),
            "temperature: 0 takes the likeliest token: all samples are the same. Set it to 1.",
        )


def _across_teacher(teacher: dict[str, Any], corpus: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    entry = registry.entries("teacher").get(str(teacher.get("name")))
    if isinstance(entry, type) and issubclass(entry, TeacherConfig):
        for name, what in entry.mistakes(teacher, corpus):
            yield ("teacher", *name.split(".")), what
    weights = teacher.get("weights", "full")
    if weights != "full" and teacher.get("sharded"):
        yield ("teacher", "sharded"), f"weights: {weights} cannot be sharded. Set it to false."
    if weights == "full" and teacher.get("reference") is not None:
        yield ("teacher", "reference"), "weights: full are the reference themselves. Leave it out."


def _across_capture(capture: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    finer = {"sampled": "threshold", "topk": "k"}.get(capture.get("name", ""))
    given = [name for name in (finer, "bytes_per_position") if name and capture.get(name) is not None]
    if len(given) == 2:
        yield ("capture", given[0]), f"{given[0]} and bytes_per_position are both given. Leave one out."
    if finer == "k" and not given:
        yield ("capture", "k"), "neither k nor bytes_per_position is given. Give one of them."


def _across_evaluations(tree: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    entries, listed = registry.entries("evaluation"), tree.get("evaluations")
    for number, given in enumerate(listed if isinstance(listed, list) else []):
        kind = entries.get(str(given.get("name"))) if isinstance(given, dict) else None
        if kind is not None and issubclass(kind, EvaluationConfig):
            with contextlib.suppress(TypeError):  # of a value that validation refuses for its type
                for name, what in kind.mistakes(given):
                    yield ("evaluations", str(number), name), what


def _across_arms(compare: dict[str, Any], tree: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    teacher, objective, train = (
        tree[s] if isinstance(tree.get(s), dict) else {} for s in ("teacher", "objective", "train")
    )
    if objective.get("kd_weight") == 0:
        yield (
            ("compare",),
            "objective.kd_weight is 0: there is no KD arm to compare. Raise it, or leave compare out.",
        )
    corrected, steps = compare.get("corrected_steps", 0), train.get("steps")
    kind = registry.entries("teacher").get(str(teacher.get("name")))
    if corrected and kind is not None and not getattr(kind, "has_weights", False):
        yield ("compare", "corrected_steps"), f"teacher {kind.name} has no weights to train. Set it to 0."
    is_whole = isinstance(corrected, int) and isinstance(steps, int)
    if is_whole and compare.get("budget") == "steps" and corrected >= steps:
        yield (
            ("compare", "corrected_steps"),
            f"{corrected} steps of the teacher's own training leave none of {steps}. Set it lower.",
        )
