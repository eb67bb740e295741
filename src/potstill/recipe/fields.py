"""The types of a recipe's fields, and the base of every config class.

A plug-in's config class uses the same types: `LocalPath` is a path relative to the recipe, `Count` a whole number
from 1 up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import Interval, MinLen
from pydantic import AfterValidator, ConfigDict, PlainValidator, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

from potstill.errors import UserError
from potstill.recipe.messages import shown
from potstill.recipe.paths import locate, locate_data, locate_dataset, locate_evaluation, place

HubKind = Literal["model", "tokenizer", "data set"]
MAX_INT32 = 2**31 - 1
DEVICE = "^(auto|cpu|cuda(:[0-9]{1,3})?)$"


def require_device(value: str, folder: Path) -> str:
    if not re.fullmatch(DEVICE, value):
        raise UserError(f"{shown(value)} is not one of auto, cpu, cuda, cuda:N.")
    return value


def _chunk(value: Any, folder: Path) -> Any:
    if value != "auto" and not (type(value) is int and 1 <= value <= MAX_INT32):
        raise UserError(f"{shown(value)} is neither auto nor a whole number from 1 to {MAX_INT32}.")
    return value


def _ascending(value: list[int], folder: Path) -> list[int]:
    if value != sorted(set(value)):
        raise UserError(f"{value} is not in ascending order. List each layer once, the lowest first.")
    return value


def check(verify: Callable[[Any, Path], Any]) -> AfterValidator:
    """A validator that calls `verify(value, folder of the recipe)`, which returns the value to keep or raises
    UserError; the message is reported with the field's name in front.
    """

    def validate(value: Any, info: ValidationInfo) -> Any:
        try:
            return verify(value, typing.cast(Path, info.context))
        except UserError as error:
            raise PydanticCustomError("user_error", "{message}", {"message": str(error)}) from error

    return AfterValidator(validate)


LocalPath = Annotated[str, check(locate)]
Place = Annotated[str, check(place)]
DataPath = Annotated[str, check(locate_data)]
DataSet = Annotated[str, check(locate_dataset)]
"""Data: a path relative to the recipe, or a data set of the hub, `owner/name` or `owner/name@revision`."""
EvaluationPath = Annotated[str, check(locate_evaluation)]
ModelSource = Annotated[str, check(functools.partial(locate, or_hub_id=True))]
"""A model: a path relative to the recipe, `package:NAME/FILE`, or a hub id, `owner/name` or `owner/name@revision`."""
TokenizerSource = Annotated[str, check(functools.partial(locate, or_hub_id=True))]
"""The same, of which the tokenizer alone is read: from the hub no weights are fetched."""
Count = Annotated[int, Interval(ge=1, le=MAX_INT32)]
CountOrZero = Annotated[int, Interval(ge=0, le=MAX_INT32)]
Chunk = Annotated[
    int | Literal["auto"],
    PlainValidator(check(_chunk).func),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_INT32}, {"const": "auto"}]}),
]
Positive = Annotated[float, Interval(gt=0)]
PositiveOrZero = Annotated[float, Interval(ge=0)]
Seed = Annotated[int, Interval(ge=0, le=2**63 - 1)]
Share = Annotated[float, Interval(gt=0, le=1)]
BelowOne = Annotated[float, Interval(ge=0, lt=1)]


def _weights(value: Any, folder: Path) -> int:
    written = (
        re.fullmatch(r"([0-9]{1,16}(?:\.[0-9]{1,16})?) ?([KMB]?)", str(value))
        if type(value) in (int, str)
        else None
    )
    number = round(float(written[1]) * 1000 ** " KMB".index(written[2] or " ")) if written else 0
    if not 1 <= number <= 10**15:
        raise UserError(f"{shown(value)} is not a number of weights, such as 60M or 1.5B.")
    return number


Weights = Annotated[
    int,
    PlainValidator(check(_weights).func),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^[0-9.]+ ?[KMB]?$"}]}
    ),
]
"""A number of weights: 60M, 1.5B, or all of its digits."""
Layers = Annotated[list[CountOrZero], MinLen(1), check(_ascending)]


def _id(what: str, form: str) -> Callable[[str, Path], str]:
    def check(value: str, folder: Path) -> str:
        if not re.fullmatch(form, value):
            raise UserError(f"{shown(value)} is not a {what}.")
        return value

    return check


HubId = Annotated[str, check(_id("hub id (owner/name)", r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"))]
LicenseId = Annotated[
    str, check(_id("license in the Hub's spelling, such as apache-2.0", r"[a-z0-9][a-z0-9.+-]{0,63}"))
]


def _date(value: str, folder: Path) -> str:
    try:
        return datetime.date.fromisoformat(value).isoformat()
    except ValueError:
        raise UserError(f"{shown(value)} is not a date. Write it as 2024-07-26, in quotes.") from None


Date = Annotated[str, check(_date)]


class Config:
    """Base of every config class: unknown keys are refused, numbers are finite, each field's docstring is its
    documentation: see `documented`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    @property
    def plugin_file(self) -> Path | None:
        """The file of the plug-in that defines the class; None for a built-in one."""
        module = type(self).__module__
        file = None if module.startswith("potstill.") else getattr(sys.modules.get(module), "__file__", None)
        return None if file is None else Path(file)

    @property
    def registered_name(self) -> str:
        """Its name in the registry; empty for a section that is not registered."""
        return str(self.__dict__.get("name", ""))


@contextlib.contextmanager
def documented() -> Iterator[None]:
    """Within it a schema has the fields' docstrings, which pydantic reads out of each class's source: for a recipe that
    takes most of a second, and only its JSON schema shows them.
    """
    Config.__pydantic_config__["use_attribute_docstrings"] = True
    try:
        yield
    finally:
        del Config.__pydantic_config__["use_attribute_docstrings"]


C = TypeVar("C", bound=Config)


def with_sources(config: C, replaced: Callable[[str, str, HubKind], str], prefix: str = "") -> C:
    """A copy of a section, and of those inside it, with each model and data set that it names replaced by
    `replaced(dotted field, name, kind)`."""
    section: Any = config
    changed: dict[str, Any] = {}
    for each in dataclasses.fields(section):
        value, name = getattr(section, each.name), f"{prefix}{each.name}"
        if isinstance(value, Config):
            changed[each.name] = with_sources(value, replaced, f"{name}.")
        elif isinstance(value, list) and any(isinstance(entry, Config) for entry in value):
            changed[each.name] = [
                with_sources(entry, replaced, f"{name}.{i}.") for i, entry in enumerate(value)
            ]
        elif isinstance(value, str) and (kind := _hub_kind(each.type)) is not None:
            changed[each.name] = replaced(name, value, kind)
    replacement: C = dataclasses.replace(section, **changed)
    return replacement


def _hub_kind(annotation: Any) -> HubKind | None:
    """Also of an annotation that is still text, in a plug-in, too: nothing of its module is evaluated."""
    kinds: tuple[tuple[HubKind, str, Any], ...] = (
        ("model", "ModelSource", ModelSource),
        ("tokenizer", "TokenizerSource", TokenizerSource),
        ("data set", "DataSet", DataSet),
    )
    if isinstance(annotation, str):
        return next((kind for kind, name, _ in kinds if re.search(rf"\b{name}\b", annotation)), None)
    types = (annotation, *typing.get_args(annotation))
    return next((kind for kind, _, source in kinds if source in types), None)


def lacks_method(config: Config, method: str) -> UserError:
    """The error of a plug-in's config class without the one method that its kind requires."""
    return UserError(
        f"{type(config).__name__}: its config class has no method `{method}`. See docs/extending.md."
    )
