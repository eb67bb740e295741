"""How does our step compare with the tools that people use, on the same weights, rows and objective?

The pair of bench/step.py in float32, rows 4 x 256 and 2 x 512, 0.5 CE + 0.5 forward KL at temperature 1,
mean over supervised positions, fused AdamW, one schedule; `peer_arms.py` has the arms. Each runs in a fresh
process, interleaved within a round. Compared are the median step after the first two, which compile, peak
memory of the process, and step losses with those of our arm that minimises the same. A tool that is not
installed, or does not run here, is a row that says so.

    pip install --no-deps --target PEERS trl liger-kernel torchtune    # or into the environment itself
    python bench/peers.py --peer-path PEERS --store STORES --append bench/results.jsonl

DistillKit is no package of the index: name its folder in --peer-path, too. --store adds the arms that read
the teacher's targets from a store, which are captured into that folder first.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import step
from peer_arms import ARMS, STORED, shape

WARM = 2  # steps that are not counted
GAP = 1e-4  # largest relative difference of two float32 losses that are the same


def child(options: argparse.Namespace) -> int:
    sys.path += options.peer_path  # what the environment has comes first
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    arm = (ARMS | STORED)[options.arm]
    try:
        found = arm.run(options, shape(options))
    except ImportError as error:
        print(json.dumps({"not_run": str(error)}))
        return 0
    found.setdefault("peak_gib", step.peak_gib())
    found |= {"version": version(arm.package), "threads": sys.modules["torch"].get_num_threads()}
    print(json.dumps(found))
    return 0


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "of its sources" if package else ""


def measure(options: argparse.Namespace, size: str, name: str) -> dict[str, Any]:
    """Of one arm in a fresh process; `not_run` or `failed` says why there is nothing else."""
    command = [sys.executable, __file__, "--arm", name, "--size", size, "--steps", str(options.steps)]
    command += ["--peer-path", *options.peer_path] + (
        ["--store", str(options.store)] if options.store else []
    )
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"failed": done.stderr.strip().splitlines()[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(options: argparse.Namespace, size: str) -> list[dict[str, Any]]:
    """One record for each arm."""
    arms = {name: arm for name, arm in (ARMS | STORED).items() if name in options.arms}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for turn in range(options.rounds):
        for name, of in runs.items():
            if not of or "losses" in of[-1]:
                of.append(measure(options, size, name))
                seen = " ".join(f"{value:.2f}" for value in of[-1].get("seconds", [])) or "not run"
                print(f"{size}, round {turn + 1}, {name}: {seen}", file=sys.stderr, flush=True)
    records = []
    for name, of in runs.items():
        arm, last = arms[name], of[-1]
        record = {"arm": name, "like": arm.like, "note": arm.note}
        if "losses" in last:
            B, T = numbers(size)
            step_s = statistics.median(s for run in of for s in run["seconds"][WARM:] or run["seconds"])
            record |= {
                "version": last["version"],
                "threads": last["threads"],
                "step_s": step_s,
                "tokens_per_s": B * T / step_s,
                "peak_gib": statistics.median(run["peak_gib"] for run in of),
            }
            ours = runs.get(arm.like, [{}])[0].get("losses", [])
            if ours and last["losses"]:
                pairs = zip(last["losses"], ours, strict=True)
                record["gap"] = max(abs(a - b) / abs(b) for a, b in pairs)
        else:
            record |= {key: last[key] for key in ("not_run", "failed") if key in last}
        records.append(record)
    return records


def table(size: str, records: list[dict[str, Any]]) -> None:
    """Ratios are to our arm that minimises the same."""
    base = {record["arm"]: record for record in records if "step_s" in record}
    print(f"\nrows {size}: tokens/s, ours / its, peak GiB, ours / its, largest difference of a step's loss")
    for record in records:
        name = f"{record['arm']} {record.get('version', '')}".strip()
        if "step_s" not in record:
            why = "; ".join(
                f"{key.replace('_', ' ')}: {record[key]}" for key in ("not_run", "failed") if key in record
            )
            print(f"{name:<44} {why}")
            continue
        ours = base.get(record["like"], {})
        faster = ours["tokens_per_s"] / record["tokens_per_s"] if ours else float("nan")
        smaller = ours["peak_gib"] / record["peak_gib"] if ours else float("nan")
        figures = f"{record['tokens_per_s']:7.1f} {faster:5.2f} {record['peak_gib']:6.2f} {smaller:5.2f}"
        print(f"{name:<44} {figures} {record.get('gap', float('nan')):8.1e}  {record['note']}")


def markdown(results: Path, size: str) -> None:
    """The newest run, as the README has it: of the last lines as many as are of different arms."""
    lines = map(json.loads, results.read_text().splitlines())
    newest: dict[str, dict[str, Any]] = {}
    for line in reversed([line for line in lines if line["bench"] == "peers" and line["size"] == size]):
        if line["arm"] in newest:
            break
        newest = {line["arm"]: line} | newest
    print("| step | tokens/s | ours / its | peak, GiB | ours / its |\n|---|---|---|---|---|")
    for arm, line in newest.items():
        name = f"{arm} {line.get('version', '')}".strip()
        if "step_s" not in line:
            print(f"| {name} | not run | | | |")
            continue
        ours = newest[line["like"]]
        faster = f"{ours['tokens_per_s'] / line['tokens_per_s']:.2f}"
        smaller = f"{ours['peak_gib'] / line['peak_gib']:.2f}"
        print(f"| {name} | {line['tokens_per_s']:.0f} | {faster} | {line['peak_gib']:.2f} | {smaller} |")


def numbers(size: str) -> tuple[int, int]:
    B, T = size.split("x")
    return int(B), int(T)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["4x256", "2x512"], help="rows x tokens")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *STORED], help="all of them, if not given")
    parser.add_argument("--peer-path", nargs="*", default=[], help="folders that peers were unpacked in")
    parser.add_argument("--store", type=Path, help="folder of stores: adds the arms that read from one")
    parser.add_argument("--append", type=Path)
    parser.add_argument("--markdown", type=Path, help="only print a table of this file's results")
    parser.add_argument("--arm", choices=[*ARMS, *STORED], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        options.B, options.T = numbers(options.size[0])
        return child(options)
    if options.markdown:
        markdown(options.markdown, options.size[0])
        return 0
    options.arms = options.arms or [*ARMS, *(STORED if options.store else ())]
    ok = True
    for size in options.size:
        records = compare(options, size)
        table(size, records)
        ok &= all("failed" not in record for record in records)
        ok &= all(
            record["gap"] < GAP
            for record in records
            if "gap" in record and (ARMS | STORED)[record["arm"]].exact
        )
        if options.append:
            settings = {"bench": "peers", "size": size, "steps": options.steps, "rounds": options.rounds}
            machine = {"torch": importlib.metadata.version("torch"), "machine": platform.machine()}
            with open(options.append, "a", encoding="utf-8") as file:
                for record in records:
                    file.write(json.dumps(settings | record | machine) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
