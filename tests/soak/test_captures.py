"""A capture killed at any instant goes on to the store of one that was not, and no damage to a store passes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from potstill.errors import UserError
from potstill.store.layout import HEAD, HELDOUT
from potstill.store.reader import Store, verify
from soak.forkserver import End
from soak.lab import KILLED, SHORT, Lab, count

CAPTURE = "capture: {name: sampled, threshold: 0.05, rows_per_shard: 24}\n"


def recipe(lab: Lab) -> Path:
    path = lab.folder / "capture.yaml"
    path.write_text(lab.recipe("llama", SHORT).read_text() + CAPTURE)
    return path


def start(lab: Lab, out: Path, **how: object) -> End:
    return lab.server.start(["capture", str(recipe(lab)), "--out", str(out)], **how)  # type: ignore[arg-type]


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="session")
def whole(lab: Lab) -> Path:
    """The uninterrupted capture, once; `whole.calls` says what it did to the disk, `.seconds` how long."""
    out = lab.folder / "targets" / "whole"
    end = start(lab, out, watch=out, calls=out.with_suffix(".calls"))
    assert end.code == 0, end.told
    out.with_suffix(".seconds").write_text(str(end.seconds))
    assert len(list(out.glob("?????.safetensors"))) == 7
    return out


def calls(whole: Path) -> list[str]:
    return list(json.loads(whole.with_suffix(".calls").read_text()))


def finish(lab: Lab, out: Path, whole: Path) -> None:
    end = start(lab, out)
    assert end.code == 0, end.told
    assert content(out) == content(whole)
    assert list(verify(out)) == []


@pytest.mark.parametrize("trial", range(count(2, 50)))
def test_a_capture_killed_at_any_instant_goes_on_to_the_same_store(
    lab: Lab, whole: Path, tmp_path: Path, trial: int
) -> None:
    """At a random time, or at a call that changes the disk with what was being written cut; then maybe again."""
    generator, out = random.Random(trial), tmp_path / "store"
    if trial % 3 == 0:
        seconds = float(whole.with_suffix(".seconds").read_text())
        end = start(lab, out, after_s=generator.random() * seconds)
        assert end.code in (KILLED, 0), end.told
    else:
        number = generator.randint(1, len(calls(whole)))
        end = start(lab, out, watch=out, die_at=number, torn=generator.random())
        assert end.code == KILLED, end.told
    if trial % 3 == 2:
        end = start(lab, out, watch=out, die_at=generator.randint(1, 9), torn=generator.random())
        assert end.code in (KILLED, 0), end.told
    finish(lab, out, whole)


@pytest.mark.parametrize("trial", range(count(1, 20)))
def test_a_disk_that_fills_up_is_one_line_and_the_capture_goes_on(
    lab: Lab, whole: Path, tmp_path: Path, trial: int
) -> None:
    generator, out = random.Random(trial), tmp_path / "store"
    end = start(lab, out, watch=out, full_at=generator.randint(1, len(calls(whole))))
    errors = [line for line in end.told.splitlines() if line.startswith("error: ")]
    assert end.code == 2 and len(errors) == 1 and "Traceback" not in end.told, end.told
    finish(lab, out, whole)


@pytest.mark.parametrize("part", range(count(1, 6)))
@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_damage_anywhere_is_found_by_verify_and_before_a_row_is_used(
    whole: Path, tmp_path: Path, how: str, part: int
) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    names, generator = sorted(content(store)), random.Random(f"{how}{part}")
    for _ in range(count(8, 84) if how == "flipped" else count(3, 17)):
        name = generator.choice(names)
        sound = (store / name).read_bytes()
        damaged, at = bytearray(sound), generator.randrange(len(sound))
        if how == "truncated":
            del damaged[at:]
        else:
            damaged[at] ^= 1 << generator.randrange(8)
        (store / name).write_bytes(damaged)
        with pytest.raises(UserError):
            if found := list(verify(store)):
                raise UserError(*found)
            pytest.fail(f"{name} {how} at {at}, and verify did not notice")
        if name.endswith(".safetensors"):
            with pytest.raises(UserError, match=name):
                read_all(store, name)
                pytest.fail(f"{name} {how} at {at}, and its reader did not notice")
        (store / name).write_bytes(sound)
    assert list(verify(store)) == []


def read_all(store: Path, name: str) -> None:
    """Everything that a file keeps."""
    reader = Store(store)
    train_rows = reader.manifest["corpus"]["train_rows"]
    if name == HEAD:
        _ = reader.head
        return
    first = train_rows if name == HELDOUT else int(name[:5]) * 24
    last = train_rows + 4 if name == HELDOUT else min(first + 24, train_rows)
    for row in range(first, last):
        reader.row(row)
