"""A store on disk: any damage is found, when it is read and by `verify`; kills and several writers are harmless."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import make_tokenizer
from torch import Tensor

from potstill.errors import UserError
from potstill.store import writer as writing
from potstill.store.layout import CAPTURE, CERTIFICATE, HEAD, HELDOUT, MANIFEST, SCHEMA, seal
from potstill.store.reader import Store, read_manifest, verify
from potstill.store.shards import BLOCK_BYTES, FileRecord, Shard, VerifiedFile, write_shard
from potstill.store.writer import StoreWriter, merge, write_json
from potstill.types import Head

T, E, V = 64, 24, 40
WIDE = 512  # a row is 128 KiB, a shard of 20 rows three blocks
TRAIN, HELD, EACH = 50, 2, 20


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "kind": {"name": "hidden", "dtype": "float32"},
        "temperature": None,
        "teacher": {"source": "teacher", "weights_sha256": "0" * 64, "dtype": "float32"},
        "vocabulary": {"size": V, "ids": V},
        "head": {"scale": 2.0, "softcap": None, "width": E},
        "corpus": {"fingerprint": "f" * 64, "train_rows": TRAIN},
        "rows": TRAIN,
        "runs": [[0, TRAIN - 1]],
        "rows_per_batch": 8,
        "rows_per_shard": EACH,
        "shards": 3,
        "positions": TRAIN * T,
    } | changes


def hidden(row: int, width: int = E) -> Tensor:
    return torch.randn(T - row % EACH % 3, width, generator=torch.Generator().manual_seed(row))


def places(row: int) -> Tensor:
    return torch.arange(row % EACH % 3, T)


def save(rows: Iterable[int], width: int = E) -> Callable[[Path], Any]:
    rows = list(rows)
    kept = [{"hidden": hidden(row, width)} for row in rows]
    return lambda file: write_shard(file, rows, list(map(places, rows)), kept, T)


def make(
    path: Path, shards: Iterable[int] = range(3), first: bool = True, width: int = E, **changes: Any
) -> Path:
    """A store, or a part of one; `first` is the part with what is there once."""
    writer = StoreWriter.open(path, settings(**changes))
    if first:
        writer.write_head(Head(torch.ones(V, E), torch.zeros(V)))
        writer.write_tokenizer(make_tokenizer())
        writer.write(path / HELDOUT, save(range(TRAIN, TRAIN + HELD), width))
        write_json(path / CERTIFICATE, {"positions": 7, "gradient_cosine": 0.5})
    for number in shards:
        rows = range(number * EACH, min((number + 1) * EACH, TRAIN))
        writer.write(writer.files.shard(number), save(rows, width))
    writer.finish()
    return path


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("stores") / "sound")


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "store"))


def flip(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def verdict(path: Path) -> list[str]:
    try:
        return list(verify(path))
    except UserError as error:
        return [str(error)]


FILES = [
    *("00000.safetensors", "00001.safetensors", "00002.safetensors", HEAD, HELDOUT),
    *("00000.json", "00001.json", "00002.json", "head.json", "heldout.json"),
    *(MANIFEST, CAPTURE, CERTIFICATE, "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    "tokenizer/SHA256SUMS",
]


def test_a_store_has_these_files(sound: Path) -> None:
    assert sorted(content(sound)) == sorted(FILES)
    assert verdict(sound) == []


def test_what_was_written_is_read(sound: Path) -> None:
    reader = Store(sound)
    assert reader.manifest["bytes_per_position"] == pytest.approx(4 * E, rel=0.02)
    for row in (0, 19, 20, 39, 40, 49, 50, 51):
        places_P, kept = reader.row(row)
        assert torch.equal(places_P, places(row)) and torch.equal(kept["hidden"], hidden(row))
        assert reader.is_heldout(row) == (row >= 50)
    head = reader.head
    assert torch.equal(head.weight_VD, torch.ones(V, E)) and (head.scale, head.softcap) == (2.0, None)
    assert head.bias_V is not None and head.num_ids == V
    for row in (52, 1000, -1):
        with pytest.raises(UserError, match=f"has no targets for row {row}"):
            reader.row(row)


def test_a_store_of_some_rows_returns_those_and_refuses_others(tmp_path: Path) -> None:
    rows = [3, 4, 5, 11, 20, 21, 49]
    runs = [[3, 5], [11, 11], [20, 21], [49, 49]]
    path = tmp_path / "some"
    writer = StoreWriter.open(path, settings(rows=7, runs=runs, rows_per_shard=3))
    writer.write_head(Head(torch.ones(V, E)))
    writer.write(path / HELDOUT, save([50, 51]))
    for number in range(3):
        writer.write(writer.files.shard(number), save(rows[number * 3 : number * 3 + 3]))
    write_json(path / CERTIFICATE, {})
    assert writer.finish()
    reader = Store(path)
    for row in (*rows, 50, 51):
        assert torch.equal(reader.row(row)[1]["hidden"], hidden(row))
    assert reader.missing([49, 2, 3, 7, 2]) == [2, 7]
    for row in (0, 6, 12, 48, 52):
        with pytest.raises(UserError, match=f"has no targets for row {row}"):
            reader.row(row)


def test_a_flipped_bit_is_found_when_its_block_is_read_and_not_before(tmp_path: Path) -> None:
    """Rows 8 to 15 of a shard lie in its second block, which no other row touches."""
    store = make(tmp_path / "wide", width=WIDE)
    assert len(read_manifest(store)["files"][3]["blocks"]) == 3
    flip(store / "00001.safetensors", BLOCK_BYTES + 12345)
    reader = Store(store)
    for row in (20, 26, 37, 39):
        assert torch.equal(reader.row(row)[1]["hidden"], hidden(row, WIDE))
    for _ in range(2):
        with pytest.raises(UserError, match=rf"00001.safetensors: damaged: block 1 \(bytes {BLOCK_BYTES} to"):
            reader.row(32)
    assert torch.equal(reader.row(20)[1]["hidden"], hidden(20, WIDE))


@pytest.mark.parametrize("at", [0, 5, 9, 40, 200, 400, 900])
def test_a_flipped_bit_in_a_header_or_an_index_is_found_before_a_row_is_read(store: Path, at: int) -> None:
    flip(store / "00000.safetensors", at)
    with pytest.raises(UserError, match=r"00000.safetensors: damaged: block 0"):
        Store(store).row(3)


def test_a_flipped_bit_in_the_head_is_found_before_it_is_used(store: Path) -> None:
    flip(store / HEAD, 3000)
    reader = Store(store)
    with pytest.raises(UserError, match=r"head.safetensors: damaged: block 0"):
        _ = reader.head


def test_a_flipped_bit_in_the_tokenizer_is_found_before_it_is_used(store: Path) -> None:
    flip(store / "tokenizer/tokenizer.json", 300)
    with pytest.raises(UserError, match=r"tokenizer.json: damaged: block 0"):
        _ = Store(store).tokenizer_folder


def test_a_file_added_to_the_tokenizer_is_found_before_it_is_used(store: Path) -> None:
    (store / "tokenizer/added_tokens.json").write_text('{"new": 258}')
    with pytest.raises(UserError, match=r"added_tokens.json: not in the manifest"):
        _ = Store(store).tokenizer_folder


def test_shards_hold_no_file_descriptors(sound: Path) -> None:
    """A corpus of a hundred million tokens has more shards than a process may have files open."""
    open_files = Path("/proc/self/fd")
    if not open_files.exists():
        pytest.skip("no /proc on this machine; not run")
    before, reader = len(list(open_files.iterdir())), Store(sound)
    for row in (0, 20, 40, 50):
        reader.row(row)
    assert len(list(open_files.iterdir())) == before


@pytest.mark.parametrize("name", FILES)
def test_verify_finds_a_flipped_bit_anywhere(store: Path, name: str) -> None:
    file = store / name
    size, generator = file.stat().st_size, random.Random(name)
    for at in (0, size - 1, *(generator.randrange(size) for _ in range(6 if size < 10_000 else 2))):
        bit = generator.randrange(8)
        flip(file, at, bit)
        (first, *_) = verdict(store) or [f"bit {bit} of byte {at} flipped, undetected"]
        assert first.startswith(f"{file}: "), first
        flip(file, at, bit)
    assert verdict(store) == []


@pytest.mark.parametrize("name", FILES)
def test_verify_finds_a_file_that_is_truncated_or_missing(store: Path, name: str) -> None:
    file = store / name
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 0):
        file.write_bytes(whole[:size])
        assert any(line.startswith(f"{file}: ") for line in verdict(store))
    file.write_bytes(whole + b"\n")
    assert any(line.startswith(f"{file}: ") for line in verdict(store))
    file.unlink()
    (line,) = verdict(store)
    assert line.startswith(f"{store}: " if name == MANIFEST else f"{file}: no such file")


@pytest.mark.parametrize("with_records", [False, True])
def test_swapped_and_duplicated_shards_are_found(store: Path, with_records: bool) -> None:
    suffixes = (".safetensors", ".json") if with_records else (".safetensors",)
    for suffix in suffixes:
        one, other = store / f"00000{suffix}", store / f"00001{suffix}"
        one.rename(store / "aside"), other.rename(one), (store / "aside").rename(other)
    assert len(verdict(store)) == 2 * len(suffixes)
    with pytest.raises(UserError, match=r"00000.safetensors: damaged"):
        Store(store).row(0)
    for suffix in suffixes:
        shutil.copy(store / f"00001{suffix}", store / f"00000{suffix}")
    assert len(verdict(store)) == len(suffixes)
    with pytest.raises(UserError, match=r"00001.safetensors"):
        Store(store).row(20)


def test_a_shard_under_another_s_name_is_found_even_where_the_manifest_agrees(tmp_path: Path) -> None:
    """The rows that a shard lists are compared with those that its name implies."""
    path, writer = tmp_path / "odd", StoreWriter.open(tmp_path / "odd", settings())
    writer.write_head(Head(torch.ones(V, E)))
    writer.write(path / HELDOUT, save([50, 51]))
    for number, other in ((0, 1), (1, 0), (2, 2)):
        rows = range(other * EACH, min((other + 1) * EACH, TRAIN))
        writer.write(writer.files.shard(number), save(rows))
    write_json(path / CERTIFICATE, {})
    assert writer.finish()
    with pytest.raises(UserError, match="has no targets for row 3"):
        Store(path).row(3)


@pytest.mark.parametrize("name", ["00003.safetensors", "notes.txt", "tokenizer/added_tokens.json", "more/x"])
def test_verify_finds_what_the_manifest_does_not_name(store: Path, name: str) -> None:
    (store / name).parent.mkdir(exist_ok=True)
    (store / name).write_bytes(b"{}")
    (line,) = verdict(store)
    assert line.startswith(f"{store / name.removesuffix('/x')}: not in the manifest")


@pytest.mark.parametrize("name", ["00002.safetensors", HELDOUT])
def test_a_missing_or_truncated_shard_is_refused_when_the_store_is_opened(store: Path, name: str) -> None:
    with (store / name).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=f"{name}: has 1000 bytes, the manifest says"):
        Store(store)
    (store / name).unlink()
    with pytest.raises(UserError, match=f"{name}: no such file"):
        Store(store)


def test_several_readers_share_a_store(sound: Path) -> None:
    readers = [Store(sound) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        rows = [(reader, row) for row in range(0, 52, 3) for reader in readers]
        found = pool.map(lambda at: at[0].row(at[1])[1]["hidden"], rows)
        assert all(torch.equal(one, hidden(row)) for one, (_, row) in zip(found, rows, strict=True))


def resealed(path: Path, **changes: Any) -> None:
    manifest = read_manifest(path) | changes
    write_json(path / MANIFEST, manifest | {"seal": seal(manifest)})


@pytest.mark.parametrize(
    "record",
    [
        {"file": "../head.safetensors", "bytes": 3, "sha256": "", "blocks": [""]},
        {"file": "head.safetensors", "bytes": "3", "sha256": "", "blocks": [""]},
        {"file": "head.safetensors", "bytes": 3, "sha256": "", "blocks": []},
        {"file": "head.safetensors", "bytes": 0, "sha256": "", "blocks": []},
        {"file": "head.safetensors", "bytes": 3, "sha256": "", "blocks": [4]},
        {"file": "head.safetensors", "bytes": 3},
        7,
    ],
)
def test_a_malformed_record_is_refused(store: Path, record: Any) -> None:
    resealed(store, files=[record])
    with pytest.raises(UserError, match=r"manifest.json: damaged: no record of a file"):
        Store(store)


def test_a_manifest_of_another_version_or_another_content_is_refused(store: Path) -> None:
    manifest = read_manifest(store)
    write_json(store / MANIFEST, manifest | {"temperature": 2.0})
    with pytest.raises(UserError, match=r"manifest.json: damaged: it is not what was written"):
        read_manifest(store)
    resealed_manifest = manifest | {"schema": SCHEMA + 1}
    write_json(store / MANIFEST, resealed_manifest)
    with pytest.raises(UserError, match=f"schema {SCHEMA + 1}, this version reads {SCHEMA}"):
        read_manifest(store)


def test_a_folder_without_a_manifest_is_not_a_store(store: Path, tmp_path: Path) -> None:
    (store / MANIFEST).unlink()
    with pytest.raises(UserError, match="a capture that is not finished"):
        Store(store)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a store of targets"):
        Store(tmp_path / "empty")


# --- writing


def test_the_manifest_is_written_last_and_only_when_every_file_is_there(
    tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *a: replaced.append(Path(a[1]).name) or replace(*a))  # type: ignore[func-returns-value]
    path = tmp_path / "store"
    for part in ([], [1], [0]):
        make(path, part)
        assert not (path / MANIFEST).exists()
    make(path, [2], first=False)
    assert replaced[-1] == MANIFEST and replaced.count(MANIFEST) == 1
    assert replaced.index("00002.safetensors") < replaced.index("00002.json")
    assert content(path) == content(sound)
    (path / CERTIFICATE).unlink(), (path / MANIFEST).unlink()
    assert not StoreWriter.open(path, settings()).finish()


@pytest.mark.parametrize("name", ["00001.safetensors", HEAD, HELDOUT])
@pytest.mark.parametrize("how", ["cut", "flipped", "no record", "record alone"])
def test_what_is_not_whole_is_written_again(tmp_path: Path, sound: Path, name: str, how: str) -> None:
    path = make(tmp_path / "store", [0, 1])
    file = path / name
    match how:
        case "cut":
            file.write_bytes(file.read_bytes()[:3000])
        case "flipped":
            flip(file, 3000)
        case "no record":
            file.with_suffix(".json").unlink()
        case _:
            file.unlink()
    make(path)
    assert content(path) == content(sound)


def test_what_is_whole_is_not_written_again(store: Path) -> None:
    def refuse(file: Path) -> Any:
        raise AssertionError(f"{file} is written again")

    writer = StoreWriter.open(store, settings())
    for name in ("00001.safetensors", HELDOUT):
        writer.write(store / name, refuse)
    before = (store / "tokenizer/tokenizer.json").stat().st_mtime_ns
    writer.write_tokenizer(make_tokenizer())
    assert (store / "tokenizer/tokenizer.json").stat().st_mtime_ns == before
    assert writer.missing(range(3)) == []


@pytest.mark.parametrize(
    "changes, field, recorded, given",
    [
        ({"kind": {"name": "hidden", "dtype": "int8"}}, "kind.dtype", "float32", "int8"),
        ({"temperature": 2.0}, "temperature", None, 2.0),
        ({"rows_per_shard": 10}, "rows_per_shard", 20, 10),
        ({"teacher": {"source": "x"}}, "teacher.dtype", "float32", None),
    ],
)
def test_a_capture_does_not_resume_another(
    store: Path, changes: Any, field: str, recorded: Any, given: Any
) -> None:
    before = content(store)
    with pytest.raises(UserError, match=rf" {field}: {recorded!r}.*{given!r}"):
        StoreWriter.open(store, settings(**changes))
    assert content(store) == before


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no capture"):
        StoreWriter.open(tmp_path, settings())
    assert content(tmp_path) == {"notes.txt": b"mine"}


def test_a_capture_killed_at_its_first_write_resumes(tmp_path: Path) -> None:
    (tmp_path / f"{CAPTURE}.new").write_bytes(b"{")
    StoreWriter.open(tmp_path, settings())
    assert list(content(tmp_path)) == [CAPTURE]


HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, int(sys.argv[3]), int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_writer_of_a_shard_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path / "store", settings())
    held = [sys.executable, "-c", HOLDER, str(tmp_path / "store" / CAPTURE), "2", "1"]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for shards in (range(3), range(1, 2), range(1, 3)):
            with pytest.raises(UserError, match="another process captures shards"), writer.exclusive(shards):
                pass
        # Parts without a shard are in nobody's way, the first part's other files included.
        for shards, first in ((range(1), True), (range(2, 3), False), (range(1, 1), False), (range(0), True)):
            with writer.exclusive(shards, first):
                pass
        other.communicate()
    with writer.exclusive(range(3)):
        probe = subprocess.run(held, capture_output=True, text=True, input="")
    assert "BlockingIOError" in probe.stderr
    assert subprocess.run(held, capture_output=True, text=True, input="").stdout == "held\n"


def test_writers_that_start_or_finish_together_wait_for_each_other(
    tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most, write = [0], [0], writing.write_json
    counting = threading.Lock()

    def slow(path: Path, tree: Any) -> None:
        with counting:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        write(path, tree)
        with counting:
            inside[0] -= 1

    monkeypatch.setattr(writing, "write_json", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: StoreWriter.open(tmp_path / "store", settings()), range(4)))
    assert most == [1]
    path = Path(shutil.copytree(sound, tmp_path / "whole"))
    writers = [StoreWriter.open(path, settings()) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda writer: writer.finish(), writers)) == [True] * 3
    assert most == [1] and content(path) == content(sound)


# --- parts


def test_parts_of_two_folders_merge_to_the_single_store_byte_for_byte(sound: Path, tmp_path: Path) -> None:
    one, other = make(tmp_path / "1", [0]), make(tmp_path / "2", [1, 2], first=False)
    assert merge([one], tmp_path / "whole") == 2
    assert not (tmp_path / "whole" / MANIFEST).exists()
    assert merge([other, one], tmp_path / "whole") == 0
    assert content(tmp_path / "whole") == content(sound) and verdict(tmp_path / "whole") == []


def test_parts_of_different_captures_do_not_merge(tmp_path: Path) -> None:
    one = make(tmp_path / "1", [0])
    other = make(tmp_path / "2", [1, 2], first=False, teacher={"weights_sha256": "1" * 64})
    with pytest.raises(UserError, match=r"2: .*teacher.dtype: None.*'float32'"):
        merge([one, other], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("name", ["00001.safetensors", HEAD])
def test_a_damaged_part_does_not_merge(tmp_path: Path, name: str) -> None:
    one, other = make(tmp_path / "1", [0]), make(tmp_path / "2", [1, 2], first=False)
    flip((one if name == HEAD else other) / name, 4000)
    with pytest.raises(UserError, match=f"{name}: damaged"):
        merge([one, other], tmp_path / "whole")
    assert not (tmp_path / "whole" / MANIFEST).exists()


def test_a_folder_that_is_not_a_capture_does_not_merge(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"capture.json: no such file"):
        merge([make(tmp_path / "1", [0]), tmp_path / "x"], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_the_manifest_is_plain_json(sound: Path) -> None:
    manifest = json.loads((sound / MANIFEST).read_text())
    assert [one["file"] for one in manifest["files"]] == [HEAD, HELDOUT, *FILES[:3]]
    assert manifest["certificate"] == {"positions": 7, "gradient_cosine": 0.5}


@pytest.mark.parametrize("offsets", [[[0], [10**9]], [[5], [3]], [[-4], [2]]])
def test_offsets_outside_a_file_are_refused(tmp_path: Path, offsets: list[list[int]]) -> None:
    """A hostile file may come with a manifest of its own, so that its hashes agree."""
    tensors = {
        "rows": torch.zeros(1, dtype=torch.int64),
        "places": torch.zeros(1, 1, dtype=torch.uint8),
        "offsets": torch.tensor(offsets),
        "hidden": torch.zeros(8, 4),
    }
    file = tmp_path / "00000.safetensors"
    file.write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(UserError, match="no file of targets: hidden is F32"):
        Shard(VerifiedFile(file, FileRecord.of(file))).row(0)
