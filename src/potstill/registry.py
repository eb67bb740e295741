"""The registry of what a recipe names and a plug-in may add: divergences, teachers, corpora, evaluations, sinks.

Free of torch, so that a recipe is checked within a moment. A divergence is registered as a function; its keyword-only
parameters are its options in the YAML, with their types, bounds and defaults:

    @register("divergence")
    def jsd(student_logp_NS: "Tensor", teacher_logp_NS: "Tensor", *, beta: OpenUnit = 0.5) -> "Tensor": ...

Every other kind is registered as its config class: a frozen dataclass whose fields are its options, and whose methods
build the object when it is needed; see docs/extending.md:

    @register("teacher")
    @dataclass(frozen=True, kw_only=True)
    class CounterTeacherConfig(TeacherConfig):
        name: Literal["counter"] = "counter"
        start: int = 0

        def load(self, device): ...

Built-in entries are registered the same way. A user's file is listed under `plugins:` in the recipe, and `load_plugin`
imports it before names are looked up.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from potstill.errors import UserError, one_line

F = TypeVar("F", bound=Callable[..., Any])

HOMES = {
    "divergence": "potstill.losses.divergences",
    "teacher": "potstill.recipe.sections_mixture",
    "corpus": "potstill.recipe.sections_mix",
    "evaluation": "potstill.recipe.sections_evaluation",
    "sink": "potstill.recipe.sections_evaluation",
}
"""Kind -> the module whose import registers the built-in entries."""
_entries: dict[str, dict[str, Callable[..., Any]]] = {kind: {} for kind in HOMES}


def register(kind: str) -> Callable[[F], F]:
    """Make a function or a config class known to recipes: a function under its own name, a class under that of its
    field `name`.

    Raises:
        UserError: an unknown kind, a name that another module has registered, or a class that is no config.
    """
    if kind not in HOMES:
        raise UserError(f"register: no kind {kind!r}.{nearest(str(kind), HOMES)}")

    def add(entry: F) -> F:
        name = entry.__name__ if kind == "divergence" else _name_of(kind, entry)
        known = _entries[kind].get(name)
        if known is not None and known.__module__ != entry.__module__:
            raise UserError(f"{kind} {name}: registered twice, by {known.__module__} and {entry.__module__}.")
        _entries[kind][name] = entry
        return entry

    return add


def _name_of(kind: str, entry: Any) -> str:
    """The default of a config class's field `name`."""
    fields = dataclasses.fields(entry) if dataclasses.is_dataclass(entry) else ()
    name = next((f.default for f in fields if f.name == "name"), None)
    if not isinstance(entry, type) or not isinstance(name, str):
        raise UserError(
            f"{kind} {getattr(entry, '__name__', entry)}: not a config class. Register a frozen dataclass with a field"
            ' name: Literal["…"] = "…".'
        )
    return name


def entries(kind: str) -> dict[str, Any]:
    """Every registered entry of a kind, by name."""
    importlib.import_module(HOMES[kind])
    return dict(sorted(_entries[kind].items()))


def implementation(reference: str) -> Any:
    """The object `module:name`, imported now. Config classes refer to what they configure in this form, so that a
    recipe is read without importing torch.
    """
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def options_type(name: str, function: Callable[..., Any]) -> type:
    """A frozen dataclass of a function's options: `name`, and its keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    options = [
        (p.name, p.annotation, field(default=p.default))
        if p.default is not p.empty
        else (p.name, p.annotation)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    ]
    fields: list[Any] = [("name", Literal[name], field(default=name)), *options]
    return make_dataclass(name, fields, frozen=True, kw_only=True)


def load_plugin(path: Path) -> None:
    """Import a user's Python file, which registers its entries as it runs.

    Raises:
        UserError: no such file, not a Python file, or any exception of its code.
    """
    if not path.is_file():
        raise UserError(f"plugins: no file {path}. List Python files, relative to the recipe.")
    if path.suffix != ".py":
        raise UserError(f"plugins: {path}: not a Python file. Give one whose name ends in .py.")
    spec = importlib.util.spec_from_file_location(f"potstill_plugin_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    writes, sys.dont_write_bytecode = (
        sys.dont_write_bytecode,
        True,
    )  # leave no __pycache__ in the user's folder
    sys.modules[spec.name] = module  # dataclasses and pydantic look up a class's module by name
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise UserError(
            f"plugins: {path}: {type(error).__name__}: {one_line(error)} The file must import cleanly."
        ) from error
    finally:
        sys.dont_write_bytecode = writes


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean x?' or, where nothing is similar, ' Known: a, b, c.'"""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else f" Known: {', '.join(known)}."
