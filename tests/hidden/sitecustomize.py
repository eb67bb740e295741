"""Hides optional parts from every Python that has this folder on PYTHONPATH: `HIDE=peft,bwrap`.

Python imports this file at its start, so that processes which a test starts do not find them either.
"""

from __future__ import annotations

import os
import shutil
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

HIDDEN = frozenset(os.environ.get("HIDE", "").split(","))
_find_spec, _which = PathFinder.find_spec, shutil.which


@classmethod  # so that whoever keeps it as an attribute of a class keeps it bound, as pytest does
def find_spec(
    cls: type[PathFinder], fullname: str, path: Any = None, target: Any = None
) -> ModuleSpec | None:
    return None if fullname.partition(".")[0] in HIDDEN else _find_spec(fullname, path, target)


def which(cmd: Any, *args: Any, **options: Any) -> Any:
    return None if cmd in HIDDEN else _which(cmd, *args, **options)


PathFinder.find_spec = find_spec  # type: ignore[method-assign]
shutil.which = which
