"""Layers, channels and KV groups chosen for a size: the KL against a student that was really cut, the choice, the run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_mixture, make_model
from cut_off import cut_off
from test_layer_harm import logits_ND, make, rows

from potstill import UserError, distill, load_causal_lm, load_recipe
from potstill.cli.main import main
from potstill.models import sizing
from potstill.models.causal_lm import CausalLM
from potstill.models.load import num_weights
from potstill.models.pruning import cut
from potstill.models.sizing import choose_size
from potstill.preflight.plan import plan
from potstill.runs.run_dir import RunDir

Recipe = Callable[..., Path]
COUNT = 5


def choose(model: CausalLM, most: int, told: list[str] | None = None) -> Any:
    return choose_size(model, rows(), rows(4), most, (told if told is not None else []).append)


def kl(whole: CausalLM, student: CausalLM) -> float:
    """In float64, nats per position."""
    total = 0.0
    for batch in rows():
        p, q = (
            logits_ND(copy.deepcopy(model.hf).eval(), batch).log_softmax(-1) for model in (whole, student)
        )
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(rows())


def cut_to(model: CausalLM, chosen: Any) -> CausalLM:
    return cut(model, chosen.keep, chosen.ffn_width, rows(4), kv_heads=chosen.kv_heads)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox"])
def test_the_student_has_the_size_and_the_kl_that_were_measured(family: str) -> None:
    """That of the student that is cut, which has fewer channels and not masked ones."""
    model = make(family)
    whole = num_weights(model.hf.config)
    embeddings = sum(
        p.numel() for name, p in model.hf.named_parameters() if "layers" not in name and ".h." not in name
    )
    most = embeddings + (whole - embeddings) // 2
    chosen = choose(model, most)
    student = cut_to(model, chosen)
    weights = sum(p.numel() for p in student.hf.parameters())
    assert weights <= most and weights == chosen.moves[-1]["weights"] == num_weights(student.hf.config)
    assert chosen.kl == pytest.approx(kl(model, student), rel=1e-3)


def test_each_move_is_the_one_that_costs_least_for_what_it_saves() -> None:
    """By cutting every student of the three kinds of move, and measuring each."""
    model = make("llama")
    whole = num_weights(model.hf.config)
    chosen = choose(model, whole - 9 * whole // 20)
    out: list[int] = []
    width, kv_heads, weights, before = 48, 4, whole, 0.0

    def of(out: list[int], width: int, kv_heads: int) -> tuple[float, int]:
        keep = sorted({*range(COUNT)} - {*out})
        student = cut(model, keep, width, rows(4), kv_heads=kv_heads)
        return kl(model, student), sum(p.numel() for p in student.hf.parameters())

    assert len(chosen.moves) >= 3
    for move in chosen.moves:
        left = [number for number in range(COUNT) if number not in out]
        layer = min(left, key=lambda number: chosen.alone_L[number])
        kinds = {"layer": ([*out, layer], width, kv_heads), "channels": (out, width - 6, kv_heads)}
        if kv_heads > 1:  # of 4, 2 and 1: a hidden size of 32 is no multiple of 3
            kinds["heads"] = (out, width, kv_heads // 2)
        costs = {}
        for kind, size in kinds.items():
            its_kl, smaller = of(*size)
            costs[kind] = (its_kl - before) / (weights - smaller)
        if move is chosen.moves[-1] and move["kind"] == "channels" and move["ffn_width"] > width:
            continue  # channels that are given back
        assert move["kind"] == min(costs, key=lambda kind: costs[kind])
        assert move["layer"] == (layer if move["kind"] == "layer" else None)
        out, width, kv_heads = kinds[move["kind"]]
        before, weights = of(out, width, kv_heads)
        assert move["kl"] == pytest.approx(before, rel=1e-3)
    assert chosen.ffn_width in (None, chosen.moves[-1]["ffn_width"])


def test_channels_that_fit_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of which no layer and no head can be spared."""
    monkeypatch.setattr(sizing, "_spared", lambda *given: None)
    monkeypatch.setattr(sizing._Shape, "know_heads", lambda shape: "")
    model = make("llama")
    whole = num_weights(model.hf.config)
    per_channel = 5 * 3 * 32
    # Less to save than a notch of six channels.
    given_back = 0
    for spare in (1, 2 * per_channel, 5 * per_channel):
        chosen = choose(model, whole - spare)
        student = cut_to(model, chosen)
        weights = sum(p.numel() for p in student.hf.parameters())
        assert weights <= whole - spare
        assert not chosen.left_out and weights + per_channel > whole - spare
        given_back += chosen.moves[-1]["ffn_width"] > chosen.moves[0]["ffn_width"]
    assert given_back == 3


