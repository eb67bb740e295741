"""How the folders beside this file were made: by potstill 0.1.0 at commit 89f2fc1, on a CPU.

    PYTHONPATH=CHECKOUT/src python make.py

They are what that version wrote, and stay as they are: `tests/test_old_folders.py` opens them with the version
of today. Absolute paths in them lead to PLACE, where they were made. To freeze those of a later version, copy
this file into a folder of its own (v2) and run it there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE, PLACE = Path(__file__).resolve().parent, Path("/tmp/potstill-v1")
WORDS = "the cat sat on a mat and the dog ran to a red house in the rain while two birds sang of bread"
RECIPE = """\
corpus: {name: text, path: text, tokens_per_row: 32, heldout_rows: 2}
teacher: {name: torch, model: teacher}
student: {name: cut, layers: 2}
objective: {chunk: 16}
train: {steps: 12, rows_per_step: 4, rows_per_micro_batch: 2, lr: 1e-2, warmup: 2, save_every: 0, device: cpu, matmul: blas}
eval: {every: 4, sample_prompt: the cat, sample_tokens: 8}
"""
KINDS = {
    "sampled": "{name: sampled, threshold: 0.2, rows_per_shard: 8}",
    "topk": "{name: topk, k: 4, rows_per_shard: 8}",
    "hidden": "{name: hidden, dtype: bfloat16, rows_per_shard: 8}",
}


def potstill(*words: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-m", "potstill", *words], cwd=PLACE, env=environment)


def run(*words: str) -> None:
    if code := potstill(*words).wait():
        raise SystemExit(f"potstill {words[0]}: exit code {code}")


def make_inputs() -> None:
    """Twelve short texts, and a random Llama of three layers whose tokenizer reads bytes."""
    import tokenizers
    import torch
    import transformers

    (PLACE / "recipe.yaml").write_text(RECIPE)
    (PLACE / "text").mkdir()
    words = WORDS.split()
    for number in range(12):
        picks = [words[(number * 7 + i * i + 3 * i * number) % len(words)] for i in range(16)]
        (PLACE / "text" / f"{number:02}.txt").write_text(f"{' '.join(picks)} {number}\n")
    known = ["<eos>", "<pad>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(known)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(PLACE / "teacher")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.5,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(PLACE / "teacher")


def interrupted() -> None:
    """A run that a signal stops after its fifth line of metrics, at the first try that is quick enough."""
    while True:
        process, metrics = (
            potstill("distill", "recipe.yaml", "--out", "interrupted"),
            PLACE / "interrupted/metrics.jsonl",
        )
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 5):
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        if process.wait() == 143:
            return
        shutil.rmtree(PLACE / "interrupted")


def main() -> None:
    PLACE.mkdir()
    make_inputs()
    run("distill", "recipe.yaml", "--out", "finished")
    interrupted()
    losses = {}
    for kind, capture in KINDS.items():
        run("capture", "recipe.yaml", f"capture={capture}", "--out", f"stores/{kind}")
        teacher = f"teacher={{name: store, path: stores/{kind}}}"
        run("distill", "recipe.yaml", teacher, "--out", f"from-{kind}")
        lines = (PLACE / f"from-{kind}" / "metrics.jsonl").read_text().splitlines()
        losses[kind] = [json.loads(line)["train/loss"] for line in lines if "train/loss" in line]
    (PLACE / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")
    for name in ("recipe.yaml", "losses.json"):
        shutil.copyfile(PLACE / name, HERE / name)
    for name in ("text", "teacher", "finished", "interrupted", "stores"):
        shutil.rmtree(HERE / name, ignore_errors=True)
        shutil.copytree(PLACE / name, HERE / name)
    shutil.rmtree(PLACE)


if __name__ == "__main__":
    main()
