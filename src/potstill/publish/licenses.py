"""Licenses: what a parent's own files state, and which one a student of such parents may carry.

Sources are GGUF metadata, model cards and configs; license texts are not interpreted, and where no file names
a license, none is known. The choice is cautious: what any parent requires, the corpus included, is required
of the student. This is no legal advice. It keeps a license from being lost silently, and what it cannot
settle, a line of the recipe does. Called when a receipt is written, since a parent's files may be gone later,
and by `publish.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from potstill.errors import UserError
from potstill.io.hub import hub_id
from potstill.io.safe_open import opened, read_object
from potstill.models.gguf_files import check_gguf

NO_ANSWER = {"other", "unknown", "cc", "gpl", "lgpl", "gfdl"}
"""Accepted by the Hub as a license, without stating what is permitted."""
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
MAX_CARD_BYTES = 2**20
SETTINGS = ("config.json", "dataset_info.json")
_PERMISSIVE = (
    "apache-2.0 mit bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear isc zlib ncsa unlicense wtfpl bsl-1.0"
    " afl-3.0 artistic-2.0 ecl-2.0 postgresql ms-pl psf-2.0 python-2.0 0bsd cc0-1.0 cc-by-2.0 cc-by-2.5"
    " cc-by-3.0 cc-by-4.0 cdla-permissive-1.0 cdla-permissive-2.0 odc-by pddl etalab-2.0"
)
PERMISSIVE = frozenset(_PERMISSIVE.split())
"""They require a notice at most, and bind the student to nothing."""
NO_DERIVATIVES = "-nd-"
_BINDING = (
    "openrail openrail++ bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 c-uda"
    " bigcode-openrail-m cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-sa-2.0"
    " cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gpl-2.0"
    " gpl-3.0 lgpl-2.1 lgpl-3.0 lppl-1.3c mpl-2.0 odbl osl-3.0 ofl-1.1 lgpl-lr deepfloyd-if-license"
    " apple-amlr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma"
)
HUB = PERMISSIVE - {"psf-2.0", "python-2.0", "0bsd"} | frozenset(_BINDING.split())
"""Identifiers that the Hub lists; any other is `other` there, with `license_name` beside."""


@dataclass(frozen=True)
class Parent:
    role: str
    """teacher, student or data: also, followed by `_license`, the name of its field in the recipe."""
    what: str
    license: str | None
    read_from: str | None


@dataclass(frozen=True)
class StudentLicense:
    license: str
    reason: str


def settle(parents: Sequence[Parent], requested: str | None) -> StudentLicense:
    """The student's license, and why.

    Args:
        parents: the model that the weights come from first, then the teacher, then the data.
        requested: `publish.license` of the recipe.

    Raises:
        UserError: one line for each parent whose license is unknown or forbids derivatives; or parents require
            different terms, or the recipe names a license that they do not allow.
    """
    mistakes = [
        f"license of the {one.role} ({one.what}): {_fault(one)} {_advice(one.role)}"
        for one in parents
        if one.license is None or NO_DERIVATIVES in one.license
    ]
    if mistakes:
        raise UserError(*mistakes)
    binding: dict[str, str] = {}
    for one in parents:
        if one.license is not None and one.license not in PERMISSIVE:
            binding.setdefault(one.license, f"the {one.role}'s {one.license}")
    if len(binding) > 1:
        both = " and ".join(binding.values())
        if requested not in binding:
            raise UserError(
                f"licenses: {both} require different terms. If one of them does not extend to the student, name"
                f" the other in the recipe: publish: {{license: {next(iter(binding))}}}, or add"
                " publish.license=…"
            )
        return StudentLicense(requested, f"chosen by the publisher: {both} require different terms")
    if binding:
        ((needed, whose),) = binding.items()
        if requested not in (None, needed):
            raise UserError(
                f"publish.license: {requested}, but {whose} requires {needed}. Remove the line, or state another"
                " license for that parent if you have one."
            )
        return StudentLicense(needed, f"required by {whose}")
    own = next((one for one in parents if one.license is not None), None)
    if requested is not None:
        return StudentLicense(requested, "chosen by the publisher; no parent requires another")
    if own is None or own.role == "data":
        raise UserError(
            "license of the student: no model's license to inherit. State one in the recipe:"
            " publish: {license: apache-2.0}, or add publish.license=…"
        )
    return StudentLicense(str(own.license), f"inherited from the {own.role}; no parent requires another")


def _fault(one: Parent) -> str:
    if one.license is None:
        return "its files name none."
    return f"{one.license} does not permit sharing derivatives."


def _advice(role: str) -> str:
    example = "cc-by-4.0" if role == "data" else "apache-2.0"
    return (
        f"State the one that you use it under in the recipe, such as publish: {{{role}_license: {example}}},"
        f" or add publish.{role}_license=…"
    )


def license_of(source: str, role: str = "teacher") -> dict[str, str | None]:
    """`license`, as the Hub spells it, or None where none is found, and `read_from`, the file that states it.

    Args:
        source: a Hugging Face folder or a hub id, of which the local copy is read; a GGUF file; a corpus.
        role: teacher, student or data; a hub id of data names a data set.
    """
    try:
        found, where = _read(source, "dataset" if role == "data" else "model")
    except UserError:  # a damaged file states nothing; whoever needs the file refuses it
        found, where = None, None
    return {"license": found, "read_from": where}


def _read(source: str, repo_type: str) -> tuple[str | None, str | None]:
    path = Path(source)
    if source.endswith(".gguf") and os.path.isfile(path):
        return _identifier(
            check_gguf(path).metadata.get("general.license")
        ), f"general.license in {path.name}"
    if not os.path.exists(path):
        return _card_of_hub(source, repo_type)
    if not os.path.isdir(path):
        return None, None
    if (card := _in_card(path / "README.md")) is not None:
        return card, "README.md"
    for name in SETTINGS:
        if os.path.isfile(path / name):
            found = _identifier(read_object(path / name, "Its license is not read.").get("license"))
            if found is not None:
                return found, name
    return None, None


def _card_of_hub(source: str, repo_type: str) -> tuple[str | None, str | None]:
    if (on_hub := hub_id(source)) is None:
        return None, None
    from huggingface_hub import hf_hub_download

    try:
        card = Path(hf_hub_download(on_hub[0], "README.md", revision=on_hub[1], repo_type=repo_type))
    except Exception:  # no network, or no such card: the recipe can state it
        return None, None
    return _in_card(card), f"the card of {source}"


def _in_card(path: Path) -> str | None:
    if not os.path.isfile(path):
        return None
    with opened(path, "a card", "Its license is not read.") as file:
        text = file.read(MAX_CARD_BYTES).decode("utf-8", "replace")
    front = FRONT_MATTER.match(text)
    try:
        fields = yaml.safe_load(front[1]) if front else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    name = fields.get("license_name")
    return _identifier(fields.get("license")) or _identifier(name)


def _identifier(value: Any) -> str | None:
    """One license identifier; from a list of several, a person has to choose."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", value.strip().lower()):
        return None
    found = value.strip().lower()
    return None if found in NO_ANSWER else found
