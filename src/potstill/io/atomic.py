"""Files and folders that are whole or not there, after a kill or a power failure too.

Content is written beside its place and flushed to the disk, then renamed, then the rename is flushed. A
folder written this way lists its files in `SHA256SUMS`, which `sha256sum -c` reads too. What the system
refuses is the user's to fix: a UserError of one line.
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
    """What the system refuses to write, a full disk for one, as a UserError."""
    try:
        yield
    except OSError as error:
        todo = "Make room" if error.errno in DISK_FULL else "Make it writable"
        raise UserError(
            f"{path}: cannot be written: {error.strerror}. {todo}, then start or resume the run again."
        ) from error


def flush(path: Path) -> None:
    """Force a file, or a folder's entries, onto the disk: a rename is only safe after what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Delete the folder with all in it, if there is one."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(
            f"{folder}: left over from an earlier start, and cannot be removed: {error.strerror}. Remove it,"
            " then start or resume the run again."
        ) from error


def listed(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder by name, none where there is no folder. A folder that cannot be read is an
    error, and not taken for an empty one.
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
    """The same for a folder that was filled in place, and is whole once it has its `SHA256SUMS`: the sums of
    all files but those named in `leave_out`.
    """
    with writing(folder):
        files = _summed(folder, f"{SUMS}.new", leave_out)
        for path in (*files, folder / f"{SUMS}.new"):
            flush(path)
        (folder / f"{SUMS}.new").rename(folder / SUMS)
        flush(folder)


def _summed(folder: Path, name: str = SUMS, leave_out: Container[str] = ()) -> list[Path]:
    """Write the sums of a folder's files into its file `name`; returns these files."""
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.name != name and path.name not in leave_out
    )
    (folder / name).write_text("".join(f"{file_sha256(path)}  {path.name}\n" for path in files))
    return files


def repair_folder(place: Path) -> None:
    """Finish or undo a `replace_folder` that a kill interrupted."""
    fresh, old = _beside(place)
    remove(fresh)
    if old.exists() and not place.exists():
        with writing(place):
            old.rename(place)
    remove(old)


def require_whole(folder: Path, recorded: Any, todo: str, names: Iterable[str] = ()) -> None:
    """Refuse a folder unless each file has its sha256, by `recorded` or else the folder's own `SHA256SUMS`,
    and all of `names` are among them.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, and the run saved its student there. {todo}")
    sums: dict[str, Any] = recorded if isinstance(recorded, dict) and recorded else _sums(folder / SUMS, todo)
    if unlisted := sorted(set(names) - set(sums)):
        raise UserError(f"{folder / SUMS}: damaged: it has no line for {unlisted[0]}. {todo}")
    for name, sha256 in sums.items():
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: missing, and the run saved it. {todo}")
        if (actual := file_sha256(folder / name)) != sha256:
            raise UserError(
                f"{folder / name}: damaged: its sha256 is {actual[:12]}…, that of the file as written was"
                f" {str(sha256)[:12]}…. {todo}"
            )


def _sums(path: Path, todo: str) -> dict[str, str]:
    with opened(path, "a list of sums", todo) as file:
        lines = file.read().decode("utf-8", "backslashreplace").splitlines()
    sums = {match[2]: match[1] for line in lines if (match := _LINE.fullmatch(line))}
    if not lines or len(sums) < len(lines):
        wrong = next((line for line in lines if not _LINE.fullmatch(line)), "nothing")
        raise UserError(f"{path}: damaged: not a list of sums: {printable_name(wrong)}. {todo}")
    return sums


def _beside(place: Path) -> tuple[Path, Path]:
    return place.with_name(f"{place.name}.new"), place.with_name(f"{place.name}.old")
