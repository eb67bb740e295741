"""From two models and data to a recipe: `potstill init`.

The models' configs and tokenizers and a sample of the documents are read, by what a run reads them with; no weight is.
Whatever a run would refuse is refused here, and then nothing is written.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.build.resolve import Resolved, resolve
from potstill.build.vocabulary import require_one_vocabulary
from potstill.data import tokenizers
from potstill.data.readers.look import Look, look, refuse
from potstill.errors import UserError, one_line
from potstill.io import yaml
from potstill.io.atomic import writing
from potstill.io.cpu_matmul import choose_product_dtype
from potstill.io.hashing import file_sha256
from potstill.io.terminal import printable, short
from potstill.models.load import longest_row, num_weights, plain_config
from potstill.models.source import ModelFiles
from potstill.preflight.fitting import Fitted, fitted
from potstill.preflight.packing_probe import require_packing
from potstill.recipe.commented import ORDER, Chosen, replaced
from potstill.recipe.load import SHORT_FORMS, parse
from potstill.recipe.messages import shown
from potstill.recipe.paths import locate, locate_dataset
from potstill.recipe.plugins import load_plugins
from potstill.registry import entries
from potstill.workflows import init_values as values
from potstill.workflows.init_making import Making, Note

CUT = "cut"
NOT_THE_LIBRARY = ["site-packages/*", "dist-packages/*", "test/*", "*/test/*", "*/tests/*"]
"""Of `stdlib:`: what is installed there, and tests, which have files that are no text on purpose."""
PLACEHOLDERS: dict[str, Any] = {
    "corpus": {"name": "text", "path": "."},
    "train": {"steps": 1, "rows_per_step": 1, "lr": 1e-4},
}
"""What a recipe has before its data and steps are known."""
MANY = 10**6
BY_KIND = ("corpus", "teacher", "student", "rollouts", "plugins")
"""Sections that can only be read once their kind is known."""
TYPES = {"name": str, "split": str, "subset": str, "exclude": list}
"""Of the fields of a corpus by which its kind is looked for."""


@dataclass(frozen=True)
class Written:
    """The recipe that was written, and what is to be said of it."""

    path: Path
    chosen: list[Chosen]
    fitted: Fitted
    warnings: list[str]


def init(
    teacher: str,
    student: str,
    data: str,
    out: Path,
    overrides: Sequence[str] = (),
    note: Note = lambda _: None,
) -> Written:
    """Write a recipe with a reason above each value.

    Args:
        teacher: folder, GGUF file, hub id or `package:NAME/FILE`.
        student: the same, a config.json, or `cut`.
        data: file, folder, `stdlib:`, `package:NAME/FILE` or a data set of the hub.
        overrides: `a.b=value` that are kept as they are.

    Raises:
        UserError: there is such a file, or models and data do not go together; nothing is written.
    """
    _require_new(out)
    given: dict[str, Any] = {}
    for each in overrides:
        yaml.override(given, each, SHORT_FORMS)
    making = Making(out, given, note)
    for _, what in load_plugins(given, making.folder):
        raise UserError(f"plugins: {what}")
    _require_values(making, overrides)
    resolved = _models(making, teacher, student)
    path = _located(data)
    if "plugins" in given:
        making.draft.choose("plugins", given["plugins"])
    seen = _corpus(making, resolved, data, path)
    _reading(making, resolved, seen)
    resolved, documents = values.read_sample(making, resolved, seen)
    values.choose_rows(making, resolved, documents)
    values.choose_steps(making, resolved, documents)
    values.choose_samples(making, resolved, seen, documents)
    found = _fit(making, resolved)
    values.choose_rate(making, resolved, documents)
    making.parsed(making.draft.tree())  # as it will be read
    command = ["potstill", "init", teacher, student, data, *overrides, "--out", out.name]
    _write(out, making.draft.with_reasons(_head(command, out, found)))
    return Written(out, making.draft.chosen, found, making.warnings)


def _require_new(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError(f"{out}: there is such a file, and it is not overwritten. Name another: --out FILE.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: no folder {out.parent}. Make it, or name another: --out FILE.")


def _require_values(making: Making, overrides: Sequence[str]) -> None:
    """Refuse what no recipe can have, before other values are chosen by it.

    Raises:
        UserError: with every such override.
    """
    given, mistakes = making.draft.given, list[str]()
    for section in (name for name in ORDER if name in given and name != "plugins"):
        if not isinstance(inside := given[section], dict):
            itself = f" The {section} itself is given in front: potstill init TEACHER STUDENT|cut DATA."
            mistakes.append(
                f"override {section}={shown(inside)}: not a section of fields. Write {section}.FIELD=VALUE."
                + itself * (section in ("teacher", "student"))
            )
    corpus = given.get("corpus", {})
    for field, kind in TYPES.items() if isinstance(corpus, dict) else ():
        if not isinstance(corpus.get(field, kind()), kind):
            what = {str: "a text", list: "a list"}[kind]
            mistakes.append(f"override corpus.{field}={shown(corpus[field])}: not {what}.")
    if mistakes:
        raise UserError(*mistakes)
    train = {"steps": MANY, "rows_per_step": MANY, "lr": 1e-4}
    if given.get("train", {}).get("epochs") is not None:
        del train["steps"]
    their = {
        "teacher": {"name": "torch", "model": "."},
        "student": {"name": "cut", "layers": 1},
        "train": train,
    }
    their |= {"plugins": given["plugins"]} if "plugins" in given else {}
    apart = [each for each in overrides if each.partition("=")[0].split(".")[0] not in BY_KIND]
    tree = yaml.write(PLACEHOLDERS | their)
    parse(tree, where=str(making.out), folder=making.folder, overrides=apart)


def _located(data: str) -> str:
    try:
        return locate_dataset(data, Path.cwd())
    except UserError as error:
        raise _named("data", error) from error


def _named(who: str, error: UserError) -> UserError:
    """A path that is an argument is relative to the folder in which the command is given."""
    return UserError(f"{who}: {error}".replace("relative to the recipe", "relative to this folder"))


def _models(making: Making, teacher: str, student: str) -> Resolved:
    """The two models, which must be two and have one vocabulary."""
    sources = {}
    for who, value in (("teacher", teacher), ("student", student)):
        if "://" in value:
            raise UserError(
                f"{who}: {value:.200} is a server, whose models are not read here. A served teacher is written into a"
                " recipe by hand: docs/served-teachers.md."
            )
        if who == "teacher" or value != CUT:
            try:
                sources[who] = locate(value, Path.cwd(), or_hub_id=True)
            except UserError as error:
                raise _named(who, error) from error
    kind = CUT if student == CUT else _kind_of(sources["student"])
    their: dict[str, dict[str, Any]] = {
        "teacher": {"name": "torch", "model": sources["teacher"], "dtype": "auto"}
    }
    their["student"] = {"name": kind} | ({"layers": 1} if kind == CUT else {"model": sources["student"]})
    for section in their:
        their[section] |= making.draft.given.get(section, {})
    if kind == CUT and len(their["student"].keys() & {"layers", "keep", "weights", "fraction"}) > 1:
        del their["student"]["layers"]
    resolved = resolve(making.parsed(PLACEHOLDERS | their))
    for files in resolved.checkpoints:
        files.verify()
    teacher_config, student_config = (
        plain_config(resolved.teacher.layers_config),
        resolved.student.model_config,
    )
    many, few = num_weights(teacher_config), num_weights(student_config)
    if kind != CUT:
        _require_two(making, resolved, teacher, student)
        require_one_vocabulary(resolved)
        if few > many:
            making.warnings.append(
                f"the student has {short(few)} weights and its teacher {short(many)}: are they named in each other's"
                " place?"
            )
    choose, device = making.draft.choose, resolved.device
    choose("teacher.name", "torch", f"{_described(teacher_config)}, {short(many)} weights")
    choose("teacher.model", making.source(teacher, sources["teacher"]))
    dtype, reason = choose_product_dtype(device)
    choose("teacher.dtype", "auto", f"{dtype} on this machine: {reason.removeprefix('auto: ')}")
    what = {CUT: "cut from the teacher", "checkpoint": "a trained model", "config": "random weights"}[kind]
    if kind == CUT:
        choose(
            "student.name",
            kind,
            f"{what}, which has {teacher_config.get_text_config().num_hidden_layers} layers",
        )
        values.choose_size(making, resolved, many)
    else:
        choose("student.name", kind, f"{what}: {_described(student_config)}, {short(few)} weights")
        choose("student.model", making.source(student, sources["student"]))
    return resolved


def _kind_of(student: str) -> str:
    """A config.json, or a folder with no weights beside it, is a student of random weights."""
    path = Path(student)
    if path.suffix == ".json":
        return "config"
    weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
    is_folder = path.is_dir() and (path / "config.json").is_file()
    return (
        "config" if is_folder and not any(each.suffix in weights for each in path.iterdir()) else "checkpoint"
    )


def _described(config: Any) -> str:
    longest = longest_row(config)
    return f"{config.model_type}" + ("" if longest is None else f", rows of up to {longest} tokens")


def _require_two(making: Making, resolved: Resolved, teacher: str, student: str) -> None:
    """UserError where both are one model, by its place or by its files; `check` compares the weights themselves."""
    if making.draft.given.get("allow_identical") or resolved.student.config.name != "checkpoint":
        return
    one, two = (
        _weights_of(files) for files in (resolved.teacher.checkpoints[0], resolved.student.checkpoints[0])
    )
    are_alike = [file.stat().st_size for file in one] == [file.stat().st_size for file in two]
    if one == two or (are_alike and [*map(file_sha256, one)] == [*map(file_sha256, two)]):
        raise UserError(
            f"student: {student} is the same model as teacher {teacher}: nothing would be learned. Name another, or"
            " `cut` to make a smaller one of the teacher."
        )


def _weights_of(files: ModelFiles) -> list[Path]:
    path = Path(os.path.realpath(files.path))
    return [path] if path.is_file() else sorted(map(Path, map(os.path.realpath, path.glob("*.safetensors"))))


def _corpus(making: Making, resolved: Resolved, data: str, path: str) -> Look:
    """The kind of the data, plug-ins' kinds first, and how it is read."""
    draft = making.draft
    told = draft.given.get("corpus", {})
    exclude = told.get("exclude", NOT_THE_LIBRARY if data.startswith("stdlib:") else [])
    seen = look(path, resolved.teacher.vocab_size, told.get("split"), told.get("subset"), exclude)
    kinds = entries("corpus")
    order = sorted(kinds, key=lambda name: (kinds[name].__module__.startswith("potstill."), name))
    for name in [told["name"]] if told.get("name") in kinds else order:
        if (found := _recognised(kinds[name], seen)) is not None:
            break
    else:
        if "name" not in told:
            refuse(seen)
        found = {"path": path}, "as given"
    fields, why = found
    draft.choose("corpus.name", name, printable(why, keep=""))
    for field, value in fields.items():
        is_path = value == path
        draft.choose(f"corpus.{field}", making.source(data, path) if is_path else value)
    if seen.form == "dataset" and not os.path.exists(path):
        draft.choose("corpus.shards", "tokens", "the data set is streamed once; its tokens are kept here")
    return seen


