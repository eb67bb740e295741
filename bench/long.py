"""Does a run of 50,000 steps come to its end, whatever happens to it on the way?

A student of 2.3 million weights learns from the stored targets of a teacher of its kind, rows of 256 tokens
of the standard library, one a step, on one core. The run is killed at random instants, some of them while it
loads, and started again with --resume each time.

    python bench/long.py prepare    tokenizer, tokens, teacher (plain training), store: about 20 minutes
    python bench/long.py run        50,000 steps and 24 kills
    python bench/long.py again      its first 3,000 steps without a kill, for comparison
    python bench/long.py judge      the curve, memory, checkpoints and step time of what `run` left

`run` goes on where it was stopped; `judge` appends what it finds to --append.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS, ROWS_OF_TEACHER, TEACHER_STEPS = 50_000, 4, 1500
KILLS, LOADING_KILLS, LAST_KILL, EARLY = 21, 3, 30_000, 3000
STUDENT = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
TEACHER = {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 5}
CORPUS = "corpus: {name: tokens, path: ids.bin, dtype: uint16, tokenizer: student, heldout_rows: 32}"
RECIPE = f"""
{CORPUS}
teacher: {{name: store, path: store}}
student: {{name: config, model: student}}
train:
  {{steps: {STEPS}, rows_per_step: 1, lr: 1e-3, warmup: 500, final_lr_ratio: 0.02,
   save_every: 500, device: cpu}}
eval: {{every: 500, sample_prompt: "def ", sample_tokens: 24}}
"""
OF_TEACHER = f"""
{CORPUS}
teacher: {{name: fixture, vocab_size: 2048}}
student: {{name: config, model: teacher}}
objective: {{kd_weight: 0, ce_weight: 1}}
train: {{steps: {TEACHER_STEPS}, rows_per_step: {ROWS_OF_TEACHER}, lr: 2e-3, warmup: 100, device: cpu}}
"""
CAPTURE = f"""
{CORPUS}
teacher: {{name: torch, model: taught/student}}
student: {{name: config, model: student}}
train: {{steps: {STEPS}, rows_per_step: 1, lr: 1e-3, device: cpu}}
"""


def prepare(out: Path) -> None:
    import numpy as np
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from potstill.data.readers import files_of
    from potstill.recipe.paths import locate

    out.mkdir(parents=True, exist_ok=True)
    stdlib = Path(locate("stdlib:", out))
    left_out = ["site-packages/*", "dist-packages/*", "test/*", "*/test/*"]
    texts = [
        Path(file).read_bytes().decode("utf-8", "replace") for file in files_of(stdlib, ["*.py"], left_out)
    ]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2048, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    ids = [number for encoded in inner.encode_batch(texts) for number in (*encoded.ids, 0)]
    np.array(ids, dtype="<u2").tofile(out / "ids.bin")
    for name, shape in (("student", STUDENT), ("teacher", TEACHER)):
        transformers.LlamaConfig(
            vocab_size=2048,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            **shape,
        ).save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    for name, text in (("long", RECIPE), ("teacher", OF_TEACHER)):
        (out / f"{name}.yaml").write_text(text)
    potstill("distill", out / "teacher.yaml", "--out", out / "taught")
    (out / "capture.yaml").write_text(CAPTURE)
    potstill("capture", out / "capture.yaml", "--out", out / "store")


def potstill(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "potstill", *map(str, arguments)], check=True)


def start(out: Path, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "potstill", "distill", str(out / "long.yaml"), "--out", str(out / name)]
    if (out / name / "status.json").exists():
        command.append("--resume")
    with open(out / f"{name}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def run(out: Path) -> None:
    dice = random.Random(0)
    wanted = sorted(
        [
            *(dice.randrange(1, EARLY) for _ in range(4)),
            *(dice.randrange(LAST_KILL) for _ in range(KILLS - 4)),
        ]
    )
    seen = out / "seen.jsonl"
    before = [json.loads(line) for line in seen.read_text().splitlines()] if seen.exists() else []
    kills = [line for line in before if "killed_at" in line]
    for at_step in wanted[sum(not kill["loading"] for kill in kills) :]:
        for loading in (True, False) if len(kills) % 8 == 3 else (False,):  # some die before they take a step
            child, born = start(out, "run"), time.monotonic()
            patience = dice.uniform(1, 12) if loading else float("inf")
            while child.poll() is None and time.monotonic() - born < patience and last_step(out) < at_step:
                observe(out, child, seen)
            time.sleep(dice.random())
            require_alive(child, out)
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills.append({"killed_at": last_step(out), "loading": loading})
            note(seen, kills[-1] | {"checkpoints": len(checkpoints(out))})
    child = start(out, "run")
    while child.poll() is None:
        observe(out, child, seen)
    sys.exit(child.returncode)


def again(out: Path) -> None:
    child = start(out, "again")
    while child.poll() is None and last_step(out, "again") < EARLY:
        time.sleep(1)
    require_alive(child, out)
    child.send_signal(signal.SIGKILL)
    child.wait()


def require_alive(child: subprocess.Popen[bytes], out: Path) -> None:
    if child.poll() is not None:
        sys.exit(f"the run ended by itself with {child.returncode}: see {out}")


def observe(out: Path, child: subprocess.Popen[bytes], seen: Path) -> None:
    time.sleep(2)
    try:
        status = Path(f"/proc/{child.pid}/status").read_text()
    except OSError:
        return
    found = [line for line in status.splitlines() if line.startswith("VmRSS")]
    if found:
        record = {"pid": child.pid, "step": last_step(out), "rss_kib": int(found[0].split()[1])}
        note(seen, record | {"checkpoints": len(checkpoints(out))})


def checkpoints(out: Path) -> list[str]:
    folder = out / "run" / "checkpoints"
    return [name for name in os.listdir(folder) if name.isdecimal()] if folder.exists() else []


def note(file: Path, record: dict[str, Any]) -> None:
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def last_step(out: Path, name: str = "run") -> int:
    """Of the last whole line of the run's metrics."""
    file = out / name / "metrics.jsonl"
    if not file.exists():
        return 0
    with open(file, "rb") as lines:
        lines.seek(max(file.stat().st_size - 4096, 0))
        whole = lines.read().split(b"\n")[:-1]
    return int(json.loads(whole[-1])["step"]) if len(whole) > 1 else 0


