"""A damaged checkpoint is noticed before a step is taken, and a full disk costs only the state that found no room."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from pathlib import Path

import pytest

from potstill.errors import UserError
from potstill.training.checkpoint import verify
from soak.lab import KILLED, SHORT, Lab, count

FILES = ("tensors.safetensors", "state.json", "manifest.json")
NEWEST = "checkpoints/00000009"
PARTS = count(1, 8)


@pytest.fixture(scope="session")
def cut_run(lab: Lab) -> Path:
    """Killed in step 11, of two micro-batches a step: checkpoints of steps 6 and 9 are there."""
    out = lab.folder / "cut-run"
    assert lab.start(lab.recipe("gpt2", SHORT), out, aim=("forward", 21, signal.SIGKILL)).code == KILLED
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["00000006", "00000009"]
    return out


@pytest.fixture
def out(cut_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(cut_run, tmp_path / "runs" / "cut")
    return tmp_path / "runs" / "cut"


def damage(path: Path, how: str, generator: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at = generator.randrange(len(content))
    if how == "truncated":
        del content[at:]
    else:
        content[at] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    return f"{path.name} {how} at {at}"


@pytest.mark.parametrize("trial", range(count(1, 200)))
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_taken(
    lab: Lab, out: Path, how: str, trial: int
) -> None:
    done = damage(out / NEWEST / FILES[trial % 3], how, random.Random(f"{how}{trial}"))
    end = lab.finish(lab.recipe("gpt2", SHORT), out)
    lines = end.told.splitlines()
    noticed = [number for number, line in enumerate(lines) if "00000009: damaged" in line]
    resumed = [number for number, line in enumerate(lines) if line.startswith("resumed from")]
    steps = [number for number, line in enumerate(lines) if line.startswith("step ")]
    assert len(noticed) == len(resumed) == 1 and noticed < resumed < steps, f"{done}: {end.told}"
    assert lines[resumed[0]].endswith("00000006") and lines[steps[0]].startswith("step 7/"), end.told
    lab.assert_same(out, "gpt2", SHORT)


@pytest.mark.parametrize("name", FILES[-count(1, 3) :])
def test_a_checkpoint_that_lacks_a_file_is_noticed(lab: Lab, out: Path, name: str) -> None:
    (out / NEWEST / name).unlink()
    assert "00000009: damaged" in lab.finish(lab.recipe("gpt2", SHORT), out).told
    lab.assert_same(out, "gpt2", SHORT)


def test_a_damaged_checkpoint_does_not_count_among_those_kept(lab: Lab, out: Path) -> None:
    """One between two saves, where a signal had stopped the run."""
    damage(out / NEWEST / "state.json", "flipped", random.Random(0))
    (out / NEWEST).rename(out / "checkpoints" / "00000008")
    end = lab.start(lab.recipe("gpt2", SHORT), out, aim=("forward", 7, signal.SIGKILL))
    assert end.code == KILLED and "00000008: damaged" in end.told
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["00000006", "00000009"]


def test_every_bit_of_the_small_files_is_checked(out: Path) -> None:
    """All single-bit flips of the manifest, and as many as are asked for of the state."""
    place = out / NEWEST
    verify(place)
    for name in FILES[1:]:
        whole = (place / name).read_bytes()
        flips = [(at, bit) for at in range(len(whole)) for bit in range(8)]
        for at, bit in random.Random(0).sample(flips, min(count(50, 4000), len(flips))):
            content = bytearray(whole)
            content[at] ^= 1 << bit
            (place / name).write_bytes(content)
            with pytest.raises(UserError):
                verify(place)
                pytest.fail(f"{name}: bit {bit} of byte {at} flipped, and nobody noticed")
        (place / name).write_bytes(whole)
    verify(place)


def checkpoints(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in (out / "checkpoints").glob("*/*")}


@pytest.mark.parametrize("trial", range(count(1, 20)))
def test_a_disk_that_fills_up_in_a_save_leaves_the_checkpoints_and_one_line(
    lab: Lab, out: Path, trial: int
) -> None:
    recipe, before = lab.recipe("gpt2", SHORT), checkpoints(out)
    room = random.Random(trial).randrange(len(before[f"{NEWEST}/tensors.safetensors"]))
    end = lab.start(recipe, out, limit=room)
    assert_full(end.code, end.told)
    assert checkpoints(out) == before
    lab.finish(recipe, out)
    lab.assert_same(out, "gpt2", SHORT)


def assert_full(code: int, told: str) -> None:
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in told, told
    assert re.search(r"the checkpoint of \d{6} bytes cannot be written", errors[0]), errors


def test_a_full_disk_at_each_file_system_call_of_a_save(lab: Lab, cut_run: Path, tmp_path: Path) -> None:
    recipe, whole = lab.recipe("gpt2", SHORT), tmp_path / "whole" / "cut"
    shutil.copytree(cut_run, whole)
    assert lab.start(recipe, whole, watch=whole, calls=tmp_path / "calls").code == 0
    calls = json.loads((tmp_path / "calls").read_text())
    save = [number for number, call in enumerate(calls, 1) if "00000012.new" in call]
    assert len(save) == 5, calls  # the folder, its three files, its name
    for number in save[-count(1, 5) :]:
        out = tmp_path / str(number) / "cut"
        shutil.copytree(cut_run, out)
        before = checkpoints(out)
        end = lab.start(recipe, out, watch=out, full_at=number)
        assert_full(end.code, end.told)
        assert checkpoints(out) == before
        lab.finish(recipe, out)
        lab.assert_same(out, "gpt2", SHORT)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_full_disk_anywhere_in_a_run_is_one_line_and_the_run_goes_on(
    lab: Lab, tmp_path: Path, part: int
) -> None:
    calls = lab.calls("gpt2", SHORT)
    growing = [
        number for number, call in enumerate(calls, 1) if not call.startswith(("os.remove", "os.rmdir"))
    ]
    numbers = growing[part::PARTS]
    for number in random.Random(part).sample(numbers, count(1, len(numbers))):
        recipe, out = lab.recipe("gpt2", SHORT), tmp_path / str(number) / "cut"
        end = lab.start(recipe, out, watch=out, full_at=number)
        errors = [line for line in end.told.splitlines() if line.startswith("error: ")]
        told = f"{number} {calls[number - 1]}: {end.told}"
        assert end.code == 2 and len(errors) == 1 and "Traceback" not in end.told, told
        assert "No space left on device" in errors[0], told
        lab.finish(recipe, out)
        lab.assert_same(out, "gpt2", SHORT)
