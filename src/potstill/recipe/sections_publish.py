"""The section `publish` of a recipe: what a model card says that no file does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import MinLen

from potstill.errors import UserError
from potstill.recipe.messages import shown
from potstill.recipe.sections import Section, check


def _id(what: str, form: str) -> Callable[[str, Path], str]:
    def check(value: str, folder: Path) -> str:
        if not re.fullmatch(form, value):
            raise UserError(f"{shown(value)} is no {what}.")
        return value

    return check


HubId = Annotated[str, check(_id("hub id (owner/name)", r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"))]
LicenceId = Annotated[
    str, check(_id("licence as the Hub spells them, such as apache-2.0", r"[a-z0-9][a-z0-9.+-]{0,63}"))
]


@dataclass(frozen=True, kw_only=True)
class Publish(Section):
    teacher: HubId | None = None
    """Hub id of the teacher for the model card, where the recipe names a file or folder."""
    student: HubId | None = None
    """Hub id of the model that the student began from, likewise; a cut student's is the teacher's."""
    data: Annotated[str, MinLen(1)] | None = None
    """What the corpus is, in a few words for the card."""
    teacher_license: LicenceId | None = None
    """Licence of the teacher; null: read from its own files."""
    student_license: LicenceId | None = None
    """Licence of the model that the student began from; null: read from its own files."""
    data_license: LicenceId | None = None
    """Licence of the corpus; null: read from its own files."""
    license: LicenceId | None = None
    """Licence of the student; null: the one that teacher, begin and corpus ask for."""
