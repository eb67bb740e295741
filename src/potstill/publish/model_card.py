"""The model card of a run, rendered from the run directory alone.

Every number is read from a file that the run or an evaluation wrote; what was not measured is called not run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from potstill.io.hub import hub_id
from potstill.publish.licenses import Parent, StudentLicense
from potstill.publish.markdown import FILTERS
from potstill.recipe.sections_training import PublishConfig
from potstill.runs import gains
from potstill.runs.answers import WRITERS
from potstill.runs.run_dir import repair_steps, stream_steps

HELDOUT = {
    "heldout/kl": "KL to the teacher, nats per position",
    "heldout/ce": "cross-entropy, nats per position",
    "heldout/agreement": "top-1 agreement with the teacher",
}
ARM_METRICS = {
    "heldout/kl": "KL, nats",
    "heldout/ce": "cross-entropy, nats",
    "heldout/agreement": "agreement",
    "pass@1": "pass@1",
}
ANSWERS = 3
"""Prompts whose answers a card shows."""
OVERRIDE = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+=.*", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class CardInputs:
    """Everything that a card is made of."""

    repo: str
    recipe: str
    """As given."""
    resolved: Mapping[str, Any]
    publish: PublishConfig
    receipt: Mapping[str, Any]
    corpus: Mapping[str, Any]
    config: Mapping[str, Any]
    parameters: int
    command: Sequence[str]
    faults: int
    humaneval: Mapping[str, Any] | None
    tasks: Sequence[Mapping[str, Any]]
    """Results of tasks with a verifier."""
    lm_eval: Mapping[str, Any] | None
    comparison: Mapping[str, Any] | None
    profile: Mapping[str, Any]
    """Empty where the student was not profiled."""
    answers: Sequence[Mapping[str, Any]]
    """Of teacher, untouched student and student to the recipe's sample prompts, one entry each."""
    gguf: Sequence[str]
    """File names in the repository."""
    license: StudentLicense
    parents: Sequence[Parent]
    regressions: Sequence[str]
    """Where the student is behind the untouched one and is published nevertheless."""

    @property
    def name(self) -> str:
        return self.repo.split("/")[1]

    @property
    def is_distilled(self) -> bool:
        return bool(self.resolved["objective"]["kd_weight"])

    @property
    def teacher(self) -> str | None:
        """Its hub id, where there is one."""
        return self.publish.teacher or hub_name(self.resolved["teacher"].get("model"))

    @property
    def datasets(self) -> list[str]:
        """Hub ids of the data sets that were read from there."""
        parts = self.corpus.get("sources", {"": self.corpus}).values()
        found = [read for part in parts if (read := (part.get("reading") or {}).get("dataset"))]
        return list(dict.fromkeys(str(read["name"]) for read in found))

    @property
    def base(self) -> str | None:
        """Hub id of the model whose weights the student started with."""
        kind = self.resolved["student"]["name"]
        if kind == "config":
            return None
        known = self.teacher if kind == "cut" else hub_name(self.resolved["student"].get("model"))
        return self.publish.student or known


def hub_name(source: object) -> str | None:
    """`owner/name` of a model on the Hub; None for a path: a resolved recipe has only absolute ones."""
    on_hub = hub_id(source) if isinstance(source, str) else None
    return None if on_hub is None else on_hub[0]


