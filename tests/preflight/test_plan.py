"""The plan against what is really made: sizes of weights and files, tensors that a real step saves, and faults
that would make it wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import make_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from potstill import distill, load_recipe
from potstill.build.corpus import make_corpus as read_corpus
from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.cli.main import main
from potstill.preflight import fake_step
from potstill.preflight import plan as planning
from potstill.preflight.memory_tracker import MemoryTracker
from potstill.preflight.plan import Plan, plan
from potstill.preflight.plan_advice import advice
from potstill.preflight.plan_disk import TOKENIZER_FILE_BYTES_PER_ID
from potstill.recipe.load import Recipe

Write = Callable[..., Path]
SHAPE = {
    "corpus": "{{name: text, path: {corpus}, tokens_per_row: 64, heldout_rows: 2}}",
    "train": "{steps: 6, rows_per_step: 8, lr: 1e-3, device: cpu, save_every: 2}",
}


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 1.2 M parameters: large beside the files and tensors that are not counted to the byte."""
    folder = tmp_path_factory.mktemp("wide") / "teacher"
    return make_model(folder, hidden_size=128, intermediate_size=384, initializer_range=0.02)


@pytest.fixture
def wide(tiny_recipe: Write, wide_folder: Path, corpus_folder: Path) -> Callable[..., Path]:
    def write(**sections: str) -> Path:
        shape = {
            name: text.format(corpus=corpus_folder) if "{{" in text else text for name, text in SHAPE.items()
        }
        return tiny_recipe(**{"teacher": f"{{name: torch, model: {wide_folder}}}", **shape, **sections})

    return write


def changed(recipe: Recipe, section: str, **fields: Any) -> Recipe:
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **fields)})


def differing(found: Plan, setup: RunSetup) -> list[str]:
    """Parts of a plan that are not the sizes of the models which the run made."""
    size = {
        name: sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
        for name, model in (("teacher", setup.teacher.model), ("student", setup.student.model))
    }
    weights = sum(p.nbytes for p in setup.student.parameters())
    wanted = {**size, "optimizer": 2 * weights, "gradients": weights}
    seen = {**found.parts, "gradients": found.largest["gradients"]}
    return [name for name, bytes_ in wanted.items() if abs(seen[name] - bytes_) > 0.01 * bytes_]


@pytest.mark.parametrize("width", [None, 100])
def test_weights_moments_and_gradients_are_those_of_the_real_models(width: int | None, wide: Write) -> None:
    recipe = changed(load_recipe(wide()), "student", ffn_width=width)
    found, setup = plan(resolve(recipe)), set_up(resolve(recipe), lambda text: None)
    assert differing(found, setup) == []
    weights = sum(p.nbytes for p in setup.student.parameters())
    assert found.student_disk_bytes - weights == TOKENIZER_FILE_BYTES_PER_ID * 258