def metrics(out: Path, name: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().split("\n")[:-1]]


def judge(out: Path) -> dict[str, Any]:
    lines, observed = (
        metrics(out),
        [json.loads(line) for line in (out / "seen.jsonl").read_text().splitlines()],
    )
    steps = [line for line in lines if "train/loss" in line]
    held = {line["step"]: line["heldout/loss"] for line in lines if "heldout/loss" in line}
    first = {line["step"]: line["train/loss"] for line in steps}
    whole = {line["step"]: line["train/loss"] for line in metrics(out, "again") if "train/loss" in line}
    last_life = [
        line
        for line in observed
        if line.get("pid") == observed[-1]["pid"] and line["step"] > LAST_KILL + 1000
    ]
    rss = [line["rss_kib"] for line in last_life]
    quarters = [STEPS * part // 4 for part in (1, 2, 3, 4)]
    tenth = len(steps) // 10
    seconds = [
        statistics.median(line["speed/step_s"] for line in steps[i * tenth : (i + 1) * tenth])
        for i in range(10)
    ]
    kills = [line for line in observed if "killed_at" in line]
    return {
        "bench": "long",
        "steps": len(steps),
        "in_order": [line["step"] for line in steps] == list(range(1, STEPS + 1)),
        "kills": len(kills),
        "kills_before_a_step": sum(line["loading"] for line in kills),
        "steps_equal_to_a_run_without_kills": sum(first[step] == loss for step, loss in whole.items()),
        "of": len(whole),
        "heldout_loss_at_quarters": [round(held[step], 4) for step in (0, *quarters)],
        "best_heldout_step": min(held, key=lambda step: held[step]),
        "most_checkpoints": max(line["checkpoints"] for line in observed),
        "rss_gib_of_last_life": [round(n / 2**20, 4) for n in (min(rss), statistics.median(rss), max(rss))],
        "steps_of_last_life": last_life[-1]["step"] - last_life[0]["step"],
        "step_s_by_tenth": [round(s, 4) for s in seconds],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["prepare", "run", "again", "judge"])
    parser.add_argument("--out", type=Path, default=Path("runs/long"))
    parser.add_argument("--append", type=Path, default=Path("bench/results.jsonl"))
    options = parser.parse_args()
    if options.mode != "judge":
        {"prepare": prepare, "run": run, "again": again}[options.mode](options.out)
        return 0
    found = judge(options.out)
    print(json.dumps(found, indent=1))
    note(options.append, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
