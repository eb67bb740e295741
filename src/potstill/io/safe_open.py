"""Files of unknown origin: only plain ones are opened, JSON has one meaning, pickles are known by content.

A FIFO in a file's place would block the process for ever, a device would fill its memory, and so may a file
that the kernel makes while it is read (/proc/kmsg, /proc/self/pagemap). A pickle can run code when it is loaded,
whatever its name: none is ever loaded here, and what parses as one is refused.
Whatever this process did not write itself is opened through this module.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import pickletools
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, cast

from potstill.errors import Unreadable, UserError, one_line

FETCH_AGAIN = "Fetch or export it again."
NO_PICKLE = "a pickle can run code"
WINDOW = 1 << 16
"""Bytes at a file's start that decide what it is."""
MAX_JSON_BYTES = 100_000_000
MAX_UNPACKED_BYTES = 64 * 2**20
"""Of a file of evaluation problems, tests or texts; HumanEval has 0.2 MB."""
LFS_POINTER = b"version "
ZIP, OLD_TORCH = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
CALLS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"}
SPECIAL = {
    "a folder": stat.S_ISDIR,
    "a FIFO": stat.S_ISFIFO,
    "a device": stat.S_ISCHR,
    "a block device": stat.S_ISBLK,
    "a socket": stat.S_ISSOCK,
}
KERNEL = {
    *("proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs", "bpf", "pstore"),
    *("devpts", "mqueue", "efivarfs", "binfmt_misc", "fusectl", "rpc_pipefs", "selinuxfs", "nsfs"),
}
"""File systems whose files are no data on a disk: regular by their mode, some of them endless."""

NO_FILE = {errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR}
"""Errors that mean there is no such file, whatever the permissions."""


class KeyTwice(ValueError):
    """A JSON object has a key twice."""


@contextmanager
def opened(path: Path, wanted: str, todo: str) -> Iterator[BufferedReader]:
    """A plain file at its first byte; UserError for anything else, and for a pickle. `wanted` is what the
    file should be. Where the system refuses to read it, the error is Unreadable.
    """
    require_file(path, todo)
    with _without_os_errors(path, todo):
        file = cast(BufferedReader, path.open("rb", WINDOW))
    with file:
        try:
            size = os.fstat(file.fileno()).st_size
            kind = pickle_in(file.peek(WINDOW)[:WINDOW], size)
        except OSError as error:
            raise unreadable(path, error, todo) from error
        if kind:
            refuse(path, f"not {wanted} but {kind}: {NO_PICKLE}", todo)
        yield file


def require_file(path: Path, todo: str) -> None:
    """Refuse, without opening it, what is not a plain file. Where the system does not say, the error is Unreadable."""
    with _without_os_errors(path, todo):
        status = os.stat(path)
        kind = _special(status.st_mode) or made_by_kernel(status.st_dev)
        if kind:
            refuse(path, f"{kind}, not a file", todo)


def made_by_kernel(device: int) -> str:
    """What a file on this device (`st_dev`) is where the kernel makes it up; empty for files that are stored."""
    kind = _file_systems().get(f"{os.major(device)}:{os.minor(device)}")
    return f"made by the kernel ({kind})" if kind in KERNEL else ""


@lru_cache(maxsize=1)  # read once: a corpus may have a million files
def _file_systems() -> dict[str, str]:
    """The type of each mounted file system by its device; empty where the system has no such list."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    # "36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/root rw": optional fields end with the dash.
    return {line.split()[2]: line.partition(" - ")[2].partition(" ")[0] for line in lines}


@contextmanager
def _without_os_errors(path: Path, todo: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        refuse(path, "no such file", todo)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, OSError) and error.errno not in NO_FILE:
            raise unreadable(path, error, todo) from error
        refuse(path, f"cannot be read: {_said(error)}", todo)


def unreadable(path: Path, error: OSError, todo: str) -> Unreadable:
    return Unreadable(f"{path}: cannot be read: {_said(error)}.", todo)


def read_object(path: Path, todo: str) -> dict[str, Any]:
    """The object of a JSON file."""
    with opened(path, "JSON", todo) as file:
        try:
            text = file.read(MAX_JSON_BYTES + 1)
        except OSError as error:
            raise unreadable(path, error, todo) from error
    if len(text) > MAX_JSON_BYTES:
        refuse(path, f"more than {MAX_JSON_BYTES} bytes of JSON", todo)
    return object_of(text, str(path), todo)


def unpacked(path: Path, wanted: str, todo: str) -> bytes:
    """The whole of a small file, which may be gzipped if its name ends in .gz."""
    with opened(path, wanted, todo) as file:
        plain: Any = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        try:
            content: bytes = plain.read(MAX_UNPACKED_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: damaged: {one_line(error)} {todo}") from error
    if len(content) > MAX_UNPACKED_BYTES:
        refuse(path, f"more than {MAX_UNPACKED_BYTES} bytes", todo)
    return content


def json_lines(path: Path, todo: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object on each line of a small file that is not empty, with its place."""
    for number, line in enumerate(io.BytesIO(unpacked(path, "JSON lines", todo)), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}: not a line of JSON: {one_line(error)} {todo}") from error
        if not isinstance(value, dict):
            refuse(where, f"{type(value).__name__}, not an object with named fields", todo)
        yield where, value


