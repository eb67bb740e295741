"""A student trained for a quantised file is trained and measured on the numbers of that file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from cut_off import cut_off
from export.tiny_models import make_model, make_tokenizer
from safetensors.torch import load_file
from soak.forkserver import ForkServer
from test_checkpoint import essence
from test_distributed import assert_equal_runs

from potstill import UserError, distill, load_causal_lm, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import set_up
from potstill.cli.main import main
from potstill.evals.heldout import heldout
from potstill.export.export import export_run
from potstill.export.gguf_model import as_written
from potstill.export.grid import Grid, round_to
from potstill.preflight.plan import plan

Recipe = Callable[..., Path]
Type = gguf.GGMLQuantizationType
NO_CUDA = "no CUDA device; not run"
TRAIN = "{steps: 6, rows_per_step: 2, lr: 3e-3, device: cpu, save_every: 2, quantize: %s}"


@pytest.fixture
def recipe(tiny_recipe: Recipe, tmp_path: Path) -> Callable[..., Path]:
    """Rows of whole blocks of 256, which K-quants need, and a tokenizer that a GGUF file can have."""

    def write(quantize: str, kind: str = "llama") -> Path:
        if quantize.endswith("_k"):
            pytest.importorskip("xllamacpp", reason="xllamacpp is not installed; not run")
        tokenizer = make_tokenizer("gpt-2")
        folder = tmp_path / "teacher"
        # Small, so that a Gemma's streams do not drown what the one layer adds.
        wide = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.1}
        make_model(kind, len(tokenizer), **wide).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        student = "{name: cut, layers: 1, rule: first_last, repair: false}"
        teacher = f"{{name: torch, model: {folder}}}"
        return tiny_recipe(teacher=teacher, student=student, train=TRAIN % quantize)

    return write


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA))],
)
@pytest.mark.parametrize("type_", [Type.Q8_0, Type.Q4_0])
def test_rounding_on_a_device_is_that_of_gguf(type_: Type, device: str) -> None:
    """Bit for bit; blocks of zeros, of one number, of ties, of numbers that a half-precision scale cannot hold."""
    torch.manual_seed(0)
    rows = [torch.randn(200, 64) * 10.0**power for power in range(-9, 4)]
    ties = torch.arange(-32.0, 32.0).div(2).repeat(3, 1)
    ties[1:, 0] = torch.tensor([-127.0, 127.0])
    rows.append(torch.randn(20_000, 64).bfloat16().float())  # their scales are often half way between two
    rows += [torch.zeros(2, 64), torch.full((2, 64), -0.3), ties, torch.randn(5, 64).clamp(max=0)]
    tensor = torch.cat(rows)
    expected = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), type_), type_)
    tensor = tensor.to(device)
    round_to(tensor, type_)
    assert np.array_equal(tensor.cpu().numpy(), expected)


@pytest.mark.parametrize(
    ("kind", "quantize"),
    [
        *(("llama", quantize) for quantize in ("q8_0", "q4_0", "q4_k", "q6_k")),
        ("gemma3", "q4_0"),
        ("qwen3_moe", "q4_k"),
    ],
)
def test_the_exported_file_has_the_numbers_that_were_trained_on(
    recipe: Callable[..., Path], tmp_path: Path, kind: str, quantize: str
) -> None:
    """And the receipt's held-out figures are those of the file, read by gguf."""
    path = recipe(quantize, kind)
    run = distill(path, out=tmp_path / "run")
    file = run.path / export_run(run.path, formats=[quantize], check=False).records[0]["file"]
    student, unrounded = load_causal_lm(run.student), load_causal_lm(run.student)
    written = dict(as_written(unrounded, file, quantize).named_parameters())
    changed, grid = 0, Grid.of(student, quantize)
    with grid.applied(student):
        for name, parameter in student.hf.named_parameters():
            # The file has a Gemma's norms as 1 more than they are, in float32.
            apart = 0.0 if name in grid.types else 3e-7
            assert torch.allclose(parameter, written[name], rtol=0, atol=apart), name
            changed += not torch.equal(parameter, dict(unrounded.hf.named_parameters())[name])
    assert changed >= 6
    for name, parameter in student.hf.named_parameters():
        assert torch.equal(parameter, dict(unrounded.hf.named_parameters())[name])

    setup = set_up(resolve(load_recipe(path, ["train.quantize=null"])), lambda text: None)
    for name, parameter in setup.student.model.hf.named_parameters():
        parameter.data.copy_(written[name])
    of_file = heldout(setup.student, setup.teacher, setup.corpus.heldout, 4)
    assert of_file == pytest.approx(run.receipt()["heldout_best"], rel=1e-6)
    for name, parameter in setup.student.model.hf.named_parameters():
        parameter.data.copy_(dict(unrounded.hf.named_parameters())[name])
    assert heldout(setup.student, setup.teacher, setup.corpus.heldout, 4) != pytest.approx(of_file, rel=1e-6)


