"""The verbs to run before a training: `check`, `check --sandbox` and `plan`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.cli.overrides import add_overrides
from potstill.errors import UserError
from potstill.io.terminal import Display, aligned, clock, size

if TYPE_CHECKING:
    from potstill.build.resolve import Resolved
    from potstill.preflight.other_device import OtherDevice
    from potstill.preflight.plan import Plan
    from potstill.preflight.plan_advice import Advice
    from potstill.recipe.load import Recipe


def add_flags(check: argparse.ArgumentParser, plan: argparse.ArgumentParser) -> None:
    check.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE")
    add_overrides(check)
    check.add_argument(
        "--sandbox",
        action="store_true",
        help="instead of a recipe, check whether this machine can sandbox a program that a model wrote",
    )
    plan.add_argument("recipe", type=Path, metavar="RECIPE")
    add_overrides(plan)
    plan.add_argument(
        "--device",
        metavar="NAME",
        help="plan for a device that need not be here: h100, a100, l4 …, cuda, cpu",
    )
    plan.add_argument("--device-memory", metavar="SIZE", help="memory of that device, such as 80GiB")
    plan.add_argument("--measure", action="store_true", help="also run three steps to project the time")


def run_check(options: argparse.Namespace, display: Display) -> int:
    """Exit code 0 if every check passes, 2 if one fails."""
    if options.sandbox == (options.recipe is not None):
        given = (
            f"both {options.recipe} and --sandbox" if options.sandbox else "neither a recipe nor --sandbox"
        )
        raise UserError(f"check: {given} given. Give one of them.")
    if options.sandbox:
        return _check_sandbox(options, display)
    from potstill.recipe.load import load

    recipe = load(options.recipe, options.overrides)
    recipe.require_available()
    from potstill.build.resolve import resolve
    from potstill.build.setup import process_of, set_up
    from potstill.preflight.auto import note_types, settle
    from potstill.preflight.trial_steps import check
    from potstill.runs.places import default_path
    from potstill.training.watchdog import cleaning

    findings = []
    with cleaning():
        note_types(resolved := resolve(recipe), display.note)
        resolved = settle(resolved, display.note)
        with process_of(resolved.recipe):
            setup = set_up(resolved, display.note)
            with contextlib.closing(setup.teacher):
                for finding in check(setup, default_path(options.recipe.stem)):
                    findings.append(finding)
                    verdict, advice = ("ok ", "") if finding.ok else ("RED", f". {finding.advice}")
                    if not options.json:
                        display.result(f"{verdict}  {finding.name}: {finding.figure}{advice}")
    failed = [finding.name for finding in findings if not finding.ok]
    if options.json:
        display.result(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        display.result(f"{len(findings) - len(failed)} of {len(findings)} checks passed")
    return 2 if failed else 0


def _check_sandbox(options: argparse.Namespace, display: Display) -> int:
    """Exit code 0 if a tier holds, 2 if none does."""
    from potstill.evals.sandbox.sandbox import survey

    tiers = survey()
    used = next((tier["tier"] for tier in tiers if tier["holds"]), None)
    if options.json:
        display.result(json.dumps({"used": used, "tiers": tiers}, indent=2))
        return 0 if used else 2
    for tier in tiers:
        display.result(f"{tier['tier']}: {'holds' if tier['holds'] else 'not here: ' + tier['why']}")
        for probe in tier["canaries"]:
            display.result(f"  {'ok ' if probe['shut'] else 'RED'}  {probe['name']}: {probe['found']}")
    display.result(f"used: {used or 'none; no program is run on this machine. See docs/sandbox.md'}")
    return 0 if used else 2


def run_plan(options: argparse.Namespace, display: Display) -> int:
    """Exit code 0 if the run fits this machine, 2 if it does not."""
    from potstill.recipe.load import load

    recipe = load(options.recipe, options.overrides)
    from potstill.preflight.auto import choose_chunk, with_chunk
    from potstill.preflight.other_device import other_device
    from potstill.preflight.plan import available, capture_size, plan
    from potstill.preflight.plan_advice import advice, stored

    other = other_device(options.device, options.device_memory, recipe)
    if other is not None and options.measure:
        raise UserError(f"--measure: runs steps here, and the plan is for {other.name}. Leave one out.")
    resolved = _resolved_for(recipe, other)
    with contextlib.closing(resolved.teacher):
        memory, disk = available(resolved.recipe, Path("runs"))
        memory = memory if other is None else other.memory_bytes
        chunk = choose_chunk(resolved, memory=memory)
        resolved = resolved.with_recipe(with_chunk(resolved.recipe, chunk.used))
        planned, captured = plan(resolved), capture_size(resolved)
        # Nobody knows the disk of another machine.
        fits = planned.fits(memory, disk if other is None else planned.disk_peak_bytes)
        changes = [] if planned.peak_bytes <= memory else advice(resolved, planned, memory)
        if planned.peak_bytes > memory and (by_store := stored(resolved, planned, memory)) is not None:
            changes.append(by_store)
    if options.measure and fits:
        from potstill.preflight.trial_steps import smoke

        measured = smoke(resolved, 3, display, options.recipe.stem, at_most=True)
        written_s = measured.get("smoke/projected_rollout_s")
        planned = dataclasses.replace(planned, time_s=measured["smoke/projected_s"], rollout_time_s=written_s)
    if options.json:
        result = planned.as_dict() | {"fits": fits, "chunk": chunk.as_dict()}
        result |= {"memory_available_bytes": memory, "capture": captured}
        result |= {"disk_available_bytes": disk if other is None else None}
        result |= {"planned_for": None if other is None else other.name}
        result["notes"] = _type_lines(resolved, other)
        result["advice"] = [
            {"set": change.settings, "peak_bytes": change.peak_bytes, "fits": change.fits}
            for change in changes
        ]
        display.result(json.dumps(result, indent=2))
        return 0 if fits else 2
    for line in (
        *_memory_lines(planned, memory, chunk.summary, other),
        *(() if options.measure and fits else _type_lines(resolved, other)),  # the steps have said it
        *_rollout_lines(resolved),
        *_disk_lines(planned, None if other is not None else disk, resolved, captured),
        "it fits" if fits else "it does not fit",
        *_advice_lines(planned, changes, memory, planned.disk_peak_bytes if other is not None else disk),
    ):
        display.result(line)
    return 0 if fits else 2


def _resolved_for(recipe: Recipe, other: OtherDevice | None) -> Resolved:
    from potstill.build.resolve import resolve
    from potstill.models.load import choose_device
    from potstill.preflight.other_device import resolve_for

    if other is not None:
        return resolve_for(recipe, other)
    try:
        choose_device(recipe.train.device)
    except UserError as error:
        raise UserError(
            f"train.{error} `potstill plan RECIPE --device h100`, or --device cuda --device-memory 80GiB, plans for"
            " one that is not here."
        ) from error
    return resolve(recipe)


def _memory_lines(planned: Plan, memory: int, chunk: str, other: OtherDevice | None) -> list[str]:
    rows = [[name, size(part), size(planned.largest.get(name, part))] for name, part in planned.parts.items()]
    return [
        aligned(["part", "at the peak", "at most"], [*rows, ["sum", size(planned.peak_bytes), ""]]),
        f"the peak is in the {planned.phase} on {planned.device}; {size(memory)} available",
        *([] if other is None else [f"planned for {other.name}, which is not measured here"]),
        chunk,
    ]


def _type_lines(resolved: Resolved, other: OtherDevice | None) -> list[str]:
    """Types that were left to `auto`, and those in which the device of the plan is slower."""
    from potstill.build.resolve import notes_on_types
    from potstill.io.cpu_matmul import choose_product_dtype

    chosen = (
        choose_product_dtype(resolved.device)
        if other is None
        else (other.product_dtype, f"auto: {other.name}")
    )
    return notes_on_types(resolved.asked, *chosen)


def _rollout_lines(resolved: Resolved) -> list[str]:
    """What the student takes to write its rows; it is freed before the step. Nothing where it writes none."""
    from potstill.preflight.rollouts import rollout_bytes, rows_of_block

    rows = rows_of_block(resolved.recipe)
    if not rows:
        return []
    return [
        f"rollouts: {size(rollout_bytes(resolved))} of key-value cache and logits while {rows} rows are written"
    ]


def _disk_lines(
    planned: Plan, disk: int | None, resolved: Resolved, captured: dict[str, Any] | None
) -> list[str]:
    from potstill.preflight.plan_disk import corpus_tokens

    free = "what is free there is not known" if disk is None else f"{size(disk)} free"
    lines = [f"disk: {size(planned.disk_peak_bytes)} in the run, {size(planned.disk_bytes)} after; {free}"]
    if captured is not None:
        each = f"{captured['bytes_per_position']:.4g} bytes for each of"
        known = captured["tokens"] is not None
        amount = (
            f"{size(int(captured['bytes']))}, {each} about {captured['tokens']} tokens"
            if known
            else f"{each} its tokens"
        )
        lines.append(f"`potstill capture` would store {resolved.recipe.capture.name} targets: {amount}")
    if resolved.recipe.corpus.is_streamed and corpus_tokens(resolved.recipe) is None:
        lines.append("corpus: on the hub; how many tokens it has is not known, and not in these figures")
    how = "; `potstill plan RECIPE --measure` runs three steps" if disk is not None else " here"
    not_measured = f"not measured{how}"
    written = (
        "" if planned.rollout_time_s is None else f", {clock(planned.rollout_time_s)} of it writing rollouts"
    )
    return [*lines, f"time: {not_measured if planned.time_s is None else clock(planned.time_s) + written}"]


def _advice_lines(planned: Plan, changes: list[Advice], memory: int, disk: int) -> list[str]:
    lines = []
    for change in changes:
        saved = size(planned.peak_bytes - change.peak_bytes)
        verdict = "fits" if change.fits else "does not fit"
        how = (
            " (`potstill capture` writes it, with the teacher alone)"
            if "name: store" in change.settings[0]
            else ""
        )
        lines.append(
            f"  {' '.join(change.settings)}{how}: saves {saved}, peak {size(change.peak_bytes)}, {verdict}"
        )
    if planned.peak_bytes > memory and not any(change.fits for change in changes):
        lines.append(
            f"  none of these fits into {size(memory)}: use smaller models, or a machine with more memory"
        )
    if planned.disk_peak_bytes > disk:
        missing = size(planned.disk_peak_bytes - disk)
        lines.append(f"  the disk lacks {missing}: make room, or give --out a folder on another disk")
    return lines