def object_of(text: bytes, where: str, todo: str) -> dict[str, Any]:
    """The object that JSON text spells; UserError with `where` in front for anything else."""
    try:
        fields = parse_json(text)
    except KeyTwice as error:
        refuse(where, str(error), todo)
    except ValueError as error:
        refuse(where, f"not JSON: {error}", todo)
    if not isinstance(fields, dict):
        refuse(where, f"a JSON {type(fields).__name__}, not an object", todo)
    return fields


def parse_json(text: bytes) -> Any:
    """Python's JSON in UTF-8, but a key given twice is refused, of which it would read only the last.

    Raises:
        ValueError: with the place in the text, where there is one.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        if "set_int_max_str_digits" in str(error):
            raise ValueError("a number of more than 4300 digits") from None
        raise


def require_plain(folder: Path, todo: str) -> None:
    """Refuse a folder with a FIFO, a socket or a device in it, or of the kernel's: a library that opens one would
    never return.
    """
    try:
        if kind := made_by_kernel(os.stat(folder).st_dev):
            refuse(folder, f"{kind}, not a folder of files", todo)
        names = sorted(os.listdir(folder))
    except OSError as error:
        refuse(folder, f"cannot be read: {_said(error)}", todo)
    for name in names:
        try:
            mode = os.stat(folder / name).st_mode
        except OSError:
            continue  # a link that leads nowhere is refused by whoever needs the file
        if not stat.S_ISDIR(mode) and (kind := _special(mode)):
            refuse(folder / name, f"{kind}, not a file", todo)


def pickle_in(start: bytes, size: int) -> str:
    """What pickle a file of `size` bytes is that begins with `start`; empty where it is none.

    Its opcodes are read and not obeyed. Two first bytes are not enough: token ids and lengths can have them.
    """
    if start.startswith(ZIP):
        return "a zip, as pickles come in"
    has_protocol = start[:1] == b"\x80" and start[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}
    names: list[str] = []
    end = 0
    try:
        for opcode, _, at in pickletools.genops(io.BytesIO(start)):
            names.append(opcode.name)
            end = (at or 0) + 1
    except Exception as error:  # its argument readers raise many kinds
        cut = len(start) < size and "unknown" not in str(error)
        long = has_protocol and cut and (len(names) >= 16 or not CALLS.isdisjoint(names))
        return "a pickle" if long or start.startswith(OLD_TORCH) else ""
    rest = start[end:].strip(b"\0\n ")
    if rest and not (has_protocol and rest.startswith(b"\x80")):
        return ""
    return "a pickle" if has_protocol or not CALLS.isdisjoint(names) else ""


def printable_name(name: str) -> str:
    """A name from a file of unknown origin, fit for one line of a terminal."""
    name = name if len(name) <= 80 else f"{name[:77]}..."
    return name if name and name.isprintable() else ascii(name)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise KeyTwice(f"{printable_name(key)} is there twice, and only one would be read")
    return fields


def _special(mode: int) -> str:
    return next((kind for kind, is_kind in SPECIAL.items() if is_kind(mode)), "")


def _said(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def require_size(path: Path, needed: int, size: int) -> None:
    """Refuse a file of `size` bytes whose header needs another number of them."""
    if needed != size:
        fault = "ends early" if size < needed else "too long"
        refuse(path, f"{fault}: its header needs {needed} bytes, the file has {size}")


def refuse(where: object, what: str, todo: str = FETCH_AGAIN) -> NoReturn:
    raise UserError(f"{where}: {what}. {todo}")


def is_encodable(value: str) -> bool:
    """Whether UTF-8 has it: JSON can spell half a surrogate pair, which tokenizers refuse."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def names_of(record: dict[str, Any]) -> str:
    names = [*map(printable_name, islice(record, 8)), *(["…"] if len(record) > 8 else [])]
    return ", ".join(names) or "nothing"
