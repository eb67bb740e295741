"""potstill in several processes of one run, as `torchrun` starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def launch(
    world: int, *arguments: object, program: tuple[str, ...] = ("-m", "potstill")
) -> subprocess.Popen[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    command += ["--master-port", str(port), *program, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def ranks(world: int, *arguments: object, program: tuple[str, ...] = ("-m", "potstill")) -> str:
    process = launch(world, *arguments, program=program)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    return out + err