@pytest.mark.parametrize("part", ["teacher", "student", "optimizer"])
def test_a_plan_that_forgets_a_part_is_seen(part: str, wide: Write) -> None:
    recipe = load_recipe(wide())
    forgetful = dataclasses.replace(plan(resolve(recipe)), **{part: 0})
    assert differing(forgetful, set_up(resolve(recipe), lambda text: None)) == [part]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_what_a_real_forward_saves(checkpointing: bool, precision: str, wide: Write) -> None:
    train = {"activation_checkpointing": checkpointing, "precision": precision}
    recipe = changed(load_recipe(wide(objective="{chunk: 512}")), "train", **train)
    setup = set_up(resolve(recipe), lambda text: None)
    batch = setup.corpus.train.batch(range(8))
    weights = {p.untyped_storage().data_ptr() for p in setup.student.parameters()}
    saved: dict[int, tuple[int, Any]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    setup.student.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_ND = setup.student.hidden_ND(batch)
    counted = sum(size for size, _ in saved.values())
    beside = 2 * hidden_ND.nbytes  # the student's and the teacher's at the supervised positions
    fields = (getattr(batch, f.name) for f in dataclasses.fields(batch))
    beside += sum(field.nbytes for field in fields if isinstance(field, torch.Tensor))
    found = plan(resolve(recipe))
    if checkpointing:  # layers' inputs are kept, and the peak may be in the way back
        assert found.largest["activations"] >= counted
        assert (
            counted
            < 0.3 * plan(resolve(changed(recipe, "train", activation_checkpointing=False))).activations
        )
    else:
        assert found.phase == "training step"
        assert found.activations == pytest.approx(counted + beside, rel=0.08)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_full_weights_are_beside_the_packed_ones_before_the_first_step(weights: str, wide: Write) -> None:
    """Where the step itself needs little: one row at a time, and no moments."""
    recipe = load_recipe(wide(train="{steps: 2, rows_per_step: 1, lr: 1e-3, device: cpu, optimizer: sgd}"))
    full = set_up(resolve(recipe), lambda text: None).teacher
    found = plan(resolve(changed(recipe, "teacher", weights=weights)))
    bytes_ = sum(p.nbytes for p in full.model.parameters())
    packed = found.largest["teacher"] - bytes_
    assert 0.1 * bytes_ < packed < 0.6 * bytes_
    step = plan(resolve(recipe))
    assert step.largest["teacher"] == pytest.approx(bytes_, rel=0.05)
    if weights == "int8":  # the larger of the two
        assert found.phase == "checking the teacher"


class Counting(TorchDispatchMode):
    """Shows a tracker the tensors of a real step, whose numbers and kernels are the real ones."""

    def __init__(self, tracker: MemoryTracker) -> None:
        super().__init__()
        self.tracker = tracker

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.tracker.track(leaf)
        return out


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "mixtral"])
def test_a_step_without_data_holds_what_the_same_step_with_data_holds(kind: str) -> None:
    """Byte for byte, forwards and backwards, also where experts are routed."""
    shape: dict[str, Any] = {"vocab_size": 200, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **shape)
    else:
        shape |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        made = {"qwen2": transformers.Qwen2Config, "mixtral": transformers.MixtralConfig}[kind]
        config = made(**shape, **({"num_local_experts": 4} if kind == "mixtral" else {}))

    def step(counting: Any) -> None:
        hf = transformers.AutoModelForCausalLM.from_config(config).base_model
        ids_BT = torch.arange(128).reshape(2, 64) % 200
        positions_BT = torch.arange(32).repeat(2).expand(2, 64).contiguous()
        with counting:
            hf(
                input_ids=ids_BT, position_ids=positions_BT, use_cache=False
            ).last_hidden_state.sum().backward()

    real, fake = MemoryTracker(), MemoryTracker()
    step(Counting(real))
    with FakeTensorMode():
        step(fake)
    assert fake.largest["activations"] == real.largest["activations"] > 0


def test_blocks_that_glibc_maps_by_themselves_are_not_kept() -> None:
    tracker, at_most = MemoryTracker(), 2**23  # in float32: 32 MiB
    with FakeTensorMode(), tracker:
        kept, mapped = torch.empty(at_most), torch.empty(at_most + 1)
        assert tracker.on_heap == tracker.on_heap_at_peak == 2**25
        del kept
        assert tracker.on_heap == 0 and tracker.on_heap_at_peak == 2**25
    assert mapped.numel() > at_most


def test_smaller_chunks_and_micro_batches_need_less(wide: Write) -> None:
    recipe = load_recipe(wide())
    chunks = [
        plan(resolve(changed(recipe, "objective", chunk=chunk))).largest["loss_chunk"] for chunk in (64, 256)
    ]
    assert chunks == sorted(set(chunks))
    rows = [plan(resolve(changed(recipe, "train", rows_per_micro_batch=rows))).activations for rows in (2, 4)]
    assert rows == sorted(set(rows))


def test_the_gradients_of_earlier_micro_batches_are_there(wide: Write) -> None:
    recipe = load_recipe(wide())
    alone = plan(resolve(recipe))
    assert alone.gradients < 0.2 * alone.student  # they grow while activations go
    several = plan(resolve(changed(recipe, "train", rows_per_micro_batch=4)))
    assert several.gradients == pytest.approx(several.student, rel=0.01)


def test_advice_lowers_the_peak_and_is_what_a_plan_of_it_says(wide: Write) -> None:
    path = wide(objective="{chunk: 512}")
    now = plan(resolve(load_recipe(path)))
    told = advice(resolve(load_recipe(path)), now)
    fields = {setting.split("=")[0] for change in told for setting in change.settings}
    assert {"train.rows_per_micro_batch", "objective.chunk", "train.activation_checkpointing"} <= fields
    assert all(change.peak_bytes < now.peak_bytes for change in told)
    assert told[-1].peak_bytes == min(change.peak_bytes for change in told)
    again = dataclasses.replace(plan(resolve(load_recipe(path, told[0].settings))), libraries=now.libraries)
    assert again.peak_bytes == told[0].peak_bytes


def test_advice_turns_a_field_as_little_as_makes_the_run_fit(wide: Write) -> None:
    recipe = load_recipe(wide(objective="{chunk: 512}"))
    now = plan(resolve(recipe))

    def peak(rows: int) -> int:
        then = plan(resolve(changed(recipe, "train", rows_per_micro_batch=rows)))
        return dataclasses.replace(then, libraries=now.libraries).peak_bytes

    first, *others = advice(resolve(recipe), now, peak(2))
    assert first.fits and all(len(change.settings) == 1 for change in (first, *others))
    told = {change.settings[0]: change for change in (first, *others)}
    assert told["train.rows_per_micro_batch=2"].fits and peak(4) > peak(2)
    assert told["train.rows_per_micro_batch=2"].peak_bytes == peak(2)


