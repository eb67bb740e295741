"""Live sinks: TensorBoard, trackio and wandb, told every line of `metrics.jsonl` once it is written.

The run is the record and a sink a window on it: one that fails is told of once, closed, and the run goes on.
A run that was cut off and resumed tells again what it logs again, from where it goes on: TensorBoard drops
what it had from that step on, wandb keeps the first value of a step, and trackio, which would keep both, is
not told a line that the run had written before.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from potstill.errors import UserError, one_line
from potstill.runs.run_dir import RunDir

Metrics = Mapping[str, float]
MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}


class Sink(Protocol):
    def tell(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's `tensorboard/`."""

    def __init__(self, module: Any, run: RunDir, first: int) -> None:
        self.writer = module.SummaryWriter(str(run.path / "tensorboard"), purge_step=first or None)
        for line in run.metrics()[:-1]:  # the last is told next
            if line["step"] >= first:  # what the purge forgets and the run has kept
                self.tell(first, {name: value for name, value in line.items() if name != "step"})

    def tell(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a kill loses nothing that was told

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """trackio, and wandb, whose interface it has: project `potstill`, a run named like the folder."""

    def __init__(self, module: Any, run: RunDir, first: int) -> None:
        self.module, folder = module, run.path
        more: dict[str, Any] = {}
        if module.__name__ == "wandb":
            begun = (folder / "environment.json").stat().st_mtime_ns  # written once, at the run's begin
            more["id"] = hashlib.sha256(f"{folder.resolve()} {begun}".encode()).hexdigest()[:16]
            more["dir"] = str(folder)
        module.init(project="potstill", name=folder.resolve().name, resume="allow", **more)

    def tell(self, step: int, metrics: Metrics) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


def require_sinks(names: Sequence[str]) -> None:
    """Refuse before a run begins what could not be told anything.

    Raises:
        UserError: a sink's package cannot be imported; names the extra that has it.
    """
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except Exception as error:  # a broken installation raises what it likes
            raise UserError(
                f"sinks: {name} cannot be imported: {one_line(error)} pip install 'potstill[{name}]', or"
                f" leave {name} out."
            ) from error


@contextlib.contextmanager
def telling(names: Sequence[str], run: RunDir, warn: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, each line that `run` logs goes to the sinks, too."""
    listeners = [_Listener(name, run, warn) for name in names]
    run.listeners.extend(listeners)
    try:
        yield
    finally:
        for listener in listeners:
            run.listeners.remove(listener)
            listener.close()


class _Listener:
    """A sink that is opened by its first line, and that may fail."""

    def __init__(self, name: str, run: RunDir, warn: Callable[[str], None]) -> None:
        self.name, self.run, self.warn = name, run, warn
        self.before = (
            [(line["step"], {*line} - {"step"}) for line in run.metrics()] if name == "trackio" else []
        )
        self.sink: Sink | None = None
        self.works = True

    def __call__(self, step: int, metrics: Metrics) -> None:
        if (step, {*metrics}) not in self.before:
            self._try(lambda: self._tell(step, metrics))

    def close(self) -> None:
        if self.sink is not None:
            self._try(self.sink.close)

    def _tell(self, step: int, metrics: Metrics) -> None:
        if self.sink is None:
            make = TensorBoard if self.name == "tensorboard" else Tracker
            self.sink = make(importlib.import_module(MODULES[self.name]), self.run, step)
        self.sink.tell(step, metrics)

    def _try(self, act: Callable[[], None]) -> None:
        if not self.works:
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                act()
        except Exception as error:  # a sink raises what it likes
            self.works = False
            self.warn(f"sink {self.name} failed and is told no more; the run goes on: {one_line(error)}")
