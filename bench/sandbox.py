"""How many programs does the sandbox judge in a second, in each tier of this machine?

The 164 published solutions of HumanEval, each judged by its own test from as many threads as there are
workers, after one round to warm up. Median of the rounds.

    python bench/sandbox.py [--rounds 3] [--workers 2] [--append bench/results.jsonl]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from potstill.evals.humaneval_problems import read_problems
from potstill.evals.sandbox.sandbox import TIERS, Sandbox, SandboxRefused


def programs_per_s(sandbox: Sandbox, workers: int) -> float:
    def passed(problem) -> bool:
        return sandbox.judge(
            source=problem.canonical,
            entry_point=problem.entry_point,
            helpers=problem.canonical,
            test=problem.test,
            cpu_s=60.0,
        ).passed

    problems = read_problems()
    with ThreadPoolExecutor(workers) as pool:
        started = time.perf_counter()
        passing = sum(pool.map(passed, problems))
        seconds = time.perf_counter() - started
    assert passing == len(problems)
    return len(problems) / seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--append", type=Path)
    options = parser.parse_args()
    found, start_s = {}, {}
    for tier in TIERS:
        try:
            started = time.perf_counter()
            with Sandbox(tier) as sandbox:
                start_s[tier] = time.perf_counter() - started
                programs_per_s(sandbox, options.workers)
                rounds = [programs_per_s(sandbox, options.workers) for _ in range(options.rounds)]
        except SandboxRefused as refused:
            print(refused)
            continue
        found[tier] = statistics.median(rounds)
        told = ", ".join(f"{figure:.1f}" for figure in rounds)
        print(f"{tier}: {found[tier]:.1f} programs/s ({told}); ready after {start_s[tier]:.1f} s")
    if options.append:
        record = {
            "bench": "sandbox",
            "programs": len(read_problems()),
            "rounds": options.rounds,
            "workers": options.workers,
            "programs_per_s": found,
            "ready_s": start_s,
            "python": platform.python_version(),
            "kernel": platform.release(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        }
        with open(options.append, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return 0 if found and min(found.values()) >= 10 else 1


if __name__ == "__main__":
    sys.exit(main())
