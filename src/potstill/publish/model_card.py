"""The model card of a run, in Markdown, made of the run directory alone.

Every number is read from a file that the run or an evaluation wrote; what was not measured is said to be not
run. Text of unknown origin cannot leave its cell or its block. Called by `publish.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.publish.licenses import Parent, Settled
from potstill.publish.markdown import (
    block,
    code,
    quoted,
    short,
    short_hash,
    table,
    text,
)
from potstill.recipe.sections_training import PublishConfig

HELDOUT = {
    "heldout/kl": "KL to the teacher, nats per position",
    "heldout/ce": "cross-entropy, nats per position",
    "heldout/agreement": "top-1 agreement with the teacher",
}
NOT_RUN = "not run"
INTERVAL = {True: "below, of the arms.", False: "not run; one run has none, and `potstill compare` has."}
OVERRIDE = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+=.*", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Known:
    """All that a card is made of."""

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
    lm_eval: Mapping[str, Any] | None
    comparison: Mapping[str, Any] | None
    gguf: Sequence[str]
    """File names in the repository."""
    licence: Settled
    parents: Sequence[Parent]
    worse: Sequence[str]
    """Where the student is behind the untouched one and is published all the same."""

    @property
    def name(self) -> str:
        return self.repo.split("/")[1]

    @property
    def taught(self) -> bool:
        return bool(self.resolved["objective"]["kd_weight"])

    @property
    def teacher(self) -> str | None:
        """Its hub id, where there is one."""
        return self.publish.teacher or hub_id(self.resolved["teacher"].get("model"))

    @property
    def base(self) -> str | None:
        """Hub id of the model whose weights the student began with."""
        kind = self.resolved["student"]["name"]
        if kind == "config":
            return None
        known = self.teacher if kind == "cut" else hub_id(self.resolved["student"].get("model"))
        return self.publish.student or known


def hub_id(source: object) -> str | None:
    """`source` where it is a name on the Hub and no path: a resolved recipe has only absolute ones."""
    return source if isinstance(source, str) and source.count("/") == 1 and source[0] != "/" else None


def card(known: Known, metadata: str) -> str:
    """The whole README.md; `metadata` is the YAML in front."""
    parts = [
        f"---\n{metadata}\n---",
        f"# {known.name}",
        *_lead(known),
        "## Use",
        *_use(known),
        "## Where it comes from",
        *_origin(known),
        "## How it was trained",
        *_training(known),
        "## What it is worth",
        *_worth(known),
        "## What was checked",
        *_checks(known),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(known)),
        "## How to repeat it",
        *_again(known),
    ]
    return "\n\n".join(parts) + "\n"


def scores(known: Known) -> list[tuple[str, Mapping[str, Any]]]:
    found = known.humaneval or {}
    return list(found.get("scores", {}).items()) if found.get("status") == "finished" else []


def setting(result: Mapping[str, Any]) -> str:
    of = result.get("settings", {})
    how = "greedy" if not of.get("do_sample") else f"temperature {of.get('temperature')}"
    return (
        f"{of.get('problems')} problems, {of.get('samples')} sample each, {how}, seed {of.get('seed')},"
        f" {of.get('prompt')} prompts, at most {of.get('max_new_tokens')} tokens"
    )


def _linked(model: str | None, source: object) -> str:
    if model is not None:
        return f"[{text(model)}](https://huggingface.co/{model})"
    return code(str(source).rstrip("/").rsplit("/", 1)[-1])


def _lead(known: Known) -> Iterator[str]:
    receipt, best = known.receipt, known.receipt["heldout_best"]
    teacher = _linked(known.teacher, receipt["teacher"].get("source") or receipt["teacher"]["name"])
    size = (
        f"A {known.config.get('model_type', 'causal')} language model of {short(known.parameters)} parameters"
    )
    how = f"distilled from {teacher}" if known.taught else f"trained on text alone, beside {teacher}"
    numbers = "; ".join(
        f"{name.split(',')[0]} {best[metric]:.3f} (before training {receipt['heldout_first'][metric]:.3f})"
        for metric, name in HELDOUT.items()
        if metric in best
    )
    yield f"{size}, {how}. On held-out rows of its own corpus: {numbers}."
    if known.worse:
        yield (
            "> **Worse than before training.** "
            + " ".join(f"{text(one)}." for one in known.worse)
            + " Its publisher was told and published it all the same."
        )
    yield (
        "Made with potstill. Every number here was read from the run directory; what was not measured is"
        " called “not run”. `provenance.json` has the hashes of what the model came from, `manifest.json`"
        " those of every file."
    )


def _use(known: Known) -> Iterator[str]:
    prompt = known.resolved["eval"].get("sample_prompt") or "Once upon a time"
    yield block(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({known.repo!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({known.repo!r})\n"
        f"prompt = tokenizer({prompt!r}, return_tensors='pt')\n"
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))",
        "python",
    )
    if known.gguf:
        names = ", ".join(code(name) for name in known.gguf)
        yield f"For llama.cpp: {names}. For Ollama, in a copy of this repository:"
        yield block(f"ollama create {known.name.lower()} -f Modelfile", "bash")


def _origin(known: Known) -> Iterator[str]:
    receipt, resolved = known.receipt, known.resolved
    licences = {one.role: one for one in known.parents}
    teacher, student = receipt["teacher"], receipt["student"]
    kept = f"{len(student.get('layers_kept', []))} of {student.get('of')} layers"
    if "ffn_width" in student:
        kept += f" and {student['ffn_width']} of {student['of_ffn_width']} channels of each MLP"
    begin = {
        "cut": f"{kept} of the teacher, cut out",
        "checkpoint": "fine-tuned from it",
        "config": "random weights of this shape",
    }[resolved["student"]["name"]]
    source = teacher.get("source") or teacher["name"]
    began = source if resolved["student"]["name"] == "cut" else resolved["student"].get("model")
    rows = [
        [
            "teacher",
            _linked(known.teacher, source),
            "its next-token distributions are the target"
            if known.taught
            else "measured against, not learned from",
            _licence(licences.get("teacher")),
            short_hash(teacher.get("weights_sha256")),
        ],
        [
            "student before training",
            _linked(known.base, began),
            begin,
            _licence(
                licences.get("student") or (licences.get("teacher") if known.base == known.teacher else None)
            ),
            short_hash(student.get("weights_sha256_start")),
        ],
        [
            "data",
            text(known.publish.data or f"{len(known.corpus.get('files', []))} files"),
            f"{known.corpus['train_documents']:,} documents to train on",
            _licence(licences.get("data")),
            short_hash(receipt["corpus_fingerprint"]),
        ],
    ]
    yield table(["", "what", "relation", "licence", "sha256"], rows)
    yield f"Licence of this model: **{text(known.licence.license)}**, {text(known.licence.reason)}."


def _licence(one: Parent | None) -> str:
    if one is None or one.license is None:
        return "–"
    return f"{text(one.license)} ({text(one.read_from)})"


def _training(known: Known) -> Iterator[str]:
    receipt, train = known.receipt, known.resolved["train"]
    environment = receipt["environment"]
    machine = (
        f"{text(receipt['device'])}, {environment['cpu_count']} CPU cores, {text(environment['platform'])}"
    )
    left_out = receipt.get("steps_left_out", [])
    guarded = f", {len(left_out)} of them left out by the guard" if left_out else ""
    rows = [
        ["loss", code(receipt["objective"])],
        ["steps", f"{receipt['steps']:,}{guarded}"],
        ["rows of a step", f"{train['rows_per_step']} of {known.corpus['tokens_per_row']} tokens"],
        ["supervised positions", f"{receipt['positions']:,}"],
        [
            "optimizer",
            f"{train['optimizer']}, learning rate {train['lr']:g} (warm-up steps: {train['warmup']}),"
            f" cosine to {train['lr'] * train['final_lr_ratio']:g}, weight decay {train['weight_decay']:g}",
        ],
        ["precision", f"matrix products in {receipt['precision']}, weights in {receipt['weights_dtype']}"],
        ["seed", str(receipt["seed"])],
        ["saved student", f"of step {receipt['student_is_of_step']}, the best by held-out loss"],
        ["time", f"{receipt['training_seconds']:,.0f} s of training"],
        ["hardware", f"{machine}, peak memory {receipt['peak_memory_gib']:.2f} GiB"],
    ]
    if store := receipt["teacher"].get("store"):
        kept = f"{store['kind']['name']}, {store['bytes_per_position']} bytes per position, read from disk"
        rows.insert(1, ["teacher's targets", text(kept)])
    yield table(["setting", "value"], rows)


def _worth(known: Known) -> Iterator[str]:
    receipt, corpus = known.receipt, known.corpus
    first, best = receipt["heldout_first"], receipt["heldout_best"]
    of_teacher = {"heldout/kl": "0", "heldout/agreement": "1"}
    if "heldout/teacher_ce" in best:
        of_teacher["heldout/ce"] = f"{best['heldout/teacher_ce']:.4f}"
    rows = [
        [told, f"{first[name]:.4f}", f"{best[name]:.4f}", of_teacher.get(name, NOT_RUN)]
        for name, told in HELDOUT.items()
        if name in best
    ]
    yield table(["held-out rows", "untouched student", "this model", "teacher"], rows)
    yield (
        f"n = {corpus['heldout_positions']:,} positions in {corpus['heldout_rows']} rows of"
        f" {corpus['heldout_documents']} documents that share nothing with the training rows; seed"
        f" {receipt['seed']}. 95 % interval: {INTERVAL[known.comparison is not None]}"
    )
    yield from _benchmarks(known)
    yield from _arms(known)
    if samples := receipt.get("samples"):
        yield "What the student wrote, greedily, at the end of its training:"
        yield block(f"{samples['prompt']}{samples.get('after', '')}")


def _benchmarks(known: Known) -> Iterator[str]:
    if rows := [
        [
            name,
            f"{100 * of['value']:.1f} %",
            f"{100 * of['low']:.1f} to {100 * of['high']:.1f} %",
            text(of["interval"]),
        ]
        for name, of in scores(known)
    ]:
        yield table(["HumanEval", "score", "95 % interval", "kind of interval"], rows)
        controls = (known.humaneval or {}).get("controls", {})
        yield (
            f"n = {setting(known.humaneval or {})}. Controls: published solutions"
            f" {text(controls.get('canonical'))}, empty functions {text(controls.get('empty'))}."
        )
    else:
        why = NOT_RUN
        if (found := known.humaneval) is not None:
            why = f"no score: {text(found.get('why') or 'a subset of the problems was run')}"
        yield f"HumanEval: {why}."
    yield from _lm_eval(known.lm_eval)


def _lm_eval(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None or not found.get("whole"):
        why = NOT_RUN if found is None else "only a part of a task was run, which is no score"
        yield f"Other benchmarks: {why}."
        return
    rows = [
        [text(task), text(name), f"{value:.4f}"]
        for task, metrics in found["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float) and "," in name
    ]
    yield table([f"lm-eval {text(found['lm_eval'])}", "metric", "value"], rows)


def _arms(known: Known) -> Iterator[str]:
    found = known.comparison
    if found is None:
        yield f"Beside plain training under the same budget: {NOT_RUN}."
        return
    metrics = [*HELDOUT, "pass@1"]
    rows = []
    for arm in found["arms"]:
        values = [_spread(arm["metrics"].get(name)) for name in metrics]
        rows.append([text(arm["name"]), str(arm["steps"]), *values])
    names = ["KL, nats", "cross-entropy, nats", "agreement", "pass@1"]
    yield table([f"arms, equal {text(found['budget']['equal'])}", "steps", *names], rows)
    seeds = ", ".join(map(str, found["seeds"]))
    yield f"95 % intervals over seeds {seeds} and {found['heldout_rows']} held-out rows."
    yield text(found["sentence"])
    for warning in found.get("warnings", []):
        yield f"Warning: {text(warning)}"


def _spread(of: Any) -> str:
    return NOT_RUN if of is None else f"{of['mean']:.4g} [{of['low']:.4g}, {of['high']:.4g}]"


def _checks(known: Known) -> Iterator[str]:
    found = known.receipt.get("check", {})
    yield f"Before training, on the recipe's own models and rows; {len(found)} checks, none red:"
    yield table(["check", "what it found"], [[text(name), text(figure)] for name, figure in found.items()])
    rows = []
    for record in known.receipt.get("exports", []):
        for path, of in record.get("three_path", {}).items():
            status = f"{of['status']}, so it is not here" if of["status"] == "failed" else of["status"]
            rows.append([text(record["format"]), text(path), text(status), text(_path_told(of))])
    if rows:
        yield "The files as others load them, each in a fresh process:"
        yield table(["format", "loaded by", "verdict", "what it found"], rows)
    else:
        yield f"The files loaded by Transformers, llama.cpp and potstill side by side: {NOT_RUN}."


def _path_told(of: Mapping[str, Any]) -> str:
    if of.get("why"):
        return str(of["why"])
    told = []
    if "tokens_equal" in of:
        told.append(f"{of['tokens_equal']} of {of.get('texts', of['prompts'])} texts with equal tokens")
    if "top1_equal" in of:
        told.append(f"{of['top1_equal']} of {of['prompts']} equal next tokens")
    if "mean_kl" in of:
        told.append(f"mean KL {of['mean_kl']:.2g} nats, at most {of.get('mean_kl_limit', 0):.0g} allowed")
    return ", ".join(told) or "–"


def _limits(known: Known) -> Iterator[str]:
    receipt = known.receipt
    yield (
        "The held-out rows are of the same corpus as the training rows. On other text: not run. Safety, bias"
        " and what it may repeat of its data: not run."
    )
    if known.comparison is None:
        yield "One run with one seed: how far another seed would differ is not known."
    if receipt.get("decontamination", NOT_RUN) == NOT_RUN:
        yield "The corpus was not compared with the texts of any evaluation."
    else:
        found = known.receipt["check"].get("decontamination", "")
        yield f"The corpus was compared with evaluations: {text(found)}."
    if known.faults:
        yield f"The guard met {known.faults} faulty steps during training."
    if receipt.get("allow_identical"):
        yield "The recipe allowed teacher and student to have the same weights."
    if receipt.get("uncommitted_changes"):
        yield "The code that ran had changes that no commit has; how to repeat it is known but for them."
    yield "What the licence says is what the files and the publisher say; it is no legal advice."


def _again(known: Known) -> Iterator[str]:
    receipt = known.receipt
    libraries = ", ".join(
        f"{name} {version}" for name, version in receipt["environment"]["libraries"].items()
    )
    yield (
        f"Code: commit {code(receipt['commit'])}; {text(libraries)}; Python"
        f" {text(receipt['environment']['python'])}. The recipe as given, {code('recipe.yaml')}"
        f" (sha256 {short_hash(receipt['recipe_sha256'])}):"
    )
    yield block(known.recipe, "yaml")
    changed = [word for word in known.command if OVERRIDE.fullmatch(word)]
    lines = ["potstill check recipe.yaml", "potstill distill recipe.yaml"]
    yield block("\n".join(" ".join([line, *map(quoted, changed)]) for line in lines), "bash")
    yield f"The corpus is the same where its fingerprint is {code(receipt['corpus_fingerprint'])}."
