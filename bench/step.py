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
from pathlib import Path

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "half-depth.yaml"


def ours(recipe: Path, overrides: list[str], folder: Path) -> dict[str, list[float]]:
    from potstill import distill

    run = distill(recipe, overrides=overrides, out=folder / "run")
    steps = [line for line in run.metrics() if "train/loss" in line]
    return {"losses": [s["train/loss"] for s in steps], "seconds": [s["speed/step_s"] for s in steps]}


def plain(recipe: Path, overrides: list[str], folder: Path) -> dict[str, list[float]]:
    """The loop that anybody would write: full logits of both models, library losses."""
    import torch
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    from potstill.assembly import make_corpus
    from potstill.corpus.rows import Order
    from potstill.recipe import load

    settings = load(recipe, overrides)
    plan = settings.train
    corpus, _ = make_corpus(settings)
    order = Order(len(corpus.train), plan.seed)
    gguf = Path(settings.teacher.model)
    teacher = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    student = copy.deepcopy(teacher)
    student.model.layers = torch.nn.ModuleList([student.model.layers[i] for i in settings.student.keep])
    student.config.num_hidden_layers = len(student.model.layers)
    student.train()
    matrices = [p for p in student.parameters() if p.ndim >= 2]
    vectors = [p for p in student.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=(plan.beta1, plan.beta2))

    losses, seconds = [], []
    for step in range(plan.steps):
        started = time.perf_counter()
        batch = corpus.train.batch(order.rows(step, plan.rows_per_step))
        inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
        with torch.no_grad():
            teacher_logits = teacher(**inputs).logits.flatten(0, 1)[batch.positions_N]
        logits = student(**inputs).logits.flatten(0, 1)[batch.positions_N]
        ce = F.cross_entropy(logits, batch.labels_N)
        teacher_logp = F.log_softmax(teacher_logits, -1)
        kl = F.kl_div(F.log_softmax(logits, -1), teacher_logp, log_target=True, reduction="batchmean")
        loss = 0.5 * ce + 0.5 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), plan.clip)
        warm = (step + 1) / plan.warmup if step < plan.warmup else 1.0
        progress = max(step - plan.warmup, 0) / max(plan.steps - 1 - plan.warmup, 1)
        cosine = plan.final_lr_ratio + (1 - plan.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * (warm if step < plan.warmup else cosine)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "seconds": seconds}


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
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(result | {"peak_gib": peak}))
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
