"""What came back from a lease, as the tables of the docs: README.md beside this says which goes where.

    python bench/lease/collect.py OUT                        Markdown, of OUT/results.tar.gz or a folder results
    python bench/lease/collect.py OUT --append bench/results.jsonl      also keep the lines of bench/gpu.py

HumanEval is judged here, before: `potstill eval OUT/results/6-humaneval/NAME --humaneval` for each model.
What was not run, or not judged, is said to be so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu
import parts

GPU_LINES = ("3-loss.jsonl", "4-qwen.jsonl", "5-demo.jsonl")
HELD = (
    ("KL to the teacher", "heldout/kl"),
    ("cross-entropy", "heldout/ce"),
    ("agreement", "heldout/agreement"),
)
Json = dict[str, Any]


def results_of(out: Path) -> Path:
    folder = out / "results"
    if not folder.is_dir():
        with tarfile.open(out / "results.tar.gz") as tar:
            parts.extract(tar, out)
    return folder


def read(path: Path) -> Json | None:
    """The object in a file; None where a stage has not come that far."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def lines_of(path: Path) -> list[Json]:
    found = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last one may have been cut off
                found.append(dict(json.loads(line)))
    return found


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield ""
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def environment(results: Path) -> Iterator[str]:
    found = read(results / "1-environment.json")
    if found is None:
        yield "Machine: not read."
        return
    packages = found["packages"]
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("torch", "triton", "transformers") if name in packages
    )
    card = found["card"]
    yield (
        f"{found['device']}, driver {card.get('driver_version', 'none')}, CUDA {found['cuda']}, {versions}, Python"
        f" {found['python']}, {found['cores']} cores, potstill at {found['commit'][:7]}."
    )


def stages(results: Path) -> Iterator[str]:
    rows = [
        [f"{each['stage']} {each['name']}", each["state"], f"{each['seconds']} of {each['limit_s']}"]
        for each in lines_of(results / "stages.jsonl")
    ]
    yield from table(["stage", "ended", "seconds"], rows)


def tests(results: Path) -> Iterator[str]:
    path = results / "2-tests.xml"
    if not path.exists():
        yield "\nTests on the device: not run."
        return
    suite = ElementTree.parse(path).getroot()[0]
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    bad = count["failures"] + count["errors"]
    passed = count["tests"] - bad - count["skipped"]
    yield f"\nTests on the device: {passed} passed, {bad} failed, {count['skipped']} skipped."
    for case in suite.iter("testcase"):
        for fault in (*case.findall("failure"), *case.findall("error")):
            yield f"- {case.attrib['name']}: {fault.attrib.get('message', '').splitlines()[0][:200]}"


def runs(results: Path) -> Iterator[str]:
    """The arms of the demo pair, the long run's curve, and what says that it was a distillation."""
    receipts = {name: read(results / f"5-{name}" / "receipt.json") for name in ("kd", "ce", "long")}
    for name, receipt in receipts.items():
        if receipt is None:
            yield f"\nRun {name}: not run to its end."
    done = {name: receipt for name, receipt in receipts.items() if receipt}
    if not done:
        return
    rows = []
    for name, receipt in done.items():
        steps = [line for line in lines_of(results / f"5-{name}" / "metrics.jsonl") if "speed/step_s" in line]
        step_s = sorted(line["speed/step_s"] for line in steps)[len(steps) // 2]
        first, last = receipt["heldout_first"], receipt["heldout_last"]
        cells = [f"{first[metric]:.3f} → {last[metric]:.3f}" for _, metric in HELD]
        speed = f"{receipt['positions'] / receipt['steps'] / step_s:.0f}"
        memory = f"{receipt['peak_memory_gib']:.2f}"
        rows.append([name, str(receipt["steps"]), *cells, f"{1000 * step_s:.1f}", speed, memory])
    head = ["run", "steps", *(title for title, _ in HELD), "ms a step", "positions/s", "peak GiB"]
    yield from table(head, rows)
    curve = [line for line in lines_of(results / "5-long" / "metrics.jsonl") if "heldout/kl" in line]
    if curve:
        cells = [[str(line["step"]), *(f"{line[metric]:.3f}" for _, metric in HELD)] for line in curve]
        yield from table(["step of long", *(title for title, _ in HELD)], cells)
    kl = {name: receipt["heldout_last"]["heldout/kl"] for name, receipt in done.items()}
    untouched = next(iter(done.values()))["heldout_first"]["heldout/kl"]
    checks = [
        ("the KL of the long run falls", kl.get("long"), untouched),
        ("kd ends below ce", kl.get("kd"), kl.get("ce")),
    ]
    checks += [("kd ends below the untouched student", kl.get("kd"), untouched)]
    yield ""
    for what, low, high in checks:
        if low is None or high is None:
            yield f"- {what}: not run"
        else:
            yield f"- {what}: {low:.3f} against {high:.3f}: {'yes' if low < high else 'NO'}"


def humaneval(results: Path) -> Iterator[str]:
    rows = []
    for name in ("teacher", "untouched", "student"):
        folder = results / "6-humaneval" / name
        result = read(folder / "humaneval.json")
        if result is None:
            rows.append([name, "not run", "", ""])
            continue
        speed = f"{result['generation']['tokens_per_s']}" if "generation" in result else ""
        if result["status"] != "finished":
            rows.append([name, f"{result['status']}: `potstill eval {folder} --humaneval`", "", speed])
            continue
        passed = sum(map(bool, result["passed_by_problem"].values()))
        of = len(result["passed_by_problem"])
        score = result.get("scores", {}).get("pass@1")
        low_high = f"{score['low']:.1%} to {score['high']:.1%}" if score else "a subset: no score"
        rows.append([name, f"{passed} of {of}, {low_high}", f"{result['programs_that_parse']:.1%}", speed])
    yield from table(["HumanEval", "passed", "programs that parse", "tokens/s"], rows)


def others(results: Path) -> Iterator[str]:
    policy = read(results / "7-on-policy.json") or {"not_run": "no result"}
    yield f"\nOn-policy rows: not run: {policy['not_run']}." if "not_run" in policy else f"\n{policy}"
    for bits in ("int8", "int4"):
        path = results / f"8-{bits}.json"
        findings = json.loads(path.read_text()) if path.exists() and path.stat().st_size else []
        said = [f"{each['name']}: {each['figure']}" for each in findings if "bits" in each["name"]]
        red = [each["name"] for each in findings if not each["ok"]]
        yield f"\nTeacher in {bits}: {'; '.join(said) or 'not run'}{'; red: ' + ', '.join(red) if red else ''}."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--append", type=Path)
    options = parser.parse_args(arguments)
    if not any((options.out / name).exists() for name in ("results", "results.tar.gz")):
        print(f"collect.py: {options.out}: neither results.tar.gz nor results in it.", file=sys.stderr)
        return 1
    results = results_of(options.out)
    for part in (environment, stages, tests):
        print(*part(results), sep="\n")
    measured = [line for name in GPU_LINES for line in lines_of(results / name)]
    if measured:
        gpu.show(measured, gpu.peak_tflops(measured[-1]["device"]))
    else:
        print("\nbench/gpu.py: not run.")
    for part in (runs, humaneval, others):
        print(*part(results), sep="\n")
    if options.append and measured:
        with open(options.append, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
