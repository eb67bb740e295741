"""Checkpoints that are whole or not there, and a resume that continues the run bit for bit.

    checkpoints/000500/tensors.safetensors   weights, optimizer moments, random state
                       state.json            the loop's outcome so far, and hashes of what the run was made of
                       manifest.json         bytes and sha256 of both, written last

A checkpoint is written beside its place, flushed to the disk, renamed and read back; only then is an older
one deleted. Loading takes the newest that verifies, and says so when that is not the newest. Nothing in it
can run code. The schedule and the order of rows are functions of the step, so they need no saving.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from potstill.errors import UserError
from potstill.models.files import check_safetensors, file_sha256
from potstill.plain_files import read_object
from potstill.students.student import Student

KEPT = 2
FILES = ("tensors.safetensors", "state.json")


@dataclass
class Outcome:
    """What the loop knows beside weights; part of every checkpoint."""

    step: int = 0
    """Optimizer steps taken."""
    first: dict[str, float] = dataclasses.field(default_factory=dict)
    """Held-out metrics of the untouched student."""
    last: dict[str, float] = dataclasses.field(default_factory=dict)
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    best_step: int = 0
    """Optimizer steps that the best student has seen; chosen by held-out loss alone."""
    evaluated: int = -1
    """Step of the last evaluation: one that a signal cut short is made up for on resume."""
    left_out: list[int] = dataclasses.field(default_factory=list)
    """Steps whose update the guard refused, counted from 1."""
    positions: int = 0
    """Supervised positions trained on."""
    seconds: float = 0.0
    """Wall time in steps, evaluations excluded."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run. `inputs` are hashes of what it is made of; others are refused on resume."""

    folder: Path
    inputs: dict[str, str]
    tell: Callable[[str], None]

    def save(self, student: Student, optimizer: torch.optim.Optimizer, outcome: Outcome) -> None:
        """Write the state after `outcome.step` steps.

        Raises:
            UserError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
        """
        tensors = _tensors(student, optimizer)
        place = self.folder / f"{outcome.step:08d}"
        beside = self.folder / f"{outcome.step:08d}.new"
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            save_file(tensors, beside / FILES[0])
            state = {"outcome": dataclasses.asdict(outcome), "inputs": self.inputs}
            (beside / FILES[1]).write_text(json.dumps(state))
            manifest = {
                name: {"bytes": (beside / name).stat().st_size, "sha256": file_sha256(beside / name)}
                for name in FILES
            }
            (beside / "manifest.json").write_text(json.dumps(manifest))
            for path in (*beside.iterdir(), beside):
                _flush(path)
            shutil.rmtree(place, ignore_errors=True)
            beside.rename(place)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            needed = sum(tensor.nbytes for tensor in tensors.values())
            raise UserError(
                f"{place}: the checkpoint of {needed} bytes cannot be written: {error}."
                " Earlier ones are untouched. Make room, then run again with --resume."
            ) from error
        if (fault := _fault(place)) is not None:
            raise UserError(f"{place}: read back, the checkpoint is damaged: {fault} The disk is not sound.")
        for old in self._found()[KEPT:]:
            shutil.rmtree(old)

    def load(self, student: Student, optimizer: torch.optim.Optimizer) -> Outcome | None:
        """Put the newest sound checkpoint into `student` and `optimizer`; None where there is none.

        Raises:
            UserError: no checkpoint is sound, or the run is made of other things than the checkpoint.
        """
        for leftover in self.folder.glob("*.new"):
            shutil.rmtree(leftover, ignore_errors=True)
        found = self._found()
        faults = []
        for place in found:
            state, tensors = {}, {}
            if (fault := _fault(place)) is None:
                try:
                    state, tensors = _read_state(place), _read_tensors(place, student, optimizer)
                except UserError as error:
                    fault = str(error)
            if fault is not None:
                fault = fault.removeprefix(f"{place}{os.sep}")
                faults.append(f"{place.name}: {fault}")
                self.tell(f"warning: {place}: damaged, the one before is taken: {fault}")
                continue
            if differing := [n for n, value in self.inputs.items() if state["inputs"].get(n) != value]:
                raise UserError(
                    f"{place}: made with another {', '.join(differing)} than this run. Start a new run."
                )
            _restore(tensors, student, optimizer)
            self.tell(f"resumed from {place}")
            return Outcome(**state["outcome"])
        if found:
            raise UserError(
                f"{self.folder}: none of {len(found)} checkpoints is sound: {faults[0]} Start a new run."
            )
        return None

    def _found(self) -> list[Path]:
        """Checkpoints, newest first."""
        return sorted((p for p in self.folder.glob("*") if p.is_dir() and p.name.isdecimal()), reverse=True)


def _tensors(student: Student, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"weights/{name}": tensor.detach() for name, tensor in student.named_parameters()}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer/{number}/{name}": value for name, value in moments.items() if value is not None
        }
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors


def _restore(tensors: dict[str, Tensor], student: Student, optimizer: torch.optim.Optimizer) -> None:
    moments: dict[int, dict[str, Any]] = {}
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(tensors[f"weights/{name}"])
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            number, _, moment = rest.partition("/")
            moments.setdefault(int(number), {})[moment] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])


def _fault(place: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_object(place / "manifest.json", "It was written last.")
        for name in FILES:
            said = manifest.get(name)
            if not isinstance(said, dict) or type(said.get("bytes")) is not int or "sha256" not in said:
                return f"manifest.json: it does not give bytes and sha256 of {name}."
            size = (place / name).stat().st_size
            if size != said["bytes"]:
                return f"{name}: it has {size} bytes, written were {said['bytes']}."
            if file_sha256(place / name) != said["sha256"]:
                return f"{name}: it does not have the hash it was written with."
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{name}: cannot be read: {error.strerror}."
    return None


def _read_state(place: Path) -> dict[str, Any]:
    """`state.json`, when its fields are those of an outcome; UserError else. A hash does not say so."""

    def refuse(field: str, value: Any, wanted: str) -> NoReturn:
        raise UserError(f"{FILES[1]}: {field} is {value!r:.60}, not {wanted}.")

    state = read_object(place / FILES[1], "It was damaged before it was written.")
    outcome, inputs = state.get("outcome"), state.get("inputs")
    if not isinstance(inputs, dict):
        refuse("inputs", inputs, "a mapping of hashes")
    if not isinstance(outcome, dict):
        refuse("outcome", outcome, "a mapping")
    fields = {field.name: field for field in dataclasses.fields(Outcome)}
    if odd := sorted(outcome.keys() ^ fields.keys()):
        refuse("outcome", sorted(outcome), f"of the fields {', '.join(fields)}: {odd[0]} is one side's alone")
    for name, field in fields.items():
        value = outcome[name]
        least = min(0, getattr(Outcome, name)) if field.type == "int" else 0
        fits, wanted = {
            "int": (type(value) is int and value >= least, "a count"),
            "float": (_is_number(value) and value >= 0, "a number from 0"),
            "list[int]": (isinstance(value, list) and all(type(i) is int for i in value), "a list of steps"),
            "dict[str, float]": (
                isinstance(value, dict) and all(map(_is_number, value.values())),
                "a mapping of numbers",
            ),
        }[str(field.type)]
        if not fits:
            refuse(f"outcome.{name}", value, wanted)
    if outcome["step"] != int(place.name):
        refuse("outcome.step", outcome["step"], f"{int(place.name)}, as its folder says")
    if outcome["best_step"] > outcome["step"]:
        refuse("outcome.best_step", outcome["best_step"], f"{outcome['step']} or less")
    if "heldout/loss" not in outcome["first"]:
        refuse("outcome.first", sorted(outcome["first"]), "the metrics of an evaluation")
    for name in ("best", "last"):
        if outcome[name].keys() != outcome["first"].keys() and (outcome[name] or name == "best"):
            refuse(f"outcome.{name}", sorted(outcome[name]), "of the metrics that outcome.first has")
    return state


def _read_tensors(place: Path, student: Student, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors, when they are what `_tensors` writes for this student and optimizer; UserError else."""
    check_safetensors(place / FILES[0])
    tensors = load_file(place / FILES[0])
    weights = {f"weights/{name}": parameter for name, parameter in student.named_parameters()}
    wanted: dict[str, Tensor] = {**weights, "random/cpu": torch.get_rng_state()}
    numbers = {name.split("/")[1] for name in tensors if name.startswith("optimizer/")}
    is_adamw = isinstance(optimizer, torch.optim.AdamW)
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if is_adamw and (str(number) in numbers or not numbers):
            moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter) | {"step": torch.zeros(())}
            wanted |= {f"optimizer/{number}/{moment}": like for moment, like in moments.items()}
    if odd := sorted((wanted.keys() ^ tensors.keys()) - {"random/cuda"}):
        side = "missing" if odd[0] in wanted else "no tensor of this student or its optimizer"
        raise UserError(f"{FILES[0]}: {odd[0]:.200}: {side}.")
    for name, like in wanted.items():
        found = tensors[name]
        if (found.shape, found.dtype) != (like.shape, like.dtype):
            found_is, like_is = (f"{t.dtype} {list(t.shape)}" for t in (found, like))
            raise UserError(f"{FILES[0]}: {name}: {found_is}, and the run's own is {like_is}.")
        if bool(found.isnan().any()):
            raise UserError(f"{FILES[0]}: {name}: not all of it are numbers.")
    return tensors


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf  # of any size, and not NaN


def _flush(path: Path) -> None:
    """Onto the disk, a folder's entries too: a rename is only safe after what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
