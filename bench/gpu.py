"""What does a step cost on a GPU, and what do the tools that people use need for the same step?

    loss    forward and backward of the loss alone, on the shape that Liger publishes figures of
    qwen    a step of Qwen2.5-7B teaching Qwen2.5-0.5B, random weights of these shapes, rows 32 x 256 and
            16 x 512, all positions supervised, bfloat16
    demo    the same of the 135M demo pair, where its teacher is installed, rows 32 x 256

All in one process, arms interleaved within a round, each from the same first weights on the same rows; a line
of --append for each arm and round, as soon as it is measured. `gpu_arms.py` has the arms. A tool that is not
installed, or does not fit, is a line that says so. Nothing is downloaded. Written for eight minutes on an
H100: past --minutes no arm is begun any more.

    pip install --no-deps --target PEERS trl liger-kernel
    python bench/gpu.py --peer-path PEERS
    python bench/gpu.py --tiny --only loss qwen     small shapes, on the CPU too: does it run?
    python bench/gpu.py --markdown bench/results.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from peers import numbers, version

SECTIONS = ("loss", "qwen", "demo")
PEAK_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Of bfloat16 products with float32 sums, dense, as the makers say; the longest name that fits counts."""
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl")
GAP = 1e-2  # largest relative difference of two first losses that are the same, in bfloat16
Line = dict[str, Any]


