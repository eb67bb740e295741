"""A folder as files of limited size, and back: for a machine that takes and gives only small ones.

    python parts.py split FOLDER PARTS --mib 56    PARTS/part-0, part-1, … and PARTS/parts.json with their hashes
    python parts.py join PARTS FOLDER              each part is compared with its hash before anything is unpacked

Of weights in bfloat16, `halves` makes two thirds: signs and exponents, every second byte, are much alike.

Nothing but Python is needed, since it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import IO, Any

LIST = "parts.json"
HALVES = "halves.json"
"""Beside it, where the folder was written so: the bytes of the compressed half, which comes first."""


def split(folder: Path, parts: Path, part_bytes: int, halves: bool = False) -> list[dict[str, Any]]:
    """Write `folder` as parts of at most `part_bytes` bytes.

    Args:
        halves: second bytes apart from the first, and compressed.

    Returns:
        name, bytes and sha256 of each part, which is also what `parts.json` says.
    """
    parts.mkdir(parents=True, exist_ok=False)
    listed = []
    with tempfile.TemporaryFile() as whole:
        # Sorted, and without times and owners: the same folder gives the same parts.
        with tarfile.open(fileobj=whole, mode="w") as tar:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    tar.add(path, str(path.relative_to(folder)), filter=_plain)
        whole.seek(0)
        if halves:
            _write_halves(whole, parts / HALVES)
        while content := whole.read(part_bytes):
            name = f"part-{len(listed)}"
            (parts / name).write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            listed.append({"name": name, "bytes": len(content), "sha256": sha256})
    (parts / LIST).write_text(json.dumps(listed, indent=1) + "\n")
    return listed


def join(parts: Path, folder: Path) -> None:
    """Unpack what `split` wrote.

    Raises:
        ValueError: a part is missing or another one.
    """
    listed = json.loads((parts / LIST).read_text())
    files = [parts / entry["name"] for entry in listed]
    with tempfile.TemporaryFile() as whole:
        for entry, file in zip(listed, files, strict=True):
            if not file.is_file():
                raise ValueError(f"{file}: missing: {len(listed)} parts are listed. Carry it here.")
            content = file.read_bytes()
            found, wanted = hashlib.sha256(content).hexdigest(), entry["sha256"]
            if found != wanted:
                raise ValueError(
                    f"{file}: sha256 {found[:12]}, and {LIST} says {wanted[:12]}. Carry it again."
                )
            whole.write(content)
        whole.seek(0)
        if (parts / HALVES).exists():
            _read_halves(whole, parts / HALVES)
        with tarfile.open(fileobj=whole, mode="r") as tar:
            extract(tar, folder)


def extract(tar: tarfile.TarFile, folder: Path) -> None:
    """All files of an archive. Pythons before 3.11.4 have no filter for what would leave the folder.

    Raises:
        ValueError: a member that is no file or folder inside.
    """
    if hasattr(tarfile, "data_filter"):
        tar.extractall(folder, filter="data")
        return
    for member in tar.getmembers():
        is_inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
        if not is_inside or not (member.isfile() or member.isdir()):
            raise ValueError(f"{member.name}: is no file inside of the archive's folder.")
    tar.extractall(folder)


def _write_halves(whole: IO[bytes], record: Path) -> None:
    """In place. Members of a tar file begin at even bytes, and so do numbers in a safetensors file."""
    content = whole.read()
    # Symbols of two or three bits, without order: a code for each is all that there is to gain.
    coder = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    second = coder.compress(content[1::2]) + coder.flush()
    record.write_text(json.dumps({"compressed": len(second)}) + "\n")
    _replace(whole, second + content[::2])


def _read_halves(whole: IO[bytes], record: Path) -> None:
    length = json.loads(record.read_text())["compressed"]
    second, first = zlib.decompress(whole.read(length)), whole.read()
    content = bytearray(len(first) + len(second))
    content[::2], content[1::2] = first, second
    _replace(whole, bytes(content))


def _replace(whole: IO[bytes], content: bytes) -> None:
    whole.seek(0)
    whole.truncate()
    whole.write(content)
    whole.seek(0)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
    return member


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=["split", "join"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--mib", type=float, default=56)
    parser.add_argument("--halves", action="store_true", help="for weights in bfloat16")
    options = parser.parse_args(arguments)
    try:
        if options.verb == "join":
            join(options.source, options.target)
        else:
            for entry in split(options.source, options.target, int(options.mib * 2**20), options.halves):
                print(f"{entry['name']}  {entry['bytes'] / 2**20:.1f} MiB  {entry['sha256']}")
    except (OSError, ValueError) as error:
        print(f"parts.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
