"""LoRA students: what is trained, saved, merged and resumed, through the public entry point."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_mixture
from safetensors.torch import load_file

from potstill import distill
from potstill.cli.main import main
from potstill.runs.run_dir import RunDir

peft = pytest.importorskip("peft", reason="the extra lora is not installed; not run")

Recipe = Callable[..., Path]
CUT = "{name: cut, layers: 2, rule: first_last, repair: false, lora: {rank: 4, alpha: 8, targets: [q_proj, down_proj]}}"
TRAIN = "{steps: 6, rows_per_step: 2, lr: 1e-2, save_every: 2, device: cpu}"


def logits(model: Any) -> torch.Tensor:
    ids_BT = torch.arange(2, 34).reshape(2, 16)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids_BT).logits
    return found


@pytest.fixture
def folder(tiny_recipe: Recipe, tmp_path: Path) -> Path:
    return distill(tiny_recipe(student=CUT, train=TRAIN), out=tmp_path / "run").path


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_a_run_trains_adapters_alone_and_saves_the_merged_model_and_them(
    folder: Path, teacher_folder: Path
) -> None:
    receipt = json.loads((folder / "receipt.json").read_text())
    lora = receipt["student"]["lora"]
    # Two layers of a Llama with 32 wide hidden states: q_proj is 32 x 32, down_proj 32 x 64.
    assert lora["trainable_weights"] == 2 * (4 * (32 + 32) + 4 * (64 + 32)) and lora["matrices"] == 4
    assert receipt["heldout_last"]["heldout/kl"] < receipt["heldout_first"]["heldout/kl"]
    assert {"adapter_config.json", "adapter_model.safetensors"} < set(receipt["adapter"])

    student = transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    untouched = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
    untouched.model.layers = untouched.model.layers[:1].append(untouched.model.layers[-1])
    for number, layer in enumerate(untouched.model.layers):
        layer.self_attn.layer_idx = number
    before, after = dict(untouched.named_parameters()), dict(student.named_parameters())
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    wanted = {f"self_attn.{end}" for end in ("q_proj.weight",)} | {"mlp.down_proj.weight"}
    assert changed == {f"model.layers.{n}.{end}" for n in (0, 1) for end in wanted}
    # The head is still the embedding, in memory and on the disk.
    assert student.lm_head.weight is student.model.embed_tokens.weight
    kept = load_file(folder / "student" / "model.safetensors")
    assert "lm_head.weight" not in kept and not any("lora" in name for name in kept)

    with_adapter = peft.PeftModel.from_pretrained(untouched, folder / "adapter")
    apart = (logits(with_adapter) - logits(student)).abs().max()
    assert apart < 1e-5 * logits(student).abs().max()


def adapter_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter" / "adapter_config.json").read_text()))


def test_an_adapter_of_a_cut_student_names_the_cut_and_no_place(folder: Path, teacher_folder: Path) -> None:
    config = adapter_config(folder)
    assert config["base_model_name_or_path"] == f"{teacher_folder.name} cut to layers 0, 3"
    assert config["revision"] is None
    assert not any(
        str(teacher_folder.parent) in file.read_text("latin-1") for file in folder.glob("adapter/*")
    )


def test_an_adapter_of_a_folder_names_the_folder_alone(
    tiny_recipe: Recipe, teacher_folder: Path, tmp_path: Path
) -> None:
    student = f"{{name: checkpoint, model: {teacher_folder}, lora: {{rank: 2, targets: [q_proj]}}}}"
    train = "{steps: 1, rows_per_step: 2, lr: 1e-2, device: cpu}"
    run = distill(tiny_recipe(student=student, train=train, allow_identical="true"), out=tmp_path / "run")
    assert adapter_config(run.path)["base_model_name_or_path"] == teacher_folder.name
    for saved in (*run.adapter.iterdir(), *run.student.iterdir()):
        assert str(teacher_folder) not in saved.read_text("latin-1"), saved.name
    assert peft.PeftConfig.from_pretrained(run.adapter).base_model_name_or_path == teacher_folder.name


def test_a_checkpoint_holds_the_adapters_and_resuming_is_exact(
    tiny_recipe: Recipe, folder: Path, tmp_path: Path
) -> None:
    kept = load_file(folder / "checkpoints" / "00000006" / "tensors.safetensors")
    assert all("lora_" in name for name in kept if name.startswith("weights/"))
    assert sum(name.startswith("weights/") for name in kept) == 8

    class Stop(Exception):
        pass

    recipe = tiny_recipe(student=CUT, train=TRAIN)
    log = RunDir.log

    def killed(self: RunDir, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if step == 5 and "train/loss" in metrics:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(RunDir, "log", killed)
        distill(recipe, out=tmp_path / "cut-off")
    resumed = distill(recipe, out=tmp_path / "cut-off", resume=True)
    for name in ("student/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (resumed.path / name).read_bytes() == (folder / name).read_bytes(), name
    losses = [
        [metrics["train/loss"] for metrics in run.metrics() if "train/loss" in metrics]
        for run in (resumed, RunDir(folder))
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_resuming_with_other_adapters_is_refused(
    tiny_recipe: Recipe, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_recipe(student=CUT.replace("rank: 4", "rank: 8"), train=TRAIN)
    assert main(["distill", str(other), "--resume", "--out", str(folder)]) == 2
    assert "student.lora.rank (4 -> 8)" in capsys.readouterr().err


def test_check_runs_two_steps_as_the_first_reaches_only_b(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tiny_recipe(student=CUT, train=TRAIN))]) == 0
    output = capsys.readouterr().out
    assert "8 of 8 tensors moved in the first 2 steps, 8 have a gradient; 0 of" in output


def test_activation_checkpointing_changes_no_gradient_of_an_adapter(
    tiny_recipe: Recipe, folder: Path, tmp_path: Path
) -> None:
    saving = TRAIN.replace("device", "activation_checkpointing: true, device")
    run = distill(tiny_recipe(student=CUT, train=saving), out=tmp_path / "saving")
    recomputed, plain = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (run.path, folder)
    )
    assert all(torch.allclose(recomputed[name], plain[name], atol=1e-6) for name in plain)


def test_dropout_and_alpha_change_the_result(tiny_recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    plain = load_file(folder / "adapter" / "adapter_model.safetensors")
    for number, change in enumerate(("alpha: 4", "alpha: 8, dropout: 0.5")):
        recipe = tiny_recipe(student=CUT.replace("alpha: 8", change), train=TRAIN)
        found = load_file(
            distill(recipe, out=tmp_path / str(number)).path / "adapter" / "adapter_model.safetensors"
        )
        assert any(not torch.equal(found[name], plain[name]) for name in plain)


def test_an_unknown_target_is_refused_with_the_names_that_exist(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(student="{name: cut, layers: 2, lora: {targets: [q_prj]}}")
    assert main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "student.lora.targets" in error and "'q_prj'" in error and "q_proj" in error
    assert not (tmp_path / "run").exists()


def test_all_linear_is_every_matrix_of_the_body(
    tiny_recipe: Recipe, teacher_folder: Path, tmp_path: Path
) -> None:
    student = f"{{name: checkpoint, model: {teacher_folder}, lora: {{rank: 2}}}}"
    train = "{steps: 1, rows_per_step: 2, lr: 1e-2, device: cpu}"
    recipe = tiny_recipe(student=student, train=train)
    recipe.write_text(recipe.read_text() + "allow_identical: true\n")
    lora = distill(recipe, out=tmp_path / "run").receipt()["student"]["lora"]
    assert lora["matrices"] == 4 * 7 and lora["targets"] == ["all-linear"]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("models") / "mixture")


def adapted(mixture: Path, lora: str = "rank: 4") -> str:
    return f"{{name: checkpoint, model: {mixture}, lora: {{{lora}}}}}"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_all_linear_reaches_fused_experts_and_peft_reads_them(
    tiny_recipe: Recipe, mixture: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(student=adapted(mixture), train=TRAIN)
    run = distill(recipe, out=tmp_path / "run")
    lora = run.receipt()["student"]["lora"]
    # Two layers: four projections, and two matrices of each of four experts.
    assert lora["matrices"] == 2 * (4 + 4 * 2)
    assert lora["without_adapter"] == ["mlp.gate.weight"] and 0 < lora["share_without_adapter"] < 0.01

    student = transformers.AutoModelForCausalLM.from_pretrained(run.student)
    base = transformers.AutoModelForCausalLM.from_pretrained(mixture)
    before = dict(base.named_parameters())
    experts = [name for name in before if "experts" in name]
    after = dict(student.named_parameters())
    assert len(experts) == 4 and not any(torch.equal(after[name], before[name]) for name in experts)
    with_adapter = peft.PeftModel.from_pretrained(base, run.adapter)
    apart = (logits(with_adapter) - logits(student)).abs().max()
    assert apart < 1e-5 * logits(student).abs().max()


def test_experts_adapters_are_resumed_and_recomputed_exactly(
    tiny_recipe: Recipe, mixture: Path, tmp_path: Path
) -> None:
    train = TRAIN.replace("steps: 6", "steps: 4")
    whole = distill(tiny_recipe(student=adapted(mixture), train=train), out=tmp_path / "whole")
    saving = tiny_recipe(
        student=adapted(mixture), train=train.replace("{", "{activation_checkpointing: true, ")
    )
    run, log = tmp_path / "run", RunDir.log

    def killed(self: RunDir, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if step == 3 and "train/loss" in metrics:
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(RunDir, "log", killed)
        distill(saving, out=run)
    distill(saving, out=run, resume=True)
    name = "adapter/adapter_model.safetensors"
    one, other = load_file(whole.path / name), load_file(run / name)
    assert one.keys() == other.keys() and any("experts" in key for key in one)
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


def test_experts_without_adapters_are_named(
    tiny_recipe: Recipe, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With dropout peft has none for them: most of the weights are left as they are, which is said at the start."""
    recipe = tiny_recipe(student=adapted(mixture, "rank: 4, dropout: 0.1"), train=TRAIN)
    assert main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == 0
    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("lora: "))
    assert said == (
        "lora: 88.94% of the layers' weights have no adapter: mlp.experts.down_proj, mlp.experts.gate_up_proj,"
        " mlp.gate.weight"
    )
    lora = RunDir(tmp_path / "run").receipt()["student"]["lora"]
    assert lora["matrices"] == 8 and lora["share_without_adapter"] == pytest.approx(0.8894, abs=1e-4)


