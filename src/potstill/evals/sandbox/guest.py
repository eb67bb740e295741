"""Inside the sandbox: give up all rights that are not needed, then run the untrusted program.

Started by `sandbox.py` as `python -c`, with the descriptors of requests and answers as arguments. The kernel
enforces the restrictions and cannot be asked to lift them: resource limits, no new privileges, Landlock (no
file is written, only Python's own are read), seccomp (a list of allowed system calls: no socket but a pair
that is connected to itself, no new process, no signal to another). The program may do anything to this
interpreter: the other end trusts none of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import linecache
import os
import resource
import struct
import sys
import types
from typing import Any

from potstill.evals.sandbox.protocol import ProtocolError, pack, receive, send, unpack

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2
SIGKILL = 9
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Number of file rights in each Landlock ABI, counted from bit 0."""
EPERM, ENOSYS = 1, 38
SIGNALS_BY_FCNTL = (8, 10, 15)
"""F_SETOWN, F_SETSIG, F_SETOWN_EX: they could signal another process through a pipe."""
CLONE_THREAD, CLONE_NEW = 0x10000, 0x7E020000
"""A thread; any new namespace."""
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CANDIDATE = "candidate"
LOAD, EQUAL, AT_LEAST, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
"""Instructions of a seccomp filter, and what it returns."""
ALLOWED = """
    read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62,
    mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135,
    rt_sigreturn 15 139, pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access
    21 -, pipe 22 -, select 23 -, sched_yield 24 124, mremap 25 216, madvise 28 233, dup 32 23, dup2 33
    -, pause 34 -, nanosleep 35 101, getitimer 36 102, alarm 37 -, setitimer 38 103, getpid 39 172, exit
    60 93, uname 63 160, ftruncate 77 46, getdents 78 -, getcwd 79 17, readlink 89 -, umask 95 166,
    gettimeofday 96 169, getrlimit 97 163, getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102
    174, getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173, getpgrp 111 -, rt_sigpending
    127 136, rt_sigtimedwait 128 137, sigaltstack 131 132, arch_prctl 158 -, gettid 186 178, time 201 -,
    futex 202 98, sched_getaffinity 204 123, getdents64 217 61,
    set_tid_address 218 96, restart_syscall 219 128, timer_create 222 107, timer_settime 223 110,
    timer_gettime 224 108, timer_getoverrun 225 109, timer_delete 226 111, clock_gettime 228 113,
    clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, epoll_wait 232 -, epoll_ctl 233
    21, openat 257 56, newfstatat 262 79, readlinkat 267 78, faccessat 269 48, pselect6 270 72, ppoll
    271 73, set_robust_list 273 99, epoll_pwait 281 22, signalfd4 289 74, eventfd2 290 19, epoll_create1
    291 20, dup3 292 24, pipe2 293 59, getrandom 318 278, membarrier 324 283, statx 332 291, rseq 334
    293, faccessat2 439 439, epoll_pwait2 441 441
"""
"""All that an interpreter needs without writing, children or network: name, number on x86_64, on aarch64."""
EVERY_BIT = 0xFFFFFFFF
SOCK_TYPE_BITS, FIONBIO, FIRST_FREE = 0xF, 0x5421, 5
"""Descriptors 0 to 4 are the null device and the pipes to the judge."""
BY_ARGUMENT: dict[str, tuple[int, int, list[tuple[float, int, str, int]]]] = {
    # A thread, and nothing else.
    "clone": (56, 220, [(0, CLONE_THREAD | CLONE_NEW, "==", CLONE_THREAD)]),
    "fcntl": (72, 25, [(1, EVERY_BIT, "!=", command) for command in SIGNALS_BY_FCNTL]),
    # An event loop of asyncio wakes itself through a pair of sockets. A stream pair is connected to itself
    # for good: it has no address, and none can be sent to. A datagram pair could send to any socket of the
    # machine.
    "socketpair": (53, 199, [(0, EVERY_BIT, "==", 1), (1, SOCK_TYPE_BITS, "==", 1)]),  # AF_UNIX, SOCK_STREAM
    "sendto": (
        44,
        206,
        [(0, EVERY_BIT, ">=", FIRST_FREE), (4, EVERY_BIT, "==", 0), (4.5, EVERY_BIT, "==", 0)],
    ),
    "recvfrom": (45, 207, [(0, EVERY_BIT, ">=", FIRST_FREE)]),
    "ioctl": (16, 29, [(1, EVERY_BIT, "==", FIONBIO)]),
}
"""System calls that are allowed for some arguments only: numbers on x86_64 and aarch64, and what each
argument must be: its index (and a half: its upper 32 bits), the bits that count, comparison, value."""
CLONE3 = 435


def lock_down(limits: dict[str, int], readable: list[str]) -> None:
    """Raises OSError if a restriction cannot be applied."""
    libc = ctypes.CDLL(None, use_errno=True)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0):  # or a sleeping program outlives its parent
        raise OSError(ctypes.get_errno(), "end with the parent")
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no new privileges")
    _landlock(libc, readable)
    _seccomp(libc)