def test_advice_puts_changes_together_where_none_alone_suffices(wide: Write, wide_folder: Path) -> None:
    path = wide(objective="{chunk: 512}", teacher=f"{{name: torch, model: {wide_folder}, dtype: bfloat16}}")
    path.write_text(path.read_text().replace("save_every: 2", "precision: bfloat16, return_memory: true"))
    recipe = load_recipe(path)
    now = plan(resolve(recipe))
    *alone, every = advice(resolve(recipe), now)
    memory = every.peak_bytes + 2**16
    assert memory < min(change.peak_bytes for change in alone)
    *alone, together = advice(resolve(recipe), now, memory)
    assert together.fits and not any(change.fits for change in alone) and len(together.settings) > 1
    again = dataclasses.replace(plan(resolve(load_recipe(path, together.settings))), libraries=now.libraries)
    assert again.peak_bytes == together.peak_bytes <= memory


@pytest.mark.parametrize(
    ("huge", "said"),
    [
        (["train.rows_per_step=100000000"], "train.rows_per_micro_batch="),
        (["train.rows_per_step=2147483647", "corpus.tokens_per_row=512"], "Set it to 1, and corpus.tokens"),
        (["corpus.tokens_per_row=2147483647"], "student was made for 512 at most"),
    ],
)
def test_sizes_that_no_machine_has_are_told_in_numbers(
    huge: list[str],
    said: str,
    wide: Write,
    wide_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a list of a billion rows, and without a number that has left its 64 bits."""
    teacher, student = "{name: fixture, vocab_size: 258}", f"{{name: checkpoint, model: {wide_folder}}}"
    done = ["train.precision=bfloat16", "train.return_memory=true", "train.activation_checkpointing=true"]
    path = wide(teacher=teacher, student=student, objective="{chunk: 16}")
    assert main(["plan", str(path), *done, *huge]) == 2
    told = capsys.readouterr()
    assert said in told.out + told.err and "Traceback" not in told.err
    assert not re.search(r" -\d", told.out)
    assert ("does not fit" in told.out) == (len(huge) == 1 and "rows_per_step" in huge[0])


@pytest.mark.parametrize(
    "optimizer",
    [
        "muon",
        "adamw, ema: 0.9",
        pytest.param("adamw", marks=pytest.mark.soak),
        pytest.param("sgd", marks=pytest.mark.soak),
    ],
)
def test_disk_is_what_a_run_leaves(optimizer: str, wide: Write, tmp_path: Path) -> None:
    train = f"{{steps: 6, rows_per_step: 2, lr: 1e-3, device: cpu, save_every: 2, optimizer: {optimizer}}}"
    path = wide(train=train)
    run = distill(path, out=tmp_path / "run")
    left = [f for of in (run.student, run.checkpoints) for f in of.rglob("*") if f.is_file()]
    found = plan(resolve(load_recipe(path)))
    assert found.disk_bytes == pytest.approx(sum(f.stat().st_size for f in left), rel=0.03)
    assert found.disk_peak_bytes >= found.disk_bytes + found.checkpoint_disk_bytes


def test_shards_are_counted_on_the_disk_until_they_are_there(wide: Write, tmp_path: Path) -> None:
    (tmp_path / "ids").mkdir()
    generator = np.random.default_rng(0)
    generator.integers(3, 250, 200_000).astype(np.uint16).tofile(tmp_path / "ids" / "a.bin")
    kept = tmp_path / "kept"
    corpus = f"name: tokens, path: {tmp_path / 'ids'}, dtype: uint16, tokens_per_row: 64, heldout_rows: 4"
    without = plan(resolve(load_recipe(wide(corpus=f"{{{corpus}}}"))))
    recipe = load_recipe(wide(corpus=f"{{{corpus}, shards: {kept}}}"))
    found = plan(resolve(recipe))
    read_corpus(resolve(recipe))
    written = sum(file.stat().st_size for file in kept.iterdir())
    assert found.shards_disk_bytes == pytest.approx(written, rel=0.15)
    assert found.disk_bytes - without.disk_bytes == found.shards_disk_bytes
    assert plan(resolve(recipe)).disk_bytes == without.disk_bytes


def test_what_is_known_already_is_not_traced_again(wide: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[Recipe] = []
    whole = fake_step._trace
    monkeypatch.setattr(fake_step, "_known", {})
    monkeypatch.setattr(
        fake_step, "_trace", lambda recipe, *rest: traces.append(recipe) or whole(recipe, *rest)
    )
    first = plan(resolve(load_recipe(wide())))
    again = plan(resolve(load_recipe(wide(), ["train.lr=0.5", "train.seed=7", "train.steps=500"])))
    assert len(traces) == 1 and again.parts.items() - first.parts.items() <= {("libraries", again.libraries)}
    for change in (
        "train.rows_per_step=9",
        "objective.chunk=8",
        "teacher.dtype=bfloat16",
        "student.layers=1",
    ):
        plan(resolve(load_recipe(wide(), [change])))
    assert len(traces) == 5


def test_no_weight_is_read_and_no_random_number_is_drawn(wide: Write, tmp_path: Path) -> None:
    transformers.AutoConfig.for_model("llama").save_pretrained(tmp_path / "config")
    make_model(tmp_path / "bare", with_tokenizer=False)
    (tmp_path / "bare" / "model.safetensors").unlink()
    state = torch.get_rng_state()
    found = plan(resolve(load_recipe(wide(teacher=f"{{name: torch, model: {tmp_path / 'bare'}}}"))))
    assert found.teacher > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_seven_billion_parameters_are_planned_on_a_small_machine(wide: Write, tmp_path: Path) -> None:
    folder = tmp_path / "7b"
    transformers.Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    found = plan(resolve(load_recipe(wide(teacher=f"{{name: torch, model: {folder}, dtype: bfloat16}}"))))
    assert found.teacher == pytest.approx(2 * 7.616e9, rel=0.001)  # its card says 7.61 B
    assert found.student > 0.4 * 2 * found.teacher / 28


@pytest.mark.parametrize("name", ["fixture", "table"])
def test_a_teacher_without_weights_of_a_config(
    name: str, wide: Write, wide_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file({"logits": torch.zeros(258, 258)}, tmp_path / "table.safetensors")
    teachers = {"fixture": "vocab_size: 258", "table": f"path: {tmp_path / 'table.safetensors'}"}
    student = f"{{name: checkpoint, model: {wide_folder}}}"
    found = plan(resolve(load_recipe(wide(teacher=f"{{name: {name}, {teachers[name]}}}", student=student))))
    assert found.teacher == (258 * 258 * 4 if name == "table" else 0)


def test_the_verb_prints_a_table_and_says_whether_it_fits(
    wide: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(wide())
    assert main(["plan", recipe]) == 0
    told = capsys.readouterr().out
    assert all(part in told for part in planning.PARTS) and "it fits" in told and "not measured" in told
    monkeypatch.setattr(planning, "available", lambda recipe, folder: (2**20, 2**10))
    done = ["train.activation_checkpointing=true", "train.precision=bfloat16", "teacher.dtype=bfloat16"]
    assert main(["plan", recipe, *done]) == 2
    told = capsys.readouterr().out
    assert "does not fit" in told and "train.rows_per_micro_batch=1" in told and "the disk lacks" in told
    assert main(["plan", recipe, *done, "objective.chunk=16", "--json"]) == 2
    as_json = json.loads(capsys.readouterr().out)
    assert not as_json["fits"] and as_json["advice"][0]["peak_bytes"] < as_json["peak_bytes"]


def test_after_assembly_rows_and_tokenizer_are_measured(wide: Write) -> None:
    recipe = load_recipe(wide())
    setup = set_up(resolve(recipe), lambda text: None)
    found = plan(setup.resolved, is_set_up=True)
    assert found.corpus == 0
    assert found.libraries + found.teacher + found.student == pytest.approx(
        planning.resident_bytes(), rel=0.05
    )


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    (tmp_path / "memory.stat").write_text("anon 3000\nfile 5000\n")
    assert planning._container_left(tmp_path) > 2**60
    (tmp_path / "memory.max").write_text("max\n")
    assert planning._container_left(tmp_path) > 2**60
    (tmp_path / "memory.max").write_text("10000\n")
    assert planning._container_left(tmp_path) == 7000


def test_what_a_run_has_on_its_device_already_is_available_to_it(
    wide: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "choose_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2000)
    assert planning.available(load_recipe(wide()), Path())[0] == 5000


def test_a_measured_plan_has_a_time(wide: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(wide()), "--measure", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["time_s"] > 0


def test_freed_tensors_go_back_to_the_system() -> None:
    """Once glibc has freed a large block it keeps smaller ones: the peak of a run would follow no plan. In a
    process of its own, whose heap nobody has filled.
    """
    program = (
        "import torch; from potstill.build.setup import return_freed_memory; from potstill.preflight import plan\n"
        "return_freed_memory()\n"
        "del_me = [torch.ones(31 * 2**18)]; del_me.clear()\n"
        "blocks = [torch.ones(2**18) for _ in range(128)]  # 1 MiB each\n"
        "full = plan.resident_bytes()\n"
        "del blocks[::2]\n"
        "print(full - plan.resident_bytes() > 48 * 2**20)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
