"""`potstill capture`: run a recipe's teacher once, and store its targets for every run that learns from it.

The size is printed and checked against the disk before anything is written, and the fidelity of the stored targets is
measured before the capture counts as complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, process_of, set_up
from potstill.errors import UserError
from potstill.io.safe_open import read_object
from potstill.io.terminal import Display, clock, size
from potstill.losses.targets import HiddenTargets
from potstill.models.causal_lm import CausalLM
from potstill.preflight.auto import note_types, settle
from potstill.preflight.plan import available
from potstill.recipe import load as recipes
from potstill.recipe.load import Recipe
from potstill.store.codecs import DEFAULT_BYTES, k_of, planned_bytes, threshold_of
from potstill.store.layout import (
    CAPTURE,
    CERTIFICATE,
    EXACT,
    HEAD,
    HELDOUT,
    SCHEMA,
    Files,
    codec_of,
    heldout_codec_of,
)
from potstill.store.reader import read_manifest
from potstill.store.shards import AGAIN
from potstill.store.writer import StoreWriter, write_json
from potstill.teachers.backends import FULL
from potstill.teachers.capture_rows import Captured, capture_shard, forget_rows
from potstill.teachers.stored import OF_CORPUS
from potstill.types import Teacher
from potstill.workflows.capture_fidelity import certificate

MAX_SHARDS = 1000  # where the recipe does not set rows_per_shard
SAID_EVERY_S = 10.0
"""Of a capture whose rows take long."""
THRESHOLD_POSITIONS = 2048  # held-out positions that a sampling threshold is fitted to
Json = dict[str, Any]


def capture(recipe: Path, overrides: list[str], out: Path, part: str | None, display: Display) -> Json | None:
    """Write the recipe's targets into `out`, or continue an interrupted capture there.

    Args:
        part: `I/N`, the I-th of N ranges of shards. None: all of them, or under torchrun one range per process.

    Returns:
        The manifest, or None while other parts are missing.

    Raises:
        UserError: the targets cannot be captured, or the disk has no room. Nothing has been written then.
    """
    loaded = recipes.load(recipe, overrides)
    number, parts = _parse_part(part)
    if loaded.corpus.is_prompts:
        raise UserError(
            "corpus.name: prompts have no answers whose targets could be captured. Use another corpus."
        )
    require_capturable(loaded, recipe)
    resolved = resolve(loaded, commits=(_recorded(out) or {}).get("commits"))
    _require_kind(loaded, resolved.teacher.captures, recipe)
    note_types(resolved, display.note, trains=False)
    resolved = settle(resolved, display.note)
    with process_of(resolved.recipe):
        setup = set_up(resolved, display.note)
        with contextlib.closing(setup.teacher):
            return _capture(setup, out, number, parts, display)


def _capture(setup: RunSetup, out: Path, number: int, parts: int, display: Display) -> Json | None:
    """Capture part `number` of `parts`."""
    teacher, held, rows_per_batch = setup.teacher, setup.corpus.heldout, setup.recipe.capture.rows_per_batch
    settings = settings_of(setup, _recorded(out))
    shards = settings["shards"]
    mine = range((number - 1) * shards // parts, number * shards // parts)
    _require_room(settings, setup, out, mine, display)
    writer = StoreWriter.open(out, settings)
    # What the parts share (head, tokenizer, held-out rows, certificate) is written by the first alone.
    with writer.exclusive(mine, first=number == 1):
        if number == 1:
            if teacher.model is not None:
                writer.write_head(teacher.model.head)
            writer.write_tokenizer(setup.tokenizer)
            codec = heldout_codec_of(settings)
            writer.write(
                out / HELDOUT,
                lambda file: capture_shard(
                    file, teacher, held, range(len(held)), codec, 0, rows_per_batch, with_labels=True
                ),
            )
            forget_rows(out / HELDOUT)
        _capture_shards(setup, settings, writer, mine, display)
        if number == 1 and not (out / CERTIFICATE).exists():
            display.note("certificate: on the held-out rows")
            seed = settings["kind"].get("seed", 0)
            fidelity = certificate(setup.student, teacher, held, codec_of(settings), seed)
            teacher.require_unchanged()
            student = {**setup.origin, "weights_sha256": setup.student.weights_sha256()}
            write_json(out / CERTIFICATE, fidelity | {"student": student})
    return read_manifest(out) if writer.finish() else None


def _require_kind(recipe: Recipe, kinds: Sequence[str], where: Path) -> None:
    """Refuse a kind of store that the teacher has no targets for."""
    name = recipe.teacher.registered_name
    if not kinds:
        raise UserError(
            f"{where}: teacher.name: {name} has no targets to capture. Give a teacher of name torch or server."
        )
    if recipe.capture.name not in kinds:
        raise UserError(
            f"{where}: capture.name: {recipe.capture.name} needs more than teacher.name: {name} gives. Set"
            f" capture.name: {' or '.join(kinds)}."
        )


def require_capturable(recipe: Recipe, where: Path) -> None:
    """Refuse targets that a run of the same recipe could not be trained from."""
    if recipe.capture.name == "sampled" and recipe.objective.divergence.name != "forward_kl":
        raise UserError(
            f"{where}: capture.name: sampled targets are unbiased only for forward_kl, and"
            f" objective.divergence is {recipe.objective.divergence.name}. Set capture.name: hidden."
        )


def settings_of(setup: RunSetup, recorded: Json | None) -> Json:
    """Everything the targets depend on, and how they are stored. `recorded`: those of the capture to continue."""
    config, ids, corpus = setup.recipe.capture, setup.shared.ids, setup.corpus
    numbers = _row_numbers(setup)
    rows, per_shard = corpus.train, config.rows_per_shard or max(64, -(-len(numbers) // MAX_SHARDS))
    teacher, kind = setup.teacher, _codec_settings(setup, recorded)
    head = None if teacher.model is None else teacher.model.head
    commits = {"commits": dict(setup.resolved.commits)} if setup.resolved.commits else {}
    return {
        **commits,
        "schema": SCHEMA,
        "kind": kind,
        # Where whole distributions are not to be had: the label, too, which may be none of the k.
        **({"heldout": {"k": kind["k"] + 1, "dtype": "float32"}} if teacher.ids_known else {}),
        "temperature": None if config.name == "hidden" else setup.recipe.objective.temperature,
        "teacher": _teacher_identity(setup, recorded),
        "vocabulary": {"size": setup.teacher.vocab_size, "ids": ids},
        "head": None
        if head is None
        else {"scale": head.scale, "softcap": head.softcap, "width": head.weight_VD.shape[1]},
        "corpus": {name: corpus.manifest[name] for name in (*OF_CORPUS, "fingerprint", "train_rows")},
        "rows": len(numbers),
        "runs": _ranges(numbers),
        "rows_per_batch": config.rows_per_batch,
        "rows_per_shard": per_shard,
        "shards": -(-len(numbers) // per_shard),
        "positions": sum(rows.positions_of(number) for number in numbers),
    }


def _codec_settings(setup: RunSetup, recorded: Json | None) -> Json:
    """How the targets of a position are encoded, with k or the threshold settled."""
    config, ids = setup.recipe.capture, setup.shared.ids
    settings = {
        name: value for name, value in dataclasses.asdict(config).items() if not name.startswith("rows")
    }
    if config.name == "topk":
        settings["k"] = min(config.k or k_of(config.bytes_per_position or 0, ids, config.dtype), ids)
        if (known := setup.teacher.ids_known) is not None and known < settings["k"]:
            raise UserError(
                f"capture.k: {settings['k']}, and the teacher gives {known} ids a position. Set it to at most {known},"
                " or teacher.top_k higher."
            )
    if config.name == "sampled" and config.threshold is None:
        # A continued capture keeps its threshold: fitted anew, its last digits may differ on another machine.
        before = (recorded or {}).get("kind")
        if isinstance(before, dict) and before.get("bytes_per_position") == config.bytes_per_position:
            settings["threshold"] = before.get("threshold")
        target_bytes = config.bytes_per_position or DEFAULT_BYTES
        settings["threshold"] = settings["threshold"] or _fit_threshold(setup, target_bytes)
    return settings


def _teacher_identity(setup: RunSetup, recorded: Json | None) -> Json:
    """Which weights, in which precision, computed the targets."""
    teacher = setup.teacher
    if teacher.model is None:
        before = (recorded or {}).get("teacher", {})
        about = {"source": None, "weights_sha256": None, "dtype": "float32"} | teacher.describe()
        about.pop("url", None)  # the same model may move
        return about | teacher.fingerprint(before)
    model, backend = teacher.model, teacher.backend or {"weights": FULL}
    quantized = {} if backend["weights"] == FULL else {name: backend[name] for name in ("weights", "backend")}
    return {
        "source": teacher.describe().get("source"),
        "weights_sha256": teacher.weights_sha256(),
        "dtype": str(model.head.weight_VD.dtype).removeprefix("torch."),
        "architecture": type(model.hf).__name__,
        **quantized,
    }


def _model(teacher: Teacher) -> CausalLM:
    assert teacher.model is not None  # `capture` refuses others
    return teacher.model


def _ranges(numbers: list[int]) -> list[list[int]]:
    """Ascending numbers as [first, last] of each contiguous range."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges


def _require_room(settings: Json, setup: RunSetup, out: Path, mine: range, display: Display) -> None:
    """Print what will be written, and where; UserError if the disk has no room for it."""
    ids, model = settings["vocabulary"]["ids"], setup.teacher.model
    width = 0 if model is None else settings["head"]["width"]
    per_position = planned_bytes(settings["kind"], ids, width)
    heldout = (
        {"name": "topk", **settings["heldout"]} if "heldout" in settings else vars(EXACT) | {"name": "hidden"}
    )
    heldout_bytes = planned_bytes(heldout, ids, width) * setup.corpus.manifest["heldout_positions"]
    shared_bytes = int(heldout_bytes) + (0 if model is None else model.head.weight_VD.nbytes)
    shard_bytes = per_position * settings["positions"]
    _, free = available(setup.recipe, out)
    kind = ", ".join(f"{name} {value}" for name, value in settings["kind"].items() if value is not None)
    display.note(
        f"targets: {kind}; {settings['positions']} positions of {settings['rows']} rows, about"
        f" {per_position:.3g} bytes each; with held-out rows and head"
        f" {size(int(shared_bytes + shard_bytes))} into {out}, {size(free)} free"
    )
    files = [Files(out).shard(number) for number in mine] + [out / HEAD, out / HELDOUT]
    existing = sum(file.stat().st_size for file in files if file.exists())
    part_bytes = int(shard_bytes * len(mine) / settings["shards"])
    needed = part_bytes + (0 if mine.start else shared_bytes) - existing
    if needed > free:
        raise UserError(
            f"{out}: {size(needed)} are needed and {size(free)} free. Make room, or capture fewer rows."
        )


