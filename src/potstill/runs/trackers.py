"""Live sinks: TensorBoard, trackio and wandb get every line of `metrics.jsonl` once it is written.

The run is the record and a sink a window on it: one that fails is warned of once and closed, and the run goes on. A
run that was cut off and resumed logs some steps again. TensorBoard drops what it had from that step on, wandb keeps the
first value of a step, and trackio, which would keep both, does not get a line that the run had written before.
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
    """Event files in the run's `tensorboard/`."""

    def __init__(self, module: Any, run: RunDir, first: int) -> None:
        self.writer = module.SummaryWriter(str(run.path / "tensorboard"), purge_step=first or None)
        for line in run.metrics()[:-1]:  # the last is logged next
            if line["step"] >= first:  # what the purge forgets and the run has kept
                self.log(first, {name: value for name, value in line.items() if name != "step"})

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a kill loses nothing that was logged

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """trackio, and wandb, whose interface it has: project `potstill`, a run named like the folder."""

    def __init__(self, module: Any, run: RunDir, first: int) -> None:
        self.module, folder = module, run.path
        more: dict[str, Any] = {}
        if module.__name__ == "wandb":
            started = (folder / "environment.json").stat().st_mtime_ns  # written once, at the run's start
            more["id"] = hashlib.sha256(f"{folder.resolve()} {started}".encode()).hexdigest()[:16]
            more["dir"] = str(folder)
        module.init(project="potstill", name=folder.resolve().name, resume="allow", **more)

    def log(self, step: int, metrics: Metrics) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


def require_module(name: str, module: str) -> None:
    """Refuse before a run starts a sink whose library cannot be used.

    Raises:
        UserError: it cannot be imported; names the extra that has it.
    """
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises what it likes
        raise UserError(
            f"sinks: {name} cannot be imported: {one_line(error)} pip install 'potstill[{name}]', or"
            f" leave {name} out."
        ) from error


@contextlib.contextmanager
def logging_to(configs: Sequence[SinkConfig], run: RunDir, warn: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, each line that `run` logs goes to the sinks, too."""
    listeners = [_Listener(config, run, warn) for config in configs]
    run.listeners.extend(listeners)
    try:
        yield
    finally:
        for listener in listeners:
            run.listeners.remove(listener)
            listener.close()


class _Listener:
    """A sink that is opened by its first line, and that may fail."""

    def __init__(self, config: SinkConfig, run: RunDir, warn: Callable[[str], None]) -> None:
        self.config, self.run, self.warn = config, run, warn
        self.name = config.registered_name
        logged = run.metrics() if config.keeps_what_it_has else []
        self.before = [(line["step"], {*line} - {"step"}) for line in logged]
        self.sink: Sink | None = None
        self.works = True

    def __call__(self, step: int, metrics: Metrics) -> None:
        if (step, {*metrics}) not in self.before:
            self._try(lambda: self._log(step, metrics))

    def close(self) -> None:
        if self.sink is not None:
            self._try(self.sink.close)

    def _log(self, step: int, metrics: Metrics) -> None:
        if self.sink is None:
            self.sink = self.config.open(self.run, step)
        self.sink.log(step, metrics)

    def _try(self, act: Callable[[], None]) -> None:
        if not self.works:
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                act()
        except Exception as error:  # a sink raises what it likes
            self.works = False
            self.warn(
                f"sink {self.name} failed and is no longer logged to; the run goes on: {one_line(error)}"
            )
