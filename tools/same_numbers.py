"""Do two commits compute the same numbers? For a change that should move none.

    python tools/same_numbers.py OLD NEW

The same small jobs are run with the code of each commit, one after the other in the same place, by the public
command line alone. Everything they write is then compared to the last bit: weights, tokenizers, checkpoints,
stores, GGUF files and tables by their bytes; metrics, receipts and manifests field by field, but for those in
`LEFT_OUT`. One line a job, `same` or every field that differs; exit code 1 where anything does.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

LEFT_OUT = (
    # Pattern of the file, pattern of the field, why two runs of one program may differ in it.
    ("*metrics.jsonl", "*.speed/*", "wall time"),
    ("*metrics.jsonl", "*.memory/*", "what the system gave the process"),
    ("*receipt.json", "*_seconds", "wall time"),
    ("*receipt.json", "*peak_*gib", "what the system gave the process; planned: with the libraries in it"),
    ("*receipt.json", "plan.ratio", "of these two"),
    ("*receipt.json", "plan.parts_gib.libraries", "memory of the process before the run"),
    ("*receipt.json", "check.memory", "names what is free now; the parts of the plan are compared"),
    ("*receipt.json", "check.disk", "the same"),
    ("*", "chunk.why", "names what is free now; the chunk is compared"),
    ("*state.json", "outcome.seconds", "wall time, in a checkpoint"),
    ("*checkpoints/*manifest.json", "state.json.*", "size and hash of the file with that wall time"),
    ("*plan.stdout", "*_available_bytes", "what is free now"),
    ("*plan.stdout", "*libraries", "memory of the process before the run"),
    ("*plan.stdout", "peak_bytes", "has it in its sum, whose parts are compared"),
    ("*show.stdout", "receipt.*", "is that of receipt.json"),
    ("*show.stdout", "metrics.speed/*", "wall time"),
    ("*show.stdout", "metrics.memory/*", "what the system gave the process"),
)
MOST_LINES = 20
SET_UP = ("plan", "capture", "distill", "demo")
"""Commands that take fields of a recipe."""
FAILED = "failed.txt"
WORDS = "the cat sat on a mat and the dog ran to a red house in the rain while two birds sang of bread"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECIPE = """\
corpus: {name: text, path: text, tokens_per_row: 32, heldout_rows: 4}
teacher: {name: torch, model: teacher}
student: {name: cut, layers: 2, rule: first_last}
objective: {chunk: 16}
train: {steps: 6, rows_per_step: 5, rows_per_micro_batch: 2, lr: 1e-3, warmup: 2, save_every: 3, device: cpu}
eval: {every: 2}
"""
CAPTURES = {
    # Kind of the targets: how they are kept, and an objective that they serve.
    "sampled": ("{name: sampled, threshold: 0.05, rows_per_shard: 16}", "{chunk: 16}"),
    "topk": (
        "{name: topk, k: 8, rows_per_shard: 16}",
        "{divergence: {name: skew_kl, alpha: 0.2}, temperature: 2.0, chunk: 16}",
    ),
    "hidden": (
        "{name: hidden, dtype: bfloat16, rows_per_shard: 16}",
        "{divergence: tvd, kd_weight: 0.5, ce_weight: 0.5, chunk: 16}",
    ),
}
LORA = "{name: cut, keep: [0, 1, 3], ffn_width: 48, lora: {rank: 4, dropout: 0.1}}"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "potstill")
LIBRARIES = ("torch._dynamo", "torch.distributed.tensor", "transformers.models.llama.modeling_llama", "gguf")
SERVER = """
import importlib, json, os, runpy, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    words, place, *files = json.loads(line)
    if (child := os.fork()) == 0:
        os.chdir(place)
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        sys.argv = ["potstill", *words]
        runpy.run_module("potstill", run_name="__main__", alter_sys=True)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""`python -m potstill` for each line that it reads, in a new process that has the libraries already."""
Commands = list[list[str]]


def jobs(inputs: Path, side: Path) -> dict[str, Commands]:
    """Each job's commands, in order: the words after `potstill`."""
    recipe, fixture, stored = f"{inputs}/recipe.yaml", f"{inputs}/tiny-fixture.yaml", Commands()
    cut = ["train.activation_checkpointing=true", "eval.sample_prompt=the cat", "eval.sample_tokens=8"]
    rows, odd = f"tokens_per_row: 48, heldout_rows: 3, shards: {side}/chat/shards", "train.precision=bfloat16"
    chat = [f"corpus={{name: chat, path: chat.jsonl, {rows}}}", odd, "train.optimizer=sgd"]
    jsd, reverse = "{divergence: {name: jsd, beta: 0.3}}", "{divergence: reverse_kl, engine: reference}"
    for kind, (capture, objective) in CAPTURES.items():
        asked, teacher = f"objective={objective}", f"teacher={{name: store, path: {side}/stored/{kind}}}"
        stored.append(["capture", recipe, asked, f"capture={capture}", "--out", kind, "--json"])
        stored.append(["store", "verify", kind, "--json"])
        stored.append(["distill", recipe, asked, teacher, "--out", f"from-{kind}"])
    ways = [[f"train.parallel={way}", "train.clip=0.5", "--out", way] for way in ("ddp", "fsdp")]
    return {
        "fixture": [["distill", fixture, "train.device=cpu", "--out", "run"]],
        "cut": [
            ["plan", recipe, *cut, "--json"],
            ["distill", recipe, *cut, "--out", "run"],
            ["eval", "run", "--json"],
            ["show", "run", "--json"],
            ["export", "run", "--quantize", "f16,q8_0", "--json"],
        ],
        "stored": stored,
        "lora": [["distill", recipe, f"student={LORA}", f"objective={reverse}", "--out", "run"]],
        "ranks": [["distill", recipe, *way] for way in ways],
        "chat": [["distill", recipe, *chat, f"objective={jsd}", "--out", "run"]],
        "demo": [["demo", "--out", "run"], ["eval", "run", "--json"]],
    }


