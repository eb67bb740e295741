"""Folders and files of a model: whole ones pass, what is missing or damaged is refused by name, hashes cover both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from weight_files import ARRAYS, make_folder, make_gguf, make_safetensors, make_sharded, refusal, with_header

from potstill.io.hashing import file_sha256
from potstill.models.model_files import check_model_files, dtype_of_files, folder_sha256, tensor_shapes
from potstill.models.safetensors_files import check_safetensors


def test_a_whole_folder_passes_and_gives_its_shapes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    check_model_files(folder)
    assert tensor_shapes(folder) == {name: array.shape for name, array in ARRAYS.items()}


def test_a_sharded_folder_passes_and_gives_the_shapes_of_all_shards(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    check_model_files(folder)
    assert tensor_shapes(folder) == {name: array.shape for name, array in ARRAYS.items()}


def test_a_gguf_file_passes_as_a_model(tmp_path: Path) -> None:
    check_model_files(make_gguf(tmp_path / "m.gguf"))


def test_a_gguf_file_under_another_name_is_refused_because_loading_goes_by_the_name(tmp_path: Path) -> None:
    assert "a GGUF file whose name ends in '.bin'" in refusal(
        check_model_files, make_gguf(tmp_path / "m.bin")
    )


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("missing", "missing.gguf"):
        assert f"{name}: no such file" in refusal(check_model_files, tmp_path / name)
    for check in (tensor_shapes, file_sha256, folder_sha256, check_safetensors):
        assert "no such file" in refusal(check, tmp_path / "missing")


def test_a_folder_without_a_config_is_refused_with_what_was_found(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    needs = f"{folder}: not a model: a Hugging Face folder needs config.json; found: "
    assert refusal(check_model_files, folder).startswith(f"{needs}nothing.")
    for name in "cba":
        (folder / name).touch()
    assert refusal(check_model_files, folder).startswith(f"{needs}a, b, c.")
    for name in "hgfed2":
        (folder / name).touch()
    assert refusal(check_model_files, folder).startswith(f"{needs}2, a, b, c, d, e, f, g, and 1 more.")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "a JSON list, not an object"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"hidden_size": 4}', "neither model_type nor architectures"),
        (b'{"architectures": []}', "neither model_type nor architectures"),
        (b'{"model_type": "llama", "model_type": "gpt2"}', "model_type is there twice"),
    ],
)
def test_a_config_that_describes_no_model_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "config.json").write_bytes(content)
    said = refusal(check_model_files, folder)
    assert word in said and f"{folder / 'config.json'}: " in said


def test_a_config_with_architectures_alone_passes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    check_model_files(folder)


def test_a_folder_without_weights_is_refused_with_what_was_found(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "vocab.txt").touch()
    said = refusal(check_model_files, folder)
    assert f"{folder}: no weights; found: config.json, vocab.txt. Needed: model.safetensors" in said


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "last.ckpt"])
def test_a_folder_with_pickles_alone_is_refused_without_opening_them(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / name)
    assert f"{folder}: only {name}: a pickle can run code; convert to safetensors" in refusal(
        check_model_files, folder
    )


def test_a_folder_whose_weights_hold_no_tensor_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    with_header(folder / "model.safetensors", {})
    assert "hold 0 tensors" in refusal(check_model_files, folder)


def test_a_truncated_weight_file_in_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert f"{weights}: ends early" in refusal(check_model_files, folder)


def test_a_broken_link_in_place_of_the_weights_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "model.safetensors: no such file" in refusal(check_model_files, folder)


@pytest.mark.parametrize(("where", "call"), [(os, "listdir"), (Path, "open")], ids=["folder", "file"])
def test_what_the_system_refuses_to_read_is_told_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, call: str
) -> None:
    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    folder = make_folder(tmp_path / "m")
    monkeypatch.setattr(where, call, denied)
    assert "cannot be read: Permission denied" in refusal(check_model_files, folder)


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    edit(fields)
    index.write_text(json.dumps(fields))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    (folder / "model-00002-of-00003.safetensors").unlink()
    said = refusal(check_model_files, folder)
    assert "1 of 3 shards" in said and "model-00002-of-00003.safetensors" in said


def test_a_tensor_that_its_shard_does_not_have_is_named(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    edit_index(folder, lambda f: f["weight_map"].update({"lost.weight": "model-00001-of-00003.safetensors"}))
    said = refusal(check_model_files, folder)
    assert (
        f"{folder / 'model-00001-of-00003.safetensors'}: 1 of 2 tensors" in said
        and "first lost.weight" in said
    )


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    both = {name: ARRAYS[name] for name in ("embed.weight", "norm.weight")}
    save_file(both, folder / "model-00002-of-00003.safetensors")
    said = refusal(check_model_files, folder)
    assert "tensor embed.weight is both in model-00001-of-00003.safetensors and in model-00002" in said


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    shard = folder / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard}: ends early" in refusal(check_model_files, folder)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/outside.safetensors", "", "a.bin", "..", 7, None, ["a"]]
)
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path: Path, file: Any) -> None:
    folder = make_sharded(tmp_path / "m")
    make_safetensors(tmp_path / "outside.safetensors")
    edit_index(folder, lambda f: f["weight_map"].update({"norm.weight": file}))
    assert "tensor norm.weight is" in refusal(check_model_files, folder)


@pytest.mark.parametrize("file", ["a\0.safetensors", "a\n.safetensors"])
def test_a_shard_name_that_no_terminal_should_print_is_escaped(tmp_path: Path, file: str) -> None:
    folder = make_sharded(tmp_path / "m")
    edit_index(folder, lambda f: f["weight_map"].update({"norm.weight": file}))
    assert ascii(file) in refusal(check_model_files, folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    folder = make_sharded(tmp_path / "m")
    edit_index(folder, lambda f: f.update(weight_map=weight_map))
    assert "weight_map is not a table" in refusal(check_model_files, folder)


def test_the_hash_of_a_file_is_the_sha256_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 5000)
    expected = hashlib.sha256(bytes(range(256)) * 5000).hexdigest()
    assert file_sha256(path) == folder_sha256(path) == expected


@pytest.mark.parametrize("make", [make_folder, make_sharded])
def test_the_hash_of_a_folder_covers_its_config_and_weights_and_nothing_else(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    folder = make(tmp_path / "m")
    names = ["config.json", *sorted(p.name for p in folder.glob("*.safetensors"))]
    lines = [f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n" for name in names]
    before = folder_sha256(folder)
    assert before == hashlib.sha256("".join(lines).encode()).hexdigest()
    (folder / "README.md").write_text("a model")
    assert folder_sha256(folder) == before
    for name in names:
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        assert folder_sha256(folder) != before
        (folder / name).write_bytes(original)
    assert folder_sha256(folder) == before


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "float32"),
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "float16"),
        (torch.int8, None),
    ],
)
def test_the_dtype_of_files_is_that_of_most_weights(
    tmp_path: Path, dtype: torch.dtype, name: str | None
) -> None:
    tensors = {"a.weight": torch.zeros(8, 8, dtype=dtype), "norm.weight": torch.zeros(8), "b": torch.zeros(3)}
    save_torch(tensors, tmp_path / "model.safetensors")
    assert dtype_of_files(tmp_path) == name


@pytest.mark.parametrize(("kind", "name"), [("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", None)])
def test_the_dtype_of_a_gguf_file(tmp_path: Path, kind: str, name: str | None) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    type_ = gguf.GGMLQuantizationType[kind]
    array = gguf.quants.quantize(np.ones((4, 32), dtype=np.float32), type_)
    writer.add_tensor("output.weight", array, raw_dtype=type_)
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert dtype_of_files(tmp_path / "m.gguf") == name
