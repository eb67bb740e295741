"""The receipt: what was actually run, read back from the objects that ran it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from potstill.build.setup import RunSetup
from potstill.errors import UserError
from potstill.io.hashing import file_sha256
from potstill.io.memory import peak_gib
from potstill.models.dialogue import is_chat
from potstill.preflight.checks import Checked
from potstill.preflight.plan import Plan
from potstill.publish.licenses import license_of
from potstill.runs.run_dir import RunDir, environment
from potstill.training.checkpoint import Outcome


@dataclass(frozen=True)
class Finished:
    """What the receipt of a finished run needs beside its RunSetup and its directory."""

    outcome: Outcome
    checked: Checked
    inputs: dict[str, str]
    """`hashes` of teacher and student before the first step, and the hashes of the other input files."""
    code: dict[str, str]
    """Commit and diff of the code, read when the run started."""
    samples: dict[str, str]
    """What the student generated before and after training."""
    evaluations: dict[str, Any]
    seconds: float
    """Wall time of the whole run."""


def receipt_of(setup: RunSetup, run: RunDir, finished: Finished) -> dict[str, Any]:
    """The content of `receipt.json`.

    Raises:
        RuntimeError: training changed the teacher.
        UserError: a server is another model than at the start.
    """
    before = finished.inputs
    after = hashes(setup, before)
    for name in setup.teacher.fingerprint():
        if after[name] != before.get(name):
            kind = UserError if setup.teacher.is_elsewhere else RuntimeError
            raise kind(f"the teacher changed during training: {name}: {before.get(name)} -> {after[name]}")
    peak = peak_gib(setup.device)
    return {
        **_origins(setup, run, finished, after),
        **_settings(setup, run),
        **_results(finished),
        "peak_memory_gib": peak,
        "plan": _planned_and_measured(finished.checked.planned, peak),
        "check": {finding.name: finding.figure for finding in finished.checked.findings},
        "check_red": [finding.name for finding in finished.checked.findings if not finding.ok],
        "output": {p.name: file_sha256(p) for p in sorted(run.student.iterdir()) if p.is_file()},
        "adapter": {p.name: file_sha256(p) for p in sorted(run.adapter.glob("*"))} or None,
        "samples": {"prompt": setup.recipe.eval.sample_prompt, **finished.samples}
        if setup.recipe.eval.sample_prompt is not None
        else None,
        "is_chat": setup.tokenizer is not None and is_chat(setup.recipe.corpus.each, setup.tokenizer),
        "environment": environment(),
    }


def _origins(setup: RunSetup, run: RunDir, finished: Finished, after: dict[str, str]) -> dict[str, Any]:
    """The inputs: code, recipe, corpus and models, by hash."""
    manifest = setup.corpus.manifest
    return {
        "potstill": environment()["libraries"]["potstill"],
        "commit": finished.code["commit"] or "not a git checkout",
        "uncommitted_changes": bool(finished.code["diff"]),
        "recipe_sha256": file_sha256(run.path / "recipe.yaml"),
        "corpus_fingerprint": setup.corpus.fingerprint,
        **_sources(setup, finished.outcome),
        "decontamination": _without_hits(manifest["decontamination"]),
        "tokenizer_sha256": manifest["tokenizer_sha256"],
        "teacher": _teacher(setup, finished),
        "student": {
            **setup.origin,
            "weights_sha256_start": finished.inputs["student"],
            "weights_sha256_end": after["student"],
        },
        "inputs": finished.inputs,
        "commits": dict(setup.resolved.commits),
        "licences": _licenses(setup),
        "allow_identical": setup.recipe.allow_identical,
        "vocabulary": vars(setup.shared),
    }


def _sources(setup: RunSetup, outcome: Outcome) -> dict[str, Any]:
    """Of a mix, what each source was to be of each step, and what of it was read; nothing of one corpus."""
    listed, rows_per_step = setup.corpus.manifest.get("sources", {}), setup.recipe.corpus_rows_per_step
    order = setup.corpus.order(setup.recipe.train.seed)
    read = order.rows_read(outcome.step, rows_per_step) if rows_per_step else {}
    for step in outcome.left_out if read else ():  # which count from 1
        until, before = (order.rows_read(n, rows_per_step) for n in (step, step - 1))
        read = {name: rows - until[name] + before[name] for name, rows in read.items()}
    names = ("weight", "train_rows", "heldout_rows", "heldout_positions", "fingerprint")
    sources = {
        name: {key: part[key] for key in names}
        | ({"rows_read": read[name], "times_read": read[name] / part["train_rows"]} if read else {})
        | ({"share_read": read[name] / sum(read.values())} if any(read.values()) else {})
        for name, part in listed.items()
    }
    return {"sources": sources} if sources else {}


def _settings(setup: RunSetup, run: RunDir) -> dict[str, Any]:
    """The settings in effect, read back from the objects where they have them."""
    recipe, objective = setup.recipe, setup.recipe.objective
    router = f" + {weight} * router loss" if (weight := setup.student.router_coefficient) else ""
    return {
        "objective": f"{objective.ce_weight} * CE + {objective.kd_weight} * T^2 *"
        f" {objective.divergence.name}, T = {objective.temperature}{router}",
        # Runs of versions before `chunk: auto` have no record of it.
        "chunk": {"asked": objective.chunk, "used": objective.chunk} | run.chunk(),
        "seed": recipe.train.seed,
        "device": str(setup.device),
        "device_asked": recipe.train.device,
        "weights_dtype": str(setup.student.model.head.weight_VD.dtype).removeprefix("torch."),
        "precision": recipe.train.precision,
        "matmul": recipe.train.matmul,
        **({} if recipe.train.quantize is None else {"quantize": recipe.train.quantize}),
        **({"frozen": recipe.train.freeze} if recipe.train.freeze else {}),
        **({} if setup.rollouts is None else {"rollouts": setup.rollouts.described()}),
        "steps": recipe.train.num_steps,
    }


def _results(finished: Finished) -> dict[str, Any]:
    outcome = finished.outcome
    evaluations = {"evaluations": finished.evaluations} if finished.evaluations else {}
    return {
        "steps_left_out": outcome.left_out,
        "positions": outcome.positions,
        "heldout_first": outcome.first,
        "heldout_last": outcome.last,
        "heldout_best": outcome.best,
        "student_is_of_step": outcome.best_step,
        **evaluations,
        "training_seconds": round(outcome.seconds, 3),
        "total_seconds": round(finished.seconds, 3),
    }


def _teacher(setup: RunSetup, finished: Finished) -> dict[str, Any]:
    """The teacher's description, hash and, if quantised, what the check measured of that."""
    described = setup.teacher.describe()
    teacher: dict[str, Any] = {"name": setup.recipe.teacher.registered_name, "source": None, **described}
    if setup.teacher.backend is not None:
        teacher["runs_on"] = dict(setup.teacher.backend)
        measured = (f.numbers for f in finished.checked.findings if f.name == "teacher's bits")
        teacher["fewer_bits"] = next(measured, None)
    # `receipt_of` has compared the hashes. A teacher without weights has none to compare.
    unchanged = True if "teacher" in finished.inputs else None
    return {"weights_sha256": finished.inputs.get("teacher")} | teacher | {"unchanged_by_training": unchanged}