def make_inputs(folder: Path, old: Path) -> None:
    """Recipes, texts and a random Llama of four layers, which both commits read."""
    shutil.copytree(old / "recipes", folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "text").mkdir()
    words, talks = WORDS.split(), []
    for number in range(24):
        text = " ".join(words[(number * 7 + i * i + 3 * i * number) % len(words)] for i in range(40))
        (folder / "text" / f"{number:03}.txt").write_text(f"{text} {number}\n")
        asked, answer = {"role": "user", "content": text[:40]}, {"role": "assistant", "content": text[40:90]}
        talks.append(json.dumps({"messages": [asked, answer]}) + "\n")
    (folder / "chat.jsonl").write_text("".join(talks))
    make_teacher(folder / "teacher")


def make_teacher(folder: Path) -> None:
    """Its tokenizer reads bytes; its vocabulary has a padded end."""
    torch, transformers, tokenizers = map(importlib.import_module, ("torch", "transformers", "tokenizers"))
    special = ["<eos>", "<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    known = {token: i for i, token in enumerate([*special, *alphabet, "th", "the"])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=known, merges=[("t", "h"), ("th", "e")]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    names = {"eos_token": special[0], "pad_token": special[1], "additional_special_tokens": special[2:]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.chat_template = CHATML
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 264}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 512}
    config = transformers.LlamaConfig(**sizes, **heads, **ids, initializer_range=0.3)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def extract(commit: str, to: Path) -> None:
    """The files of a commit, without git: a receipt then names no commit."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(["git", "-C", str(root), "archive", commit], capture_output=True)
    if done.returncode:
        raise SystemExit(f"error: {commit}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
        files.extraction_filter = getattr(tarfile, "data_filter", None)  # Pythons before 3.11.4 have none
        files.extractall(to)


def run_side(tree: Path, side: Path, todo: dict[str, Commands]) -> None:
    """All jobs with the code in `tree`; stdout of each command is a file among the others."""
    told = {"PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1"}
    how: dict[str, Any] = {"env": {"OMP_NUM_THREADS": "1"} | os.environ | told, "text": True, "cwd": tree}
    where = [sys.executable, "-c", "import potstill; print(potstill.__file__)"]
    file = subprocess.run(where, capture_output=True, check=True, **how).stdout.strip()
    if not Path(file).is_relative_to(tree):
        raise SystemExit(f"error: another potstill is imported before that of {tree}: {file}")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SERVER, *LIBRARIES], **pipes, **how) as server:
        for job, number, words in [(j, n, w) for j, all_of in todo.items() for n, w in enumerate(all_of)]:
            place, err = side / job, side / f"{job}-{number}.stderr"
            place.mkdir(parents=True, exist_ok=True)
            if (place / FAILED).exists():
                continue  # what comes after it in this job would fail, too
            if words[0] in SET_UP and (tree / "src" / "potstill" / "models" / "repair.py").exists():
                words = [*words, "student.repair=false"]  # which commits before it did not know
            print(f"{tree.name}: {job}: potstill {' '.join(words)}", file=sys.stderr, flush=True)
            out = place / f"{number}-{words[0]}.stdout"
            if job == "ranks":
                command = [sys.executable, *TORCHRUN, *words]
                with out.open("w") as o, err.open("w") as e:
                    code = subprocess.run(command, stdout=o, stderr=e, **how | {"cwd": place}).returncode
            else:
                assert server.stdin is not None and server.stdout is not None
                print(json.dumps([words, *map(str, (place, out, err))]), file=server.stdin, flush=True)
                code = int(server.stdout.readline())
            if code:
                (place / FAILED).write_text(f"potstill {words[0]}: exit code {code}\n")
                print(err.read_text(), file=sys.stderr)


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every value of a JSON tree under its dotted name, as its shortest exact text."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if not inner:
        yield name, json.dumps(tree)
        return
    for key, value in inner:
        yield from leaves(value, f"{name}.{key}".lstrip("."))


def fields(path: Path) -> dict[str, str]:
    """What of a file is compared by name; of one that is no text, its hash alone."""
    data = path.read_bytes()
    try:
        text = data.decode()
        if "\0" in text:
            raise ValueError("numbers")
        if path.suffix == ".yaml":
            return dict(leaves(yaml.safe_load(text)))
        if path.suffix == ".jsonl":
            return dict(leaves([json.loads(line) for line in text.splitlines()]))
        if path.suffix in (".json", ".stdout") and text[:1] in ("{", "["):
            return dict(leaves(json.loads(text)))
        return {f"line {number}": line for number, line in enumerate(text.split("\n"), start=1)}
    except ValueError:
        return {"sha256": hashlib.sha256(data).hexdigest()}


def numbers(value: str) -> list[str]:
    """The numbers in a sentence, in their order; of any other value, the value."""
    is_sentence = value.startswith('"') and value.count(" ") >= 2
    return re.findall(r"[-+]?\d[\d.,e+-]*", value) if is_sentence else [value]


def differences(old: Path, new: Path, reworded: bool) -> list[str]:
    """Of two folders, each as `file: field: old -> new`."""
    files = [{str(p.relative_to(top)): p for p in top.rglob("*") if p.is_file()} for top in (old, new)]
    found = []
    for file in sorted((files[0].keys() | files[1].keys()) - {FAILED}):
        one, two = files[0].get(file), files[1].get(file)
        if one is None or two is None:
            found.append(f"{file}: {'absent -> there' if one is None else 'there -> absent'}")
        elif one.read_bytes() != two.read_bytes():
            found += differing_fields(file, fields(one), fields(two), reworded)
    return found


def differing_fields(file: str, old: dict[str, str], new: dict[str, str], reworded: bool) -> list[str]:
    """Of two versions of a file with different bytes. Where sentences may be `reworded`, their numbers are
    compared, and a field that only the new version knows may be there if it is empty.
    """
    if reworded:
        new = {name: value for name, value in new.items() if name in old or value not in ("[]", "null")}
        old, new = ({name: str(numbers(value)) for name, value in of.items()} for of in (old, new))
    names = [*old, *(name for name in new if name not in old)]
    matching = [field for pattern, field, _ in LEFT_OUT if fnmatch.fnmatchcase(file, pattern)]
    kept = [name for name in names if not any(fnmatch.fnmatchcase(name, field) for field in matching)]
    if len(kept) == len(names) and old == new and not reworded:
        return [f"{file}: bytes: other bytes of the same fields"]
    none = "none"
    changed = [name for name in kept if old.get(name) != new.get(name)]
    return [f"{file}: {name}: {old.get(name, none):.60} -> {new.get(name, none):.60}" for name in changed]


def is_same(job: str, old: Path, new: Path, reworded: bool) -> bool:
    """Print a job's line or lines. A job that failed is not the same, though it failed twice alike."""
    failed = [side / FAILED for side in (old, new) if (side / FAILED).exists()]
    found = [f"{file.parts[-3]}: {file.read_text().strip()}" for file in failed]
    found += differences(old, new, reworded)
    for line in found[:MOST_LINES]:
        print(f"{job}: DIFFERENT: {line}")
    if len(found) > MOST_LINES:
        print(f"{job}: DIFFERENT: and {len(found) - MOST_LINES} more")
    if not found:
        print(f"{job}: same")
    return not found


