"""Plug-ins, and the registry's entries as types of a recipe's fields.

Refused: a plug-in that does not import, and options of types that YAML cannot express.
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

from pydantic import Field, GetCoreSchemaHandler, TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic_core import CoreSchema, core_schema

from potstill import registry
from potstill.errors import UserError
from potstill.recipe.fields import Config
from potstill.recipe.paths import locate

_loaded: dict[Path, str] = {}


def load_plugins(tree: dict[str, Any], folder: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """Import a recipe's plug-ins, and yield (field, message) for each that fails. Missing files are left to the
    validation of `plugins`.
    """
    for kind in registry.HOMES:
        registry.entries(kind)  # built-in entries first, so that a clash of names is the plug-in's error
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
    """Import a file once for each content: importing it again makes new functions, and equal recipes differ."""
    registry.load_plugin(path)
    _loaded[path] = hashlib.sha256(content).hexdigest()


def plugin_sha256(path: Path) -> str:
    """sha256 of a plug-in's file as it was last imported: that is the code that runs, whatever the file is now."""
    return _loaded.get(path) or hashlib.sha256(path.read_bytes()).hexdigest()


def config_types(kind: str, only: str = "") -> tuple[Any, ...]:
    """The config class of every registered entry of a kind; that of a divergence is made from its function.

    Args:
        only: a class variable that leaves out the entries where it is false.

    Raises:
        UserError: an option has a type that YAML cannot express.
    """
    make = _options_type if kind == "divergence" else _config_type
    entries = registry.entries(kind).items()
    return tuple(make(kind, name, entry) for name, entry in entries if not only or getattr(entry, only, True))


def divergence(name: str) -> Any:
    """A divergence with its default options."""
    return _options_type("divergence", name, registry.entries("divergence")[name])()


@functools.cache
def _config_type(kind: str, name: str, entry: Any) -> Any:
    base = f"{kind.capitalize()}Config"
    if base not in {parent.__name__ for parent in entry.__mro__} or not issubclass(entry, Config):
        raise UserError(f"{kind} {name}: {entry.__name__} is not a {base}. Derive it from potstill.{base}.")
    try:
        TypeAdapter(entry)
    except (TypeError, ValueError, NameError, AttributeError, SyntaxError, PydanticUserError) as error:
        raise _unreadable(kind, name, error) from error
    return entry


@functools.cache
def _options_type(kind: str, name: str, function: Any) -> Any:
    """A dataclass of the function's options. Cached: recipes compare equal only with the same type."""
    try:
        options = registry.options_type(name, function)
        # Not the hints of the whole function: the types of its tensors may exist for the type checker only.
        hints = typing.get_type_hints(options, getattr(function, "__globals__", {}), include_extras=True)
        formula = (function.__doc__ or name).strip().splitlines()[0]
        for option in dataclasses.fields(options):
            described = formula if option.name == "name" else f"{option.name} in: {formula}"
            option.type = _described(hints[option.name], described)
            options.__annotations__[option.name] = option.type
        options.__pydantic_config__ = Config.__pydantic_config__  # type: ignore[attr-defined]
        options.__doc__ = function.__doc__
        TypeAdapter(options)
    except (TypeError, ValueError, NameError, AttributeError, SyntaxError, PydanticUserError) as error:
        raise _unreadable(kind, name, error) from error
    return options


def _unreadable(kind: str, name: str, error: Exception) -> UserError:
    no_schema = isinstance(error, PydanticUserError)
    reason = "an option has a type that YAML cannot express" if no_schema else str(error).rstrip(".")
    advice = "Annotate each option with a plain type, such as float."
    return UserError(f"{kind} {name}: its options cannot be read: {reason}. {advice}")


def _described(hint: Any, description: str) -> Any:
    """The type with a description; its own annotations come later, so that its own description wins."""
    inner, *own = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    return Annotated[(inner, Field(description=description), *own)]


@dataclasses.dataclass(frozen=True)
class Registered:
    """Annotation of a field whose value is one registered entry of a kind, with its options."""

    kind: str
    short: bool = False
    """Whether a bare name is accepted for `{name: NAME}`."""
    only: str = ""
    """A class variable that must be true of an entry; empty: any entry."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        types = config_types(self.kind, self.only)
        whole = handler.generate_schema(
            Annotated[functools.reduce(operator.or_, types), Field(discriminator="name")]
        )
        if not self.short:
            return whole
        short = core_schema.literal_schema([each.name for each in types])
        return core_schema.no_info_before_validator_function(
            lambda value: {"name": value} if isinstance(value, str) else value,
            whole,
            json_schema_input_schema=core_schema.union_schema([short, whole]),
        )
