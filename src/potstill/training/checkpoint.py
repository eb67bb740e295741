"""Checkpoints that are whole or not there, and a resume that continues the run bit for bit.

    checkpoints/000500/tensors.safetensors   weights, optimizer moments, random state
                       state.json            the loop's outcome so far, and hashes of what the run was made of
                       manifest.json         bytes and sha256 of both, written last

A checkpoint is written beside its place, flushed to the disk, renamed and read back; only then is an older
one deleted. Loading takes the newest that verifies, and says so when that is not the newest. Nothing in it
can run code. The schedule and the order of rows are functions of the step, so they need no saving. A file
that the system does not let be read may be sound: it ends the resume, and is never deleted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic
import torch
from annotated_types import Interval
from pydantic import ConfigDict, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from potstill.errors import Unreadable, UserError
from potstill.io.atomic import flush, listed, remove
from potstill.io.hashing import file_sha256
from potstill.io.safe_open import NO_FILE, read_object, unreadable
from potstill.models.safetensors_files import check_safetensors
from potstill.models.student import Student
from potstill.training.distributed import ALONE, Ranks, full, placed_as
from potstill.training.optim import moments_like

CHECKPOINTS_KEPT = 2
READABLE = "Make it readable, or move its checkpoint away to go on from the one before."
FILES = ("tensors.safetensors", "state.json")


Natural = Annotated[int, Interval(ge=0)]
Metrics = dict[str, float]
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass
class Outcome:
    """What the loop knows beside weights and moments; part of every checkpoint."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    step: Natural = 0
    """Optimizer steps taken."""
    first: Metrics = dataclasses.field(default_factory=dict)
    """Held-out metrics of the untouched student."""
    last: Metrics = dataclasses.field(default_factory=dict)
    best: Metrics = dataclasses.field(default_factory=dict)
    best_step: Natural = 0
    """Optimizer steps that the best student has seen; chosen by held-out loss alone."""
    evaluated: int = -1
    """Step of the last finished evaluation. One that a signal cut short is done on resume."""
    left_out: list[int] = dataclasses.field(default_factory=list)
    """Steps whose update the guard refused, counted from 1."""
    positions: Natural = 0
    """Supervised positions trained on."""
    seconds: Annotated[float, Interval(ge=0)] = 0.0
    """Wall time in steps, evaluations excluded."""


