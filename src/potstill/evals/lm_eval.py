"""Benchmarks of the library lm-eval on a model that was loaded, and probed, as everywhere here.

    result.json  each task's metrics, version and settings; lm-eval's version; the model's hash

What a task is, and what its score means, is lm-eval's. No code that comes with a model or a data set is run,
and tasks that run what a model writes are refused: lm-eval has no sandbox.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from potstill.data.tokenizers import load_tokenizer, vocab_of
from potstill.errors import UserError, one_line
from potstill.models.causal_lm import CausalLM
from potstill.models.load import choose_device, choose_dtype, load_causal_lm, local_copy, weights_sha256
from potstill.runs.run_dir import environment, write_whole

RESULT = "result.json"
KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs", "config")
"""Of what lm-eval tells: scores, and all that they depend on."""


def evaluate(
    source: str | Path,
    out: Path,
    tasks: Sequence[str],
    note: Callable[[str], None] = lambda _: None,
    *,
    lm_eval_tasks: Path | None = None,
    batch_rows: int = 32,
    limit: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "auto",
) -> dict[str, Any]:
    """Every task, in one process; the result is also in `out`.

    Args:
        tasks: names of lm-eval's tasks, groups or tags.
        lm_eval_tasks: a folder of further tasks; what their YAML names as a function is imported and run.
        limit: only the first documents of each task; None is all.

    Raises:
        UserError: lm-eval is not installed, knows no such task, or fails on one.
    """
    for name, value in (("--batch-rows", batch_rows), ("--limit", 1 if limit is None else limit)):
        if value < 1:
            raise UserError(f"{name} {value}: must be at least 1.")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--lm-eval: the package lm-eval is not installed. Run: pip install 'potstill[lm-eval]'"
        )
    if lm_eval_tasks is not None and not lm_eval_tasks.is_dir():
        raise UserError(
            f"--lm-eval-tasks {lm_eval_tasks}: no such folder. Give one with tasks as YAML files."
        )
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if lm_eval_tasks is None else str(lm_eval_tasks))
    if unknown := [task for task in tasks if task not in manager.task_index]:
        raise UserError(
            f"--lm-eval: lm-eval {lm_eval.__version__} has no task {unknown[0]!r:.80}."
            " `lm-eval ls tasks` lists them; --lm-eval-tasks FOLDER adds your own."
        )
    path = local_copy(source)
    tokenizer = load_tokenizer(path)
    model = load_causal_lm(path, dtype=choose_dtype(dtype), device=choose_device(device))
    _mask_padding(model, vocab_of(tokenizer, model.vocab_size).known)
    note(f"lm-eval {lm_eval.__version__}: {', '.join(tasks)}")
    try:
        lm = HFLM(pretrained=model.hf, tokenizer=tokenizer, batch_size=batch_rows)
        told = lm_eval.simple_evaluate(
            model=lm,
            tasks=[*tasks],
            limit=limit,
            log_samples=False,
            task_manager=manager,
            confirm_run_unsafe_code=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except Exception as error:  # a task is a program, and a data set may have to be fetched
        raise UserError(f"--lm-eval {','.join(tasks)}: lm-eval fails: {one_line(error)}") from error
    result = {
        "model": str(source),
        "weights_sha256": weights_sha256(model),
        "lm_eval": lm_eval.__version__,
        "batch_rows": lm.batch_size,
        "whole": limit is None,
        **{name: told[name] for name in KEPT if name in told},
        "environment": environment(),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}. Give --out another folder.") from error
    text = json.dumps(result, indent=2, default=str)  # a task's settings may hold functions
    write_whole(out / RESULT, f"{text}\n".encode())
    plain: dict[str, Any] = json.loads(text)
    return plain


def told(result: Mapping[str, Any]) -> list[list[str]]:
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
        rows.append(["note", "", "only the first documents of each task: no score of it"])
    return rows


def _mask_padding(model: CausalLM, known: int) -> None:
    """Ids that mean nothing have probability 0 in the logits that lm-eval reads, too."""
    model.mask_from(known)

    def mask(module: Any, arguments: Any, output: Any) -> None:
        output.logits[..., known:] = -torch.inf

    model.hf.register_forward_hook(mask)
