"""One process at a time in a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from potstill.io.atomic import writing

LOCK = ".lock"
"""The locked file. One that a killed process left behind locks nothing."""
RETRY_S = 0.2


@contextlib.contextmanager
def locked(folder: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a folder, which is made where there is none.

    Args:
        on_wait: called before each new attempt while another process or thread holds the lock. What it raises
            ends the wait.

    Raises:
        UserError: the folder cannot be written.
    """
    file = folder / LOCK
    lock = FileLock(file)
    while not _acquired(lock, folder):
        on_wait()
        time.sleep(RETRY_S)
    try:
        yield
    finally:
        _release(lock, file)


def remove_leftover_lock(folder: Path) -> None:
    """Remove the lock file that a killed process left. One that is held, or cannot be removed, stays."""
    file = folder / LOCK
    if not file.exists():
        return
    lock = FileLock(file)
    with contextlib.suppress(Timeout, OSError):
        lock.acquire(blocking=False)
        _release(lock, file)


def _release(lock: FileLock, file: Path) -> None:
    # Removed while the lock is held: filelock sees that a file it has opened is gone by now, and opens the next.
    with contextlib.suppress(OSError):
        file.unlink()
    lock.release()


def _acquired(lock: FileLock, folder: Path) -> bool:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
    return True


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of a folder; a folder that cannot be written counts as free."""
    file = folder / LOCK
    if not file.exists():
        return False
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False