@dataclass(frozen=True)
class State:
    """What `state.json` holds."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    outcome: Outcome
    inputs: dict[str, str]
    """Hashes of what the run is made of."""


_STATE = TypeAdapter(State)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run. `inputs` are hashes of what it is made of; others are refused on resume."""

    folder: Path
    inputs: dict[str, str]
    note: Callable[[str], None]
    ranks: Ranks = ALONE
    """All of them call `save` and `load`. The first alone writes and deletes."""

    def save(self, student: Student, optimizer: torch.optim.Optimizer, outcome: Outcome) -> None:
        """Write the state after `outcome.step` steps.

        Raises:
            UserError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
        """
        tensors = _tensors(student, optimizer)  # on every rank: shards are gathered from all of them
        self.ranks.on_first(lambda: self._write(tensors, outcome))

    def _write(self, tensors: dict[str, Tensor], outcome: Outcome) -> None:
        place = self.folder / f"{outcome.step:08d}"
        fresh = self.folder / f"{outcome.step:08d}.new"
        try:
            if not self.folder.exists():
                self.folder.mkdir()
                flush(self.folder.parent)
            remove(fresh)
            fresh.mkdir()
            # Tensors, state, manifest: the last has the hashes of the others. All are on the disk before the
            # folder takes its name, so a folder with a number is whole, or was damaged later.
            save_file(tensors, fresh / FILES[0])
            state = dataclasses.asdict(State(outcome, self.inputs))
            (fresh / FILES[1]).write_text(json.dumps(state))
            manifest = {
                name: {"bytes": (fresh / name).stat().st_size, "sha256": file_sha256(fresh / name)}
                for name in FILES
            }
            (fresh / "manifest.json").write_text(json.dumps(manifest))
            for path in (*fresh.iterdir(), fresh):
                flush(path)
            remove(place)
            fresh.rename(place)
            flush(self.folder)  # the name itself
        except (OSError, SafetensorError) as error:
            shutil.rmtree(fresh, ignore_errors=True)
            needed = sum(tensor.nbytes for tensor in tensors.values())
            raise UserError(
                f"{place}: the checkpoint of {needed} bytes cannot be written: {error}."
                " Earlier ones are untouched. Make room, then run again with --resume."
            ) from error
        # Older ones go last, when this one has been read back: until then they are what a resume needs.
        try:
            verify(place)
        except UserError as error:
            raise UserError(
                f"{place}: read back, the checkpoint is damaged: {error} The disk is not sound."
            ) from error
        for old in self._newest_first()[CHECKPOINTS_KEPT:]:
            remove(old)

    def load(self, student: Student, optimizer: torch.optim.Optimizer) -> Outcome | None:
        """Put the newest sound checkpoint into `student` and `optimizer`; None where there is none.

        Raises:
            UserError: no checkpoint is sound, one cannot be read, or the run is made of other things than the
                checkpoint.
        """
        self.ranks.on_first(self._remove_leftovers)
        places = self._newest_first()
        faults = []
        for number, place in enumerate(places):
            try:
                verify(place)
                state = _read_state(place)
                differing = self._differing(state)
                # Of another student the shapes differ, and nothing is damaged.
                tensors = {} if differing else _read_tensors(place, state.outcome, student, optimizer)
            except Unreadable as error:
                raise Unreadable(error.what, READABLE) from error
            except UserError as error:
                fault = str(error).removeprefix(f"{place}{os.sep}")
                faults.append(f"{place.name}: {fault}")
                self.note(f"warning: {place}: damaged, the one before is taken: {fault}")
                continue
            if differing:
                raise UserError(
                    f"{place}: made with another {', '.join(differing)} than this run. Resume with the same,"
                    " or start a new run."
                )
            _restore(tensors, student, optimizer)
            # Damaged ones would count among those kept. Older ones are there where a kill came before the
            # deletion. Neither goes before the state of this one is in place.
            stale = [*places[:number], *places[number + CHECKPOINTS_KEPT :]]
            self.ranks.on_first(partial(_remove_all, stale))
            self.note(f"resumed from {place}")
            return state.outcome
        if places:
            raise UserError(
                f"{self.folder}: none of {len(places)} checkpoints is sound: {faults[0]} Start a new run."
            )
        return None

    def _remove_leftovers(self) -> None:
        for leftover in listed(self.folder):
            if leftover.name.endswith(".new"):
                remove(Path(leftover.path))

    def _differing(self, state: State) -> list[str]:
        """Inputs that are not those of the checkpoint, with both hashes."""
        return [
            f"{name} ({str(state.inputs.get(name))[:12]} -> {str(self.inputs.get(name))[:12]})"
            for name in sorted(self.inputs | state.inputs)
            if state.inputs.get(name) != self.inputs.get(name)
        ]

    def _newest_first(self) -> list[Path]:
        entries = [entry for entry in listed(self.folder) if entry.name.isdecimal() and entry.is_dir()]
        return [Path(entry.path) for entry in sorted(entries, key=lambda e: int(e.name), reverse=True)]


def _remove_all(places: list[Path]) -> None:
    for place in places:
        remove(place)


def _trained(student: Student) -> list[tuple[str, Tensor]]:
    """Frozen weights are not saved: the run started with them, and their hash is among its inputs."""
    return [(name, p) for name, p in student.named_parameters() if p.requires_grad]


