"""Numbers that are not sound never reach the weights; a run that hangs says where; a signal never loses work."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from soak.forkserver import ForkServer

from potstill import UserError, distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.cli.main import main
from potstill.data.fixed import Order
from potstill.losses.targets import HiddenTargets
from potstill.models.student import Student
from potstill.preflight.checks import Checked
from potstill.preflight.trial_steps import smoke
from potstill.teachers.hf import TorchTeacher
from potstill.training.guard import rows_at_fault
from potstill.training.loop import Hooks, train
from potstill.training.watchdog import Watchdog
from potstill.workflows.distill import RunDir

Recipe = Callable[..., Path]
NAN = float("nan")
FAULTY = 3  # the step, from 1, that goes wrong in the tests of a whole run


def setup_of(recipe: Path) -> RunSetup:
    return set_up(resolve(load_recipe(recipe)), lambda text: None)


def hooks(**others: Any) -> Hooks:
    return Hooks(lambda step: {"heldout/loss": 1.0}, lambda *_: None, lambda *_: None, **others)


def run_steps(setup: RunSetup) -> None:
    train(setup.student, setup.teacher, setup.data(), setup.recipe, hooks())


def plant(setup: RunSetup, where: str) -> None:
    if where == "loss":
        objective = setup.student.objective
        nan = lambda student_NS, teacher_NS: objective.divergence(student_NS, teacher_NS) * NAN  # noqa: E731
        setup.student.objective = type(objective)(nan, chunk=objective.chunk)
    elif where == "gradient":
        weight = setup.student.model.hf.model.layers[1].mlp.up_proj.weight
        weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), NAN))
    else:
        assert isinstance(setup.teacher, TorchTeacher)
        targets = setup.teacher.targets

        def spoiled(batch: Any) -> HiddenTargets:
            found = targets(batch)
            if where == "a target row":
                found.hidden_NE[5] = NAN
                return found

            def head(hidden_NE: torch.Tensor) -> torch.Tensor:
                logits_NV = found.head(hidden_NE)
                logits_NV[0, 7] = NAN
                return logits_NV

            return HiddenTargets(found.hidden_NE, head)

        setup.teacher.targets = spoiled  # type: ignore[method-assign]


@pytest.mark.parametrize("where", ["loss", "gradient", "a target row", "the teacher's logits"])
def test_what_is_not_finite_is_noticed_in_its_step_and_no_weight_moves(
    tiny_recipe: Recipe, where: str
) -> None:
    setup = setup_of(tiny_recipe())
    plant(setup, where)
    before = setup.student.weights_sha256()
    said = r"up_proj\.weight" if where == "gradient" else "kd is nan"
    with pytest.raises(UserError, match=rf"step 1, rows \[\d+, .*{said}.* The weights are those before"):
        run_steps(setup)
    assert setup.student.weights_sha256() == before


def test_a_loss_above_its_ceiling_is_refused_and_one_below_is_not(tiny_recipe: Recipe) -> None:
    run_steps(setup_of(tiny_recipe(guard="{loss_ceiling: 50}")))
    setup = setup_of(tiny_recipe(guard="{loss_ceiling: 0.5}"))
    before = setup.student.weights_sha256()
    with pytest.raises(UserError, match=r"step 1, rows .* nats per position, above the ceiling of 0\.5"):
        run_steps(setup)
    assert setup.student.weights_sha256() == before


def test_without_a_ceiling_an_exploded_loss_is_refused_all_the_same(tiny_recipe: Recipe) -> None:
    setup = setup_of(tiny_recipe())
    with torch.no_grad():
        setup.student.model.hf.model.norm.weight.mul_(1000)
    with pytest.raises(UserError, match="above the ceiling of 27"):  # 5 ln 258
        run_steps(setup)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planted here goes wrong on the way; the checks before a run see none of it."""
    for module in ("workflows.distill", "preflight.trial_steps"):
        monkeypatch.setattr(
            f"potstill.{module}.require_sound", lambda setup, place, note: Checked("not planned", [])
        )


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> Callable[..., None]:
    """Make given steps of a whole run not finite, each time they are tried."""

    def plant(*steps: int) -> None:
        forward = Student.forward
        now: list[int] = []
        rows = Order.rows

        def noting(self: Order, step: int, rows_per_step: int) -> list[int]:
            now[:] = [step + 1]
            return rows(self, step, rows_per_step)

        def spoiled(self: Student, batch: Any, targets: Any) -> dict[str, torch.Tensor]:
            terms = forward(self, batch, targets)
            return terms | {"loss": terms["loss"] * (NAN if now[0] in steps else 1.0)}

        monkeypatch.setattr(Order, "rows", noting)
        monkeypatch.setattr(Student, "forward", spoiled)

    return plant


