"""Experiment trackers: TensorBoard, trackio and wandb receive every line of `metrics.jsonl` after it is written.

The run directory is the record, a tracker only a view of it: one that fails is reported once and dropped, and the run
goes on. A resumed run logs some steps again. TensorBoard purges what it has from that step on, wandb keeps the first
value of a step, and trackio, which would keep both, is not sent lines that the run already had.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from potstill.errors import UserError, one_line
from potstill.recipe.sections_evaluation import SinkConfig
from potstill.runs.run_dir import RunDir

Metrics = Mapping[str, float]


class Sink(Protocol):
    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """TensorBoard event files in the run's `tensorboard/`. `first` is the first step that will be logged."""

    def __init__(self, module: Any, run: RunDir, first: int) -> None:
        self.writer = module.SummaryWriter(str(run.path / "tensorboard"), purge_step=first or None)
        # The purge also drops evaluations that the run has kept, so they are written again. The last line is
        # what `log` is called with next.
        for line in run.metrics()[:-1]:
            if line["step"] >= first:
                self.log(first, {name: value for name, value in line.items() if name != "step"})

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # so that a kill loses nothing

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """wandb, and trackio, which has the same interface: project `potstill`, the run named after its folder."""

    def __init__(self, module: Any, run: RunDir, first: int) -> None:
        self.module, folder = module, run.path
        options: dict[str, Any] = {}
        if module.__name__ == "wandb":
            # An id that survives --resume, and differs for a new run in a folder of the same name:
            # environment.json is written once, at the start.
            started = (folder / "environment.json").stat().st_mtime_ns
            options["id"] = hashlib.sha256(f"{folder.resolve()} {started}".encode()).hexdigest()[:16]
            options["dir"] = str(folder)
        module.init(project="potstill", name=folder.resolve().name, resume="allow", **options)

    def log(self, step: int, metrics: Metrics) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


def require_module(name: str, module: str) -> None:
    """Import a tracker's library before the run starts.

    Raises:
        UserError: it cannot be imported; the message names the extra that installs it.
    """
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation may raise anything
        raise UserError(
            f"sinks: {name} cannot be imported: {one_line(error)} pip install 'potstill[{name}]', or"
            f" leave {name} out."
        ) from error


@contextlib.contextmanager
def logging_to(configs: Sequence[SinkConfig], run: RunDir, warn: Callable[[str], None]) -> Iterator[None]:
    """Inside the block, every line that `run` logs is also sent to the trackers."""
    listeners = [_Listener(config, run, warn) for config in configs]
    run.listeners.extend(listeners)
    try:
        yield
    finally:
        for listener in listeners:
            run.listeners.remove(listener)
            listener.close()


class _Listener:
    """Opens a tracker at the first line, and drops it at its first failure."""

    def __init__(self, config: SinkConfig, run: RunDir, warn: Callable[[str], None]) -> None:
        self.config, self.run, self.warn = config, run, warn
        self.name = config.registered_name
        logged = run.metrics() if config.keeps_what_it_has else []
        self.already_sent = [(line["step"], {*line} - {"step"}) for line in logged]
        self.sink: Sink | None = None
        self.works = True

    def __call__(self, step: int, metrics: Metrics) -> None:
        if (step, {*metrics}) not in self.already_sent:
            self._try(lambda: self._log(step, metrics))

    def close(self) -> None:
        if self.sink is not None:
            self._try(self.sink.close)

    def _log(self, step: int, metrics: Metrics) -> None:
        if self.sink is None:
            self.sink = self.config.open(self.run, step)
        self.sink.log(step, metrics)

    def _try(self, action: Callable[[], None]) -> None:
        if not self.works:
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                action()
        except Exception as error:  # a library may raise anything, and none of it may end the run
            self.works = False
            if self.sink is not None:
                with contextlib.suppress(Exception):
                    self.sink.close()
                self.sink = None
            self.warn(
                f"sink {self.name} failed and is no longer logged to; the run goes on: {one_line(error)}"
            )