def _recognised(kind: Any, seen: Look) -> tuple[dict[str, Any], str] | None:
    try:
        found: tuple[dict[str, Any], str] | None = kind.recognise(seen)
    except UserError:
        raise
    except Exception as error:  # a plug-in's code may raise anything
        if kind.__module__.startswith("potstill."):
            raise
        raise UserError(
            f"corpus {kind.name}: recognise: {type(error).__name__}: {one_line(error)}"
        ) from error
    return found


def _reading(making: Making, resolved: Resolved, seen: Look) -> None:
    """Which tokenizer reads it, whose chat template writes it, and whether documents share a row."""
    draft, kind = making.draft, making.draft.tree()["corpus"]["name"]
    readers = {
        name: tokenizers.load_tokenizer(path)
        for name, files in (
            ("teacher", resolved.teacher.checkpoints),
            ("student", resolved.student.checkpoints),
        )
        for path in [each.path for each in files[:1]]
        if tokenizers.has_tokenizer(path)
    }
    templates = {name: reader.chat_template for name, reader in readers.items() if reader.chat_template}
    is_chat = kind == "chat" or (kind == "prompts" and seen.questions is not None and _is_messages(seen))
    if is_chat and not templates and not draft.is_given("corpus.tokenizer"):
        raise UserError(
            "data: conversations, and neither teacher nor student has a chat template to write them with. Name a"
            " tokenizer of the same vocabulary that has one: corpus.tokenizer=…"
        )
    if kind in ("chat", "prompts") and "teacher" not in templates and "student" in templates:
        source = draft.tree()["student"]["model"]
        draft.choose(
            "corpus.tokenizer", source, "the teacher has no chat template; the student's writes the rows"
        )
    elif kind in ("chat", "prompts") and len(set(templates.values())) > 1:
        making.warnings.append(
            "teacher and student have different chat templates: rows are written by the teacher's, which is saved with"
            f" the student; corpus.tokenizer={draft.tree()['student']['model']} takes the student's"
        )
    if kind == "prompts":
        return
    for name, config in (("teacher", resolved.teacher_config), ("student", resolved.student.model_config)):
        if config is None:
            continue
        try:
            require_packing(config, name)
        except UserError as error:
            why = f"one document a row: {str(error).partition('. ')[0]}"
            draft.choose("corpus.packing", False, printable(why, keep=""))
            return