def test_a_step_moves_the_unrounded_weights_by_the_gradient_at_the_rounded(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """By plain SGD: what moves is the rate times a gradient that the rounded model, on its own, has."""
    path = recipe("q4_0")
    changed = [
        "train.optimizer=sgd",
        "train.weight_decay=0",
        "train.clip=null",
        "train.steps=1",
        "train.lr=0.5",
        "train.save_every=1",
    ]
    setup = set_up(resolve(load_recipe(path, [*changed, "train.quantize=null"])), lambda text: None)
    before = {name: p.detach().clone() for name, p in setup.student.model.hf.named_parameters()}
    grid = Grid.of(setup.student.model, "q4_0")
    assert set(grid.types.values()) == {Type.Q4_0, Type.Q8_0}  # the second is of the embedding, the head
    for name, parameter in setup.student.model.hf.named_parameters():
        if name in grid.types:
            round_to(parameter.data, grid.types[name])
    batch = setup.data().step(0)[0]
    terms = setup.student(batch, setup.teacher.targets(batch))
    (terms["loss"] / len(batch.positions_N)).backward()
    run = distill(load_recipe(path, changed), out=tmp_path / "run")
    after = load_file(run.checkpoints / "00000001" / "tensors.safetensors")
    for name, parameter in setup.student.model.hf.named_parameters():
        assert parameter.grad is not None
        moved = after[f"weights/model.hf.{name}"] - before[name]
        assert torch.allclose(moved, -0.5 * parameter.grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("after", [1, 5])
def test_a_resumed_run_is_the_run_that_was_not_cut_off(
    recipe: Callable[..., Path], tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe("q4_0")
    distill(path, out=tmp_path / "whole")
    cut_off(path, tmp_path / "cut", after, monkeypatch)
    distill(path, out=tmp_path / "cut", resume=True)
    assert essence(tmp_path / "cut") == essence(tmp_path / "whole")


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_ranks_round_as_one(
    recipe: Callable[..., Path], forks: ForkServer, tmp_path: Path, parallel: str
) -> None:
    path = recipe("q8_0")
    changed = [f"train.parallel={parallel}", "train.rows_per_micro_batch=1", "train.optimizer=sgd"]
    alone = distill(load_recipe(path, changed), out=tmp_path / "alone").path
    forks.ranks(2, "distill", path, *changed, "--out", tmp_path / "two")
    assert_equal_runs(tmp_path / "two", alone)


def test_the_plan_counts_the_unrounded_weights(recipe: Callable[..., Path]) -> None:
    path = recipe("q8_0")
    rounded, plain = (plan(resolve(load_recipe(path, [f"train.quantize={q}"]))) for q in ("q8_0", "null"))
    weights = sum(
        p.numel() for p in load_causal_lm(resolve(load_recipe(path)).teacher.files.source).hf.parameters()
    )
    assert rounded.peak_bytes - plain.peak_bytes > 4 * 0.5 * weights


def test_what_has_no_such_file_is_refused(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=0, bos_token_id=0
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    recipe = tiny_recipe(student=f"{{name: checkpoint, model: {tmp_path / 'gpt2'}}}")
    with pytest.raises(UserError, match=r"train\.quantize: q8_0: .*gpt2"):
        distill(load_recipe(recipe, ["train.quantize=q8_0"]), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    adapters = tiny_recipe(student=f"{{name: checkpoint, model: {tmp_path / 'gpt2'}, lora: {{rank: 2}}}}")
    assert main(["distill", str(adapters), "train.quantize=q8_0"]) == 2
    assert "train.quantize" in capsys.readouterr().err
    assert main(["distill", str(recipe), "train.quantize=q5_k"]) == 2
    assert "train.quantize" in capsys.readouterr().err