def _landlock(libc: Any, readable: list[str]) -> None:
    """Only files under `readable` can be read, none written, no TCP port bound or connected to."""
    abi = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if abi < 1:
        if readable == ["/"]:
            return  # bubblewrap has already removed every other file
        raise OSError(ctypes.get_errno(), "Landlock")
    rights = (1 << FS_RIGHTS.get(abi, FS_RIGHTS[max(FS_RIGHTS)])) - 1
    attributes = struct.pack("QQQ", rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    rules = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, size, 0)
    if rules < 0:
        raise OSError(ctypes.get_errno(), "a Landlock ruleset")
    for path in readable:
        try:
            descriptor = os.open(path, os.O_PATH)
        except FileNotFoundError:
            continue
        allowed = READ_FILE | EXECUTE | (READ_DIR if os.path.isdir(path) else 0)
        if libc.syscall(LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", allowed, descriptor), 0):
            raise OSError(ctypes.get_errno(), f"a Landlock rule for {path}")
        os.close(descriptor)
    if libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0):
        raise OSError(ctypes.get_errno(), "Landlock")
    os.close(rules)


def _seccomp(libc: Any) -> None:
    """Every system call that is not listed fails with EPERM; `clone` may only start a thread."""
    machine = os.uname().machine
    column = list(ARCH).index(machine)
    allowed = [number for call in ALLOWED.split(",") if (number := call.split()[column + 1]) != "-"]
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, ARCH[machine]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if machine == "x86_64":
        program += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]  # x32 system calls
    for number in allowed:
        program += [(EQUAL, 0, 1, int(number)), (RETURN, 0, 0, ALLOW)]
    for x86_64, aarch64, tests in BY_ARGUMENT.values():
        program += _if_arguments((x86_64, aarch64)[column], tests)
    # The flags of clone3 are in memory, where a filter cannot look. ENOSYS makes libc fall back to `clone`.
    program += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, REFUSE | ENOSYS), (RETURN, 0, 0, REFUSE | EPERM)]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    filters = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def _if_arguments(number: int, tests: list[tuple[float, int, str, int]]) -> list[tuple[int, int, int, int]]:
    """Instructions that allow the system call `number` if every test holds."""
    body: list[tuple[int, int, int, int]] = []
    for at, (argument, bits, comparison, value) in enumerate(tests):
        refuse = 3 * (len(tests) - at - 1) + 1  # instructions between this jump and the last one
        holds, fails = (refuse, 0) if comparison == "!=" else (0, refuse)
        jump = AT_LEAST if comparison == ">=" else EQUAL
        body += [(LOAD, 0, 0, int(16 + 8 * argument)), (AND, 0, 0, bits), (jump, holds, fails, value)]
    body += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE | EPERM)]
    return [(EQUAL, 0, len(body), number), *body]


def _run(source: str) -> dict[str, Any]:
    """The names that the program defines, run as an imported module is: with its own future statements only,
    and found by who looks a class up by its module (dataclasses, typing, pickle) or reads its source
    (inspect).
    """
    module = sys.modules[CANDIDATE] = types.ModuleType(CANDIDATE)
    linecache.cache[CANDIDATE] = (len(source), None, source.splitlines(keepends=True), CANDIDATE)
    exec(compile(source, CANDIDATE, "exec", dont_inherit=True), vars(module))
    return vars(module)


def main() -> None:
    os.environ.clear()  # bubblewrap and the locale each leave a variable
    inherited = [int(number) for number in sys.argv[1:]]
    copies = [fcntl.fcntl(number, fcntl.F_DUPFD, 5) for number in inherited]
    requests, answers = os.dup2(copies[0], 3), os.dup2(copies[1], 4)
    for number in {*inherited, *copies} - {3, 4}:
        os.close(number)
    if os.getpid() == 1 and (child := os.fork()):  # the kernel shields PID 1 from signals
        os.closerange(3, 5)
        os.waitpid(child, 0)
        os._exit(0)

    def read(size: int) -> bytes:
        return os.read(requests, min(size, 1 << 16))

    def answer(request: dict[str, Any], **fields: Any) -> None:
        send(lambda data: os.write(answers, data), {"id": request["id"], **fields})

    request = receive(read)
    lock_down(request["limits"], request["readable"])
    try:
        candidate = _run(request["source"])[request["entry_point"]]
    except BaseException as error:
        answer(request, raised=_name(error), text=_text(error))
        candidate = None
    else:
        answer(request, ready=True)
    while "end" not in (request := receive(read)):
        args, kwargs = unpack(request["call"])
        try:
            answer(request, value=pack(candidate(*args, **kwargs)))
        except ProtocolError as error:
            answer(request, not_sendable=str(error))
        except BaseException as error:
            answer(request, raised=_name(error), text=_text(error))
    answer(request, end=True)
    os._exit(0)


def _name(error: BaseException) -> str:
    return next(base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins")


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:
        return ""


if __name__ == "__main__":
    sys.setrecursionlimit(1000)
    main()