class Bench:
    """Options, the clock, and the lines so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        self.options, self.started = options, time.perf_counter()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.lines: list[Line] = []
        self.shared = {"run": time.strftime("%Y-%m-%dT%H:%M:%S"), "tiny": options.tiny} | machine(self.device)
        self.peak_tflops = options.peak_tflops or peak_tflops(self.shared["device"])

    def interleaved(self, section: str, size: str, arms: dict[str, Callable[[], Line]]) -> None:
        """Every arm once a round, until one gives no figures or the time is over."""
        of: dict[str, Line] = {}
        chosen = self.options.arms or ("",)
        for turn in range(self.options.rounds):
            for name, run in arms.items():
                if not any(text in name for text in chosen) or why_not(of.get(name, {})):
                    continue
                if time.perf_counter() - self.started > 60 * self.options.minutes:
                    print(f"{section} {size}: {name} of round {turn + 1} not run: over --minutes", flush=True)
                    continue
                of[name] = attempt(run)
                self.keep({"section": section, "size": size, "arm": name, "round": turn + 1} | of[name])

    def keep(self, line: Line) -> None:
        line = {"bench": "gpu"} | line | self.shared
        self.lines.append(line)
        spent = time.perf_counter() - self.started
        seen = why_not(line) or " ".join(f"{1000 * value:.1f}" for value in line["seconds"]) + " ms"
        print(
            f"{spent:4.0f} s: {line['section']} {line['size']}, {line['arm']}, round {line['round']}: {seen}",
            flush=True,
        )
        if self.options.append:
            with open(self.options.append, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def attempt(run: Callable[[], Line]) -> Line:
    """What it found, or why it found nothing."""
    import torch

    from potstill.errors import UserError

    try:
        return run()
    except torch.OutOfMemoryError:
        return {"not_run": "out of memory"}
    except (ImportError, UserError) as error:
        return {"not_run": str(error).splitlines()[0][:200]}
    except Exception as error:  # a peer fails as it likes, and the others go on
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        gc.collect()  # the error's own frames held tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def why_not(line: Line) -> str:
    return "; ".join(str(line[key]) for key in ("not_run", "failed") if key in line)


def machine(device: Any) -> Line:
    import torch

    found: Line = {"device": "cpu", "driver": ""}
    if device.type == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(asked, capture_output=True, text=True).stdout.split()
        except OSError:
            driver = []
        found = {"device": torch.cuda.get_device_name(device), "driver": driver[0] if driver else ""}
    return found | {name: version(name) for name in PACKAGES if find_spec(name.replace("-", "_"))}


def peak_tflops(device: str) -> float | None:
    """Of the card by its name; None of one that is not in the table."""
    fitting = [name for name in PEAK_TFLOPS if all(word in device for word in name.split())]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else None


def loss(bench: Bench) -> None:
    import torch
    from gpu_arms import losses_alone, timed

    case, arms = losses_alone(bench.options.tiny, bench.device)

    def measured(make: Callable[[], Any]) -> Line:
        run = make()
        run()
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found: Line = {"seconds": [*timed(run, bench.device, bench.options.steps)], "flops": case.flops}
        return found | (memory() if bench.device.type == "cuda" else {})

    size = f"N {case.N}, V {case.V}, D {case.D}, E {case.E}"
    bench.interleaved("loss", size, {name: lambda make=make: measured(make) for name, make in arms.items()})


def qwen(bench: Bench) -> None:
    from gpu_arms import qwen as make

    for size in ("4x16", "2x32") if bench.options.tiny else ("32x256", "16x512"):
        steps_of(bench, "qwen", size, make)


def demo(bench: Bench) -> None:
    from gpu_arms import demo as make

    given = functools.partial(make, fields=bench.options.demo)
    steps_of(bench, "demo", "2x32" if bench.options.tiny else "32x256", given)


def steps_of(bench: Bench, section: str, size: str, make: Callable[..., Any]) -> None:
    import torch
    from gpu_arms import ARMS, Meter

    options = bench.options
    found: Line = {}

    def begin() -> Line:
        found["pair"] = make(*numbers(size), options.steps, bench.device, options.tiny)
        return {}

    if refused := attempt(begin):
        bench.keep({"section": section, "size": size, "arm": "ours", "round": 1} | refused)
        return
    pair = found.pop("pair")

    def measured(run: Any) -> Line:
        meter = Meter(bench.device, options.steps)
        try:
            result: Line = run(pair, meter)
        finally:
            meter.close()
        return result | meter.found | {"flops": pair.flops()}

    bench.interleaved(section, size, {name: lambda run=run: measured(run) for name, run in ARMS.items()})
    torch.compiler.reset()  # what was compiled may keep the pair that it was compiled for


def memory() -> Line:
    import torch

    found = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
    return {name: value / 2**30 for name, value in found.items()}


def summed_up(lines: list[Line], peak: float | None) -> dict[tuple[str, str], dict[str, Line]]:
    """Of each section and size the arms, medians over rounds."""
    from gpu_arms import ONLY_KL, WARM

    groups: dict[tuple[str, str], dict[str, list[Line]]] = {}
    for line in lines:
        groups.setdefault((line["section"], line["size"]), {}).setdefault(line["arm"], []).append(line)
    tables: dict[tuple[str, str], dict[str, Line]] = {}
    for (section, size), arms in groups.items():
        table = tables[section, size] = {}
        base = next((line["losses"] for line in arms.get("ours", []) if "losses" in line), None)
        for name, of in arms.items():
            good = [line for line in of if "seconds" in line]
            if not good:
                table[name] = {"why": why_not(of[-1])}
                continue
            # Of a run of steps the first ones compile, and waits were counted in the last one.
            counted = slice(0, None) if section == "loss" else slice(WARM, -1)
            seconds = statistics.median(
                s for line in good for s in line["seconds"][counted] or line["seconds"]
            )
            row: Line = {"seconds": seconds}
            if section != "loss":
                B, T = numbers(size)
                row["tokens_per_s"] = B * T / seconds
            if peak:
                row["utilisation"] = good[-1]["flops"] / seconds / (peak * 1e12)
            if "loss_seconds" in good[-1]:
                row["loss_s"] = statistics.median(s for line in good for s in line["loss_seconds"])
            row |= {key: good[-1][key] for key in ("waits", "peak_gib", "reserved_gib") if key in good[-1]}
            if base and name not in ONLY_KL and "losses" in good[-1]:
                pairs = zip(good[-1]["losses"], base, strict=True)
                gaps = [abs(a - b) / abs(b) for a, b in pairs]
                row |= {"gap": gaps[0], "drift": max(gaps)}
            table[name] = row
    return tables


COLUMNS: dict[str, tuple[str, Callable[[Line], str]]] = {
    "seconds": ("ms", lambda row: f"{1000 * row['seconds']:.1f}"),
    "tokens_per_s": ("tokens/s", lambda row: f"{row['tokens_per_s']:.0f}"),
    "utilisation": ("utilisation", lambda row: f"{row['utilisation']:.0%}"),
    "loss_s": ("loss", lambda row: f"{row['loss_s'] / row['seconds']:.0%}"),
    "waits": ("waits a step", lambda row: str(row["waits"])),
    "peak_gib": ("peak GiB", lambda row: f"{row['peak_gib']:.2f}"),
    "reserved_gib": ("reserved GiB", lambda row: f"{row['reserved_gib']:.2f}"),
    "gap": ("first loss differs by", lambda row: f"{row['gap']:.1e}"),
    "drift": ("any by", lambda row: f"{row['drift']:.1e}"),
}


def show(lines: list[Line], peak: float | None) -> None:
    tables = summed_up(lines, peak)
    head = lines[-1]
    known = f"{peak:.0f} TFLOP/s" if peak else "peak not known: --peak-tflops"
    versions = ", ".join(f"{name} {head[name]}" for name in PACKAGES if name in head)
    small = " Tiny shapes: no figures of anything." if head["tiny"] else ""
    print(f"\n{head['device']} {head['driver']} ({known}), {versions}, {head['run']}.{small}")
    for (section, size), table in tables.items():
        print(f"\n| {section} {size} | {' | '.join(title for title, _ in COLUMNS.values())} |")
        print("|---" * (len(COLUMNS) + 1) + "|")
        for name, row in table.items():
            if "why" in row:
                print(f"| {name} | {row['why']} |{' |' * (len(COLUMNS) - 1)}")
            else:
                cells = (of(row) if key in row else "" for key, (_, of) in COLUMNS.items())
                print(f"| {name} | {' | '.join(cells)} |")
    print("\n| goal | fastest of ours | |\n|---|---|---|")
    for goal, figure, is_met in goals(tables):
        verdict = "not run" if is_met is None or head["tiny"] else "met" if is_met else "missed"
        print(f"| {goal} | {figure} | {verdict} |")


def goals(tables: dict[tuple[str, str], dict[str, Line]]) -> list[tuple[str, str, bool | None]]:
    found: list[tuple[str, str, bool | None]] = []

    def add(goal: str, form: str, value: float | None, is_met: Callable[[float], bool]) -> None:
        said = "not run" if value is None else form.format(value)
        found.append((goal, said, None if value is None else is_met(value)))

    for (section, size), table in tables.items():
        timed = {name: row for name, row in table.items() if "seconds" in row and "bare" not in name}
        mine, theirs = (
            min(
                (row for name, row in timed.items() if name.startswith("ours") == is_ours),
                default={},
                key=lambda row: row["seconds"],
            )
            for is_ours in (True, False)
        )
        where, seconds = f"{section} {size}", mine.get("seconds")
        if section == "loss":
            gb = mine["peak_gib"] * 2**30 / 1e9 if "peak_gib" in mine else None
            add(f"{where}: at most 36 ms, Liger says 60.7", "{:.4f} s", seconds, lambda s: s <= 0.036)
            add(f"{where}: at most 3.3 GB, Liger says 11.1", "{:.2f} GB", gb, lambda g: g <= 3.3)
        if section == "qwen":
            add(f"{where}: at most 0.5 s", "{:.3f} s", seconds, lambda s: s <= 0.5)
            add(f"{where}: at least 50 %", "{:.0%}", mine.get("utilisation"), lambda u: u >= 0.5)
        ratio = theirs["seconds"] / seconds if theirs and seconds else None
        add(f"{where}: at least 1.3 of the fastest peer", "{:.2f}", ratio, lambda r: r >= 1.3)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes, on the CPU too: seconds, of demo two minutes"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--arms", nargs="+", help="those whose name contains one of these texts")
    parser.add_argument("--demo", nargs="+", default=[], metavar="a.b=value", help="fields of its recipe")
    parser.add_argument("--steps", type=int, help="8, tiny 4; the first two are not counted, nor is the last")
    parser.add_argument("--rounds", type=int, help="2, tiny 1")
    parser.add_argument("--minutes", type=float, default=8, help="after which no arm is begun")
    parser.add_argument("--peak-tflops", type=float, help="of the card, in bfloat16 without sparsity")
    parser.add_argument("--peer-path", nargs="*", default=[], help="folders that peers were unpacked in")
    parser.add_argument("--append", type=Path, help="bench/results.jsonl, if not given and not --tiny")
    parser.add_argument("--markdown", type=Path, help="only print the tables of this file's newest run")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (4 if options.tiny else 8)
    options.rounds = options.rounds or (1 if options.tiny else 2)
    if options.markdown:
        lines = [json.loads(line) for line in options.markdown.read_text().splitlines()]
        lines = [line for line in lines if line["bench"] == "gpu" and line["tiny"] == options.tiny]
        if not lines:
            print("bench/gpu.py: not run: no line of it in this file.")
            return 0
        newest = [line for line in lines if line["run"] == lines[-1]["run"]]
        show(newest, options.peak_tflops or peak_tflops(newest[-1]["device"]))
        return 0
    import torch

    if not options.tiny and not torch.cuda.is_available():
        print("bench/gpu.py: no CUDA device. --tiny runs it all small on the CPU.", file=sys.stderr)
        return 2
    if not options.tiny and options.append is None:
        options.append = Path(__file__).resolve().parent / "results.jsonl"
    sys.path += options.peer_path  # what the environment has comes first
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    bench = Bench(options)
    with contextlib.nullcontext() if bench.device.type == "cuda" else traced_only():
        for section in options.only:
            {"loss": loss, "qwen": qwen, "demo": demo}[section](bench)
            gc.collect()
    if not bench.lines:
        print("bench/gpu.py: no arm of --arms in the sections of --only.", file=sys.stderr)
        return 2
    show(bench.lines, bench.peak_tflops)
    rows = (row for table in summed_up(bench.lines, None).values() for row in table.values())
    others = any(row["gap"] > GAP for row in rows if "gap" in row)
    return int(others or any("failed" in line for line in bench.lines))


@contextlib.contextmanager
def traced_only() -> Iterator[None]:
    """torch.compile traces, of the loss too, and calls no compiler: on a CPU it would take minutes."""
    import torch

    from potstill.losses import objective

    compile_ = torch.compile

    @functools.wraps(compile_)
    def traced(*given: Any, **options: Any) -> Any:
        return compile_(*given, **options | {"backend": "aot_eager"})

    with (
        mock.patch.object(torch, "compile", traced),
        mock.patch.object(objective, "is_compiling_faster", lambda device: True),
    ):
        yield
    objective.compiled_fused.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
