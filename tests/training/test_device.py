"""What a device is asked for and when: numbers once a step, targets one micro-batch ahead, compiled bodies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from potstill import UserError, distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.models import causal_lm, compile
from potstill.training import loop
from potstill.training.loop import Hooks, train
from potstill.training.prefetch import Prefetch
from potstill.types import Batch

Recipe = Callable[..., Path]
TRAIN = "{steps: 3, rows_per_step: 4, rows_per_micro_batch: 2, lr: 1e-2, device: cpu}"
WAITS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu),
    *(Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__),
}
NEVER = {"heldout/loss": math.inf}


class Waits(TorchFunctionMode):
    """How often a number of a tensor is asked for, whole numbers apart: these were made on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS and (args[0].is_floating_point() or args[0].dtype == torch.bool):
            self.seen[func.__name__] += 1
        return func(*args, **kwargs or {})


def steps(setup: RunSetup, teacher: Any = None, on_step: Callable[..., None] = lambda *_: None) -> None:
    hooks = Hooks(lambda step: NEVER, on_step, lambda *_: None)
    train(setup.student, teacher or setup.teacher, setup.data(), setup.recipe, hooks)


def weights(setup: RunSetup) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in setup.student.named_parameters()}


@pytest.mark.parametrize("objective", ["{}", "{divergence: jsd, temperature: 2.0}"])
def test_a_step_waits_for_its_device_once(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    setup = set_up(resolve(load_recipe(tiny_recipe(train=TRAIN, objective=objective))), lambda text: None)
    monkeypatch.setattr(causal_lm, "is_asynchronous", lambda device: True)
    with Waits() as waits:
        before = waits.seen.copy()
        counts: list[Counter[str]] = []
        steps(setup, on_step=lambda *_: counts.append(waits.seen.copy()))
    each = [after - earlier for earlier, after in zip([before, *counts], counts, strict=False)]
    assert each == [Counter(tolist=1)] * 3


def test_a_wait_in_a_micro_batch_is_seen(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = set_up(resolve(load_recipe(tiny_recipe(train=TRAIN))), lambda text: None)
    forward = setup.student.forward

    def waiting(batch: Batch, targets: Any) -> dict[str, Tensor]:
        terms = forward(batch, targets)
        float(terms["loss"].detach())
        return terms

    monkeypatch.setattr(setup.student, "forward", waiting)
    with Waits() as waits:
        steps(setup)
    assert waits.seen["__float__"] == 6


def test_rows_taken_as_packed_give_the_same_numbers(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One document in a row, too, for which Transformers would do without a mask."""
    setup = set_up(resolve(load_recipe(tiny_recipe())), lambda text: None)
    ids_BT = setup.corpus.train.batch([0, 1]).input_ids_BT
    for positions_BT in (torch.arange(32).expand(2, 32), torch.arange(32).remainder(13).expand(2, 32)):
        plain = setup.student.model.hidden(ids_BT, positions_BT)
        with monkeypatch.context() as patch:
            patch.setattr(causal_lm, "is_asynchronous", lambda device: True)
            assert torch.allclose(setup.student.model.hidden(ids_BT, positions_BT), plain, atol=1e-6)


class Noting:
    """A teacher that says which rows it was asked for."""

    reads_on_cpu = False

    def __init__(self, inner: Any, told: list[Any]) -> None:
        self.inner, self.told = inner, told

    def targets(self, batch: Batch) -> Any:
        self.told.append(("asked", batch.rows_B.tolist()))
        return self.inner.targets(batch)


def prefetched(setup: RunSetup, patch: pytest.MonkeyPatch, ahead: bool) -> list[Any]:
    told: list[Any] = []
    forward = setup.student.forward

    def noted(batch: Batch, targets: Any) -> dict[str, Tensor]:
        told.append(("trained", batch.rows_B.tolist()))
        return forward(batch, targets)

    patch.setattr(setup.student, "forward", noted)
    patch.setattr(loop, "Prefetch", lambda *given: Prefetch(*given[:-1], is_ahead=ahead))
    steps(setup, Noting(setup.teacher, told))
    return told


def test_the_teacher_is_one_micro_batch_ahead_and_changes_no_bit(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tiny_recipe(train=TRAIN))
    found = {}
    for ahead in (False, True):
        setup = set_up(resolve(recipe), lambda text: None)
        with monkeypatch.context() as patch:
            told = prefetched(setup, patch, ahead)
        asked, trained = ([rows for what, rows in told if what == kind] for kind in ("asked", "trained"))
        assert asked == trained and len(asked) == 6
        kinds = [what for what, _ in told]
        in_turn = ["asked", "trained"] * 6
        assert kinds == (["asked", *["asked", "trained"] * 5, "trained"] if ahead else in_turn)
        found[ahead] = weights(setup)
    assert all(torch.equal(found[True][name], found[False][name]) for name in found[True])


def test_a_teacher_that_fails_ahead_is_told_at_its_turn(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = set_up(resolve(load_recipe(tiny_recipe(train=TRAIN))), lambda text: None)
    trained: list[int] = []

    class Failing(Noting):
        def targets(self, batch: Batch) -> Any:
            if len(self.told) == 3:
                raise RuntimeError("no more")
            return super().targets(batch)

    monkeypatch.setattr(loop, "Prefetch", lambda *given: Prefetch(*given[:-1], is_ahead=True))
    with pytest.raises(
        UserError, match=r"^step 2: the teacher failed on rows \[\d+, \d+\]: RuntimeError: no more"
    ):
        steps(setup, Failing(setup.teacher, []), lambda step, metrics: trained.append(step))
    assert trained == [1]  # the fourth micro-batch, which is the second step's last


def test_compiled_bodies_train_the_same_student(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as for a compiler, which then is not called: it takes a minute."""
    monkeypatch.setattr(compile.compile_body, "__defaults__", ("aot_eager",))
    losses: dict[bool, list[float]] = {False: [], True: []}
    for is_compiled, of in losses.items():
        recipe = load_recipe(
            tiny_recipe(train=TRAIN), [f"train.compile={str(is_compiled).lower()}", "train.steps=2"]
        )
        setup = set_up(resolve(recipe), lambda text: None)
        assert (setup.student.model.compiled_body is not None) == is_compiled
        steps(setup, on_step=lambda step, metrics, of=of: of.append(metrics["train/loss"]))
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_without_a_compiler_it_is_said_before_anything_is_read(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        UserError, match=r"^train\.compile: on the CPU PyTorch compiles with a C\+\+ compiler"
    ):
        distill(tiny_recipe(train=TRAIN.replace("lr", "compile: true, lr")), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_on_cuda_a_step_waits_once_and_the_teacher_has_its_stream(tiny_recipe: Recipe) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; not run")
    recipe = load_recipe(tiny_recipe(train=TRAIN.replace("cpu", "cuda")))
    found = {}
    for ahead in (False, True):
        setup = set_up(resolve(recipe), lambda text: None)
        with pytest.MonkeyPatch.context() as patch, Waits() as waits:
            patch.setattr(loop, "Prefetch", lambda *given, ahead=ahead: Prefetch(*given, is_ahead=ahead))
            steps(setup)
        assert waits.seen["tolist"] == 3
        found[ahead] = weights(setup)
    assert all(torch.allclose(found[True][name], found[False][name], atol=1e-6) for name in found[True])