TRAIN = "{steps: 8, rows_per_step: 4, lr: 1e-3, save_every: 2, device: cpu}"


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_bad_step_is_left_out_and_the_run_goes_on(
    policy: str, tiny_recipe: Recipe, spoil: Callable[..., None], tmp_path: Path
) -> None:
    spoil(FAULTY)
    run = distill(tiny_recipe(train=TRAIN, guard=f"{{policy: {policy}}}"), out=tmp_path / "run")
    steps = [line["step"] for line in run.metrics() if "train/loss" in line]
    assert steps == [1, 2, 4, 5, 6, 7, 8]
    assert run.receipt()["steps_left_out"] == [FAULTY]
    (fault,) = map(json.loads, (run.path / "faults.jsonl").read_text().splitlines())
    assert fault["step"] == FAULTY and "nan" in fault["what"] and "rows [" in fault["what"]


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_every_row_that_goes_wrong_is_in_the_record_with_its_value(
    policy: str, tiny_recipe: Recipe, tmp_path: Path, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step of 24 rows the two last and the fourth, in three micro-batches: one NaN, one inf, one huge."""
    planted: dict[int, float] = {}
    order, forward = Order.rows, Student.forward

    def noting(self: Order, step: int, rows_per_step: int) -> list[int]:
        rows = order(self, step, rows_per_step)
        if step == 0:
            planted.update({rows[3]: 1e6, rows[22]: NAN, rows[23]: float("inf")})
        else:
            planted.clear()
        return rows

    def spoiled(self: Student, batch: Any, targets: Any) -> dict[str, torch.Tensor]:
        terms = forward(self, batch, targets)
        for row in batch.rows_B.tolist():
            terms["loss"] = terms["loss"] + planted.get(row, 0.0) * len(batch.positions_N)
        return terms

    monkeypatch.setattr(Order, "rows", noting)
    monkeypatch.setattr(Student, "forward", spoiled)
    train = "{steps: 2, rows_per_step: 24, rows_per_micro_batch: 8, lr: 1e-3, device: cpu}"
    recipe = tiny_recipe(train=train, guard=f"{{policy: {policy}}}")
    expected: list[tuple[int, Any]] = []
    on_fault = RunDir.log_fault

    def keeping(self: RunDir, step: int, what: str, rows: Any) -> None:
        expected.extend(planted.items())
        on_fault(self, step, what, rows)

    monkeypatch.setattr(RunDir, "log_fault", keeping)
    if policy == "stop":
        with pytest.raises(UserError, match=r"these go wrong by themselves: \[\d+, \d+, \d+\]\. The weights"):
            distill(recipe, out=tmp_path / "run")
    else:
        distill(recipe, out=tmp_path / "run")
    (fault,) = RunDir(tmp_path / "run").faults()
    found = [(entry["row"], entry["loss"]) for entry in fault["rows"]]
    (huge, near), *others = found
    assert (huge, expected[0][0]) == (expected[0][0], huge) and near == pytest.approx(1e6, rel=1e-3)
    assert others == [(expected[1][0], "nan"), (expected[2][0], "inf")]


def test_a_gradient_that_is_not_finite_names_its_rows(tiny_recipe: Recipe) -> None:
    setup = setup_of(tiny_recipe())
    plant(setup, "gradient")
    told: list[Any] = []
    with pytest.raises(UserError):
        train(
            setup.student,
            setup.teacher,
            setup.data(),
            setup.recipe,
            hooks(on_fault=lambda *what: told.append(what)),
        )
    ((step, _, rows),) = told
    assert step == 1 and rows == [{"row": r, "grad_norm": "nan"} for r in setup.corpus.order(0).rows(0, 4)]


def test_looking_for_the_rows_leaves_the_random_state_as_it_was(tiny_recipe: Recipe) -> None:
    setup = setup_of(tiny_recipe())
    before = torch.get_rng_state()
    forward = setup.student.forward

    def drawing(*arguments: Any) -> dict[str, torch.Tensor]:
        torch.rand(1)
        return forward(*arguments)

    setup.student.forward = drawing  # type: ignore[method-assign]
    assert rows_at_fault(setup.student, setup.teacher, setup.data().step(0), 1e9, lambda: None) == []
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fault_after_the_last_checkpoint_is_told_once_over_a_resume(
    tiny_recipe: Recipe, spoil: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off at step 6, resumed from step 4: step 3 is left out for good, step 6 goes wrong again."""
    recipe = tiny_recipe(train=TRAIN.replace("save_every: 2", "save_every: 4"), guard="{policy: skip}")
    spoil(FAULTY, 6)
    log = RunDir.log
    with monkeypatch.context() as context:

        def cut_off(self: RunDir, step: int, metrics: dict[str, float]) -> None:
            if step == 7:
                raise RuntimeError("cut off")
            log(self, step, metrics)

        context.setattr(RunDir, "log", cut_off)
        with pytest.raises(RuntimeError, match="cut off"):
            distill(recipe, out=tmp_path / "run")
    run = distill(recipe, out=tmp_path / "run", resume=True)
    faults = map(json.loads, (run.path / "faults.jsonl").read_text().splitlines())
    assert [fault["step"] for fault in faults] == [FAULTY, 6] == run.receipt()["steps_left_out"]


def test_an_evaluation_that_is_not_finite_names_its_step(
    tiny_recipe: Recipe, tmp_path: Path, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Student.measure
    seen: list[int] = []

    def spoiled(self: Student, batch: Any, targets: Any) -> dict[str, torch.Tensor]:
        seen.append(1)
        if len(seen) > 1:
            raise UserError("ce is nan.")
        return measure(self, batch, targets)

    monkeypatch.setattr(Student, "measure", spoiled)
    with pytest.raises(UserError, match="evaluation after step 2: ce is nan"):
        distill(tiny_recipe(train=TRAIN), out=tmp_path / "run")


def test_a_smoke_tells_a_fault_that_the_run_would_leave_out(
    tiny_recipe: Recipe, spoil: Callable[..., None], unchecked: None
) -> None:
    spoil(1)
    with pytest.raises(UserError, match="step 1, rows"):
        smoke(resolve(load_recipe(tiny_recipe(train=TRAIN, guard="{policy: skip}"))), 2)


def test_two_processes_do_not_work_on_one_run(tiny_recipe: Recipe, tmp_path: Path) -> None:
    run = distill(tiny_recipe(), out=tmp_path / "run")
    run.set_status("stopped")
    with run.locked(), pytest.raises(UserError, match=r"run: another process is at work on this run\."):
        distill(tiny_recipe(), out=tmp_path / "run", resume=True)
    assert distill(tiny_recipe(), out=tmp_path / "run", resume=True).status()["state"] == "finished"


def test_skipping_and_rolling_back_give_the_same_weights(
    tiny_recipe: Recipe, spoil: Callable[..., None], tmp_path: Path
) -> None:
    """The student of the tests has no dropout, and the bad step is right after a checkpoint or after the start."""
    found = {}
    for policy in ("skip", "rollback"):
        with pytest.MonkeyPatch.context():
            spoil(1)
            path = tiny_recipe(train=TRAIN, guard=f"{{policy: {policy}}}")
            found[policy] = distill(path, out=tmp_path / policy).receipt()["student"]["weights_sha256_end"]
    assert found["skip"] == found["rollback"]


def test_a_run_that_stops_on_a_fault_keeps_its_checkpoint_and_goes_on_once_mended(
    tiny_recipe: Recipe, spoil: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(train=TRAIN)
    whole = distill(recipe, out=tmp_path / "whole")
    with monkeypatch.context():
        forward = Student.forward
        spoil(FAULTY)
        with pytest.raises(UserError, match=f"step {FAULTY}, rows"):
            distill(recipe, out=tmp_path / "cut")
        monkeypatch.setattr(Student, "forward", forward)
    assert "nan" in RunDir(tmp_path / "cut").status()["why"]
    cut = distill(recipe, out=tmp_path / "cut", resume=True)
    assert cut.receipt()["student"] == whole.receipt()["student"]


def test_a_run_in_which_every_step_is_bad_ends(
    tiny_recipe: Recipe, spoil: Callable[..., None], tmp_path: Path
) -> None:
    spoil(2, 3, 4, 5)
    with pytest.raises(UserError, match=r"step 5, .* 3 steps before it were left out too"):
        distill(tiny_recipe(train=TRAIN, guard="{policy: skip}"), out=tmp_path / "run")


@pytest.mark.parametrize(("field", "step"), [("first_step_s", 1), ("stall_s", 3)])
def test_a_run_that_hangs_writes_its_stacks_and_ends(
    field: str,
    step: int,
    tiny_recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    unchecked: None,
) -> None:
    codes: list[int] = []
    monkeypatch.setattr("potstill.workflows.distill.os._exit", codes.append)
    forward = Student.forward
    calls: list[int] = []

    def hang_here(self: Student, batch: Any, targets: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == step:
            deadline = time.monotonic() + 20
            while not codes and time.monotonic() < deadline:
                time.sleep(0.05)
        return forward(self, batch, targets)

    monkeypatch.setattr(Student, "forward", hang_here)
    recipe = tiny_recipe(guard=f"{{{field}: 3.0}}")  # what is before the loop takes less
    assert main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == 0  # os._exit is only noted here
    assert codes == [2]
    assert "hang_here" in (tmp_path / "run" / "stall.txt").read_text()
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and f"guard.{field} is 3" in told[0] and "stall.txt" in told[0]


@pytest.mark.parametrize("where", ["potstill.data.packing.build", "potstill.build.setup.require_teacher"])
def test_a_hang_before_the_run_has_a_folder_shows_its_stacks_and_ends(
    where: str,
    tiny_recipe: Recipe,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Ended(BaseException):
        pass

    codes: list[int] = []
    monkeypatch.setattr("potstill.workflows.distill.os._exit", codes.append)

    def hang_here(*arguments: Any, **more: Any) -> None:
        deadline = time.monotonic() + 30
        while not codes and time.monotonic() < deadline:
            time.sleep(0.05)
        raise Ended

    monkeypatch.setattr(where, hang_here)
    recipe = tiny_recipe(guard="{first_step_s: 1.0}")
    with pytest.raises(Ended):
        main(["distill", str(recipe), "--out", str(tmp_path / "run")])
    told = capfd.readouterr().err
    assert codes == [2] and "hang_here" in told and not (tmp_path / "run").exists()
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "run: no sign of life at the start for" in line and "guard.first_step_s is 1" in line


def test_a_document_is_a_sign_of_life(tiny_recipe: Recipe) -> None:
    beats: list[int] = []
    set_up(resolve(load_recipe(tiny_recipe())), lambda text: None, beat=lambda: beats.append(1))
    assert len(beats) == 40


def test_a_run_that_does_not_hang_is_left_alone(tiny_recipe: Recipe, tmp_path: Path) -> None:
    run = distill(tiny_recipe(guard="{first_step_s: 60, stall_s: 60}"), out=tmp_path / "run")
    assert not (run.path / "stall.txt").exists() and not (run.path / "faults.jsonl").exists()


@pytest.mark.parametrize("at_step", [0, 2, 4])
def test_a_signal_during_an_evaluation_cuts_it_short_and_loses_nothing(
    at_step: int, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(train="{steps: 4, rows_per_step: 4, rows_per_micro_batch: 1, lr: 1e-3, device: cpu}")
    distill(recipe, out=tmp_path / "whole")
    arguments = ["distill", str(recipe), "--out", str(tmp_path / "cut")]
    polled: list[int] = []
    poll = Watchdog.poll

    def signalling(self: Watchdog) -> None:
        polled.append(1)
        if len(polled) == 4 * at_step // 2 + 2:  # the second of an evaluation's four batches
            signal.raise_signal(signal.SIGTERM)
        poll(self)

    with monkeypatch.context() as patch:
        patch.setattr(Watchdog, "poll", signalling)
        assert main(arguments) == 143
    assert len(polled) == 4 * at_step // 2 + 2
    assert RunDir(tmp_path / "cut").status()["state"] == "stopped"
    assert main([*arguments, "--resume"]) == 0
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert not [p for p in (tmp_path / "cut").rglob("*") if p.name.endswith(".new")]


def lines(run: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if not name.startswith(("speed/", "memory/"))}
        for line in RunDir(run).metrics()
    ]


def test_an_evaluation_made_up_for_is_not_logged_twice(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    run = distill(recipe, out=tmp_path / "run")
    before = run.metrics()
    run.rewind(2, evaluated=0)
    kept = run.metrics()
    assert [line["step"] for line in kept] == [0, 1, 2]
    run.rewind(2, evaluated=2)
    assert run.metrics() == kept and [line["step"] for line in before] == [0, 1, 2, 2, 3, 4, 4]


def test_a_signal_before_the_run_directory_exists_leaves_nothing(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.data import packing

    def signalling(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(packing, "build", signalling)
    recipe = tiny_recipe()
    before = set(tmp_path.rglob("*"))
    assert main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == 143
    assert set(tmp_path.rglob("*")) == before


def test_a_second_signal_ends_the_process_at_once(
    tiny_recipe: Recipe, forks: ForkServer, tmp_path: Path
) -> None:
    """Both within one step, of four micro-batches."""
    recipe = tiny_recipe(train="{steps: 4, rows_per_step: 4, rows_per_micro_batch: 1, lr: 1e-3, device: cpu}")
    arguments = ["distill", str(recipe), "--out", str(tmp_path / "run")]
    end = forks.start(arguments, aim=("forward", 2, signal.SIGTERM), times=2)
    assert end.code == -signal.SIGTERM and "once more ends at once" in end.told
    assert RunDir(tmp_path / "run").status()["state"] == "running"  # nothing more was written
