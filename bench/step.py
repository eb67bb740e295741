"""Is our step the step that plain PyTorch takes, and what does it need of memory and time?

Teacher SmolLM2-135M-Instruct, student of every second layer, rows 4 x 256, float32, 0.5 CE + 0.5 forward KL,
AdamW. Each arm runs in a fresh process: ours through `potstill.distill`, plain as the loop below, which
knows nothing of potstill's losses, optimizer or loop and takes only the rows from it. Compares ten step
losses, peak memory and the median time of a step.

    python bench/step.py [--steps 10] [--rounds 1] [--rows 4] [--append bench/results.jsonl]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "half-depth.yaml"


def ours(recipe: Path, overrides: list[str], folder: Path) -> dict[str, Any]:
    from potstill import distill

    run = distill(recipe, overrides=overrides, out=folder / "run")
    steps = [line for line in run.metrics() if "train/loss" in line]
    return {"losses": [s["train/loss"] for s in steps], "seconds": [s["speed/step_s"] for s in steps]}


def pair(recipe: Path, overrides: list[str]) -> tuple[Any, list[Any], Any, Any]:
    """Settings, the batches of all steps, teacher and student as Transformers has them."""
    import torch
    from transformers import AutoModelForCausalLM

    from potstill.build.corpus import make_corpus
    from potstill.build.resolve import resolve
    from potstill.data.fixed import Order
    from potstill.recipe.load import load

    settings = load(recipe, overrides)
    plan = settings.train
    corpus, _ = make_corpus(resolve(settings))
    order = Order(len(corpus.train), plan.seed)
    batches = [corpus.train.batch(order.rows(step, plan.rows_per_step)) for step in range(plan.steps)]
    gguf = Path(settings.teacher.model)
    teacher = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    student = copy.deepcopy(teacher)
    student.model.layers = torch.nn.ModuleList([student.model.layers[i] for i in settings.student.keep])
    student.config.num_hidden_layers = len(student.model.layers)
    return settings, batches, teacher, student.train()


def full_logits(model: Any, batch: Any) -> Any:
    """logits_NV, of the logits of all positions."""
    inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
    return supervised(model(**inputs).logits.flatten(0, 1), batch)


def supervised(of_positions: Any, batch: Any) -> Any:
    """Of all positions those that bear loss; no copy where they all do."""
    return of_positions if len(of_positions) == len(batch.positions_N) else of_positions[batch.positions_N]


def plain_loss(logits: Any, teacher_logits: Any, labels: Any) -> Any:
    from torch.nn import functional as F

    ce = F.cross_entropy(logits, labels)
    teacher_logp = F.log_softmax(teacher_logits, -1)
    kl = F.kl_div(F.log_softmax(logits, -1), teacher_logp, log_target=True, reduction="batchmean")
    return 0.5 * ce + 0.5 * kl


def make_adamw(plan: Any, student: Any, fused: bool | None = None) -> Any:
    import torch

    matrices = [p for p in student.parameters() if p.ndim >= 2]
    vectors = [p for p in student.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(plan.beta1, plan.beta2), fused=fused)


def rate(plan: Any, step: int) -> float:
    """As a part of plan.lr."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    progress = (step - plan.warmup) / max(plan.steps - 1 - plan.warmup, 1)
    return plan.final_lr_ratio + (1 - plan.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def take_steps(
    plan: Any, student: Any, optimizer: Any, items: Iterable[Any], loss: Callable[[Any], Any]
) -> dict[str, Any]:
    """One for each item."""
    import torch

    losses, seconds = [], []
    for step, item in enumerate(items):
        started = time.perf_counter()
        value = loss(item)
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), plan.clip)
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * rate(plan, step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "seconds": seconds}


def plain(recipe: Path, overrides: list[str], folder: Path) -> dict[str, Any]:
    """The loop that anybody would write: full logits of both models, library losses."""
    import torch

    settings, batches, teacher, student = pair(recipe, overrides)

    def loss(batch: Any) -> Any:
        with torch.no_grad():
            teacher_logits = full_logits(teacher, batch)
        return plain_loss(full_logits(student, batch), teacher_logits, batch.labels_N)

    return take_steps(settings.train, student, make_adamw(settings.train, student), batches, loss)


def peak_gib() -> float:
    """Of this process so far; of a child at least what its parent had when it started it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


ARMS = {"ours": ours, "plain": plain}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--append", type=Path)
    options = parser.parse_args()
    overrides = [f"train.steps={options.steps}", f"train.rows_per_step={options.rows}"]
    if options.arm:
        with tempfile.TemporaryDirectory() as folder:
            result = ARMS[options.arm](RECIPE, overrides, Path(folder))
        print(json.dumps(result | {"peak_gib": peak_gib()}))
        return 0

    runs: dict[str, list[dict]] = {name: [] for name in ARMS}
    for _ in range(options.rounds):
        for name in ARMS:
            command = [
                sys.executable,
                __file__,
                "--arm",
                name,
                "--steps",
                str(options.steps),
                "--rows",
                str(options.rows),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))

    first, other = runs["ours"][0]["losses"], runs["plain"][0]["losses"]
    gap = max(abs(a - b) / abs(b) for a, b in zip(first, other, strict=True))
    print(f"step losses, ours  {' '.join(f'{x:.6f}' for x in first)}")
    print(f"step losses, plain {' '.join(f'{x:.6f}' for x in other)}")
    print(f"largest relative difference over {options.steps} steps: {gap:.2g}")
    peak = {name: statistics.median(r["peak_gib"] for r in of) for name, of in runs.items()}
    step_s = {name: statistics.median(s for r in of for s in r["seconds"][1:]) for name, of in runs.items()}
    for name in ARMS:
        print(f"{name:>6}: peak {peak[name]:.2f} GiB, {step_s[name]:.2f} s per step")
    print(
        f"ours / plain: peak {peak['ours'] / peak['plain']:.2f}, time {step_s['ours'] / step_s['plain']:.2f}"
    )
    if options.append:
        import torch

        record = {
            "bench": "step",
            "rows": options.rows,
            "steps": options.steps,
            "gap": gap,
            "peak_gib": peak,
            "step_s": step_s,
        }
        record |= {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
        with open(options.append, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return 0 if gap < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