def _row_numbers(setup: RunSetup) -> list[int]:
    """The rows to capture: all, or those that the recipe's own steps train on."""
    plan, order = setup.recipe.train, setup.corpus.order(setup.recipe.train.seed)
    if setup.recipe.capture.rows == "all":
        return list(range(len(setup.corpus.train)))
    return sorted({row for step in range(plan.num_steps) for row in order.rows(step, plan.rows_per_step)})


def _capture_shards(
    setup: RunSetup, settings: Json, writer: StoreWriter, mine: range, display: Display
) -> None:
    teacher, numbers, codec = setup.teacher, _row_numbers(setup), codec_of(settings)
    per_shard, seed = settings["rows_per_shard"], settings["kind"].get("seed", 0)
    missing = set(writer.missing(mine))
    total = sum(len(numbers[n * per_shard : (n + 1) * per_shard]) for n in missing)
    started = said_s = time.perf_counter()
    done = kept = 0

    def on_kept(rows: int) -> None:
        nonlocal kept
        kept += rows

    def on_row(row: Captured) -> None:
        nonlocal done, said_s
        done += 1
        there, now_s = kept + done, time.perf_counter()
        if there % 16 == 0 or there == total or now_s - said_s > SAID_EVERY_S:
            seconds, said_s = now_s - started, now_s
            rate = done * setup.recipe.corpus.tokens_per_row / seconds  # of those that were asked for
            left = clock(seconds / done * (total - there))
            doing = teacher.activity()
            display.note(f"{there}/{total} rows, {rate:.0f} tokens/s, {doing}{', ' * bool(doing)}{left} left")

    for shard in mine:
        rows = numbers[shard * per_shard : (shard + 1) * per_shard]
        writer.write(
            writer.files.shard(shard),
            lambda file, rows=rows: capture_shard(  # type: ignore[misc]
                file,
                teacher,
                setup.corpus.train,
                rows,
                codec,
                seed,
                settings["rows_per_batch"],
                on_row,
                on_kept,
            ),
        )
        forget_rows(writer.files.shard(shard))


def _fit_threshold(setup: RunSetup, target_bytes: float) -> float:
    """On the first held-out rows, so that every part and every restart arrives at the same one."""
    held, tokens = setup.corpus.heldout, setup.recipe.corpus.tokens_per_row
    batch = held.batch(range(min(len(held), max(THRESHOLD_POSITIONS // tokens, 1)))).to(setup.device)
    targets = setup.teacher.targets(batch)
    assert isinstance(targets, HiddenTargets)
    return threshold_of(
        target_bytes, targets.hidden_NE, _model(setup.teacher).head, setup.recipe.objective.temperature
    )


def _recorded(out: Path) -> Json | None:
    path = out / CAPTURE
    return read_object(path, AGAIN) if path.exists() else None


def _parse_part(part: str | None) -> tuple[int, int]:
    if part is None:  # under torchrun this process's own part, else everything
        part = f"{int(os.environ.get('RANK', '0')) + 1}/{os.environ.get('WORLD_SIZE', '1')}"
    words = part.split("/")
    if len(words) == 2 and all(word.isdecimal() for word in words):
        number, parts = map(int, words)
        if 1 <= number <= parts:
            return number, parts
    raise UserError(f"--part: {part!r} is not I/N with I from 1 to N, such as 2/4.")
