"""Files and folders that are whole or not there, after a kill and after the power went, too.

What is written goes beside its place and onto the disk, only then takes its name, and then the name goes onto
the disk. A folder so written lists its files in `SHA256SUMS`, which `sha256sum -c` reads too. What the system
refuses is the user's to mend, and one line.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from potstill.errors import UserError
from potstill.io.hashing import file_sha256
from potstill.io.safe_open import opened, printable_name

SUMS = "SHA256SUMS"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")


def write_whole(path: Path, content: bytes) -> None:
    """Write beside, then rename: a reader sees the old file or the new one."""
    beside = path.with_name(path.name + ".new")
    with writing(path):
        beside.write_bytes(content)
        flush(beside)
        os.replace(beside, path)
        flush(path.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk is the user's to mend."""
    try:
        yield
    except OSError as error:
        todo = "Make room" if error.errno in DISK_FULL else "Make it writable"
        raise UserError(
            f"{path}: cannot be written: {error.strerror}. {todo}, then start or resume the run again."
        ) from error


def flush(path: Path) -> None:
    """Onto the disk, a folder's entries too: a rename is only safe after what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """The folder with all in it, where there is one."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(
            f"{folder}: left over, and it cannot be removed: {error.strerror}. Remove it, then start or"
            " resume the run again."
        ) from error


def listed(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name; nothing where there is no folder. One that may not be read is not taken
    for an empty one.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}. Make it readable first.") from error


def replace_folder(place: Path, save: Callable[[Path], None]) -> None:
    """`save` fills a folder beside the old one; only a whole one, on the disk, takes its place."""
    fresh, old = _beside(place)
    repair_folder(place)
    try:
        save(fresh)
        with writing(place):
            for path in (*_summed(fresh), fresh / SUMS, fresh):
                flush(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    with writing(place):
        if place.exists():
            place.rename(old)
        fresh.rename(place)
        flush(place.parent)
    remove(old)


def seal(folder: Path, leave_out: Container[str] = ()) -> None:
    """The same for a folder that is filled in its place: whole once its `SHA256SUMS` is there. It lists every
    file but those named in `leave_out`.
    """
    with writing(folder):
        files = _summed(folder, f"{SUMS}.new", leave_out)
        for path in (*files, folder / f"{SUMS}.new"):
            flush(path)
        (folder / f"{SUMS}.new").rename(folder / SUMS)
        flush(folder)


def _summed(folder: Path, name: str = SUMS, leave_out: Container[str] = ()) -> list[Path]:
    """The files of a folder, whose sums are now in its file of that name."""
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.name != name and path.name not in leave_out
    )
    (folder / name).write_text("".join(f"{file_sha256(path)}  {path.name}\n" for path in files))
    return files


def repair_folder(place: Path) -> None:
    """Undo what a kill left half done in `replace_folder`."""
    fresh, old = _beside(place)
    remove(fresh)
    if old.exists() and not place.exists():
        with writing(place):
            old.rename(place)
    remove(old)


def require_whole(folder: Path, said: Any, todo: str, holds: Iterable[str] = ()) -> None:
    """Each file has the sha256 that `said` or else the folder's own `SHA256SUMS` says, and all that `holds`
    names are among them; UserError else.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, and the run saved its student there. {todo}")
    sums: dict[str, Any] = said if isinstance(said, dict) and said else _sums(folder / SUMS, todo)
    if unsaid := sorted(set(holds) - set(sums)):
        raise UserError(f"{folder / SUMS}: damaged: it has no line for {unsaid[0]}. {todo}")
    for name, sha256 in sums.items():
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: missing, and the run saved it. {todo}")
        if (found := file_sha256(folder / name)) != sha256:
            raise UserError(
                f"{folder / name}: damaged: its sha256 is {found[:12]}…, written was"
                f" {str(sha256)[:12]}…. {todo}"
            )


def _sums(path: Path, todo: str) -> dict[str, str]:
    with opened(path, "a list of sums", todo) as file:
        lines = file.read().decode("utf-8", "backslashreplace").splitlines()
    found = {match[2]: match[1] for line in lines if (match := _LINE.fullmatch(line))}
    if not lines or len(found) < len(lines):
        odd = next((line for line in lines if not _LINE.fullmatch(line)), "nothing")
        raise UserError(f"{path}: damaged: no list of sums: {printable_name(odd)}. {todo}")
    return found


def _beside(place: Path) -> tuple[Path, Path]:
    return place.with_name(f"{place.name}.new"), place.with_name(f"{place.name}.old")
