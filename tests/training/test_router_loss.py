"""A mixture of experts whose config has `output_router_logits` is trained with its balancing loss, of the whole step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import COEFFICIENT, make_mixture
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from potstill import distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import set_up
from potstill.cli.main import main
from potstill.models.compile import compile_body
from potstill.runs.run_dir import RunDir
from potstill.training.loop import Hooks, train

Recipe = Callable[..., Path]
SGD = (
    "{steps: %d, rows_per_step: 5, lr: 0.3, optimizer: sgd, weight_decay: 0.0, clip: null, final_lr_ratio: 1.0,"
    " device: cpu%s}"
)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("models") / "mixture")


def student_of(folder: Path) -> str:
    return f"{{name: checkpoint, model: {folder}}}"


def lines_of(run: RunDir) -> list[dict[str, float]]:
    return [line for line in run.metrics() if "train/loss" in line]


def by_transformers(recipe: Path, with_router: bool = True) -> tuple[dict[str, float], dict[str, Any]]:
    """The first step's terms and the weights after it, with all rows in one batch: whole logits, autograd and
    Transformers' own balancing loss, in float64.
    """
    setup = set_up(resolve(load_recipe(recipe)), lambda text: None)
    batch = setup.corpus.train.batch(setup.corpus.order(0).rows(0, 5))
    teacher = transformers.AutoModelForCausalLM.from_pretrained(
        setup.recipe.teacher.model, dtype=torch.float64
    )
    student = setup.student.model.hf.double().train()
    student.set_experts_implementation("eager")  # the grouped products have no float64
    inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
    out = student(**inputs, output_router_logits=True)
    logits_NV = out.logits.flatten(0, 1)[batch.positions_N]
    with torch.no_grad():
        teacher_NV = teacher(**inputs).logits.flatten(0, 1)[batch.positions_N].log_softmax(-1)
    kd = F.kl_div(logits_NV.log_softmax(-1), teacher_NV, log_target=True, reduction="sum") / len(logits_NV)
    ce = F.cross_entropy(logits_NV, batch.labels_N)
    router = load_balancing_loss_func(out.router_logits, 4, 2)
    (0.9 * kd + 0.1 * ce + with_router * COEFFICIENT * router).backward()
    after = {name: (p - 0.3 * p.grad).float().detach() for name, p in student.named_parameters()}
    terms = {"train/loss": 0.9 * kd + 0.1 * ce, "train/router_loss": router, "train/kd": kd}
    return {name: value.item() for name, value in terms.items()}, after


def largest_gap(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert other.keys() == ours.keys() - {"lm_head.weight"} or other.keys() == ours.keys()
    return max(float((ours[name] - tensor).abs().max()) for name, tensor in other.items())


def one_step(recipe: Path, out: Path, *overrides: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The first line of metrics, and the weights after the step: of the checkpoint, which is kept in any case."""
    run = distill(recipe, out=out, overrides=["train.save_every=1", *overrides])
    tensors = load_file(run.path / "checkpoints" / "00000001" / "tensors.safetensors")
    prefix = "weights/model.hf."
    return lines_of(run)[0], {
        name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_a_step_is_that_of_transformers_with_its_balancing_loss(
    tiny_recipe: Recipe, tmp_path: Path, kind: str
) -> None:
    """However the step is cut into micro-batches; the KD number has nothing of it."""
    recipe = tiny_recipe(student=student_of(make_mixture(tmp_path / "s", kind)), train=SGD % (1, ""))
    terms, after = by_transformers(recipe)
    _, without = by_transformers(recipe, with_router=False)
    cuts = ("5", "2") if kind == "Mixtral" else ("2",)
    for rows in cuts:
        line, ours = one_step(recipe, tmp_path / rows, f"train.rows_per_micro_batch={rows}")
        assert {name: line[name] for name in terms} == pytest.approx(terms, rel=2e-6), rows
        assert largest_gap(ours, after) < 2e-6, rows
        router = next(name for name in ours if name.endswith("gate.weight"))
        assert float((ours[router] - without[router]).abs().max()) > 1e-3


def test_padding_counts_for_nothing(tiny_recipe: Recipe, mixture: Path) -> None:
    """As under Transformers' attention mask: the last row of a corpus is padded."""
    setup = set_up(resolve(load_recipe(tiny_recipe(student=student_of(mixture)))), lambda text: None)
    rows, student = setup.corpus.train, setup.student
    batch = rows.batch([0, len(rows) - 1])
    assert batch.lengths_B is not None
    length = int(batch.lengths_B[1])
    assert length < 32
    mask_BT = torch.ones(2, 32)
    mask_BT[1, length:] = 0
    with torch.no_grad():
        terms = student(batch, setup.teacher.targets(batch))
        inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT}
        routers = student.model.hf(**inputs, use_cache=False, output_router_logits=True).router_logits
        counts_LX = terms["expert_counts"]
        parts = [
            student(row, setup.teacher.targets(row), counts_LX)["router_loss"].item() for row in batch.split()
        ]
    expected, other = (load_balancing_loss_func(routers, 4, 2, mask).item() for mask in (mask_BT, None))
    assert terms["router_loss"].item() == pytest.approx(expected, rel=1e-6)
    assert sum(parts) == pytest.approx(expected, rel=1e-6) and abs(other - expected) > 1e-4
    assert counts_LX.sum(-1).tolist() == [2 * (32 + length)] * 2


