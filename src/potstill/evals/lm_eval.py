"""Benchmarks of the lm-eval library, on a model loaded and masked the way potstill loads every model.

    result.json  each task's metrics, version and settings; lm-eval's version; the model's hash

Tasks and their scores are defined by lm-eval. Code that ships with a model or a data set is never run, and
tasks that execute generated code are rejected, because lm-eval has no sandbox.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from potstill.data.tokenizers import load_tokenizer, vocab_of
from potstill.errors import UserError, one_line
from potstill.evals.subject import Subject
from potstill.models.causal_lm import CausalLM
from potstill.models.hub import local_copy, pinned
from potstill.models.load import choose_device, choose_dtype, load_causal_lm, weights_sha256
from potstill.recipe.sections_evaluation import LmEvalConfig
from potstill.runs.run_dir import environment, write_whole

RESULT = "result.json"
REPORTED = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs", "config")
"""The keys of lm-eval's own result that go into ours: scores, and every setting they depend on."""


@dataclass(frozen=True, kw_only=True)
class LmEvalSettings:
    tasks: tuple[str, ...]
    """Names of lm-eval's tasks, groups or tags."""
    lm_eval_tasks: Path | None = None
    """A folder of further tasks. Functions named in their YAML are imported and run."""
    batch_rows: int = 32
    limit: int | None = None
    """Only the first documents of each task; None is all."""
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"

    def mistakes(self) -> dict[str, str]:
        """The fields that cannot be used, each with its problem."""
        counts = {"batch_rows": self.batch_rows, "limit": 1 if self.limit is None else self.limit}
        return {name: f"{value}: must be at least 1." for name, value in counts.items() if value < 1}


def evaluate(
    source: str | Path, config: LmEvalSettings, out: Path, note: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Run every task in this process. The result is returned, and written to `out`.

    Args:
        source: a model folder, a GGUF file or a hub id.

    Raises:
        UserError: lm-eval is not installed, has no such task, or fails on one.
    """
    if mistakes := config.mistakes():
        raise UserError(*(f"lm-eval: {name} {problem}" for name, problem in mistakes.items()))
    manager = _task_manager(config)
    source = pinned(str(source))
    path = local_copy(source)
    tokenizer = load_tokenizer(path)
    model = load_causal_lm(path, dtype=choose_dtype(config.dtype), device=choose_device(config.device))
    _mask_padding(model, vocab_of(tokenizer, model.vocab_size).known)
    result: dict[str, Any] = {"model": str(source), "weights_sha256": weights_sha256(model)}
    result |= _run_tasks(model, tokenizer, config, manager, note)
    result["environment"] = environment()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}. Give --out another folder.") from error
    text = json.dumps(result, indent=2, default=str)  # a task's settings may contain functions
    write_whole(out / RESULT, f"{text}\n".encode())
    plain: dict[str, Any] = json.loads(text)
    return plain


def require(config: LmEvalConfig) -> None:
    """Before a run: lm-eval is installed and has every task of a recipe's `evaluations: [{name: lm_eval, …}]`.

    Raises:
        UserError: it is not, or has not.
    """
    _task_manager(_settings_of(config, device="auto"))


def _settings_of(config: LmEvalConfig, device: str) -> LmEvalSettings:
    return LmEvalSettings(tasks=tuple(config.tasks), limit=config.limit, seed=config.seed, device=device)


def of_subject(config: LmEvalConfig, subject: Subject) -> dict[str, float]:
    """A recipe's `evaluations: [{name: lm_eval, tasks: […]}]`: every metric of every task, standard errors too.

    Raises:
        UserError: lm-eval is not installed, has no such task, or fails on one.
    """
    result = evaluate(subject.folder, _settings_of(config, subject.device), subject.out, subject.note)
    return {
        f"{task}/{name}": value
        for task, metrics in result["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float)
    }


def _task_manager(config: LmEvalSettings) -> Any:
    """lm-eval's index of tasks, in which all of the requested ones exist."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval: the package is not installed. Run: pip install 'potstill[lm-eval]'")
    folder = config.lm_eval_tasks
    if folder is not None and not folder.is_dir():
        raise UserError(f"--lm-eval-tasks {folder}: no such folder. Give one with tasks as YAML files.")
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in config.tasks if task not in manager.task_index]:
        raise UserError(
            f"lm-eval: version {lm_eval.__version__} has no task {unknown[0]!r:.80}. `lm-eval ls tasks` lists them;"
            " `potstill eval` reads further ones from the folder of --lm-eval-tasks."
        )
    return manager


def _run_tasks(
    model: CausalLM, tokenizer: Any, config: LmEvalSettings, manager: Any, note: Callable[[str], None]
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    note(f"lm-eval {lm_eval.__version__}: {', '.join(config.tasks)}")
    try:
        lm = HFLM(pretrained=model.hf, tokenizer=tokenizer, batch_size=config.batch_rows)
        values = lm_eval.simple_evaluate(
            model=lm,
            tasks=[*config.tasks],
            limit=config.limit,
            log_samples=False,
            task_manager=manager,
            confirm_run_unsafe_code=False,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=config.seed,
        )
    except Exception as error:  # a task is a program, and its data set may have to be downloaded
        raise UserError(f"lm-eval: {','.join(config.tasks)}: it fails: {one_line(error)}") from error
    return {
        "lm_eval": lm_eval.__version__,
        "batch_rows": lm.batch_size,
        "whole": config.limit is None,
        **{name: values[name] for name in REPORTED if name in values},
    }


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The metrics of every task as rows: task, metric, value with its standard error."""
    rows = []
    for task, metrics in result["results"].items():
        for name, value in metrics.items():
            metric, _, form = name.partition(",")
            if isinstance(value, float) and form and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{form}")
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                rows.append(
                    [task, metric if form == "none" else f"{metric} ({form})", f"{value:.4f}{spread}"]
                )
    if not result["whole"]:
        rows.append(["note", "", "only the first documents of each task: not the task's score"])
    return rows


def _mask_padding(model: CausalLM, known: int) -> None:
    """Give ids without a token probability 0 in the logits that lm-eval reads, too."""
    model.mask_from(known)

    def mask(module: Any, arguments: Any, output: Any) -> None:
        output.logits[..., known:] = -torch.inf

    model.hf.register_forward_hook(mask)
