"""`train.matmul`: oneDNN's products are the products, are asked for where they gain, and are kept with a run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from potstill import UserError, distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import set_up
from potstill.cli.main import main
from potstill.io import cpu_matmul
from potstill.io.cpu_matmul import choose_matmul, choose_product_dtype, matmul_backend, matmul_with
from potstill.runs.run_dir import RunDir
from potstill.workflows.distill import evaluate

CPU = torch.device("cpu")
ONEDNN, BLAS = "mkldnn::_linear_pointwise", "blas"
HERE = pytest.mark.skipif(not cpu_matmul._has_onednn(), reason="this build of PyTorch has no oneDNN; not run")


@pytest.fixture
def multiply_by() -> Iterator[Callable[[Any], None]]:
    """Choose a library for the rest of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda backend: stack.enter_context(matmul_with(backend))


@pytest.fixture
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are then multiplied as large ones are."""
    monkeypatch.setattr(cpu_matmul, "LEAST_WORK", 1)
    monkeypatch.setattr(cpu_matmul, "LEAST_ROWS", 1)


@pytest.fixture
def slow_with_mkl(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    return lambda is_slow: monkeypatch.setattr(cpu_matmul, "_is_slow_with_mkl", lambda: is_slow)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def products_by_onednn(compute: Callable[[], object]) -> int:
    with profile() as seen:
        compute()
    # Not `key_averages`, whose table of all events takes longer than a run.
    return sum(event.name() == ONEDNN for event in seen.profiler.kineto_results.events())


@HERE
@pytest.mark.parametrize("has_bias", [False, True])
def test_values_and_gradients_are_float64_s_but_for_rounding(
    has_bias: bool, multiply_by: Callable[[Any], None]
) -> None:
    layer = nn.Linear(256, 512, bias=has_bias)
    inputs_BTD, upstream_BTF = normal(2, 128, 256), normal(2, 128, 512)
    inputs_BTD.requires_grad_()
    multiply_by("onednn")

    def both_ways() -> None:
        layer(inputs_BTD).backward(upstream_BTF)

    assert products_by_onednn(both_ways) == 2  # the layer's product, and the gradient of what came in
    x_ND, g_NF = (t.detach().double().flatten(0, 1).numpy() for t in (inputs_BTD, upstream_BTF))
    w_FD = layer.weight.detach().double().numpy()
    b_F = layer.bias.detach().double().numpy() if has_bias else 0.0
    assert inputs_BTD.grad is not None and layer.weight.grad is not None
    for found, exact in (
        (layer(inputs_BTD).detach().flatten(0, 1), x_ND @ w_FD.T + b_F),
        (inputs_BTD.grad.flatten(0, 1), g_NF @ w_FD),
        (layer.weight.grad, g_NF.T @ x_ND),
        *([(layer.bias.grad, g_NF.sum(0))] if has_bias else []),
    ):
        assert np.abs(found.numpy() - exact).max() <= 2e-6 * np.abs(exact).max()


@HERE
def test_every_other_product_is_made_as_ever(multiply_by: Callable[[Any], None]) -> None:
    """Bit for bit, and refused in the same words."""
    large_MK, large_KN, bias_N = normal(300, 300), normal(300, 300), normal(300)
    cases: dict[str, Callable[[], Tensor]] = {
        "small": lambda: normal(64, 64) @ normal(64, 64),
        "one row": lambda: normal(1, 4096) @ normal(4096, 4096),
        "float64": lambda: large_MK.double() @ large_KN.double(),
        "bfloat16": lambda: large_MK.bfloat16() @ large_KN.bfloat16(),
        "columns for rows": lambda: large_MK.T @ large_KN,
        "rows apart": lambda: normal(600, 300)[::2] @ large_KN,
        "columns apart": lambda: large_MK @ normal(300, 600)[:, ::2],
        "scaled": lambda: torch.addmm(bias_N, large_MK, large_KN, alpha=2, beta=3),
        "added to a matrix": lambda: torch.addmm(large_KN, large_MK, large_KN),
        "added to one number": lambda: torch.addmm(bias_N[:1], large_MK, large_KN),
    }
    plain = {name: compute() for name, compute in cases.items()}
    multiply_by("onednn")
    for name, compute in cases.items():
        assert torch.equal(compute(), plain[name]), name
        if name != "bfloat16":  # which PyTorch has oneDNN make
            assert products_by_onednn(compute) == 0, name
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        large_MK @ normal(299, 300)
    with pytest.raises(RuntimeError, match="must be a matrix"):
        torch.mm(bias_N, large_KN)
    with pytest.raises(RuntimeError, match=r"must be a matrix|2D"):
        torch.addmm(bias_N, large_MK, bias_N)
    with pytest.raises(RuntimeError, match="same dtype"):
        large_MK @ large_KN.double()
    assert products_by_onednn(lambda: large_MK @ large_KN) == 1
    multiply_by("blas")
    assert products_by_onednn(lambda: large_MK @ large_KN) == 0


def test_the_library_is_chosen_by_a_table(
    slow_with_mkl: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_matmul, "_has_onednn", lambda: True)
    slow_with_mkl(True)
    assert choose_matmul("auto", CPU) == (
        "onednn",
        "auto: faster than MKL on a processor of AMD's with AVX-512",
    )
    assert choose_matmul("blas", CPU) == ("blas", "as the recipe says")
    assert choose_matmul("auto", torch.device("cuda"))[0] == "blas"
    slow_with_mkl(False)
    assert choose_matmul("auto", CPU) == ("blas", "auto: what PyTorch calls")
    assert choose_matmul("onednn", CPU) == ("onednn", "as the recipe says")
    slow_with_mkl(True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert choose_matmul("auto", CPU)[0] == "blas"
    monkeypatch.setattr(cpu_matmul, "_has_onednn", lambda: False)
    assert choose_matmul("auto", CPU)[0] == "blas"
    with pytest.raises(UserError, match=r"train\.matmul: onednn"), matmul_with("onednn"):
        pass


@HERE
def test_a_choice_ends_with_its_block_whatever_ends_it() -> None:
    with matmul_with("onednn"):
        with matmul_with("blas"):
            assert matmul_backend() == "blas"
        assert matmul_backend() == "onednn"
    with pytest.raises(KeyError), matmul_with("onednn"):
        raise KeyError
    assert matmul_backend() == "blas"


@pytest.mark.parametrize(
    ("vendor", "kernels", "is_slow"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_a_processor_is_known_by_its_maker_and_its_instructions(
    vendor: str, kernels: str, is_slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tmp_path / "cpuinfo"
    listed.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(cpu_matmul, "CPUINFO", listed)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    assert cpu_matmul._is_slow_with_mkl() == is_slow
    listed.unlink()  # there is no such file but on Linux
    monkeypatch.setattr("platform.processor", lambda: f"AMD64 Family 25 Model 17 Stepping 1, {vendor}")
    assert cpu_matmul._is_slow_with_mkl() == is_slow


@HERE
def test_a_run_takes_it_keeps_it_and_goes_on_with_it(
    of_any_size: None, slow_with_mkl: Callable[[bool], None], tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(train="{steps: 2, rows_per_step: 4, lr: 1e-3, device: cpu, save_every: 1}")
    slow_with_mkl(True)
    runs: list[RunDir] = []
    assert products_by_onednn(lambda: runs.append(distill(recipe, out=tmp_path / "chosen"))) > 0
    assert matmul_backend() == "blas"  # a program that goes on multiplies as it did before
    slow_with_mkl(False)
    assert products_by_onednn(lambda: runs.append(distill(recipe, out=tmp_path / "other"))) == 0
    run, other = runs
    for found, used in ((run, "onednn"), (other, BLAS)):
        assert found.receipt()["matmul"] == used == load_recipe(found.resolved).train.matmul
    ours, theirs = (
        [line["train/loss"] for line in r.metrics() if "train/loss" in line] for r in (run, other)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    # A run goes on, and is evaluated, as it began, on a processor for which nobody would choose so.
    (run.path / "receipt.json").unlink()
    run.set_status("stopped", "for this test")
    assert distill(recipe, resume=True, out=run.path).receipt()["matmul"] == "onednn"
    again = evaluate(load_recipe(run.resolved), run.student)
    best = run.receipt()["heldout_best"]
    assert {name: again[name] for name in best} == best


@HERE
def test_every_rank_takes_the_first_one_s(
    slow_with_mkl: Callable[[bool], None],
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here the only rank is told what another first rank would say."""
    slow_with_mkl(False)
    says = "potstill.training.distributed.Ranks.broadcast"
    monkeypatch.setattr(says, lambda ranks, value: "onednn" if value == BLAS else value)
    run = distill(tiny_recipe(), overrides=["train.steps=1"], out=tmp_path / "run")
    assert run.receipt()["matmul"] == "onednn"