def main(arguments: Sequence[str] | None = None) -> int:
    names = [*jobs(Path(), Path())]
    parser = argparse.ArgumentParser(description="Do two commits compute the same numbers?")
    parser.add_argument("old", metavar="OLD", help="a commit")
    parser.add_argument("new", metavar="NEW", help="another")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"of {', '.join(names)}")
    parser.add_argument("--work", type=Path, metavar="DIR", help="an empty folder, kept; default a temporary")
    parser.add_argument("--reworded", action="store_true", help="sentences may differ, but for their numbers")
    parser.add_argument("--demo", action="store_true", help="also `potstill demo`: minutes for each commit")
    options = parser.parse_args(arguments)
    wanted = options.only or [name for name in names if options.demo or name != "demo"]
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):
            parser.error(f"--work: {work} is not empty")
        inputs, side = work / "inputs", work / "side"
        todo = {name: commands for name, commands in jobs(inputs, side).items() if name in wanted}
        for name in ("old", "new"):
            extract(getattr(options, name), work / f"code-{name}")
        make_inputs(inputs, work / "code-old")
        for name in ("old", "new"):
            run_side(work / f"code-{name}", side, todo)
            side.rename(work / name)  # both wrote to one place, so that no path differs
        pairs = {job: (work / "old" / job, work / "new" / job) for job in todo}
        same = [is_same(job, *pair, options.reworded) for job, pair in pairs.items()]
    print(f"{sum(same)} of {len(same)} jobs the same")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
