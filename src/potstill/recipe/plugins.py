"""The divergences that a recipe may name, as types whose fields are their options; plug-ins are loaded first.

Refused: a file that does not import, and options whose types no YAML value can have. Called by `load.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import operator
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic_core import CoreSchema, core_schema

from potstill import registry
from potstill.errors import UserError
from potstill.recipe.paths import locate

_loaded: dict[Path, str] = {}
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def load_plugins(tree: dict[str, Any], folder: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """Import a recipe's plug-ins and yield what is wrong with each; a missing file is left to the fields."""
    registry.entries("divergence")  # first, so that a clash of names is the plug-in's
    plugins = tree.get("plugins")
    for number, plugin in enumerate(plugins if isinstance(plugins, list) else []):
        try:
            path = Path(locate(plugin, folder)) if isinstance(plugin, str) else None
        except UserError:
            continue
        if path is not None:
            try:
                _load(path, path.read_bytes() if path.is_file() else b"")
            except (UserError, OSError) as error:
                yield ("plugins", str(number)), str(error).removeprefix("plugins: ")


@functools.cache
def _load(path: Path, content: bytes) -> None:
    """Once for each content of a file: a second load makes other functions, and recipes that differ."""
    registry.load_plugin(path)
    _loaded[path] = hashlib.sha256(content).hexdigest()


def plugin_sha256(path: Path) -> str:
    """sha256 of a plug-in's file as it was when it was imported last: that code runs, whatever is there."""
    return _loaded.get(path) or hashlib.sha256(path.read_bytes()).hexdigest()


def divergences() -> tuple[Any, ...]:
    """The options of every registered divergence, one dataclass each."""
    return tuple(_options_type(name, function) for name, function in registry.entries("divergence").items())


def divergence(name: str) -> Any:
    """A divergence with its default options."""
    return _options_type(name, registry.entries("divergence")[name])()


@functools.cache
def _options_type(name: str, function: Any) -> Any:
    """The same type for the same function, so that recipes compare equal."""
    try:
        kind = registry.options_type(name, function)
        # Not the hints of the whole function: its tensors' types are often there for the type checker only.
        hints = typing.get_type_hints(kind, getattr(function, "__globals__", {}), include_extras=True)
        formula = (function.__doc__ or name).strip().splitlines()[0]
        for option in dataclasses.fields(kind):
            described = formula if option.name == "name" else f"{option.name} in: {formula}"
            option.type = _described(hints[option.name], described)
            kind.__annotations__[option.name] = option.type
        kind.__pydantic_config__ = CONFIG  # type: ignore[attr-defined]
        kind.__doc__ = function.__doc__
        TypeAdapter(kind)
    except (TypeError, ValueError, NameError, AttributeError, SyntaxError, PydanticUserError) as error:
        is_type = isinstance(error, PydanticUserError)
        said = "an option has a type that no YAML value has" if is_type else str(error).rstrip(".")
        advice = "Annotate each keyword option with a plain type, such as float."
        raise UserError(f"divergence {name}: its options cannot be read: {said}. {advice}") from error
    return kind


def _described(hint: Any, description: str) -> Any:
    """The type with a description, unless it brings its own."""
    inner, *own = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    return Annotated[(inner, Field(description=description), *own)]


class RegisteredDivergence:
    """Marks a field that holds one divergence with its options; a bare name is short for {name: it}."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        kinds = divergences()
        whole = handler.generate_schema(
            Annotated[functools.reduce(operator.or_, kinds), Field(discriminator="name")]
        )
        short = core_schema.literal_schema([kind.name for kind in kinds])
        return core_schema.no_info_before_validator_function(
            lambda value: {"name": value} if isinstance(value, str) else value,
            whole,
            json_schema_input_schema=core_schema.union_schema([short, whole]),
        )
