"""Names on the Hugging Face hub; why something is not to be had from it, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from potstill.errors import one_line

HUB_ID = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>(?!.*\.\.)\w[\w./+-]*))?", re.ASCII
)
DATA_ENDINGS = (".txt", ".jsonl", ".parquet", ".csv", ".gz", ".zst")
FILE_ENDINGS = (".gguf", ".safetensors", ".json", ".bin", ".pt")


def hub_id(value: str) -> tuple[str, str] | None:
    """`owner/name` and the branch, tag or commit that a hub id names, by default main; None for a path."""
    found = HUB_ID.fullmatch(value)
    if found is None or value.endswith(FILE_ENDINGS) or found["name"].endswith(FILE_ENDINGS):
        return None
    return found["name"], found["revision"] or "main"


def dataset_id(value: str) -> tuple[str, str] | None:
    """`hub_id`, where the value does not end like a file of data."""
    return None if value.endswith(DATA_ENDINGS) else hub_id(value)


OFFLINE = {
    "model": "the cache lacks it. Unset it once.",
    "data set": "a data set is streamed. Unset it, or name a commit (owner/name@COMMIT) whose tokens are in"
    " corpus.shards.",
}


def why_not(error: BaseException, name: str, revision: str, what: Literal["model", "data set"]) -> str:
    """An error of the hub's client or of its network, in a sentence and with what to do.

    Args:
        name: `owner/name`.
        what: a model or a data set.
    """
    from huggingface_hub import errors

    chain = list(_chain(error))
    for kind, why in (
        (errors.RevisionNotFoundError, f"no revision {revision!r}. Name a branch, tag or commit of {name}."),
        (errors.GatedRepoError, "its owner grants access on request. Ask for it there, and set HF_TOKEN."),
        (
            errors.RepositoryNotFoundError,
            f"no such {what}, or a private one. Check the name, or set HF_TOKEN.",
        ),
        (errors.OfflineModeIsEnabled, f"HF_HUB_OFFLINE is set, and {OFFLINE[what]}"),
    ):
        if any(isinstance(each, kind) for each in chain):
            return why
    return f"{one_line(chain[1] if len(chain) > 1 else error)} Check the name, the network and HF_TOKEN."


def _chain(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__
