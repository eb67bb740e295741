"""Seconds of a whole run until a student is good enough: ours, and the tools that people use.

The demo's teacher, corpus and held-out rows. Ours is `potstill distill` as it is, from the import to the evaluation
that reaches the KL: reading the corpus, both models, the checks, what layers and channels are worth, and the repair. A
peer starts from the same teacher cut by place to 21 of its 30 layers, 102.7 M weights, since none of them cuts one by
measurement, and trains with its own loss in one plain loop, on the same rows, at the same learning rates. Evaluations
are the same for all, every few steps, and not counted. Each arm runs in a fresh process, interleaved, once a seed, and
ends where the KL is reached, or with --to-end after all steps. Processor time is noted as well: it depends less on what
else the machine does.

    python bench/quality.py [--kl 1.10] [--seeds 0,1,2] [--arms "ours; plain"] [--most-steps 48] [--to-end]
        [--peer-path PEERS] [--append bench/results.jsonl]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peer_losses as losses
import step

DEMO = Path(__file__).resolve().parent.parent / "src" / "potstill" / "demo.yaml"
BY_PLACE = [*range(11), *range(20, 30)]
"""What `first_last` keeps of 30."""
STARTED = "QUALITY_STARTED"
Curve = list[tuple[int, float, float, float]]
"""Step, seconds since the process was started without evaluations, held-out KL, seconds of processor time as well."""


class Reached(Exception):
    """The KL that was asked for."""


class Clock:
    def __init__(self, kl: float, to_end: bool) -> None:
        self.wanted, self.to_end, self.curve = kl, to_end, Curve()
        self.evaluating_s = self.evaluating_cpu_s = 0.0
        self.started = float(os.environ[STARTED])

    def evaluate(self, number: int, kl: Callable[[], float]) -> None:
        """Raises Reached."""
        at, cpu_at = time.time(), time.process_time()
        seconds, cpu_s = at - self.started - self.evaluating_s, cpu_at - self.evaluating_cpu_s
        found = kl()
        self.curve.append((number, round(seconds, 2), found, round(cpu_s, 2)))
        self.evaluating_s += time.time() - at
        self.evaluating_cpu_s += time.process_time() - cpu_at
        if found <= self.wanted and not self.to_end:
            raise Reached


def ours(*more: str) -> Callable[[argparse.Namespace, Clock], None]:
    def run(options: argparse.Namespace, clock: Clock) -> None:
        from potstill.workflows import distill as workflow

        measure, steps = workflow.heldout, iter(range(0, 10**9, options.every))

        def timed(*given: Any) -> dict[str, float]:
            found: dict[str, float] = {}

            def kl() -> float:
                found.update(measure(*given))
                return found["heldout/kl"]

            clock.evaluate(next(steps), kl)
            return found

        workflow.heldout = timed
        with tempfile.TemporaryDirectory() as folder:
            # Nothing is known from an earlier run.
            os.environ["XDG_CACHE_HOME"] = folder
            workflow.distill(DEMO, overrides=[*fields(options), *more], out=Path(folder) / "run")

    return run


def peer(make: Callable[[], losses.Loss]) -> Callable[[argparse.Namespace, Clock], None]:
    def run(options: argparse.Namespace, clock: Clock) -> None:
        loss = make()
        settings, batches, teacher, student = step.pair(
            DEMO, [*fields(options), f"student={{name: cut, keep: {BY_PLACE}}}"]
        )
        before, cpu_before = time.time(), time.process_time()
        held_out = heldout_batches(settings)
        clock.evaluating_s += time.time() - before  # the corpus is read once more for it
        clock.evaluating_cpu_s += time.process_time() - cpu_before
        optimizer = step.make_adamw(settings.train, student, fused=True)

        def watched() -> Iterator[Any]:
            for number, batch in enumerate(batches):
                if number % options.every == 0:
                    clock.evaluate(number, lambda: kl_of(student, teacher, held_out))
                yield batch

        step.take_steps(
            settings.train, student, optimizer, watched(), lambda batch: loss(student, teacher, batch)
        )
        clock.evaluate(len(batches), lambda: kl_of(student, teacher, held_out))

    return run


def fields(options: argparse.Namespace) -> list[str]:
    return [
        f"train.steps={options.most_steps}",
        f"train.seed={options.seed}",
        f"eval.every={options.every}",
        f"corpus.shards={options.shards}",
    ]


def heldout_batches(settings: Any) -> list[Any]:
    from potstill.build.corpus import make_corpus
    from potstill.build.resolve import resolve

    rows = make_corpus(resolve(settings))[0].heldout
    return [rows.batch([row]) for row in range(len(rows))]


def kl_of(student: Any, teacher: Any, batches: list[Any]) -> float:
    """KL(teacher || student), nats per position."""
    import torch
    from torch.nn import functional as F

    total, count = 0.0, 0
    student.eval()
    with torch.no_grad():
        for batch in batches:
            q, p = (step.full_logits(model, batch).float().log_softmax(-1) for model in (student, teacher))
            total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
            count += len(batch.positions_N)
    student.train()
    return total / count


ARMS = {
    "ours": ours(),
    "ours, no repair": ours("student.repair=false"),
    "ours, 21 layers": ours("student={name: cut, layers: 21}"),
    "ours, by place": ours(f"student={{name: cut, keep: {BY_PLACE}, repair: false}}"),
    "plain": peer(lambda: losses.on_logits(step.plain_loss)),
    "TRL generalized_jsd_loss": peer(losses.trl_loss),
    "Liger JSD": peer(losses.liger(False, 1024)),
    "torchtune chunked": peer(losses.torchtune(False)),
    "DistillKit": peer(losses.distillkit),
}


def child(options: argparse.Namespace) -> int:
    sys.path += options.peer_path
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    clock = Clock(options.kl, options.to_end)
    try:
        with contextlib.suppress(Reached):
            ARMS[options.arm](options, clock)
    except ImportError as error:
        print(json.dumps({"not_run": str(error)}))
        return 0
    reached = [(seconds, cpu_s) for _, seconds, kl, cpu_s in clock.curve if kl <= options.kl]
    seconds, cpu_s = min(reached, default=(None, None))
    print(json.dumps({"curve": clock.curve, "seconds": seconds, "cpu_s": cpu_s}))
    return 0


def measure(options: argparse.Namespace, arm: str, seed: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--arm", arm, "--seed", seed, "--kl", str(options.kl)]
    command += ["--every", str(options.every), "--most-steps", str(options.most_steps)]
    command += ["--to-end"] if options.to_end else []
    command += ["--shards", str(options.shards), *(f"--peer-path={path}" for path in options.peer_path)]
    environment = os.environ | {STARTED: str(time.time())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kl", type=float, default=1.10)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default="; ".join(ARMS), help="apart by ;")
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--most-steps", type=int, default=48)
    parser.add_argument("--to-end", action="store_true")
    parser.add_argument("--shards", type=Path, default=Path("build/quality"))
    parser.add_argument("--peer-path", action="append", default=[])
    parser.add_argument("--append", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", default="0", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        return child(options)
    options.shards = options.shards.absolute()
    arms = [name.strip() for name in options.arms.split(";")]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for seed in options.seeds.split(","):
        for name in arms:
            line = {"bench": "quality", "arm": name, "seed": int(seed), "kl": options.kl}
            line |= measure(options, name, seed)
            print(json.dumps(line), flush=True)
            if line.get("seconds"):
                found[name].append((line["seconds"], line["cpu_s"]))
            if options.append is not None:
                with options.append.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    for name, of in found.items():
        said = "not reached, or not run: see its lines"
        if of:
            seconds, cpu_s = map(statistics.median, zip(*of, strict=True))
            said = f"{seconds:.0f} s, of the processor {cpu_s:.0f} s"
        print(f"{name:>26}: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
