"""What teacher, untouched student and student wrote behind the same prompts, for the report and the model card."""

from __future__ import annotations

from typing import Any

from potstill.runs.run_dir import RunDir

WRITERS = {"teacher": "Teacher", "before": "Untouched student", "after": "Student"}


def side_by_side(run: RunDir) -> list[dict[str, Any]]:
    """One entry a prompt, None where a writer did not answer it: that of `eval.sample_prompt`, those of
    `eval.sample_prompts` by the student of the step that was saved and, of a run in which the student writes rows, the
    first held-out ones.

    Raises:
        UserError: a file of the run is damaged, with its place.
    """
    receipt, names = run.receipt(), ("prompt", *WRITERS)
    found = []
    sample = receipt.get("samples") or {}
    if isinstance(sample.get("prompt"), str):
        found.append({name: sample.get(name) for name in names} | {"how": "greedy"})
    by_step = {
        line["step"]: {str(one["prompt"]): one for one in line.get("samples", [])} for line in run.samples()
    }
    shown = receipt.get("student_is_of_step", max(by_step, default=0))
    untouched, student = by_step.get(0, {}), by_step.get(shown, {})
    for prompt in untouched or student:
        if prompt == sample.get("prompt"):
            continue
        before = untouched.get(prompt, {})
        texts = (prompt, before.get("teacher"), before.get("text"), student.get(prompt, {}).get("text"))
        found.append(dict(zip(names, texts, strict=True)) | {"how": "greedy"})
    heldout = run.answers()
    for number in range(len(heldout.get("prompt", ()))):
        one = {name: (*heldout.get(name, ()), *[None] * (number + 1))[number] for name in names}
        found.append(one | {"how": "sampled at temperature 1, behind a held-out prompt"})
    return found
