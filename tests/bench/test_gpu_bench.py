"""bench/gpu.py without a GPU: the same code on small shapes, and what it does where something is missing."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    import gpu

    return gpu


@pytest.fixture
def arms(gpu: Any) -> Any:
    import gpu_arms

    return gpu_arms


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_arm_takes_the_same_steps_and_one_without_memory_is_a_line(
    gpu: Any, arms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(pair: Any, meter: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(arms.ARMS, "plain, too large", too_large)
    monkeypatch.delitem(arms.ARMS, "ours, compiled")  # traced, they would take seconds
    monkeypatch.delitem(arms.ARMS, "plain, compiled")
    given = [
        "--tiny",
        "--only",
        "qwen",
        "--rounds",
        "2",
        "--steps",
        "3",
        "--append",
        str(tmp_path / "lines"),
        "--arms",
    ]
    assert gpu.main([*given, "ours", "plain", "Liger JSD, bodies"]) == 0
    lines = lines_of(tmp_path / "lines")
    for size in ("4x16", "2x32"):
        of = [line for line in lines if line["size"] == size]
        good = [line for line in of if "losses" in line]
        assert [line["arm"] for line in good] == ["ours", "ours, reference", "plain"] * 2
        for line in good:
            assert line["losses"] == pytest.approx(good[0]["losses"], rel=2e-3)
        assert [line["not_run"] for line in of if line["arm"] == "plain, too large"] == ["out of memory"]
    assert gpu.main(["--tiny", "--markdown", str(tmp_path / "lines")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("| plain, too large | out of memory |") == 4  # of the run, and read again
    assert "| qwen 4x16: at most 0.5 s |" in shown and "| met |" not in shown


def test_operations_are_those_of_both_models_and_their_heads(arms: Any) -> None:
    pair = arms.qwen(4, 16, 2, torch.device("cpu"), True)
    batch = pair.batch(0)
    with FlopCounterMode(display=False) as counter:
        pair.teacher.targets(batch)
        pair.student.hidden(batch.input_ids_BT, batch.position_ids_BT).sum().backward()
    by_kind = counter.get_flop_counts()["Global"]
    matrices = sum(n for op, n in by_kind.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    N, T, V, D, E = 64, 16, arms.TINY_SHARED, 16, 32
    attention = N * (2 * T * E + 3 * 2 * T * D)  # two products of width times half of T, three times
    assert pair.flops() == matrices + attention + N * V * (6 * D + 2 * E)


def test_waits_are_counted_in_the_last_step_alone(arms: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", said.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: said.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**31)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**32)
    meter = arms.Meter(torch.device("cuda"), 4)
    for number in range(5):
        meter.before(number)
        if said[-1:] == ["warn"]:
            for _ in range(2):
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert meter.found == {"waits": 2, "peak_gib": 2.0, "reserved_gib": 4.0}
    assert said == ["reset", "warn", "default"]


def test_without_a_device_it_is_one_line(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "bench/gpu.py: no CUDA device. --tiny runs it all small on the CPU.\n"


def test_a_card_is_known_by_its_longest_name(gpu: Any) -> None:
    cards = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA L40S", "cpu"]
    assert [gpu.peak_tflops(card) for card in cards] == [989, 756, 989, 362, None]
