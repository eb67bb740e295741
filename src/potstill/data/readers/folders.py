"""Which files a corpus has: all of a folder that match, behind links too, or an error that names what is not read.

A corpus that lacks a part trains another model without a word, so nothing that may hold text is passed over: a
folder that cannot be read, a link that leads nowhere and a file that is not a plain one are refused.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from potstill.errors import UserError
from potstill.io.safe_open import (
    NO_FILE,
    WINDOW,
    made_by_kernel,
    opened,
    printable_name,
    refuse,
    require_file,
    unreadable,
)

MOVE = "Make it readable, or move it out of corpus.path."
SHOWN = 8
"""Names in a message."""
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
REMOVE = "Remove it, or leave it out with a pattern."


def files_with(path: Path, patterns: Sequence[str], others: list[str] | None = None) -> list[Path]:
    """Files of a folder that match a reader's own patterns; see `files_of`.

    Capitals in a name do not matter, and of JSON files only those are read that hold an array: others beside the data
    describe it.

    Args:
        others: gets the names of the files that are not read.
    """
    names: list[str] = [] if others is None else others
    found = files_of(path, patterns, any_case=True, others=names)
    if os.path.isdir(path):
        described = {file for file in found if file.suffix.lower() == ".json" and not _holds_array(file)}
        names += [str(file.relative_to(path)) for file in described]
        found = [file for file in found if file not in described]
        names.sort()
    if not found:
        raise UserError(
            f"corpus.path: no file of {path} matches {', '.join(patterns)}; it has {listed(names)}. Name another"
            " folder, or name the files so."
        )
    return found


def listed(names: Sequence[str], count: int | None = None) -> str:
    """The first names, and how many more there are; of those that are compressed it says what to do."""
    shown = [
        printable_name(name) + (" (decompress it first)" if name.lower().endswith(COMPRESSED) else "")
        for name in names[:SHOWN]
    ]
    more = (count or len(names)) - len(shown)
    return ", ".join([*shown, *([f"{more} more"] if more else [])]) or "none"


def _holds_array(file: Path) -> bool:
    with opened(file, "JSON", REMOVE) as stream:
        try:
            return stream.read(WINDOW).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        except OSError as error:
            raise unreadable(file, error, REMOVE) from error


def files_of(
    path: Path,
    include: Sequence[str],
    exclude: Sequence[str] = (),
    any_case: bool = False,
    others: list[str] | None = None,
) -> list[Path]:
    """Files of a folder that match, sorted so that a corpus is the same on every file system.

    Patterns match a file's name or its path in the folder; hidden files and folders are none. Links to folders
    are followed, and each folder is read once: under its own name where it lies inside `path`, else under the
    first link to it.

    Args:
        any_case: match the names in small letters.
        others: gets the names of files that do not match; with it, that none does is no error.

    Raises:
        UserError: no such path, nothing in it that matches, a file that is not a plain one, a link that leads
            nowhere, a link to a folder that holds `path`. A folder that cannot be read is Unreadable.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        return [path]  # also a FIFO or a device: opening it raises the error that names it
    if not os.path.isdir(path):
        raise UserError(f"corpus.path: no file or folder {path}.")
    matching = {}
    for relative, entry in _entries(path, include, exclude):
        # A link that leads nowhere, named like a folder, may have led to one with files that match.
        is_lost_folder = (
            entry.is_symlink() and not os.path.splitext(relative)[1] and not os.path.exists(entry.path)
        )
        is_named = _matches(relative.lower() if any_case else relative, include)
        if (is_named or is_lost_folder) and not _matches(relative, exclude):
            matching[path / relative] = entry
        elif others is not None:
            others.append(relative)
    for file in sorted(matching):
        if not matching[file].is_file(follow_symlinks=False):  # most need no call to the system
            require_file(file, REMOVE)
    if not matching and others is None:
        left = f", {', '.join(exclude)} left out" if exclude else ""
        raise UserError(f"corpus.path: no file of {path} matches {', '.join(include)}{left}.")
    return sorted(matching)


def has_match(path: Path, include: Sequence[str]) -> bool:
    """Whether a folder has a file that matches."""
    return os.path.isdir(path) and any(_matches(name, include) for name, _ in _entries(path, include, ()))


def _entries(
    root: Path, include: Sequence[str], exclude: Sequence[str]
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every entry that is no folder, with its path in `root`."""
    seen: dict[tuple[int, int], str] = {}
    above = {_identity(root, folder) for folder in Path(os.path.realpath(root)).parents}
    folders, links = [""], list[str]()
    while folders or links:
        # Folders before links, so that a folder inside `root` is read under its own name.
        name = folders.pop() if folders else heapq.heappop(links)
        folder = root / name
        identity = _identity(folder, folder)
        if identity in above:
            refuse(folder, "a link to a folder that holds corpus.path", "Remove it.")
        if identity in seen:
            _require_own_name(name, seen[identity], include)
            continue
        seen[identity] = name
        if kind := made_by_kernel(identity[0]):
            refuse(folder, f"{kind}, not a folder of files", "Name another in corpus.path.")
        for entry in _scan(folder):
            relative = f"{name}/{entry.name}" if name else entry.name
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            if not _is_folder(entry):
                yield relative, entry
            elif _excludes_all_of(relative, exclude):
                continue
            elif entry.is_symlink():
                heapq.heappush(links, relative)
            else:
                folders.append(relative)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise unreadable(folder, error, MOVE) from error


def _identity(where: Path, folder: Path) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise unreadable(where, error, MOVE) from error
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in NO_FILE:
            return False  # a link to itself
        raise unreadable(Path(entry.path), error, MOVE) from error


def _matches(relative: str, patterns: Sequence[str]) -> bool:
    name = os.path.basename(relative)
    return any(fnmatch(relative, pattern) or fnmatch(name, pattern) for pattern in patterns)


def _excludes_all_of(folder: str, exclude: Sequence[str]) -> bool:
    """Whether a pattern leaves out whatever lies below: a final star matches any rest, slashes too."""
    return any(pattern.endswith("*") and fnmatch(f"{folder}/", pattern) for pattern in exclude)


def _require_own_name(link: str, name: str, include: Sequence[str]) -> None:
    """Refuse a pattern for the files behind a link whose folder is read under another name: none would match."""
    for pattern in include:
        if pattern.startswith(f"{link}/"):
            raise UserError(
                f"corpus.include: {pattern!r} goes through the link {link!r} to a folder that is read as"
                f" {name or '.'!r}. Write the pattern for that."
            )
