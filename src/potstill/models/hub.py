"""A model's files on this machine, and the one commit of a hub's model that they are of.

A branch moves while a run goes on: whoever reads more than one file of a model, or reads it twice, names it by
`pinned(source)`.
"""

from __future__ import annotations

import os
from pathlib import Path

from potstill.errors import UserError
from potstill.io.hub import hub_id, why_not

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""No code, and no pickles."""
WITHOUT_WEIGHTS = [pattern for pattern in FILES if pattern != "*.safetensors"]


def local_copy(source: str | Path, files: list[str] = FILES) -> Path:
    """A folder or file on this machine; of `owner/name` or `owner/name@revision` these files are fetched from the hub,
    or taken from its cache where there is no network.

    Raises:
        UserError: there is no such file, model or revision, or it cannot be fetched.
    """
    if not isinstance(source, str | Path):
        raise UserError(f"model: {source!r:.60} is no path. Give a folder, a hub id or a GGUF file.")
    if (on_hub := hub_model(source)) is not None:
        return _snapshot(*on_hub, files)
    if not os.path.exists(source):
        raise UserError(
            f"{source}: no such file or folder. A model is a Hugging Face folder, a hub id or a GGUF file."
        )
    return Path(source)


def hub_model(source: str | Path) -> tuple[str, str] | None:
    """`owner/name` and the revision that `source` names; None where it is a path. What exists here is a path."""
    return hub_id(source) if isinstance(source, str) and not os.path.exists(source) else None


def public_name(source: str) -> tuple[str, str | None]:
    """What another machine may know a model by: `owner/name` and its revision, or the last part of a path."""
    return hub_model(source) or (Path(source).name, None)


def tokenizer_files(source: str | Path) -> Path:
    """`local_copy` for a tokenizer alone, whose model may be too large for this machine."""
    return local_copy(source, WITHOUT_WEIGHTS)


def pinned(source: str, files: list[str] = FILES) -> str:
    """`owner/name@COMMIT`, the commit that the revision is now; a path as it is.

    Raises:
        UserError: see `local_copy`.
    """
    on_hub = hub_model(source)
    return source if on_hub is None else f"{on_hub[0]}@{_snapshot(*on_hub, files).name}"


def _snapshot(name: str, revision: str, files: list[str]) -> Path:
    """The folder of the hub's cache that has these files of one commit, and its name."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as error:  # a network fails in many ways
        what = f"{name}@{revision}: no such folder here, and not to be had from the hub"
        raise UserError(f"{what}: {why_not(error, name, revision, 'model')}") from error
