"""What does the loss block cost, against positions, vocabulary, both widths, chunk and divergence?

The block alone, forward and backward, from random hidden states and heads in float32: 0.9 KD + 0.1 CE. For
every case: its time beside the bare matmuls of its shapes, done alternately in one process; its
floating-point operations as PyTorch counts them, of which N V (6 D + 2 E) are needed; and what a fresh
process has at its peak beyond inputs, weights and one gradient of each that learns. The last case is the bar:
152k ids, a teacher of 3,584 and a student of 896, under 2.5 GB.

    python bench/scaling.py [--rounds 5] [--only TEXT] [--measure memory] [--append bench/results.jsonl]

Where others are at work on the machine, `--clock processor` counts the seconds of this process alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    N: int = 1024
    V: int = 49_152
    D: int = 576
    E: int = 576
    chunk: int = 128
    divergence: str = "forward_kl"

    @property
    def flops(self) -> int:
        return self.N * self.V * (6 * self.D + 2 * self.E)

    @property
    def given_bytes(self) -> int:
        """Inputs, weights, and the gradients of the student's."""
        student = 2 * (self.N + self.V) * self.D
        return 4 * (student + (self.N + self.V) * self.E) + 8 * self.N


BAR = Case(N=8192, V=151_936, D=896, E=3584, chunk=256)
BAR_BYTES = 2.5e9
CASES = {
    "base": Case(),
    **{f"N {N}": Case(N=N) for N in (256, 512, 2048, 4096)},
    **{f"V {V}": Case(V=V) for V in (16_384, 32_768, 98_304)},
    **{f"D {D}": Case(D=D) for D in (288, 1152)},
    **{f"E {E}": Case(E=E) for E in (1152, 2304)},
    **{f"chunk {chunk}": Case(chunk=chunk) for chunk in (16, 32, 64, 256, 512, 1024)},
    **{name: Case(N=512, divergence=name) for name in ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd")},
    "bar": BAR,
}


def tensors(case: Case, device: Any = "cpu", dtype: Any = None) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device=device, dtype=dtype)

    return {
        "hidden_ND": normal(case.N, case.D).requires_grad_(),
        "weight_VD": normal(case.V, case.D).mul_(case.D**-0.5).requires_grad_(),
        "hidden_NE": normal(case.N, case.E),
        "weight_VE": normal(case.V, case.E).mul_(case.E**-0.5),
        "labels_N": torch.randint(case.V, (case.N,), device=device),
    }


def loss_block(case: Case, of: dict[str, Any], compiled: bool = False) -> Callable[[], None]:
    from potstill.losses.objective import Objective
    from potstill.losses.targets import HiddenTargets
    from potstill.registry import entries
    from potstill.types import Head

    objective = Objective(entries("divergence")[case.divergence], chunk=case.chunk, compiled=compiled)
    targets = HiddenTargets(of["hidden_NE"], Head(of["weight_VE"]))

    def run() -> None:
        of["hidden_ND"].grad = of["weight_VD"].grad = None
        head = Head(of["weight_VD"])
        sums = objective(of["hidden_ND"], head, of["labels_N"], targets, checked=False)
        (sums["loss"] / case.N).backward()

    return run


def bare_matmuls(case: Case, of: dict[str, Any]) -> Callable[[], None]:
    """Both models' logits, and the gradients of hidden states and head from any [C, V]: into memory that is
    there already, or by oneDNN, where the process has asked for it, which takes new.
    """
    import torch

    from potstill.io import cpu_matmul

    student_CV, teacher_CV = of["weight_VE"].new_empty(2, min(case.chunk, case.N), case.V)
    weight_VD, weight_VE = of["weight_VD"].detach(), of["weight_VE"]
    hidden_ND = of["hidden_ND"].detach()
    grad_ND, grad_VD = torch.zeros_like(hidden_ND), torch.zeros_like(weight_VD)

    def run() -> None:
        nonlocal student_CV, teacher_CV
        for start in range(0, case.N, case.chunk):
            part = slice(start, start + case.chunk)
            size = len(hidden_ND[part])
            if cpu_matmul.matmul_backend() == "onednn":
                student_CV, teacher_CV = hidden_ND[part] @ weight_VD.T, of["hidden_NE"][part] @ weight_VE.T
                grad_ND[part] = student_CV @ weight_VD
            else:
                torch.mm(hidden_ND[part], weight_VD.T, out=student_CV[:size])
                torch.mm(of["hidden_NE"][part], weight_VE.T, out=teacher_CV[:size])
                torch.mm(student_CV[:size], weight_VD, out=grad_ND[part])
            grad_VD.addmm_(student_CV[:size].T, hidden_ND[part])

    return run