def test_recomputed_layers_change_nothing(tiny_recipe: Recipe, tmp_path: Path, mixture: Path) -> None:
    recipe = tiny_recipe(student=student_of(mixture), train=SGD % (1, ", rows_per_micro_batch: 3"))
    line, plain = one_step(recipe, tmp_path / "plain")
    for saved in ("true", "selective"):
        again, recomputed = one_step(recipe, tmp_path / saved, f"train.activation_checkpointing={saved}")
        assert again["train/router_loss"] == line["train/router_loss"]
        assert largest_gap(recomputed, plain) < 1e-6


@pytest.mark.soak
def test_a_compiled_body_records_its_routers(tiny_recipe: Recipe, tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "s", num_hidden_layers=1)
    recipe = tiny_recipe(student=student_of(folder), train=SGD % (1, ", rows_per_micro_batch: 3"))

    def lines_of_a_run(is_compiled: bool) -> list[dict[str, float]]:
        setup = set_up(resolve(load_recipe(recipe)), lambda text: None)
        if is_compiled:
            compile_body(setup.student.model, backend="eager")
        lines: list[dict[str, float]] = []
        hooks = Hooks(
            lambda step: {"heldout/loss": 0.0}, lambda step, line: lines.append(line), lambda *_: None
        )
        train(setup.student, setup.teacher, setup.data(), setup.recipe, hooks)
        return lines

    (plain,), (compiled,) = lines_of_a_run(is_compiled=False), lines_of_a_run(is_compiled=True)
    for name in ("train/router_loss", "train/loss", "experts/share_max"):
        assert compiled[name] == pytest.approx(plain[name], rel=1e-5)


def test_the_loss_balances_the_experts(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """With it the most used expert loses, without it it does not; both runs log how the experts are used."""
    ends = []
    for number, changes in enumerate(({"router_aux_loss_coef": 5.0}, {"output_router_logits": False})):
        folder = make_mixture(tmp_path / str(number), num_hidden_layers=1, **changes)
        train = "{steps: 12, rows_per_step: 4, lr: 1e-2, device: cpu}"
        run = distill(tiny_recipe(student=student_of(folder), train=train), out=tmp_path / f"run{number}")
        lines = lines_of(run)
        assert all(0 <= line["experts/share_min"] < 0.25 < line["experts/share_max"] <= 1 for line in lines)
        assert ("router_loss" in run.receipt()["objective"].replace(" ", "_")) == (number == 0)
        assert all(("train/router_loss" in line) == (number == 0) for line in lines)
        ends.append((lines[0]["experts/share_max"], lines[-1]["experts/share_max"]))
    (before, after), (same, other) = ends
    assert before == same and after < before - 0.05 and after < other - 0.05


def test_a_resumed_run_is_the_uninterrupted_one(tiny_recipe: Recipe, tmp_path: Path, mixture: Path) -> None:
    class Stop(Exception):
        pass

    extra = ", rows_per_micro_batch: 2, save_every: 2"
    recipe = tiny_recipe(student=student_of(mixture), train=SGD % (4, extra))
    whole, log = distill(recipe, out=tmp_path / "whole"), RunDir.log

    def killed(self: RunDir, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if step == 3 and "train/loss" in metrics:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(RunDir, "log", killed)
        distill(recipe, out=tmp_path / "cut-off")
    resumed = distill(recipe, out=tmp_path / "cut-off", resume=True)
    routed = [[line["train/router_loss"] for line in lines_of(run)] for run in (whole, resumed)]
    assert routed[0] == routed[1] and len(routed[0]) == 4
    name = "checkpoints/00000004/tensors.safetensors"
    assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_counting_first_draws_no_random_numbers(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """The dropout of a step is that of a run without the loss, whose coefficient here moves nothing."""
    losses = []
    for asks in (True, False):
        folder = make_mixture(
            tmp_path / str(asks),
            attention_dropout=0.5,
            router_aux_loss_coef=1e-12,
            output_router_logits=asks,
        )
        recipe = tiny_recipe(student=student_of(folder), train=SGD % (2, ", rows_per_micro_batch: 2"))
        losses.append([line["train/loss"] for line in lines_of(distill(recipe, out=tmp_path / f"run{asks}"))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_plan_and_check_know_of_it(
    tiny_recipe: Recipe, mixture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(
        student=student_of(mixture), train="{steps: 4, rows_per_step: 4, lr: 1e-3, device: cpu}"
    )
    assert main(["plan", str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["student"] > 0
    assert main(["check", str(recipe)]) == 0
    said = capsys.readouterr()
    assert f"router loss with coefficient {COEFFICIENT}" in said.err
    steps = next(line for line in said.out.splitlines() if " router loss " in line)
    assert f"coefficient {COEFFICIENT:g}" in steps


def test_another_balancing_loss_is_refused(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model class with a formula of its own; where its config does not ask for it, it is trained as before."""

    def other(router_logits: Any, *_: Any) -> torch.Tensor:
        return sum(logits_MX.logsumexp(-1).square().mean() for logits_MX in router_logits)

    monkeypatch.setattr("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func", other)
    for asks in (True, False):
        folder = make_mixture(tmp_path / str(asks), output_router_logits=asks)
        train = "{steps: 1, rows_per_step: 2, lr: 1e-3, device: cpu}"
        out = tmp_path / f"run-{asks}"
        code = main(["distill", str(tiny_recipe(student=student_of(folder), train=train)), "--out", str(out)])
        error = capsys.readouterr().err.splitlines()[-1]
        if asks:
            assert code == 2 and "output_router_logits is true" in error and "mixtral" in error
            assert not out.exists()
        else:
            assert code == 0 and "experts/share_max" not in lines_of(RunDir(out))[0]