@pytest.mark.parametrize(
    ("lora", "train", "error"),
    [
        ("targets: [gate_up_proj], dropout: 0.1", TRAIN, "student.lora.dropout: is 0.1"),
        ("rank: 4", TRAIN.replace("{", "{compile: true, "), "train.compile: is true, and fused experts"),
    ],
)
def test_what_experts_adapters_cannot_do_is_refused(
    tiny_recipe: Recipe,
    mixture: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    lora: str,
    train: str,
    error: str,
) -> None:
    monkeypatch.setattr("potstill.build.setup.require_compiler", lambda device: None)
    recipe = tiny_recipe(student=adapted(mixture, lora), train=train)
    assert main(["distill", str(recipe)]) == 2
    assert error in capsys.readouterr().err.splitlines()[-1]


def test_plan_and_check_run_with_experts_adapters(
    tiny_recipe: Recipe, mixture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(tiny_recipe(student=adapted(mixture), train=TRAIN))
    assert main(["plan", recipe, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main(["check", recipe]) == 0
    moved = next(line for line in capsys.readouterr().out.splitlines() if "tensors moved" in line)
    assert "24 of 24 tensors moved" in moved and "; 0 of" in moved
    weights = 2 * (4 * 4 * 32 * 2 - 2 * 4 * 16 + 4 * 4 * ((32 + 128) + (64 + 32)))
    assert planned["largest"]["gradients"] == 4 * weights


def test_the_plan_counts_gradients_and_moments_of_adapters_alone(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(student: str) -> dict[str, Any]:
        assert main(["plan", str(tiny_recipe(student=student)), "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    narrow = "layers: 2, ffn_width: 48"
    whole, lora = planned(f"{{name: cut, {narrow}}}"), planned(CUT.replace("layers: 2", narrow))
    weights = 2 * (4 * (32 + 32) + 4 * (48 + 32))
    assert lora["largest"]["gradients"] == 4 * weights < whole["largest"]["gradients"] / 4
    assert 8 * weights <= lora["largest"]["optimizer"] < 9 * weights + 100 < whole["largest"]["optimizer"] / 4
    assert lora["student"] == whole["student"] + 4 * weights  # the frozen weights are there all the same
    assert 12 * weights <= lora["checkpoint_disk_bytes"] < whole["checkpoint_disk_bytes"] / 4