def speed(case: Case, rounds: int, clock: str) -> dict[str, Any]:
    import torch

    from potstill.io.cpu_matmul import choose_matmul, matmul_backend, matmul_with

    # Both arms multiply as a run would.
    held = contextlib.ExitStack()  # until the function returns
    held.enter_context(matmul_with(choose_matmul("auto", torch.device("cpu"))[0]))
    of = tensors(case)
    ours, bare = loss_block(case, of), bare_matmuls(case, of)
    seconds: dict[str, list[float]] = {"loss_s": [], "matmuls_s": []}
    now = CLOCKS[clock]
    for turn in range(rounds + 1):
        for name, run in (("loss_s", ours), ("matmuls_s", bare)):
            started = now()
            run()
            if turn:  # the first is a warm-up
                seconds[name].append(now() - started)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return {name: statistics.median(of_all) for name, of_all in seconds.items()} | {
        "ratio": statistics.median(ratios),
        "threads": threads(),
        "matmul": matmul_backend(),
        "clock": clock,
    }


def count(case: Case, rounds: int, clock: str) -> dict[str, Any]:
    """Of every operation that PyTorch has a formula for; a product added in place has none of its own."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def added_in_place(_: Any, a: tuple[int, int], b: tuple[int, int], **rest: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    run = loss_block(case, tensors(case))
    formulas = {torch.ops.aten.addmm_: added_in_place}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return {"flops": counter.get_total_flops()}


def memory(case: Case, rounds: int, clock: str) -> dict[str, Any]:
    small = Case(N=2, V=64, D=16, E=16)
    loss_block(small, tensors(small))()  # what libraries take once is not the block's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss_block(case, tensors(case))()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"beyond_bytes": (peak - before) * 1024 - case.given_bytes}


def threads() -> int:
    import torch

    return torch.get_num_threads()


MODES = {"speed": speed, "count": count, "memory": memory}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def in_fresh_process(mode: str, case: Case, rounds: int, clock: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--mode", mode, "--case", json.dumps(asdict(case))]
    done = subprocess.run(
        [*command, "--rounds", str(rounds), "--clock", clock], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{mode} {case}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--smaller", type=int, default=1, help="divides N and V, for a try")
    parser.add_argument("--measure", choices=MODES, nargs="+", default=list(MODES), help="default: all three")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--append", type=Path)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(MODES[options.mode](Case(**options.case), options.rounds, options.clock)))
        return 0
    ok = True
    print("case           loss s   matmuls s  ratio   FLOPs / needed   MB beyond what is given")
    for name, case in CASES.items():
        if options.only not in name:
            continue
        case = replace(case, N=case.N // options.smaller, V=case.V // options.smaller)
        found: dict[str, Any] = {"needed_flops": case.flops, "given_bytes": case.given_bytes}
        rounds = 1 if name == "bar" else options.rounds  # minutes each
        for mode in options.measure:
            found |= in_fresh_process(mode, case, rounds, options.clock)
        ok &= found.get("flops", case.flops) == case.flops
        ok &= not (name == "bar" and found.get("beyond_bytes", 0) >= BAR_BYTES)
        told = [found.get(figure, math.nan) for figure in ("loss_s", "matmuls_s", "ratio")]  # nan: not run
        told += [found.get("flops", math.nan) / case.flops, found.get("beyond_bytes", math.nan) / 1e6]
        print("{:<11} {:8.3f} {:10.3f} {:7.3f} {:13.5f} {:17.0f}".format(name, *told), flush=True)
        if options.append:
            record = {
                "bench": "scaling",
                "case": name,
                **asdict(case),
                **found,
                "torch": importlib.metadata.version("torch"),
            }
            record |= {"rounds": rounds, "machine": platform.machine()}
            with open(options.append, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