def _is_messages(seen: Look) -> bool:
    assert seen.questions is not None
    return any(isinstance(record.get(seen.questions[0]), list) for _, record in seen.records)


def _fit(making: Making, resolved: Resolved) -> Fitted:
    """Change what does not fit, with its reason."""
    draft, tree = making.draft, making.draft.tree()
    tree["train"] = {"lr": 1e-4, **tree["train"]}  # depends on what is found here, and takes no memory

    def recipe_with(changes: dict[str, Any]) -> Resolved:
        return making.resolved(resolved, replaced(draft, changes | {"train.lr": tree["train"]["lr"]}))

    making.note("planning the memory of a step")
    found = fitted(recipe_with({}), recipe_with, lambda field: not draft.is_given(field))
    for field, value in found.changes.items():
        draft.choose(field, value, values.why_changed(field, found))
    if "train.rows_per_micro_batch" not in found.changes and found.planned is not None and not found.tried:
        values.note_whole_batch(draft, found)
    return found


def _head(command: Sequence[str], out: Path, found: Fitted) -> list[str]:
    recipe = printable(shlex.quote(out.name), keep="")
    return [
        f"Written by: {printable(shlex.join(command), keep='')}",
        f"On the machine where it was written {values.verdict(found)}.",
        "Every value is yours to change: `potstill schema` lists all fields. Next:",
        f"    potstill check {recipe}",
        f"    potstill distill {recipe}",
    ]


def _write(out: Path, text: str) -> None:
    """Whole, and only where there is no file, however it came there meanwhile."""
    with writing(out):
        try:
            stream = out.open("x", encoding="utf-8")
        except FileExistsError:
            _require_new(out)
            raise
        try:
            with stream:
                stream.write(text)
        except BaseException:
            out.unlink()
            raise
