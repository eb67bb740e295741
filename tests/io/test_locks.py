"""A folder's lock: one holder at a time, gone with its process, and nothing of it stays in the folder."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from potstill.errors import UserError
from potstill.io.locks import LOCK, locked, remove_leftover_lock

HOLDER = """
import sys, time
from pathlib import Path
from potstill.io.locks import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


class Refused(Exception):
    pass


def refuse() -> None:
    raise Refused


def test_one_holder_at_a_time_and_no_file_stays(tmp_path: Path) -> None:
    counts = []

    def add(_: int) -> None:
        with locked(tmp_path / "folder"):
            counts.append(len(counts))
            seen = len(counts)
            threading.Event().wait(0.02)
            assert len(counts) == seen

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(8)))
    assert counts == [*range(8)]
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_second_process_waits_and_a_kill_lets_it_in(tmp_path: Path) -> None:
    waits = []
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(Refused), locked(tmp_path, on_wait=refuse):
            pass

        def end_the_holder_at_the_second_wait() -> None:
            waits.append(True)
            if len(waits) == 2:
                holder.send_signal(signal.SIGKILL)
                holder.wait()

        with locked(tmp_path, on_wait=end_the_holder_at_the_second_wait):
            assert len(waits) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_a_kill_left_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    with locked(tmp_path, on_wait=refuse), pytest.raises(Refused), locked(tmp_path, on_wait=refuse):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_is_removed_and_a_lock_that_is_held_is_not(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    remove_leftover_lock(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        remove_leftover_lock(tmp_path)
        assert (tmp_path / LOCK).exists()
        with pytest.raises(Refused), locked(tmp_path, on_wait=refuse):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="file/folder: cannot be written"),
        locked(tmp_path / "file" / "folder"),
    ):
        pass
