"""Layers left out by what their absence costs: the KL against an independent one, the choice, the run that follows."""

from __future__ import annotations

import contextlib
import copy
import html
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model
from cut_off import assert_goes_on_without, cut_off
from torch import Tensor

from potstill import UserError, distill, load_causal_lm
from potstill.build import setup
from potstill.build.resolve import resolve
from potstill.cli.main import main
from potstill.models.causal_lm import CausalLM
from potstill.models.layer_harm import Without, calibration, choose_layers
from potstill.models.pruning import cut, stack_of
from potstill.recipe.load import load
from potstill.recipe.sections_models import CutStudentConfig
from potstill.runs.run_dir import RunDir
from potstill.types import Batch

Recipe = Callable[..., Path]
SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "llama": (transformers.LlamaConfig(**SMALL, intermediate_size=48), ("o_proj", "down_proj")),
    "qwen2": (
        transformers.Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2),
        ("o_proj", "down_proj"),
    ),
    "gemma2": (
        transformers.Gemma2Config(
            **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=16
        ),
        ("o_proj", "down_proj"),
    ),
    "gpt2": (
        transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=5, n_head=4, n_positions=64),
        ("c_proj",),
    ),
    "gpt_neox": (
        transformers.GPTNeoXConfig(**SMALL, intermediate_size=48, use_parallel_residual=True),
        ("dense", "dense_4h_to_h"),
    ),
}
"""A config, and the matrices that write to the residual stream: with zeros in them a layer adds nothing."""


def make(family: str, spread: float = 0.2) -> CausalLM:
    torch.manual_seed(0)
    config = FAMILIES[family][0]
    config.initializer_range = spread
    return CausalLM(transformers.AutoModelForCausalLM.from_config(config).eval(), family)


def rows(count: int = 2, T: int = 24) -> list[Batch]:
    """Of two documents each; two positions in three bear loss."""
    found = []
    for number in range(count):
        ids = torch.randint(61, (1, T + 1), generator=torch.Generator().manual_seed(number))
        places = torch.cat([torch.arange(10), torch.arange(T - 10)])[None]
        positions = torch.arange(T)[torch.arange(T) % 3 != 0]
        found.append(Batch(torch.tensor([number]), ids[:, :-1], places, positions, ids[0, 1:][positions]))
    return found