def _tensors(student: Student, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, moments and random state; whole, also where the run has them in shards."""
    tensors = {f"weights/{name}": full(tensor.detach()) for name, tensor in _trained(student)}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer/{number}/{name}": full(value) for name, value in moments.items() if value is not None
        }
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors


def _restore(tensors: dict[str, Tensor], student: Student, optimizer: torch.optim.Optimizer) -> None:
    moments: dict[int, dict[str, Any]] = {}
    with torch.no_grad():
        for name, parameter in _trained(student):
            parameter.copy_(placed_as(tensors[f"weights/{name}"], parameter))
    in_order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            number, _, moment = rest.partition("/")
            moments.setdefault(int(number), {})[moment] = placed_as(tensor, in_order[int(number)])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])


def verify(place: Path) -> None:
    """UserError unless each file has the size and the hash that the manifest gives."""
    manifest = read_object(place / "manifest.json", "It was written last.")
    for name in FILES:
        entry = manifest.get(name)
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or "sha256" not in entry:
            raise UserError(f"manifest.json: it does not give bytes and sha256 of {name}.")
        try:
            size, digest = (place / name).stat().st_size, file_sha256(place / name)
        except OSError as error:
            if error.errno in NO_FILE:
                raise UserError(f"{name}: cannot be read: {error.strerror}.") from error
            raise unreadable(place / name, error, "") from error
        if size != entry["bytes"]:
            raise UserError(f"{name}: it has {size} bytes, written were {entry['bytes']}.")
        if digest != entry["sha256"]:
            raise UserError(f"{name}: it does not have the hash it was written with.")


def _read_state(place: Path) -> State:
    """`state.json`, checked: its hash shows that it is as it was written, not that it was right."""
    read = read_object(place / FILES[1], "It was damaged before it was written.")
    try:
        state = _STATE.validate_json(json.dumps(read), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{FILES[1]}: {where}: {first['msg']}, found {first['input']!r:.60}.") from error
    outcome = state.outcome
    if outcome.step != int(place.name) or outcome.best_step > outcome.step:
        raise UserError(
            f"{FILES[1]}: outcome.step is {outcome.step}, outcome.best_step {outcome.best_step}, and the"
            f" folder says {int(place.name)}."
        )
    expected = set(outcome.first) if outcome.evaluated >= 0 else set()
    for name in ("first", "last", "best"):
        names = set(getattr(outcome, name))
        if names != expected or (outcome.evaluated >= 0 and "heldout/loss" not in names):
            raise UserError(f"{FILES[1]}: outcome.{name}: not the metrics of an evaluation: {sorted(names)}.")
    return state


def _read_tensors(
    place: Path, outcome: Outcome, student: Student, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The tensors; UserError unless they are what `_tensors` writes for this student and optimizer."""
    check_safetensors(place / FILES[0])
    try:
        tensors = load_file(place / FILES[0])
    except OSError as error:
        raise unreadable(place / FILES[0], error, "") from error
    weights = {f"weights/{name}": parameter for name, parameter in _trained(student)}
    expected: dict[str, Tensor] = {**weights, "random/cpu": torch.get_rng_state()}
    kept = {tuple(name.split("/")[1:]) for name in tensors if name.startswith("optimizer/")}
    stepped = outcome.step > len(outcome.left_out)
    for number, moments in enumerate(moments_like(optimizer)):
        # One that never had a gradient, such as an expert's that no token went to, has none.
        if (stepped and not kept) or any((str(number), moment) in kept for moment in moments):
            expected |= {f"optimizer/{number}/{moment}": like for moment, like in moments.items()}
    if unexpected := sorted((expected.keys() ^ tensors.keys()) - {"random/cuda"}):
        side = "missing" if unexpected[0] in expected else "no tensor of this student or its optimizer"
        raise UserError(f"{FILES[0]}: {unexpected[0]:.200}: {side}.")
    for name, like in expected.items():
        tensor = tensors[name]
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            saved, own = (f"{t.dtype} {list(t.shape)}" for t in (tensor, like))
            raise UserError(f"{FILES[0]}: {name}: {saved}, and the run's own is {own}.")
        if bool(tensor.isnan().any()):
            raise UserError(f"{FILES[0]}: {name}: not all of it are numbers.")
    return tensors
