"""`humaneval.samples.jsonl`: the settings, then one line per sample, judged or still to be judged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from potstill.errors import UserError, one_line
from potstill.evals.pass_at_k import RESULT
from potstill.io.safe_open import object_of, opened, parse_json
from potstill.runs.run_dir import RunDir, write_whole

SAMPLES = "humaneval.samples.jsonl"


COUNTS = ("problems", "samples")
OF_COMPLETION = {"completion": str, "program": str, "finish": str, "parses": bool, "cut_in_thought": bool}
"""Fields of a line that is judged alone, with their types."""
OF_JUDGE = ("sandbox", "extra_tests_sha256")
"""Settings that are None until a judge sets them."""


def recorded_settings(folder: Path) -> dict[str, Any]:
    """Those of the samples in `folder`.

    Raises:
        UserError: no samples there, or damaged ones.
    """
    path = folder / SAMPLES
    with opened(path, "samples", f"Give a folder with a {SAMPLES}.") as file:
        header = object_of(file.readline(), str(path), "Complete the problems again.")
    settings = header.get("settings")
    if not isinstance(settings, dict) or any(type(settings.get(name)) is not int for name in COUNTS):
        raise UserError(f"{path}: its first line has no settings. Complete the problems again.")
    return settings


class SamplesFile:
    """`humaneval.samples.jsonl`. A killed process may have left its last line incomplete.

    A sample without a verdict is read where samples are completed alone, or judged alone; who does both at once
    completes it again.
    """

    def __init__(self, out: Path, settings: dict[str, Any], judges_alone: bool = False) -> None:
        """Read an existing file; nothing is written yet.

        Raises:
            UserError: it is damaged, or was started with other settings.
        """
        self._out, self.path, self._lock = out, out / SAMPLES, threading.Lock()
        self.settings, self._judges_alone = settings, judges_alone
        self.lines: dict[tuple[str, int], dict[str, Any]] = {}
        self._read()

    def require_every(self, samples: Iterable[tuple[str, int]]) -> None:
        """Each of `samples`, by task and number, has a line, and nothing else has one.

        Raises:
            UserError: too few or others.
        """
        wanted = {*samples}
        if missing := wanted - self.lines.keys():
            raise UserError(
                f"{self.path}: {len(missing)} of {len(wanted)} samples are missing, {min(missing)[0]} among them."
                " The command that completed the others goes on where it stopped."
            )
        if unknown := self.lines.keys() - wanted:
            raise UserError(
                f"{self.path}: {min(unknown)[0]} is no problem of HumanEval. Complete them again."
            )

    def require_fields(self) -> None:
        """Every line has what a judge reads.

        Raises:
            UserError: with the first that has not.
        """
        for (task, number), line in self.lines.items():
            wrong = [name for name, kind in OF_COMPLETION.items() if type(line.get(name)) is not kind]
            if wrong or "verdict" not in line:
                field = (wrong or ["verdict"])[0]
                raise UserError(
                    f"{self.path}: damaged: {task} sample {number} has no {field} that can be read."
                    " Complete the problems again."
                )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing to the folder. A result in it may be of other samples: it goes."""
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            lock = RunDir(self._out).locked()
        except OSError as error:
            raise UserError(
                f"{self._out}: cannot be written: {error.strerror}. Give --out another folder."
            ) from error
        with lock:
            self._read()
            self.write_whole()
            if not self._judges_alone:  # its result has what was known when they were completed
                (self._out / RESULT).unlink(missing_ok=True)
            yield

    def _read(self) -> None:
        if not os.path.lexists(self.path):
            return
        with opened(self.path, "samples", "Give --out another folder.") as file:
            complete = file.read().split(b"\n")[:-1]
        try:
            header, *lines = [parse_json(line) for line in complete] or [{"settings": self.settings}]
            recorded = header["settings"]
            if self._judges_alone and recorded["sandbox"] is None:
                recorded = recorded | {name: self.settings[name] for name in OF_JUDGE}
            waits = self._judges_alone or self.settings["sandbox"] is None
            found = {
                (line["task_id"], int(line["sample"])): line for line in lines if waits or line["verdict"]
            }
            names = {**recorded, **self.settings}
            differing = [name for name in names if recorded.get(name) != self.settings.get(name)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path}: damaged: {one_line(error)} Remove it, or give --out another folder."
            ) from error
        if differing:
            changes = [
                f"{name} ({recorded.get(name)!r:.80} -> {self.settings.get(name)!r:.80})"
                for name in differing[:6]
            ]
            judged = f"`potstill eval {self._out} --humaneval` judges them; or give"
            todo = judged if recorded.get("sandbox", ...) is None else "Give"
            raise UserError(
                f"{self.path}: started with other settings: {', '.join(changes)}. {todo} --out another folder."
            )
        self.lines = found

    def add(self, line: dict[str, Any]) -> None:
        """Append one line. May be called from several threads."""
        try:
            with self._lock, open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                self.lines[line["task_id"], line["sample"]] = line
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}. Make room, then run the command again."
            ) from error

    def write_whole(self) -> None:
        """Rewrite the file in the order of the problems, so that files of equal runs are equal."""
        ordered = sorted(self.lines, key=lambda key: (int(key[0].rpartition("/")[2]), key[1]))
        header = {"settings": self.settings, "settings_sha256": _sha256(self.settings)}
        content = [header, *(self.lines[key] for key in ordered)]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in content).encode())


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