@HERE
def test_a_run_asks_onednn_for_its_layers_and_its_loss(
    of_any_size: None, multiply_by: Callable[[Any], None], tiny_recipe: Callable[..., Path]
) -> None:
    recipe = tiny_recipe(train="{steps: 1, rows_per_step: 4, lr: 1e-3, device: cpu, matmul: onednn}")
    multiply_by("onednn")
    setup = set_up(resolve(load_recipe(recipe)), lambda text: None)
    batch = setup.corpus.train.batch([0, 1, 2, 3])
    assert products_by_onednn(lambda: setup.teacher.targets(batch)) == 4 * 7  # type: ignore[attr-defined]
    targets, positions = setup.teacher.targets(batch), len(batch.positions_N)
    chunks = -(-positions // 16)
    # Of the student's two layers there and back; of each chunk both logits and the way back.
    made = products_by_onednn(lambda: (setup.student(batch, targets)["loss"] / positions).backward())
    assert made == 2 * 7 * 2 + chunks * 3


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu avx512f avx512_bf16 sse", "bfloat16"),
        ("fpu amx_tile amx_bf16", "bfloat16"),
        ("fpu avx512f amx_tile my_avx512_bf16_not", "float32"),
        (None, "float32"),
    ],
)
def test_a_processor_multiplies_bfloat16_by_its_instructions(
    flags: str | None, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tmp_path / "cpuinfo"
    if flags is not None:
        listed.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: none\n")
    monkeypatch.setattr(cpu_matmul, "CPUINFO", listed)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    assert choose_product_dtype(CPU)[0] == dtype
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert choose_product_dtype(CPU)[0] == "float32"


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")]
)
def test_a_gpu_multiplies_bfloat16_by_its_capability(
    capability: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert choose_product_dtype(torch.device("cuda:0"))[0] == dtype


@pytest.mark.parametrize("flag", ["amx_bf16", "fpu"])
def test_float32_is_named_where_the_device_is_faster_in_bfloat16(
    tiny_recipe: Callable[..., Path],
    teacher_folder: Path,
    flag: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed = tmp_path / "cpuinfo"
    listed.write_text(f"flags\t: {flag}\n")
    monkeypatch.setattr(cpu_matmul, "CPUINFO", listed)
    monkeypatch.chdir(tmp_path)
    recipe = str(tiny_recipe())  # which names no type: float32

    settled: list[str] = []

    def named(*words: str) -> list[str]:
        """The fields that a verb calls slower; the lines of those that `auto` chose are added to `settled`."""
        capsys.readouterr()
        assert main([words[0], recipe, *words[1:]]) == 0
        said = capsys.readouterr()
        lines = (said.out + said.err).splitlines()
        settled.extend(line for line in lines if re.search(r"^(train.precision|teacher.dtype): \w+, ", line))
        return [line.partition(": ")[0] for line in lines if "float32; auto would be" in line]

    both = ["train.precision", "teacher.dtype"] if flag == "amx_bf16" else []
    for words in (["distill", "--out", "run"], ["check"], ["plan"]):
        assert named(*words) == both, words
    assert named("capture", "--out", "targets") == both[1:]  # nothing is trained
    assert settled == []
    auto = ("train.precision=auto", "teacher.dtype=auto")
    chosen = "bfloat16, auto: the processor has amx_bf16" if both else "float32, auto: "
    for words in (["check"], ["plan"], ["distill", "--out", "run2"]):
        assert named(*words, *auto) == []
        assert [line.partition(": ")[0] for line in settled] == ["train.precision", "teacher.dtype"], words
        assert all(line.partition(": ")[2].startswith(chosen) for line in settled)
        settled.clear()
    assert named("capture", "--out", "targets2", *auto) == [] and len(settled) == 1
    settled.clear()
    assert named("plan", "--device", "h100", *auto) == []
    assert [line.partition(": ")[2] for line in settled] == 2 * ["bfloat16, auto: h100"]
    settled.clear()
    one = f"teacher: {{name: torch, model: {teacher_folder}}}"
    mixed = f"teacher={{name: mixture, teachers: [{{weight: 0.5, {one}}}, {{weight: 0.5, {one}}}]}}"
    members = [f"teacher.teachers.{number}.teacher.dtype" for number in (0, 1)] if both else []
    student = f"student={{name: checkpoint, model: {teacher_folder}}}"
    assert named("plan", mixed, student, "allow_identical=true") == both[:1] + members
    # The grid of a file is kept in float32 on purpose.
    assert named("plan", "train.quantize=q8_0") == both[1:]
    assert named("plan", "--device", "h100") == ["train.precision", "teacher.dtype"]
    assert named("plan", "--device", "t4") == []


def test_types_left_to_auto_are_chosen_once_and_kept(
    tiny_recipe: Callable[..., Path], teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that began on a processor with bfloat16 goes on with it on one without, and is evaluated so."""
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {teacher_folder}, dtype: auto}}",
        train="{steps: 4, rows_per_step: 4, lr: 1e-3, device: cpu, save_every: 2, precision: auto}",
    )
    listed = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu_matmul, "CPUINFO", listed)
    listed.write_text("flags\t: amx_bf16\n")
    run = distill(recipe, out=tmp_path / "run")
    listed.write_text("flags\t: fpu\n")
    plain = distill(recipe, out=tmp_path / "plain")
    for found, dtype in ((run, "bfloat16"), (plain, "float32")):
        settled = load_recipe(found.resolved)
        assert (settled.train.precision, settled.teacher.dtype) == (dtype, dtype)
        assert found.receipt()["precision"] == dtype
    assert run.receipt()["heldout_first"] != plain.receipt()["heldout_first"]
    # What 8 bits of mantissa cost.
    ours, theirs = (of.receipt()["heldout_best"]["heldout/loss"] for of in (run, plain))
    assert ours == pytest.approx(theirs, rel=1e-2)
    (run.path / "receipt.json").unlink()
    run.set_status("stopped", "for this test")
    assert distill(recipe, resume=True, out=run.path).receipt()["precision"] == "bfloat16"
    best = run.receipt()["heldout_best"]
    again = evaluate(load_recipe(run.resolved), run.student)
    assert {name: again[name] for name in best} == best
