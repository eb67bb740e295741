"""Does `potstill plan` say what a run then needs? Predicted against measured peak, each in a fresh process.

Pairs: SmolLM2-135M-Instruct with its half-depth student (Llama, tied head, from GGUF), and a random Qwen2 of
59 M parameters with a student of half its layers (untied head, biases, from safetensors). Two or three shapes
of a micro-batch each, activation checkpointing off and on, and bfloat16 for both models on top. The measured
peak is the receipt's.

    python bench/plan.py [--only TEXT] [--steps 3] [--append bench/results.jsonl]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "half-depth.yaml"
FEW_FILES = 'corpus.exclude=["site-packages/*", "dist-packages/*", "test/*", "*/test/*", "[b-z]*"]'
PAIRS = {"smollm2-135m": [(4, 256), (2, 512), (1, 1024)], "qwen2-59m": [(8, 256), (2, 1024)]}
LOW, HIGH = 0.85, 1.15


def make_second_pair(folder: Path) -> Path:
    """A model with random weights, a file of random ids, and a recipe for both."""
    import numpy as np
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    ids = np.random.default_rng(0).integers(1, 32_000, 400_000)
    ids[::300] = 0  # documents end
    ids.astype("<u2").tofile(folder / "ids.bin")
    recipe = folder / "qwen2.yaml"
    recipe.write_text(
        "corpus: {name: tokens, path: ids.bin, dtype: uint16, document_end: 0, heldout_rows: 1}\n"
        "teacher: {name: torch, model: teacher}\n"
        "student: {name: cut, layers: 4}\n"
        "objective: {chunk: 256}\n"
        "train: {steps: 10, rows_per_step: 8, lr: 1e-4, device: cpu}\n"
    )
    return recipe


def cases() -> list[tuple[str, int, int, list[str]]]:
    found = []
    for pair, shapes in PAIRS.items():
        for rows, tokens in shapes:
            for on in ("false", "true"):
                found.append((pair, rows, tokens, [f"train.activation_checkpointing={on}"]))
        rows, tokens = shapes[0]
        found.append((pair, rows, tokens, ["train.precision=bfloat16", "teacher.dtype=bfloat16"]))
        found.append(
            (pair, rows, tokens, [f"train.rows_per_step={4 * rows}", f"train.rows_per_micro_batch={rows}"])
        )
    return found


def predict(recipe: Path, overrides: list[str]) -> dict:
    from potstill.build.resolve import resolve
    from potstill.preflight.plan import plan
    from potstill.recipe.load import load

    found = plan(resolve(load(recipe, overrides)))
    return {"gib": found.peak_bytes / 2**30, "parts_mib": {k: v / 2**20 for k, v in found.parts.items()}}


def measure(recipe: Path, overrides: list[str]) -> dict:
    from potstill import distill

    with tempfile.TemporaryDirectory() as folder:
        run = distill(recipe, overrides=overrides, out=Path(folder) / "run")
        return {"gib": run.receipt()["peak_memory_gib"]}


ARMS = {"predict": predict, "measure": measure}


def in_fresh_process(arm: str, recipe: Path, overrides: list[str]) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "--arm", arm, "--recipe", str(recipe), *overrides],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{arm} {overrides}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--only", default="", help="cases whose line contains this text")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--append", type=Path)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(ARMS[options.arm](options.recipe, options.overrides)))
        return 0

    import torch

    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        recipes = {"smollm2-135m": RECIPE, "qwen2-59m": make_second_pair(Path(folder))}
        for pair, rows, tokens, changes in cases():
            name = f"{pair} {rows} x {tokens} {' '.join(changes)}"
            if options.only not in name:
                continue
            overrides = [f"train.steps={options.steps}", f"train.rows_per_step={rows}", "train.warmup=1"]
            overrides += [f"corpus.tokens_per_row={tokens}", *changes]
            overrides += [FEW_FILES] if pair == "smollm2-135m" else []
            predicted = in_fresh_process("predict", recipes[pair], overrides)
            measured = in_fresh_process("measure", recipes[pair], overrides)
            ratio = predicted["gib"] / measured["gib"]
            wrong += not LOW <= ratio <= HIGH
            print(f"{name:<95} {predicted['gib']:.3f} / {measured['gib']:.3f} GiB = {ratio:.3f}", flush=True)
            if options.append:
                record = {"bench": "plan", "pair": pair, "rows": rows, "tokens_per_row": tokens}
                record |= {"changes": changes, "predicted_gib": predicted["gib"]}
                record |= {
                    "measured_gib": measured["gib"],
                    "ratio": ratio,
                    "parts_mib": predicted["parts_mib"],
                }
                record |= {"steps": options.steps, "torch": torch.__version__}
                record |= {"machine": platform.machine(), "threads": torch.get_num_threads()}
                with open(options.append, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
