"""The program that tests/evals/sandbox/test_sandbox.py starts, perhaps as another user, perhaps with another Python:
runs the hostile programs in one tier and prints what came of each, and what they left, as JSON.

    python hostile_run.py TIER PLACES_AS_JSON [NAME_OF_A_PROGRAM ...]
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hostile_programs import PROGRAMS, Hostile
from hostile_reaches import MARK, REACHES

from potstill.evals.sandbox.sandbox import TRIVIAL, Limits, Sandbox, SandboxRefused, Verdict

PR_SET_CHILD_SUBREAPER = 36
TOKEN = secrets.randbits(58) + 2**58


def run(sandbox: Sandbox, program: Hostile, places: dict[str, str]) -> Verdict:
    source = program.source
    for name, place in places.items():
        source = source.replace(f"@{name}@", place)
    test = program.test.replace("TOKEN", str(TOKEN))
    return sandbox.judge(source=source, entry_point="f", helpers="", test=test, cpu_s=program.cpu_s)


def processes_left() -> list[int]:
    """Children of this process two seconds from now at the latest: it adopts whoever loses its parent."""
    left: list[str] = []
    for _ in range(40):
        tasks = Path("/proc/self/task").iterdir()
        left = [pid for task in tasks for pid in (task / "children").read_text().split()]
        if not left:
            break
        time.sleep(0.05)
    return [int(pid) for pid in left]


def seen(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


def main() -> None:
    tier, places, only = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    programs = [p for p in [*PROGRAMS, *REACHES] if not only or p.name in only]
    try:
        sandbox = Sandbox(tier, Limits(wall_floor_s=0.4))
    except SandboxRefused as refused:
        print(json.dumps({"refused": str(refused)}))
        return
    stage = next(Path(places["TMP"]).glob("potstill-sandbox-*"))
    places |= {"PID": str(os.getpid()), "STAGE": str(stage)}
    before = seen(stage)
    with sandbox:
        with ThreadPoolExecutor(3) as pool:
            verdicts = list(pool.map(lambda program: run(sandbox, program, places), programs))
        left = processes_left()
        changed = sorted(set(before.items()) ^ set(seen(stage).items()))
        alive = sandbox.judge(**TRIVIAL, cpu_s=5.0).status
    marks = [
        str(path)
        for folder in (
            "/",
            "/tmp",
            "/dev/shm",
            "/var/tmp",
            "/run",
            places["CWD"],
            places["HOME"],
            places["TMP"],
        )
        for path in Path(folder).glob(f"*{MARK}*")
    ]
    report = {
        "verdicts": {p.name: [v.status, v.detail] for p, v in zip(programs, verdicts, strict=True)},
        "processes": left,
        "changed": changed,
        "marks": marks,
        "temporary": sorted(os.listdir(places["TMP"])),
        "alive": alive,
        "token": TOKEN,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
