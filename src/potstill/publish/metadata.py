"""What the Hub reads of a repository beside its text: the card's YAML, evaluation results, a Modelfile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from potstill.publish.licenses import HUB
from potstill.publish.model_card import HELDOUT, CardInputs, scores, setting

HUMANEVAL = ("openai/openai_humaneval", "openai_humaneval")
"""The data set on the Hub, and its task."""


def metadata(inputs: CardInputs) -> str:
    """The YAML in front of the card."""
    listed = inputs.license.license in HUB
    extra: dict[str, Any] = {} if listed else {"license_name": inputs.license.license}
    if inputs.base is not None:
        extra |= {"base_model_relation": "finetune"}  # the Hub has no relation for a distilled model
    if inputs.is_distilled and inputs.teacher is not None:
        extra |= {"distilled_from": inputs.teacher}
    data = ModelCardData(
        license=inputs.license.license if listed else "other",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*(["distillation"] if inputs.is_distilled else []), "potstill"],
        base_model=inputs.base,
        datasets=inputs.datasets or None,
        model_name=inputs.name,
        eval_results=[*_results(inputs)],
        **extra,
    )
    return str(data.to_yaml()).strip()


def _results(inputs: CardInputs) -> Iterator[EvalResult]:
    task: dict[str, Any] = {"task_type": "text-generation", "task_name": "Text Generation"}
    heldout: dict[str, Any] = {
        "dataset_type": "held-out",
        "dataset_name": f"{inputs.corpus['heldout_rows']} held-out rows of the corpus",
    }
    humaneval: dict[str, Any] = {
        "dataset_type": HUMANEVAL[0],
        "dataset_name": "HumanEval",
        "dataset_split": "test",
    }
    for key, name in HELDOUT.items():
        value = inputs.receipt["heldout_best"].get(key)
        if value is not None:
            metric = key.removeprefix("heldout/")
            yield EvalResult(
                **task, **heldout, metric_type=metric, metric_name=name, metric_value=float(value)
            )
    for name, score in scores(inputs):
        value = float(score["value"])
        yield EvalResult(**task, **humaneval, metric_type=name, metric_name=name, metric_value=value)


def eval_results(inputs: CardInputs) -> str | None:
    """`.eval_results/humaneval.yaml`; None where HumanEval gave no score."""
    entries = [
        EvalResultEntry(
            dataset_id=HUMANEVAL[0],
            task_id=HUMANEVAL[1],
            value=round(100 * score["value"], 4),
            notes=f"pass@1 in percent, {setting(inputs.humaneval or {})},"
            f" 95 % interval {100 * score['low']:.1f} to {100 * score['high']:.1f}",
        )
        for name, score in scores(inputs)
        if name == "pass@1"
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None
