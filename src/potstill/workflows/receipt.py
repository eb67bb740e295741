"""The receipt: what truly ran, read back from the objects that ran it."""

from __future__ import annotations

import hashlib
from typing import Any

from potstill.build.setup import Cast
from potstill.io.hashing import file_sha256
from potstill.io.memory import peak_gib
from potstill.preflight.checks import Checked
from potstill.preflight.plan import Plan
from potstill.publish.licenses import licence_of
from potstill.runs.run_dir import RunDir, environment
from potstill.teachers.hf import TorchTeacher
from potstill.teachers.stored import StoredTeacher, captured_source
from potstill.teachers.toy import TableTeacher
from potstill.training.checkpoint import Outcome


def receipt_of(
    cast: Cast,
    run: RunDir,
    outcome: Outcome,
    *,
    checked: Checked,
    inputs: dict[str, str],
    running: dict[str, str],
    samples: dict[str, str],
    seconds: float,
) -> dict[str, Any]:
    """Everything about a finished run, as `receipt.json` holds it.

    Args:
        inputs: `hashes` of teacher and student before the first step, and those of the files beside them.
        running: commit and diff of the code, read at the start.
        samples: what the student wrote before and after training.
        seconds: wall time of the whole run.

    Raises:
        RuntimeError: training changed the teacher.
    """
    recipe, after = cast.recipe, hashes(cast)
    if after.get("teacher") != inputs.get("teacher"):
        raise RuntimeError(
            f"the teacher's weights changed during training: {inputs['teacher']} -> {after['teacher']}"
        )
    head = cast.student.model.head.weight_VD
    peak = peak_gib(cast.device)
    return {
        "potstill": environment()["libraries"]["potstill"],
        "commit": running["commit"] or "not a git checkout",
        "uncommitted_changes": bool(running["diff"]),
        "recipe_sha256": file_sha256(run.path / "recipe.yaml"),
        "corpus_fingerprint": cast.corpus.fingerprint,
        "decontamination": _without_list(cast.corpus.manifest["decontamination"]),
        "tokenizer_sha256": cast.corpus.manifest["tokenizer_sha256"],
        "teacher": _teacher(cast, inputs, checked),
        "student": {
            **cast.origin,
            "weights_sha256_start": inputs["student"],
            "weights_sha256_end": after["student"],
        },
        "inputs": inputs,
        "licences": _licences(cast),
        "allow_identical": recipe.allow_identical,
        "vocabulary": vars(cast.shared),
        "objective": f"{recipe.objective.ce_weight} * CE + {recipe.objective.kd_weight} * T^2 *"
        f" {recipe.objective.divergence.name}, T = {recipe.objective.temperature}",
        # A run of before it was chosen has no record.
        "chunk": {"asked": recipe.objective.chunk, "used": recipe.objective.chunk} | run.chunk(),
        "seed": recipe.train.seed,
        "device": str(cast.device),
        "device_asked": recipe.train.device,
        "weights_dtype": str(head.dtype).removeprefix("torch."),
        "precision": recipe.train.precision,
        "matmul": recipe.train.matmul,
        "steps": recipe.train.steps,
        "steps_left_out": outcome.left_out,
        "positions": outcome.positions,
        "heldout_first": outcome.first,
        "heldout_last": outcome.last,
        "heldout_best": outcome.best,
        "student_is_of_step": outcome.best_step,
        "training_seconds": round(outcome.seconds, 3),
        "total_seconds": round(seconds, 3),
        "peak_memory_gib": peak,
        "plan": _compared(checked.planned, peak),
        "check": {finding.name: finding.figure for finding in checked.findings},
        "check_red": [finding.name for finding in checked.findings if not finding.ok],
        "output": {p.name: file_sha256(p) for p in sorted(run.student.iterdir()) if p.is_file()},
        "adapter": {p.name: file_sha256(p) for p in sorted(run.adapter.glob("*"))} or None,
        "samples": {"prompt": recipe.eval.sample_prompt, **samples}
        if recipe.eval.sample_prompt is not None
        else None,
        "environment": environment(),
    }


def _teacher(cast: Cast, inputs: dict[str, str], checked: Checked) -> dict[str, Any]:
    """What taught: a model, or what a model had said before; in both cases, it is the same after training."""
    found: dict[str, Any] = {"name": cast.recipe.teacher.name, "source": _source_of_teacher(cast)}
    unchanged = {"unchanged_by_training": True if "teacher" in inputs else None}
    if isinstance(cast.teacher, TorchTeacher):
        found["runs_on"] = vars(cast.teacher.choice)
        found["fewer_bits"] = next((f.numbers for f in checked.findings if f.name == "teacher's bits"), None)
    if not isinstance(cast.teacher, StoredTeacher):
        return found | {"weights_sha256": inputs.get("teacher")} | unchanged
    kept = cast.teacher.store.manifest
    of_store = {name: kept[name] for name in ("kind", "temperature", "bytes_per_position", "certificate")}
    return found | {"weights_sha256": kept["teacher"]["weights_sha256"]} | unchanged | {"store": of_store}


def _source_of_teacher(cast: Cast) -> str | None:
    if isinstance(cast.teacher, StoredTeacher):
        return captured_source(cast.recipe.teacher, cast.teacher.store.manifest["teacher"])
    return getattr(cast.recipe.teacher, "model", None)


def _licences(cast: Cast) -> dict[str, dict[str, str | None]]:
    """What the files of teacher, student and corpus say now; they may be gone when the run is published."""
    sources = {
        "teacher": _source_of_teacher(cast),
        "student": cast.recipe.student.model if cast.recipe.student.name == "checkpoint" else None,
        "data": cast.recipe.corpus.path,
    }
    return {role: licence_of(source) for role, source in sources.items() if source is not None}


def _without_list(found: dict[str, Any] | None) -> dict[str, Any] | str:
    """What was compared and counted; the hits themselves are in `corpus.json`."""
    return "not run" if found is None else {k: v for k, v in found.items() if k != "first_hits"}


def _compared(planned: Plan | str, measured_gib: float) -> dict[str, Any]:
    """The plan beside what was measured; a run that was resumed measures its last process alone."""
    if isinstance(planned, str):
        return {"predicted_peak_gib": planned, "measured_peak_gib": measured_gib}
    predicted = planned.peak_bytes / 2**30
    return {
        "predicted_peak_gib": round(predicted, 3),
        "measured_peak_gib": measured_gib,
        "ratio": round(predicted / measured_gib, 3),
        "parts_gib": {name: round(size / 2**30, 3) for name, size in planned.parts.items()},
    }


def hashes(cast: Cast) -> dict[str, str]:
    """sha256 of the weights of the student, and of a teacher that has any; of a store, its manifest's."""
    found = {"student": cast.student.weights_sha256()}
    if isinstance(cast.teacher, TorchTeacher):
        found["teacher"] = cast.teacher.weights_sha256()
    elif isinstance(cast.teacher, StoredTeacher):
        found["teacher"] = str(cast.teacher.store.manifest["seal"])
    elif isinstance(cast.teacher, TableTeacher):
        found["teacher"] = hashlib.sha256(cast.teacher.logits_VV.numpy().tobytes()).hexdigest()
    return found