def test_a_model_whose_mlps_are_not_known_loses_layers_and_heads_alone(tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "mixture")
    model, told = load_causal_lm(folder), list[str]()
    whole = num_weights(model.hf.config)
    chosen = choose(model, whole - 1, told)
    assert chosen.ffn_width is None and [move["kind"] for move in chosen.moves] in (["layer"], ["heads"])
    assert any("no MLP loses channels" in line for line in told)


def test_a_size_that_no_cut_has_is_refused() -> None:
    model = make("llama")
    with pytest.raises(UserError, match=r"student\.weights: the smallest cut .* 100 were asked for"):
        choose(model, 100)


@pytest.fixture
def recipe(tiny_recipe: Recipe, tmp_path: Path) -> Callable[[str], Path]:
    teacher = make_model(tmp_path / "five", num_hidden_layers=5, initializer_range=0.2)

    def write(size: str) -> Path:
        student = f"{{name: cut, {size}, repair: false}}"
        train = "{steps: 4, rows_per_step: 2, lr: 1e-3, device: cpu, save_every: 2}"
        return tiny_recipe(teacher=f"{{name: torch, model: {teacher}}}", student=student, train=train)

    return write


def test_a_run_names_what_was_chosen_and_goes_on_with_it(
    recipe: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe("fraction: 0.6")
    whole = distill(path, out=tmp_path / "whole")
    settled = load_recipe(whole.resolved).student
    table = whole.layers()
    assert table is not None and settled.fraction == 0.6
    assert (
        settled.keep == sorted({*range(5)} - {*table["left_out"]}) and settled.ffn_width == table["ffn_width"]
    )
    assert main(["report", str(whole.path)]) == 0
    assert "after so many moves towards the size" in (whole.path / "report.html").read_text()
    receipt = whole.receipt()["student"]
    assert (receipt["layers_kept"], receipt.get("ffn_width")) == (settled.keep, settled.ffn_width)
    of_teacher = sum(p.numel() for p in load_causal_lm(tmp_path / "five").hf.parameters())
    of_student = sum(p.numel() for p in load_causal_lm(whole.student).hf.parameters())
    assert 0.4 * of_teacher < of_student <= 0.6 * of_teacher

    cut_off(path, tmp_path / "cut", 3, monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("potstill.build.setup.choose_size", None)  # nothing is measured again
        distill(path, out=tmp_path / "cut", resume=True)
    assert (tmp_path / "cut" / "student" / "model.safetensors").read_bytes() == (
        whole.student / "model.safetensors"
    ).read_bytes()
    with pytest.raises(UserError, match=r"student\.fraction"):
        distill(load_recipe(path, ["student.fraction=0.7"]), out=tmp_path / "cut", resume=True)
    assert RunDir(tmp_path / "cut").status() == {"state": "finished"}


def test_weights_are_written_as_people_write_them(recipe: Callable[[str], Path]) -> None:
    path = recipe("weights: 60M")
    for written, number in (("60M", 60_000_000), ("1.5B", 1_500_000_000), ("700K", 700_000), ("1234", 1234)):
        assert load_recipe(path, [f"student.weights={written}"]).student.weights == number


def test_a_plan_knows_the_size(recipe: Callable[[str], Path], tmp_path: Path) -> None:
    from potstill.build.resolve import resolve

    path = recipe("fraction: 0.6")
    resolved = resolve(load_recipe(path))
    of_teacher = num_weights(resolved.teacher.model_config)
    assert 0.3 * of_teacher < num_weights(resolved.student.model_config) <= 0.6 * of_teacher
    assert plan(resolved).peak_bytes > 0


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("fraction: 1.0", "student.fraction"),
        ("fraction: 0.5, layers: 3", "student.layers"),
        ("fraction: 0.5, weights: 60M", "student.weights"),
        ("weights: many", "such as 60M or 1.5B"),
        ("weights: 0", "such as 60M or 1.5B"),
        (f"weights: {'9' * 400}M", "such as 60M or 1.5B"),
        ("keep: [0, 1, 2, 3], fraction: 0.5", "student.keep"),
        ("weights: 60M, ffn_width: 32", "student.ffn_width"),
        ("fraction: 0.5, kv_heads: 1", "student.kv_heads"),
        ("fraction: 0.5, rule: greedy", "student.rule"),
        ("repair: true", "how small the student is"),
        ("weights: 100", "the smallest cut"),
    ],
)
def test_a_size_that_says_nothing_or_two_things_is_refused(
    recipe: Callable[[str], Path], size: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = recipe("layers: 3")
    text = path.read_text()
    path.write_text(text.replace("layers: 3", size).replace("repair: true, repair: false", "repair: true"))
    assert main(["distill", str(path), "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told and not (tmp_path / "run").exists()