def _licenses(setup: RunSetup) -> dict[str, dict[str, str | None]]:
    """Licenses of teacher, student and data, read now: their files may be gone when the run is published."""
    student = setup.recipe.student
    described = setup.teacher.describe()
    teachers = {f"teacher/{each['name']}": each.get("source") for each in described.get("teachers", ())}
    sources = (teachers or {"teacher": described.get("source")}) | {
        "student": student.model if student.name == "checkpoint" else None,
    }
    found = {
        of: license_of(source, of.partition("/")[0]) for of, source in sources.items() if source is not None
    }
    parts = setup.recipe.corpus.parts or {"": setup.recipe.corpus}
    return found | {
        f"data/{name}" if name else "data": license_of(part.origin, "data") for name, part in parts.items()
    }


def _without_hits(overlaps: dict[str, Any] | None) -> dict[str, Any] | str:
    """Settings and counts of the decontamination; the hits themselves are in `corpus.json`."""
    return "not run" if overlaps is None else {k: v for k, v in overlaps.items() if k != "first_hits"}


def _planned_and_measured(planned: Plan | str, measured_gib: float) -> dict[str, Any]:
    """The planned peak beside the measured one, which in a resumed run is that of the last process only."""
    if isinstance(planned, str):
        return {"predicted_peak_gib": planned, "measured_peak_gib": measured_gib}
    predicted = planned.peak_bytes / 2**30
    return {
        "predicted_peak_gib": round(predicted, 3),
        "measured_peak_gib": measured_gib,
        "ratio": round(predicted / measured_gib, 3),
        "parts_gib": {name: round(size / 2**30, 3) for name, size in planned.parts.items()},
    }


def hashes(setup: RunSetup, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
    """sha256 of the student's weights, and the teacher's fingerprint; `recorded` is as of `Teacher.fingerprint`."""
    return setup.teacher.fingerprint(recorded) | {"student": setup.student.weights_sha256()}
