"""Inside the sandbox: shut every door behind oneself, then run the untrusted program.

Started by `sandbox.py` as `python -I -S -c`, with requests on descriptor 0 and answers on 1. The doors are the
kernel's and cannot be opened again: resource limits, no new privileges, Landlock (no file is written, none read
but Python's own), seccomp (a list of allowed system calls: no socket, no new process, no signal to another).
What the program does to this interpreter is its own affair: nothing here is trusted by the other end.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from typing import Any

from potstill.evals.sandbox_wire import Odd, pack, receive, send, unpack

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Rights that each Landlock ABI knows, counted from bit 0."""
EPERM, ENOSYS = 1, 38
SIGNALS_BY_FCNTL = (
    8,
    10,
    15,
)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: a signal to another process by way of a pipe
CLONE_THREAD = 0x10000
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CALLS = {  # what an interpreter without files to write, children or network needs; numbers per machine
    "x86_64": {
        "clone": 56,
        "clone3": 435,
        "fcntl": 72,
        "allowed": [
            *range(0, 22),  # read write open close stat fstat lstat poll lseek mmap mprotect munmap brk signals ioctl pread pwrite readv writev access
            22, 23, 24, 25, 28, 32, 33, 34, 35, 36, 37, 38, 39,  # pipe select yield mremap madvise dup pause timers getpid
            60, 63, 77, 78, 79, 89, 95, 96, 97, 98, 99, 100,  # exit uname ftruncate getdents getcwd readlink umask times limits
            102, 104, 107, 108, 110, 111, 127, 128, 131,  # ids, pending signals, the signal stack
            158, 186, 201, 202, 203, 204, 217, 218, 219, 222, 223, 224, 225, 226, 228, 229, 230, 231, 232, 233,
            257, 262, 267, 269, 270, 271, 273, 281, 289, 290, 291, 292, 293, 318, 324, 332, 334, 439, 441,
        ],
    },
    "aarch64": {
        "clone": 220,
        "clone3": 435,
        "fcntl": 25,
        "allowed": [
            17, 19, 20, 21, 22, 23, 24, 29, 46, 48, 56, 57, 59, 61, 62, 63, 64, 65, 66, 67, 68, 72, 73, 74, 78, 79, 80,
            93, 94, 96, 98, 99, 101, 102, 103, 107, 108, 109, 110, 111, 112, 113, 114, 115, 122, 123, 124,
            132, 133, 134, 135, 136, 137, 139, 153, 160, 163, 165, 166, 169, 172, 173, 174, 175, 176, 177, 178, 179,
            214, 215, 216, 222, 226, 233, 278, 283, 291, 293, 439, 441,
        ],
    },
}  # fmt: skip


def lock_down(limits: dict[str, int], readable: list[str]) -> None:
    """Raise OSError where a door does not shut."""
    libc = ctypes.CDLL(None, use_errno=True)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no new privileges")
    _landlock(libc, readable)
    _seccomp(libc)


def _landlock(libc: Any, readable: list[str]) -> None:
    """Only files under `readable` are read, none is written, no TCP port is bound or reached."""
    abi = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if abi < 1:
        if readable == ["/"]:
            return  # bubblewrap has already taken every other file away
        raise OSError(ctypes.get_errno(), "Landlock")
    rights = (1 << FS_RIGHTS.get(abi, FS_RIGHTS[max(FS_RIGHTS)])) - 1
    attributes = struct.pack("QQQ", rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    rules = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, size, 0)
    if rules < 0:
        raise OSError(ctypes.get_errno(), "a Landlock ruleset")
    for path in readable:
        try:
            place = os.open(path, os.O_PATH)
        except FileNotFoundError:
            continue
        allowed = READ_FILE | EXECUTE | (READ_DIR if os.path.isdir(path) else 0)
        if libc.syscall(LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", allowed, place), 0):
            raise OSError(ctypes.get_errno(), f"a Landlock rule for {path}")
        os.close(place)
    if libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0):
        raise OSError(ctypes.get_errno(), "Landlock")
    os.close(rules)


def _seccomp(libc: Any) -> None:
    """Every system call that is not on the list gives EPERM; `clone` may only start a thread."""
    machine = platform.machine()
    calls: Any = CALLS[machine]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    masked, allow, refuse, kill = 0x54, 0x7FFF0000, 0x00050000 | EPERM, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, ARCH[machine]), (answer, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":
        program += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, kill)]  # the x32 numbering
    for number in calls["allowed"]:
        program += [(equal, 0, 1, number), (answer, 0, 0, allow)]
    commands = [(equal, len(SIGNALS_BY_FCNTL) - i, 0, c) for i, c in enumerate(SIGNALS_BY_FCNTL)]
    program += [(equal, 0, len(commands) + 3, calls["fcntl"]), (load, 0, 0, 24), *commands]
    program += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    # The C library falls back to `clone`, whose flags a filter can see.
    program += [(equal, 0, 1, calls["clone3"]), (answer, 0, 0, 0x00050000 | ENOSYS)]
    program += [(equal, 0, 4, calls["clone"]), (load, 0, 0, 16), (masked, 0, 0, CLONE_THREAD)]
    program += [(equal, 1, 0, 0), (answer, 0, 0, allow), (answer, 0, 0, refuse)]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    filters = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def main() -> None:
    os.environ.clear()  # bubblewrap and the locale leave a word each
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(2, 0)  # the null device: what the program prints or asks for goes nowhere
    os.dup2(2, 1)

    def read(size: int) -> bytes:
        return os.read(requests, min(size, 1 << 16))

    def answer(request: dict[str, Any], **said: Any) -> None:
        send(lambda data: os.write(answers, data), {"id": request["id"], **said})

    request = receive(read)
    lock_down(request["limits"], request["readable"])
    namespace: dict[str, Any] = {"__name__": "candidate"}
    try:
        exec(compile(request["source"], "candidate", "exec"), namespace)
        candidate = namespace[request["entry_point"]]
    except BaseException as error:
        answer(request, raised=_name(error), text=_text(error))
        candidate = None
    else:
        answer(request, ready=True)
    while "end" not in (request := receive(read)):
        args, kwargs = unpack(request["call"])
        try:
            packed = pack(candidate(*args, **kwargs))
        except Odd as error:
            answer(request, odd=str(error))
        except BaseException as error:
            answer(request, raised=_name(error), text=_text(error))
        else:
            answer(request, value=packed)
    answer(request, end=True)
    os._exit(0)


def _name(error: BaseException) -> str:
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:
        return ""


if __name__ == "__main__":
    sys.setrecursionlimit(1000)
    main()
