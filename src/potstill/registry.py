"""Name -> function, for what a recipe may name and a user may add. Torch-free: recipes are checked at once.

A divergence is a function of two log-distributions; its keyword-only parameters are its options in the YAML,
with their types, bounds and defaults. Registering the function is all there is to do:

    @register("divergence")
    def jsd(student_logp_NS: "Tensor", teacher_logp_NS: "Tensor", *, beta: OpenUnit = 0.5) -> "Tensor": ...

A user's own file is named under `plugins:` in the recipe and imported by `load_plugin` before names are
looked up.
"""

from __future__ import annotations

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

# Where the built-in entries of a kind register themselves when imported.
HOMES = {"divergence": "potstill.losses.divergences"}
_entries: dict[str, dict[str, Callable[..., Any]]] = {kind: {} for kind in HOMES}


def register(kind: str) -> Callable[[F], F]:
    """Make a function known to recipes under its own name."""

    def keep(function: F) -> F:
        known = _entries[kind].get(function.__name__)
        if known is not None and known.__module__ != function.__module__:
            raise UserError(
                f"{kind} {function.__name__}: registered twice, by {known.__module__} and"
                f" {function.__module__}."
            )
        _entries[kind][function.__name__] = function
        return function

    return keep


def entries(kind: str) -> dict[str, Callable[..., Any]]:
    """Every registered function of a kind, by name."""
    importlib.import_module(HOMES[kind])
    return dict(sorted(_entries[kind].items()))


def options_type(name: str, function: Callable[..., Any]) -> type:
    """A frozen dataclass of the function's options: `name` and its keyword-only parameters."""
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
    """Import a user's Python file, which registers what it defines."""
    if not path.is_file():
        raise UserError(f"plugins: no file {path}. List Python files, relative to the recipe.")
    if path.suffix != ".py":
        raise UserError(f"plugins: {path}: not a Python file. Give one whose name ends in .py.")
    spec = importlib.util.spec_from_file_location(f"potstill_plugin_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a refusal leaves no file beside theirs
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's file raises is told, with its place
        raise UserError(
            f"plugins: {path}: {type(error).__name__}: {one_line(error)} The file must import cleanly."
        ) from error
    finally:
        sys.dont_write_bytecode = writes


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean x?' or, when nothing is near, ' Known: a, b, c.'"""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else f" Known: {', '.join(known)}."
