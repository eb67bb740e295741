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
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from potstill.errors import UserError
from potstill.models.files import file_sha256
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
            raise UserError(f"{place}: read back, the checkpoint is damaged: {fault}. The disk is not sound.")
        for old in self._found()[KEPT:]:
            shutil.rmtree(old)

    def load(self, student: Student, optimizer: torch.optim.Optimizer) -> Outcome | None:
        """Put the newest sound checkpoint into `student` and `optimizer`; None where there is none.

        Raises:
            UserError: no checkpoint is sound, or the run is made of other things than the checkpoint.
        """
        for leftover in self.folder.glob("*.new"):
            shutil.rmtree(leftover)
        found = self._found()
        for number, place in enumerate(found):
            if (fault := _fault(place)) is not None:
                self.tell(f"warning: {place}: damaged, the one before is taken: {fault}")
                continue
            state = json.loads((place / FILES[1]).read_text())
            if differing := [n for n, value in self.inputs.items() if state["inputs"].get(n) != value]:
                raise UserError(
                    f"{place}: made with another {', '.join(differing)} than this run. Start a new run."
                )
            _restore(load_file(place / FILES[0]), student, optimizer)
            # Damaged ones would count among those kept; older ones are what a kill left half deleted.
            for stale in (*found[:number], *found[number + KEPT :]):
                shutil.rmtree(stale)
            self.tell(f"resumed from {place}")
            return Outcome(**state["outcome"])
        if found:
            raise UserError(f"{self.folder}: none of {len(found)} checkpoints is sound. Start a new run.")
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
        manifest = json.loads((place / "manifest.json").read_text())
        for name in FILES:
            said = manifest[name]
            size = (place / name).stat().st_size
            if size != said["bytes"]:
                return f"{name} has {size} bytes, written were {said['bytes']}"
            if file_sha256(place / name) != said["sha256"]:
                return f"{name} does not have the hash it was written with"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json or what it names cannot be read ({type(error).__name__})"
    return None


def _flush(path: Path) -> None:
    """Onto the disk, a folder's entries too: a rename is only safe after what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
