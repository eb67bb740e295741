"""Python that need not import torch and Transformers: each program runs in a fork of one process that has.

It is a process of its own, with its own arguments, folder, environment, streams and exit code, and it imports potstill
afresh, from its own path. So it is for tests that need a process and not one that begins with nothing. `python()` is
the path of what to start in the place of `sys.executable`; this file, as a program, is the process that is forked.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "transformers.trainer",
)
CLIENT = """#!{python} -IS
import array, json, os, socket, sys
words = sys.argv[1:]
is_safe, flags = False, []
while words and words[0] in ("-P", "-u"):
    is_safe |= words[0] == "-P"
    flags.append(words.pop(0))
is_other = os.environ.get("PYTHONHASHSEED") != {seed!r}  # which a process has from its start
if is_other or not words or words[0].startswith("-") and words[0] not in ("-m", "-c", "-"):
    os.execv({python!r}, [{python!r}, *flags, *words])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
order = {{"words": words, "is_safe": is_safe, "folder": os.getcwd(), "environment": dict(os.environ)}}
streams = array.array("i", [0, 1, 2])
server.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
server.sendall(json.dumps(order).encode() + b"\\n")
code = int(server.makefile().readline() or 1)
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""
"""Ends as the fork does; when it is killed, so is the fork."""


@functools.cache
def python() -> str:
    """The path of a Python whose imports are done; its process ends with this one."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    client, address = folder / "python", folder / "socket"
    seed = os.environ.get("PYTHONHASHSEED")
    client.write_text(CLIENT.format(python=sys.executable, address=str(address), seed=seed))
    client.chmod(0o700)
    one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, str(client), str(address)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | one | {"TOKENIZERS_PARALLELISM": "false"},
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    def close() -> None:
        process.communicate()
        shutil.rmtree(folder)

    atexit.register(close)
    return str(client)


def serve(client: str, address: str) -> None:
    """Until stdin is closed. This process never has a second thread."""
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [each for each in sys.path if each not in own]
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(64)
        print("ready", flush=True)
        running: set[int] = set()
        while True:
            ready, _, _ = select.select([server, 0], [], [])
            running = {pid for pid in running if os.waitpid(pid, os.WNOHANG)[0] == 0}
            if server not in ready:
                break
            connection, _ = server.accept()
            if pid := os.fork():
                running.add(pid)
                connection.close()
            else:
                server.close()
                attend(connection, client, path)
    for pid in running:
        os.waitpid(pid, 0)


def attend(connection: socket.socket, client: str, path: list[str]) -> None:
    """Run the program of one client, and tell it how that ended; never returns."""
    streams = array.array("i")
    _, passed, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(3 * streams.itemsize))
    streams.frombytes(passed[0][2])
    order = json.loads(connection.makefile().readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        run(order, client, path)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):  # the client was killed
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def mend_threads() -> None:
    """What a fork calls before it starts a thread.

    In a fork torch replaces its thread pool at the first call from a new thread, without a lock: of several threads
    that begin at once, as those that load weights, one may find none ("Invalid thread pool!", a RuntimeError).
    """
    sys.modules["torch"].set_num_threads(1)


def run(order: dict[str, Any], client: str, path: list[str]) -> None:
    """As Python runs a script, a module or a text; never returns."""
    code = 1
    try:
        mend_threads()
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"])
        words = order["words"]
        kind = words.pop(0) if words[0] in ("-m", "-c", "-") else "script"
        text = sys.stdin.read() if kind == "-" else words.pop(0)
        first = {"-m": order["folder"], "script": str(Path(text).resolve().parent)}.get(kind, "")
        given = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
        sys.path[:] = [*([] if order["is_safe"] else [first]), *given, *path]
        sys.argv, sys.executable = [text if kind == "script" else kind, *words], client
        if kind == "-m":
            runpy.run_module(text, run_name="__main__", alter_sys=True)
        elif kind == "script":
            runpy.run_path(text, run_name="__main__")
        else:
            exec(compile(text, "<string>", "exec"), vars(sys.modules["__main__"]))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    importlib.import_module("torch").set_num_threads(1)
    os.fsync = os.fstat  # type: ignore[assignment]  # as in conftest.py
    gc.collect()
    gc.freeze()  # no fork looks through what was there before it, and copies it so
    serve(*sys.argv[1:])
