"""A teacher of fewer bits: what runs it is a table, what it lost is measured, and nothing of it is silent."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest
import torch
import transformers
from export.tiny_models import make_model, make_run, make_tokenizer, needs_llama_cpp

from potstill import TorchTeacher, UserError
from potstill.build.resolve import resolve
from potstill.cli import main
from potstill.export.export import export_run
from potstill.models import llama_cpp, load
from potstill.models.llama_cpp import LlamaCppLM
from potstill.models.quantization import parts_of, weight_bytes
from potstill.teachers import backends
from potstill.teachers.backends import choose
from potstill.types import Batch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FOLDER, GGUF = Path("model"), Path("model.gguf")


def needs(library: str) -> Any:
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"{library} is not installed; not run")


@pytest.mark.parametrize(
    ("path", "device", "weights"),
    [(FOLDER, CPU, "int8"), (FOLDER, CUDA, "int8"), (GGUF, CPU, "stored"), (GGUF, CUDA, None)],
)
def test_the_fewer_bits_that_are_offered_can_be_had(
    path: Path, device: torch.device, weights: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)  # every library
    assert backends.fewer_bits(path, device.type) == weights
    for each in [weights] if weights else ["int8", "stored"]:
        if weights:
            assert choose(path, each, "auto", device).weights == weights
        else:
            with pytest.raises(UserError, match="no backend serves it"):
                choose(path, each, "auto", device)


PACKED = [
    pytest.param("int8", "torchao", marks=needs("torchao")),
    pytest.param("int8", "bitsandbytes", marks=needs("bitsandbytes")),
    pytest.param("int4", "bitsandbytes", marks=needs("bitsandbytes")),
]


@pytest.fixture
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize(
    ("path", "weights", "asked", "device", "chosen"),
    [
        (FOLDER, "full", "auto", CPU, "transformers"),
        (GGUF, "full", "auto", CUDA, "transformers"),
        (FOLDER, "int8", "auto", CPU, "torchao"),
        (FOLDER, "int8", "bitsandbytes", CUDA, "bitsandbytes"),
        (FOLDER, "int4", "auto", CUDA, "bitsandbytes"),
        (GGUF, "stored", "auto", CPU, "llama_cpp"),
    ],
)
def test_the_table_chooses_and_says_why(
    path: Path, weights: str, asked: str, device: torch.device, chosen: str
) -> None:
    choice = choose(path, weights, asked, device)
    assert choice.backend == chosen and choice.is_full == (weights == "full")
    assert weights in choice.reason and device.type in choice.reason
    assert ("as teacher.backend says" in choice.reason) == (asked != "auto")


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize(
    ("path", "weights", "asked", "device", "said"),
    [
        (
            GGUF,
            "int8",
            "auto",
            CPU,
            "int8 of a GGUF file on cpu: no backend serves it. Set teacher.weights: stored",
        ),
        (FOLDER, "stored", "auto", CPU, "stored is for a GGUF file"),
        (GGUF, "stored", "auto", CUDA, "on cuda: no backend serves it. Set train.device: cpu"),
        (
            FOLDER,
            "int4",
            "torchao",
            CPU,
            "it serves int8. Set teacher.weights: int8, or teacher.backend: auto.",
        ),
        (
            FOLDER,
            "full",
            "llama_cpp",
            CPU,
            "llama_cpp does not serve teacher.weights: full; it serves stored",
        ),
    ],
)
def test_what_no_row_serves_is_one_line(
    path: Path, weights: str, asked: str, device: torch.device, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        choose(path, weights, asked, device)


def test_a_library_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"int8 .* torchao, which is not installed.*pip install 'potstill\[quantised"
    ):
        choose(FOLDER, "int8", "auto", CPU)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("weights: int8, sharded: true", "teacher.sharded: weights: int8"),
        ("reference: elsewhere", "teacher.reference"),
        ("weights: int3", "teacher.weights"),
    ],
)
def test_wrong_fields_are_refused(
    teacher: str,
    said: str,
    tiny_recipe: Callable[..., Path],
    teacher_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tiny_recipe(teacher=f"{{name: torch, model: {teacher_folder}, {teacher}}}")
    assert main.main(["check", str(recipe)]) == 2
    assert said in capsys.readouterr().err


@needs("torchao")
def test_int8_is_each_row_rounded_to_its_own_scale(teacher_folder: Path) -> None:
    """The codes beside numpy's; the logits beside the library's own forward with what the codes stand for."""
    ids_BT = torch.arange(24).reshape(2, 12)
    teacher = TorchTeacher.for_inference(teacher_folder, device="cpu", weights="int8", backend="torchao")
    packed = dict(teacher.model.hf.named_parameters())
    hf = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    for name, linear in hf.named_modules():
        if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
            continue
        found, matrix = packed[f"{name}.weight"], linear.weight.detach().numpy().astype(np.float64)
        scale = np.abs(matrix).max(1, keepdims=True) / 127.5
        codes, theirs = np.clip(np.rint(matrix / scale), -128, 127), found.qdata.numpy().astype(np.float64)
        # A number that lies in the middle of two is rounded apart by float32 and float64.
        assert np.abs(codes - theirs).max() <= 1 and (codes != theirs).mean() < 0.01
        assert np.allclose(found.scale.numpy(), scale, rtol=1e-6)
        linear.weight.data = torch.from_numpy(theirs * scale).float()
    with torch.no_grad():
        expected_BTV = hf(input_ids=ids_BT).logits
    assert float((teacher.logits_per_position(ids_BT) - expected_BTV).abs().max()) < 1e-4


@pytest.mark.parametrize(("weights", "backend"), PACKED)
def test_a_student_learns_from_fewer_bits_and_the_receipt_says_what_they_cost(
    weights: str, backend: str, tiny_recipe: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {teacher_folder}, weights: {weights}, backend: {backend}}}"
    )
    assert main.main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == 0
    teacher = json.loads((tmp_path / "run" / "receipt.json").read_text())["teacher"]
    assert teacher["runs_on"]["backend"] == backend and teacher["runs_on"]["weights"] == weights
    assert teacher["unchanged_by_training"] is True
    lost = teacher["fewer_bits"]
    assert 0 < lost["kl"] < 3 and 0 < lost["agreement"] <= 1
    assert lost["weight_bytes"] < lost["full_weight_bytes"]
    full = TorchTeacher.for_inference(teacher_folder, device="cpu")
    assert lost["full_weight_bytes"] == weight_bytes(full.model)


@pytest.mark.parametrize(("weights", "backend"), PACKED)
def test_hash_and_size_have_the_scales_in_them(
    weights: str, backend: str, teacher_folder: Path, tmp_path: Path
) -> None:
    """A matrix twice as large has the same codes, and scales twice as large."""
    doubled = load.load_causal_lm(teacher_folder)
    with torch.no_grad():
        doubled.hf.model.layers[0].mlp.down_proj.weight.mul_(2)
    doubled.save(tmp_path / "doubled")
    TorchTeacher.for_inference(teacher_folder, device="cpu").tokenizer.save_pretrained(tmp_path / "doubled")
    ours, again, other = (
        TorchTeacher.for_inference(path, device="cpu", weights=weights, backend=backend)
        for path in (teacher_folder, teacher_folder, tmp_path / "doubled")
    )
    before, logits_BTV = ours.weights_sha256(), ours.logits_per_position(torch.arange(40)[None])
    assert ours.weights_sha256() == before == again.weights_sha256() != other.weights_sha256()
    assert torch.equal(ours.logits_per_position(torch.arange(40)[None]), logits_BTV)  # hashing moved nothing
    linears = [m for m in doubled.hf.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    whole = sum(linear.weight.numel() for linear in linears)
    rows = sum(linear.out_features for linear in linears)
    kept = 4 * (sum(p.numel() for p in doubled.hf.parameters()) - whole)
    packed = {"int8": whole + 4 * rows, "int4": whole // 2 + 4 * (whole // 64)}[weights]
    assert kept + packed <= weight_bytes(ours.model) < 1.25 * (kept + packed)  # a table of 16 floats in each


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"num_hidden_layers": 2}, "has num_hidden_layers 2, the teacher 4"), ({"vocab_size": 300}, "vocab")],
)
@needs("torchao")
def test_full_weights_of_another_model_are_one_line(
    changes: dict[str, int],
    said: str,
    tiny_recipe: Callable[..., Path],
    teacher_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = conftest.make_model(tmp_path / "other", **changes)
    teacher = f"{{name: torch, model: {teacher_folder}, weights: int8, reference: {other}}}"
    assert main.main(["check", str(tiny_recipe(teacher=teacher))]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "teacher.reference" in told and said in told


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize(("weights", "module"), [("int8", "torchao.quantization"), ("stored", "xllamacpp")])
def test_a_library_that_cannot_be_imported_is_one_line(
    weights: str, module: str, teacher_folder: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    source = gguf if weights == "stored" else teacher_folder
    with pytest.raises(
        UserError, match=f"teacher.weights: {weights}: {module.split('.')[0]} cannot be imported"
    ):
        TorchTeacher.for_inference(source, device="cpu", weights=weights)


@needs("torchao")
def test_the_loss_of_bits_is_that_of_an_independent_computation(
    tiny_recipe: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    from potstill.build.setup import set_up
    from potstill.recipe.load import load as load_recipe
    from potstill.teachers.quantization_gap import quantization_gap

    recipe = tiny_recipe(teacher=f"{{name: torch, model: {teacher_folder}, weights: int8}}")
    setup = set_up(resolve(load_recipe(recipe)), lambda text: None)
    batch = setup.corpus.heldout.batch([0, 1])
    assert isinstance(setup.teacher, TorchTeacher)
    full = TorchTeacher.for_inference(teacher_folder, device="cpu")
    p_NV, q_NV = (log_softmax(of, batch) for of in (full, setup.teacher))
    kl = float((np.exp(p_NV) * (p_NV - q_NV)).sum(1).mean())
    found = quantization_gap(setup.teacher, full, "full", batch, setup.shared.ids)
    assert found.kl == pytest.approx(kl, rel=1e-3, abs=1e-9) and found.kl > 0
    assert found.agreement == pytest.approx(float((p_NV.argmax(1) == q_NV.argmax(1)).mean()))
    assert found.positions == len(batch.positions_N)


def log_softmax(teacher: TorchTeacher, batch: Batch) -> np.ndarray[Any, Any]:
    """Each document by itself, in numpy."""
    hidden_NE = teacher.targets(batch).hidden_NE.numpy().astype(np.float64)
    logits_NV = hidden_NE @ teacher.model.head.weight_VD.numpy().astype(np.float64).T
    logits_NV -= logits_NV.max(1, keepdims=True)
    return np.asarray(logits_NV - np.log(np.exp(logits_NV).sum(1, keepdims=True)))


@needs("torchao")
def test_a_teacher_farther_from_itself_than_the_student_is_red(
    tiny_recipe: Callable[..., Path], teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The student is the teacher's own full weights, but for a hair: nothing but the rounding is left."""
    near = teacher_folder.parent / "near"
    model = load.load_causal_lm(teacher_folder)
    with torch.no_grad():
        model.hf.model.norm.weight.mul_(1.0001)
    model.save(near)
    TorchTeacher.for_inference(teacher_folder, device="cpu").tokenizer.save_pretrained(near)
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {teacher_folder}, weights: int8}}",
        student=f"{{name: checkpoint, model: {near}}}",
    )
    assert main.main(["check", str(recipe)]) == 2
    told = capsys.readouterr()
    assert "teacher's bits" in told.out + told.err and "Take more bits" in told.out + told.err


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers whose matrices are 8 bits each in the file."""
    place = tmp_path_factory.mktemp("gguf") / "run"
    run = make_run(place, make_model("llama"), make_tokenizer("gpt-2"))
    return run.path / export_run(run.path, formats=["q8_0"], check=False).records[0]["file"]


@needs_llama_cpp
def test_llama_cpp_s_hidden_states_are_those_of_the_model_in_the_file(gguf: Path, tmp_path: Path) -> None:
    """Packed documents, padded rows and single ones, beside the same file read by Transformers."""
    shutil.copy(gguf, tmp_path / "other.gguf")
    stored, again = (
        TorchTeacher.for_inference(path, device="cpu", weights="stored", tokens=64)
        for path in (gguf, tmp_path / "other.gguf")
    )
    full = TorchTeacher.for_inference(gguf, device="cpu")
    assert stored.vocab.tokens == full.vocab.tokens and stored.vocab_size == full.vocab_size
    ids_BT = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    positions_BT = torch.cat([torch.arange(7), torch.arange(13)]).expand(2, -1)
    batch = Batch(torch.arange(2), ids_BT, positions_BT, torch.arange(40), ids_BT.flatten())
    ours_NE, theirs_NE = (of.targets(batch).hidden_NE for of in (stored, full))
    # llama.cpp rounds what a matrix is multiplied with to 8 bits, too; a wrong document or place is far off.
    assert float((ours_NE - theirs_NE).norm() / theirs_NE.norm()) < 0.05
    assert stored.weights_sha256() == again.weights_sha256()  # of the same bytes, whatever they are called
    with pytest.raises(UserError, match="a document of 65 tokens"):
        stored.logits_for_batch(torch.zeros(1, 65, dtype=torch.int64))
    mask_BT = torch.ones(2, 20, dtype=torch.bool)
    mask_BT[0, :5] = False
    padded_BV = stored.logits_for_batch(ids_BT, mask_BT)
    torch.testing.assert_close(padded_BV[:1], stored.logits_for_batch(ids_BT[:1, 5:]))
    torch.testing.assert_close(padded_BV[1:], stored.logits_for_batch(ids_BT[1:]))


@needs_llama_cpp
def test_a_student_is_cut_from_and_taught_by_a_stored_teacher(
    gguf: Path, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {gguf}, weights: stored}}", student="{name: cut, layers: 1}"
    )
    assert main.main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == 0
    teacher = json.loads((tmp_path / "run" / "receipt.json").read_text())["teacher"]
    assert teacher["runs_on"]["backend"] == "llama_cpp" and teacher["unchanged_by_training"] is True
    assert 0 < teacher["fewer_bits"]["kl"] < 0.05
    assert main.main(["capture", str(recipe), "--out", str(tmp_path / "store")]) == 0
    from_store = ["teacher={name: store, path: " + str(tmp_path / "store") + "}"]
    assert main.main(["distill", str(recipe), "--out", str(tmp_path / "again"), *from_store]) == 0


@needs_llama_cpp
def test_an_answer_for_fewer_tokens_is_refused(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = TorchTeacher.for_inference(gguf, device="cpu", weights="stored", tokens=64)
    loads = json.load
    monkeypatch.setattr(
        llama_cpp.json,
        "load",
        lambda file: [one | {"embedding": one["embedding"][1:]} for one in loads(file)],
    )
    with pytest.raises(UserError, match="answered for 5 tokens of 6"):
        stored.logits_for_batch(torch.arange(6)[None])


def test_one_file_of_several_is_refused_because_no_hash_would_know_the_others(
    gguf: Path, tmp_path: Path
) -> None:
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    part = tmp_path / "m-00001-of-00003.gguf"
    count = {Keys.Split.LLM_KV_SPLIT_COUNT: MetadataDetails(GGUFValueType.UINT16, 3)}
    copy_with_new_metadata(GGUFReader(gguf), GGUFWriter(part, "llama"), count, [])
    with pytest.raises(UserError, match=r"m-00001-of-00003\.gguf: one of 3 files of a model.*--merge"):
        LlamaCppLM.open(part, torch.float32, 64, "teacher")


def test_a_tensor_made_of_tensors_made_of_tensors_is_all_of_their_parts() -> None:
    class Made:
        def __init__(self, **parts: Any) -> None:
            vars(self).update(parts)

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return list(vars(self)), None

    numbers, scale, zero = torch.zeros(4, dtype=torch.int8), torch.ones(2), torch.zeros(1)
    outer: Any = Made(inner=Made(numbers=numbers, scale=scale), zero=zero)
    assert [part.data_ptr() for part in parts_of(outer)] == [t.data_ptr() for t in (numbers, scale, zero)]