def logits_ND(hf: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        out = hf.double()(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
    found: Tensor = out.logits[0, batch.positions_N]
    return found


def independent_kl(hf: Any, out: Sequence[int], writes: Sequence[str], batches: Sequence[Batch]) -> float:
    """In float64, of a copy in which the layers `out` write zeros."""
    whole, lacking = copy.deepcopy(hf), copy.deepcopy(hf)
    layers = next(m for m in lacking.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 5)
    for number in out:
        written = [m for name, m in layers[number].named_modules() if name.rpartition(".")[2] in writes]
        assert len(written) == 2
        for module in written:
            for parameter in module.parameters():
                torch.nn.init.zeros_(parameter)
    total, count = 0.0, 0
    for batch in batches:
        p, q = (logits_ND(model, batch).log_softmax(-1) for model in (whole, lacking))
        total += float((p.exp() * (p - q)).sum())
        count += len(batch.positions_N)
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kl_is_that_of_a_model_whose_layers_write_nothing(family: str) -> None:
    model, batches = make(family), rows()
    before = logits_ND(copy.deepcopy(model.hf), batches[0])
    without = Without(model, stack_of(model)[0].removesuffix("."), batches)
    for out in ([0], [2], [4], [1, 3], [3, 1, 0], [0, 1, 2, 3, 4]):
        expected = independent_kl(model.hf, out, FAMILIES[family][1], batches)
        assert without.kl(out) == pytest.approx(expected, rel=1e-4), out
    # Nothing of it stays in the model.
    assert torch.equal(logits_ND(copy.deepcopy(model.hf), batches[0]), before)
    assert not any("forward" in vars(layer) for layer in without.layers)


@pytest.mark.parametrize("rule", ["least_harm", "greedy"])
def test_the_layers_left_out_are_those_that_cost_least(rule: str) -> None:
    model, batches = make("llama", spread=0.3), rows()
    writes = FAMILIES["llama"][1]
    harm = choose_layers(model, "model.layers", batches, 2, rule, lambda text: None)
    alone = [independent_kl(model.hf, [number], writes, batches) for number in range(5)]
    assert harm.alone_L == pytest.approx(alone, rel=1e-4)
    expected: list[int] = []
    for _ in range(3):
        others = {*range(5)} - {*expected}
        base = expected if rule == "greedy" else []
        cost = {n: independent_kl(model.hf, [*base, n], writes, batches) for n in others}
        expected.append(min(cost, key=lambda n: cost[n]))
    by_themselves = sorted(range(5), key=lambda n: alone[n])[:3]
    assert (expected != by_themselves) == (rule == "greedy")  # or the two rules could not be told apart
    assert harm.left_out == expected and harm.keep == sorted({*range(5)} - {*expected})
    assert harm.kl == pytest.approx(independent_kl(model.hf, expected, writes, batches), rel=1e-4)
    assert harm.positions == sum(len(batch.positions_N) for batch in batches) == 32


def test_a_layer_that_adds_nothing_goes_first_and_the_cut_student_is_what_was_measured() -> None:
    model, batches = make("llama"), rows()
    for name in FAMILIES["llama"][1]:
        for module_name, module in model.hf.model.layers[3].named_modules():
            if module_name.endswith(name):
                torch.nn.init.zeros_(module.weight)
    harm = choose_layers(model, "model.layers", batches, 3, "least_harm", lambda text: None)
    assert harm.left_out[0] == 3 and harm.alone_L[3] == pytest.approx(0, abs=1e-7)
    student = cut(model, harm.keep)
    total = 0.0
    for batch in batches:
        p, q = (logits_ND(copy.deepcopy(each.hf), batch).log_softmax(-1) for each in (model, student))
        total += float((p.exp() * (p - q)).sum())
    assert harm.kl == pytest.approx(total / harm.positions, rel=1e-4)


def test_rows_without_a_position_that_bears_loss_are_refused() -> None:
    batches = [
        replace(batch, positions_N=batch.positions_N[:0], labels_N=batch.labels_N[:0]) for batch in rows()
    ]
    with pytest.raises(
        UserError, match="no training row that was looked at bears loss at its first 1024 positions"
    ):
        choose_layers(make("llama"), "model.layers", batches, 3, "least_harm", print)


def test_a_kl_that_is_not_finite_is_refused() -> None:
    model = make("llama")
    torch.nn.init.constant_(model.hf.model.layers[1].mlp.down_proj.weight, 1e38)
    with pytest.raises(UserError, match=r"student\.rule: without layers \[\d\] the KL to the whole model is"):
        choose_layers(model, "model.layers", rows(), 3, "least_harm", lambda text: None)


def test_layers_that_are_not_called_one_after_the_other_are_refused() -> None:
    model = make("llama")
    model.hf.model.layers[2] = model.hf.model.layers[1]
    with pytest.raises(UserError, match="does not call its 5 layers once each"):
        Without(model, "model.layers", rows()).kl([0])


@pytest.mark.parametrize("count", [0, 6])
def test_as_many_layers_as_there_are_can_be_kept(count: int) -> None:
    with pytest.raises(UserError, match=f"student.layers: {count} layers cannot be kept of the teacher's 5"):
        choose_layers(make("llama"), "model.layers", rows(), count, "greedy", lambda text: None)
    whole = choose_layers(make("llama"), "model.layers", rows(), 5, "greedy", lambda text: None)
    assert whole.left_out == [] and whole.kl == 0


def long_row(T: int, bears_loss: Callable[[int, int], bool], B: int = 2) -> Batch:
    ids = torch.randint(61, (B, T + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([row * T + at for row in range(B) for at in range(T) if bears_loss(row, at)])
    labels = ids[:, 1:].flatten()[positions]
    return Batch(torch.arange(B), ids[:, :-1], torch.arange(T).expand(B, T), positions, labels)


@pytest.mark.parametrize(
    ("bears_loss", "tokens", "counts"),
    [
        (lambda row, at: True, 256, [64, 64]),
        (
            lambda row, at: at >= 300 if row else at % 8 == 0,
            316,
            [40, 16],
        ),  # an answer behind a long question
        (lambda row, at: row == 1 and at >= 395, 400, [0, 5]),
    ],
)
def test_of_long_rows_the_beginning_is_read_and_positions_spread_over_it_are_compared(
    bears_loss: Callable[[int, int], bool], tokens: int, counts: list[int]
) -> None:
    row = long_row(400, bears_loss)
    found = calibration(row)
    assert found.input_ids_BT.shape == found.position_ids_BT.shape == (2, tokens)
    assert torch.equal(found.input_ids_BT, row.input_ids_BT[:, :tokens])
    for number, count in enumerate(counts):
        own = found.positions_N // tokens == number
        places = (found.positions_N[own] % tokens).tolist()
        eligible = [at for at in range(tokens) if bears_loss(number, at)]
        assert len(places) == len({*places}) == count and {*places} <= {*eligible}
        assert not places or (places[0], places[-1]) == (eligible[0], eligible[-1])
        following = torch.tensor([*row.input_ids_BT[number, 1:].tolist(), int(row.labels_N[-1])])
        assert found.labels_N[own].tolist() == following[places].tolist()


def test_what_was_measured_is_remembered_for_these_weights_and_rows_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    choose = partial(choose_layers, stack="model.layers", count=2, rule="greedy", note=said.append)
    first = choose(make("llama", spread=0.3), batches=rows())
    assert "known" not in said[0]

    passes: list[Sequence[int]] = []
    measured = Without._measured
    monkeypatch.setattr(
        Without, "_measured", lambda self, out, *more: passes.append(out) or measured(self, out, *more)
    )
    said.clear()
    assert choose(make("llama", spread=0.3), batches=rows()) == first and not passes
    assert "known from an earlier run" in said[0]
    # The other rule asks for one choice more, at most, that nobody has measured.
    choose_layers(make("llama", spread=0.3), "model.layers", rows(), 2, "least_harm", said.append)
    assert len(passes) <= 1
    for other in (
        partial(choose, make("llama", spread=0.31), batches=rows()),
        partial(choose, make("llama", spread=0.3), batches=rows(3)),
        partial(choose, make("llama", spread=0.3), batches=rows(3)[1:]),
    ):
        passes.clear()
        assert other() != first and len(passes) > 5


def test_a_cache_that_is_damaged_or_cannot_be_written_is_measured_again(tmp_path: Path) -> None:
    choose = partial(choose_layers, stack="model.layers", batches=rows(), count=2, rule="least_harm")
    first = choose(make("llama"), note=print)
    (file,) = Path(os.environ["XDG_CACHE_HOME"], "potstill", "layers").iterdir()
    for damaged in ("{", '{"0": null}', '{"0": NaN}', "[]"):
        file.write_text(damaged)
        assert choose(make("llama"), note=print) == first
        assert json.loads(file.read_text())["0"] == first.alone_L[0]
    shutil.rmtree(file.parents[1])
    file.parents[1].write_text("a file in the place of the folder")
    assert choose(make("llama"), note=print) == first


# ---- a run ------------------------------------------------------------------------------------------------

NAMED = "student.layers=null;student.rule=null;student.keep={keep}"
TRAIN = "{steps: 4, rows_per_step: 2, lr: 1e-3, save_every: 2, device: cpu}"


@pytest.fixture
def recipe(tiny_recipe: Recipe, tmp_path: Path) -> Path:
    """Of a teacher whose first layer adds nothing; `first_last` would keep it."""
    folder = make_model(tmp_path / "teacher")
    model = load_causal_lm(folder)
    layer = model.hf.model.layers[0]
    for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
        torch.nn.init.zeros_(module.weight)
    model.hf.save_pretrained(folder)
    return tiny_recipe(
        teacher=f"{{name: torch, model: {folder}}}",
        student="{name: cut, layers: 2, repair: false}",
        train=TRAIN,
    )


def test_a_run_keeps_its_layers_their_table_and_names_them(recipe: Path, tmp_path: Path) -> None:
    run = distill(recipe, out=tmp_path / "run")
    table = run.layers()
    assert table is not None and table["rule"] == "least_harm" and table["left_out"][0] == 0
    assert table["alone_L"][0] == pytest.approx(0, abs=1e-6) and min(table["alone_L"][1:]) > 1e-3
    keep = sorted({0, 1, 2, 3} - {*table["left_out"]})
    assert run.receipt()["student"]["layers_kept"] == load(run.resolved).student.keep == keep  # type: ignore[union-attr]
    named = distill(recipe, overrides=NAMED.format(keep=keep).split(";"), out=tmp_path / "named")
    assert named.metrics()[-1]["heldout/kl"] == run.metrics()[-1]["heldout/kl"] and named.layers() is None


def test_a_resumed_run_and_its_evaluation_measure_nothing_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_goes_on_without(recipe, tmp_path, monkeypatch, setup, "choose_layers")
    with pytest.raises(UserError, match=r"student\.keep|student\.layers"):
        distill(recipe, overrides=["student.layers=3"], out=tmp_path / "again", resume=True)


def test_ranks_take_what_the_first_has_measured(recipe: Path) -> None:
    """Sums that differ by rounding may choose other layers, and ranks that average their gradients need one student."""
    resolved = resolve(load(recipe))
    setup_ = setup.set_up(resolved, print, agreed=lambda harm: replace(harm, left_out=[2, 3]))
    with contextlib.closing(setup_.teacher):
        assert setup_.recipe.student.keep == setup_.origin["layers_kept"] == [0, 1]  # type: ignore[union-attr]


def test_a_rule_beside_named_layers_is_refused(recipe: Path) -> None:
    with pytest.raises(UserError, match="keep lists the layers, so that no rule chooses them"):
        load(recipe, ["student.layers=null", "student.keep=[0, 1]", "student.rule=greedy"])


def test_where_nothing_can_be_measured_the_default_is_first_last_and_a_rule_is_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> None:
        raise UserError("student.rule: no")

    monkeypatch.setattr(setup, "choose_layers", refuse)
    run = distill(recipe, out=tmp_path / "run")
    assert run.layers() is None and run.receipt()["student"]["layers_kept"] == [0, 3]
    with pytest.raises(UserError, match=r"student\.rule: no"):
        distill(recipe, overrides=["student.rule=least_harm"], out=tmp_path / "other")
    cut_off(recipe, tmp_path / "again", 3, monkeypatch)
    again = distill(recipe, out=tmp_path / "again", resume=True)
    assert again.metrics()[-1]["heldout/kl"] == run.metrics()[-1]["heldout/kl"]


class PromptsAlone:
    """Rows of long prompts: the answers are behind what is read."""

    def __len__(self) -> int:
        return 3

    def batch(self, numbers: list[int]) -> Batch:
        return long_row(1100, lambda row, at: at >= 1050, B=len(numbers))


def test_rows_whose_answers_are_behind_what_is_read_are_said_to_bear_no_loss() -> None:
    config, said, words = CutStudentConfig(layers=3), list[str](), "bears loss at its first 1024 positions"
    rows_: Any = PromptsAlone()
    assert setup._measured(make("llama"), config, rows_, said.append) is None
    assert "chosen by first_last" in said[0] and words in said[0]
    with pytest.raises(UserError, match=words):
        setup._measured(make("llama"), replace(config, rule="greedy"), rows_, said.append)


def test_a_choice_that_cannot_be_cut_gives_way_to_first_last(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = setup.cut

    def picky(model: CausalLM, keep: Sequence[int], *more: Any, **options: Any) -> CausalLM:
        if list(keep) != [0, 3]:
            raise UserError("student cut: not these")
        return real(model, keep, *more, **options)

    monkeypatch.setattr(setup, "cut", picky)
    run = distill(recipe, out=tmp_path / "run")
    assert run.layers() is None and run.receipt()["student"]["layers_kept"] == [0, 3]
    with pytest.raises(UserError, match="student cut: not these"):
        distill(recipe, overrides=["student.rule=least_harm"], out=tmp_path / "other")


class InTuple(torch.nn.Module):
    """A layer that gives more than its hidden states, as those of Bamba and RWKV do."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, str]:
        return self.layer(hidden, *args, **kwargs), "beside"


class OutOfTuple(torch.nn.Module):
    """What calls such layers: it takes the pair apart."""

    def __init__(self, layer: InTuple) -> None:
        super().__init__()
        self.layer = layer
        self.attention_type = layer.attention_type

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found, word = self.layer(hidden, *args, **kwargs)
        assert word == "beside"
        return found


def test_layers_that_give_more_than_their_hidden_states_are_measured_alike() -> None:
    model = make("llama")
    expected = choose_layers(model, "model.layers", rows(), 3, "least_harm", print)
    pairs = [InTuple(layer) for layer in model.hf.model.layers]
    for number, layer in enumerate(pairs):
        model.hf.model.layers[number] = OutOfTuple(layer)
    model.hf.pairs = torch.nn.ModuleList(pairs)
    assert choose_layers(model, "pairs", rows(), 3, "least_harm", print).alone_L == expected.alone_L


def test_a_model_that_does_not_run_without_a_layer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    model.hf.model.layers[3].register_forward_pre_hook(
        lambda layer, args: (
            (_ for _ in ()).throw(IndexError("no state"))
            if "forward" in vars(model.hf.model.layers[2])
            else None
        )
    )
    with pytest.raises(UserError, match=r"does not run without one of its layers: no state\. Use first_last"):
        choose_layers(model, "model.layers", rows(), 3, "least_harm", print)


def test_an_old_run_has_no_table(tmp_path: Path) -> None:
    assert RunDir(tmp_path).layers() is None


def test_the_report_has_a_bar_for_each_layer(recipe: Path, tmp_path: Path) -> None:
    run = distill(recipe, out=tmp_path / "run")
    assert main(["report", str(run.path), "--no-models"]) == 0
    page = (run.path / "report.html").read_text()
    table = run.layers()
    assert table is not None and "KL without each of the teacher's layers" in html.unescape(page)
    for number, value in enumerate(table["alone_L"]):
        left_out = ", left out" if number in table["left_out"] else ""
        assert f"<title>layer {number}: {value:.4g}{left_out}</title>" in page