def card(inputs: CardInputs, metadata: str) -> str:
    """The whole README.md; `metadata` is the YAML in front."""
    environment = Environment(
        loader=PackageLoader("potstill.publish", "."),
        autoescape=False,  # Markdown has other special characters than HTML: see `markdown.py`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= FILTERS
    receipt = inputs.receipt
    return environment.get_template("model_card.md.j2").render(
        metadata=metadata,
        card=inputs,
        receipt=receipt,
        corpus=inputs.corpus,
        train=inputs.resolved["train"],
        teacher_source=receipt["teacher"].get("source") or receipt["teacher"]["name"],
        student_start=_student_start(inputs.resolved["student"]["name"], receipt["student"]),
        licenses={"student": None, "teacher": None, "data": None} | {p.role: p for p in inputs.parents},
        store=receipt["teacher"].get("store"),
        heldout=_heldout(receipt),
        sources=_sources(receipt, inputs.parents),
        scores=scores(inputs),
        humaneval_setting=setting(inputs.humaneval or {}),
        tasks=[_task(result) for result in inputs.tasks],
        lm_eval_rows=list(_lm_eval_rows(inputs.lm_eval or {})),
        arm_metrics=_arm_metrics(inputs.comparison),
        gains=gains.rows(inputs.profile) if inputs.profile else [],
        gains_said=list(gains.sentences_for_others(inputs.profile)) if inputs.profile else [],
        checks=receipt.get("check", {}),
        answers=inputs.answers[:ANSWERS],
        writers=WRITERS | {"after": "This model"},
        first_prompt=inputs.answers[0]["prompt"] if inputs.answers else "Once upon a time",
        exports=list(_exports(receipt)),
        commands=_commands(inputs.command),
    )


def scores(inputs: CardInputs) -> list[tuple[str, Mapping[str, Any]]]:
    result = inputs.humaneval or {}
    return list(result.get("scores", {}).items()) if result.get("status") == "finished" else []


def setting(result: Mapping[str, Any]) -> str:
    of = result.get("settings", {})
    how = "greedy" if not of.get("do_sample") else f"temperature {of.get('temperature')}"
    cut = result.get("cut_in_thought")
    return (
        f"{of.get('problems')} problems, {of.get('samples')} sample each, {how}, seed {of.get('seed')},"
        f" {of.get('prompt')} prompts, at most {of.get('max_new_tokens')} tokens"
        + (f", {cut} answers cut in their thought" if cut else "")
    )


def _task(result: Mapping[str, Any]) -> dict[str, Any]:
    """A task's accuracy and what it depends on, or why there is none."""
    of = result.get("settings", {})
    how = "greedy" if not of.get("do_sample") else f"temperature {of.get('temperature')}"
    judged = f", of each answer {of['extract']}" if of.get("extract") else ""
    where = f"reasoning-gym {of['reasoning_gym']}" if "reasoning_gym" in of else f"match {of.get('match')}"
    cut = result.get("cut_in_thought")
    return {
        "name": of.get("name"),
        "accuracy": result.get("accuracy"),
        "why": result.get("why"),
        "mean_score": result.get("mean_score"),
        "setting": f"{where}, {of.get('questions')} questions, {of.get('samples')} per question, {how}, seed"
        f" {of.get('seed')}, {'chat' if of.get('apply_chat_template') else 'plain'} prompts, at most"
        f" {of.get('max_new_tokens')} tokens{judged}"
        + (f", {cut} answers cut in their thought" if cut else ""),
        "sha256": of.get("questions_sha256"),
        "controls": ", ".join(f"{name} {passed}" for name, passed in result.get("controls", {}).items()),
    }


def _student_start(kind: str, student: Mapping[str, Any]) -> str:
    if kind != "cut":
        return {"checkpoint": "fine-tuned from it", "config": "random weights of this shape"}[kind]
    parts = [f"{len(student.get('layers_kept', []))} of {student.get('of')} layers"]
    if "ffn_width" in student:
        parts.append(f"{student['ffn_width']} of {student['of_ffn_width']} channels of each MLP")
    if "kv_heads" in student:
        parts.append(f"{student['kv_heads']} of {student['of_kv_heads']} KV groups of each attention")
    if "hidden_size" in student:
        parts.append(
            f"{student['hidden_size']} of {student['of_hidden_size']} channels of the residual stream"
        )
    kept = " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)
    repair = student.get("repair", {})
    of_stream = stream_steps(repair)
    steps = [*repair_steps(repair), *of_stream]
    repaired = [step for step in steps if step["ridge"] is not None]
    if not repaired:
        return f"{kept} of the teacher, cut out"
    # A narrower stream raises it again, between the two.
    measured = of_stream or steps
    kl = f"KL {measured[0]['kl_before']:.3f} to {measured[-1]['kl_after']:.3f} nats on training rows"
    folded = sum("layer" in step for step in repaired)
    inside = {"refit": "channels", "refit_heads": "heads", "refit_stream": "channels of the stream"}
    fitted = [what for name, what in inside.items() if (repair.get(name) or {}).get("ridge") is not None]
    of_inside = f"; what other {' and '.join(fitted)} did is fitted into those" if fitted else ""
    of_layers = f"; what others did is folded into {folded} of its MLPs" if folded else ""
    return f"{kept} of the teacher, cut out{of_inside}{of_layers} ({kl})"


def _heldout(receipt: Mapping[str, Any]) -> list[dict[str, Any]]:
    first, best = receipt["heldout_first"], receipt["heldout_best"]
    teacher = {"heldout/kl": "0", "heldout/agreement": "1"}  # against itself
    if "heldout/teacher_ce" in best:
        teacher["heldout/ce"] = f"{best['heldout/teacher_ce']:.4f}"
    return [
        {"name": name, "first": first[key], "best": best[key], "teacher": teacher.get(key, "not run")}
        for key, name in HELDOUT.items()
        if key in best
    ]


def _sources(receipt: Mapping[str, Any], parents: Sequence[Parent]) -> list[dict[str, Any]]:
    """Of a mix, what each source was of the training rows, and the student's figures on its held-out ones."""
    licenses = {parent.what: parent.license for parent in parents if parent.role == "data"}
    first, best = receipt["heldout_first"], receipt["heldout_best"]
    return [
        {"name": name, "license": licenses.get(name)}
        | {key: part.get(key) for key in ("weight", "share_read", "rows_read", "times_read", "fingerprint")}
        | {"kl": (first[f"heldout/{name}/kl"], best[f"heldout/{name}/kl"])}
        | {"ce": (first[f"heldout/{name}/ce"], best[f"heldout/{name}/ce"])}
        | {"agreement": (first[f"heldout/{name}/agreement"], best[f"heldout/{name}/agreement"])}
        for name, part in receipt.get("sources", {}).items()
    ]


def _lm_eval_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    for task, metrics in result.get("results", {}).items():
        for name, value in metrics.items():
            if isinstance(value, float) and "," in name:
                yield task, name, value


def _arm_metrics(comparison: Mapping[str, Any] | None) -> dict[str, str]:
    """The metrics of the table of arms, each with its column's title; tasks where the comparison has them."""
    metrics = (name for arm in (comparison or {}).get("arms", []) for name in arm["metrics"])
    return ARM_METRICS | {name: name.removeprefix("task-") for name in metrics if name not in ARM_METRICS}


def _exports(receipt: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Each exported file as each library loaded it."""
    for record in receipt.get("exports", []):
        for loader, result in record.get("three_path", {}).items():
            status = result["status"]
            yield {
                "format": record["format"],
                "loader": loader,
                "verdict": f"{status}, so it is not here" if status == "failed" else status,
                "details": _export_details(result, record.get("dtype", "float32")),
            }


def _export_details(result: Mapping[str, Any], dtype: str) -> str:
    """`dtype` is that of a folder: the card's other figures are those of the weights as trained, in float32."""
    if result.get("why"):
        return str(result["why"])
    parts = []
    if dtype != "float32" and "mean_kl_to_student" in result:
        parts.append(
            f"weights rounded to {dtype}: mean KL {result['mean_kl_to_student']:.2g} nats to those as trained"
        )
    if "tokens_equal" in result:
        texts = result.get("texts", result["prompts"])
        parts.append(f"{result['tokens_equal']} of {texts} texts with equal tokens")
    if "top1_equal" in result:
        parts.append(f"{result['top1_equal']} of {result['prompts']} equal next tokens")
    if "mean_kl" in result:
        limit = result.get("mean_kl_limit", 0)
        parts.append(f"mean KL {result['mean_kl']:.2g} nats, at most {limit:.0g} allowed")
    return ", ".join(parts) or "–"


def _commands(command: Sequence[str]) -> str:
    """With the overrides that the run was started with."""
    overrides = [shlex.quote(word) for word in command if OVERRIDE.fullmatch(word)]
    return "\n".join(
        " ".join([line, *overrides])
        for line in ("potstill check recipe.yaml", "potstill distill recipe.yaml")
    )
