"""A folder as files of limited size, and back: for a machine that takes and gives only small ones.

    python parts.py split FOLDER PARTS --mib 56    PARTS/part-0, part-1, … and PARTS/parts.json with their hashes
    python parts.py join PARTS FOLDER              each part is compared with its hash before anything is unpacked

Nothing but Python is needed, since it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

LIST = "parts.json"


def split(folder: Path, parts: Path, part_bytes: int) -> list[dict[str, Any]]:
    """Write `folder` as parts of at most `part_bytes` bytes.

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
        with tarfile.open(fileobj=whole, mode="r") as tar:
            tar.extractall(folder, filter="data")


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
    return member


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=["split", "join"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--mib", type=float, default=56)
    options = parser.parse_args(arguments)
    try:
        if options.verb == "join":
            join(options.source, options.target)
        else:
            for entry in split(options.source, options.target, int(options.mib * 2**20)):
                print(f"{entry['name']}  {entry['bytes'] / 2**20:.1f} MiB  {entry['sha256']}")
    except (OSError, ValueError) as error:
        print(f"parts.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
