"""`DistillTrainer` takes the steps of the project's own loop: in one process, in ranks, in shards, and resumed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_mixture, make_model, make_tokenizer, tiny_config
from integrations.trainer_run import train
from ranks import ranks
from safetensors.torch import load_file
from serving import Served, serving
from torch.nn.functional import kl_div
from transformers import TrainingArguments

import potstill
from potstill import (
    BatchRollouts,
    DistillTrainer,
    RolloutsConfig,
    ServerTeacher,
    ServerTeacherConfig,
    TorchTeacher,
    UserError,
    to_batch,
)
from potstill.cli.main import main
from potstill.losses import Objective
from potstill.runs.run_dir import RunDir

PROGRAM = str(Path(__file__).parent / "trainer_run.py")
# One document a row, of very different lengths.
CORPUS = "{name: text, path: %s, tokens_per_row: 160, heldout_rows: 5, packing: false}"
TRAIN = "{steps: 20, rows_per_step: 4, rows_per_micro_batch: 2, lr: 1e-2, schedule: linear, final_lr_ratio: 1.0, device: cpu}"


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(60):
        (text / f"{number:02}.txt").write_text("the cat sat on a mat " * (1 + number * 7 % 8) + str(number))
    return tiny_recipe(
        corpus=CORPUS % text,
        student=f"{{name: checkpoint, model: {make_model(tmp_path / 'student', seed=3, num_hidden_layers=2)}}}",
        objective="{kd_weight: 0.7, ce_weight: 0.3, chunk: 16}",
        train=TRAIN,
        eval="{}",
    )


def order(recipe: Path, **options: Any) -> dict[str, Any]:
    folder = recipe.parent
    return {"recipe": str(recipe), "student": str(folder / "student"), "out": str(folder / "out")} | options


def logged(history: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in history if name in line]


def assert_equal_steps(history: list[dict[str, Any]], run: RunDir) -> None:
    lines = [line for line in run.metrics() if "train/loss" in line]
    assert len(lines) == 20
    for name in ("loss", "kd", "ce", "grad_norm"):
        assert logged(history, name) == pytest.approx([line[f"train/{name}"] for line in lines], rel=1e-5), (
            name
        )
    for name, value in run.receipt()["heldout_last"].items():
        assert logged(history, name.replace("heldout/", "eval_"))[-1] == pytest.approx(value, rel=1e-5), name


def assert_equal_weights(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() - theirs.keys() <= {"lm_head.weight"}  # which is tied, and FSDP's state has it twice
    apart = {name: float((ours[name] - tensor).norm() / tensor.norm()) for name, tensor in theirs.items()}
    assert max(apart.values()) < 1e-4, apart


@pytest.mark.usefixtures("warm_python")
def test_its_steps_are_those_of_the_own_loop_in_one_process_in_ranks_and_in_shards(
    recipe: Path, tmp_path: Path
) -> None:
    run = potstill.distill(recipe, out=tmp_path / "run")
    setup = potstill.prepare(recipe)
    positions = [[len(batch.positions_N) for batch in setup.data().step(step)] for step in range(20)]
    assert max(max(each) / min(each) for each in positions) > 3  # of the two micro-batches of a step

    trainer = train(**order(recipe, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    assert_equal_steps(trainer.state.log_history, run)
    trainer.save_model(str(tmp_path / "alone"))
    assert_equal_weights(tmp_path / "alone", run.student)

    shards = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    shards["transformer_layer_cls_to_wrap"] = ["LlamaDecoderLayer"]
    halves = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
    }
    for name, wrapper, options in (
        ("ddp", "DistributedDataParallel", {}),
        ("fsdp", "FSDPLlamaForCausalLM", {"fsdp": True, "fsdp_config": shards}),
    ):
        given = tmp_path / f"{name}.json"
        given.write_text(json.dumps(order(recipe, out=str(tmp_path / name), **halves, **options)))
        told = ranks(2, given, program=(PROGRAM,))
        assert told.count(f"wrapped: {wrapper}") == 2
        assert_equal_steps(json.loads((tmp_path / name / "logged.json").read_text()), run)
        assert_equal_weights(tmp_path / name / "student", run.student)


def test_it_resumes_and_its_checkpoints_have_nothing_of_the_teacher(recipe: Path, tmp_path: Path) -> None:
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    whole = train(**order(recipe, **sizes, save_steps=3, max_steps=6))
    folder = tmp_path / "out" / "checkpoint-3"
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == load_file(tmp_path / "student" / "model.safetensors").keys()
    assert not any("teacher" in path.name for path in folder.rglob("*"))

    teacher = whole.teacher.model
    assert teacher is not None and not any(
        p.requires_grad or p.grad is not None for p in teacher.parameters()
    )
    assert whole.teacher.weights_sha256() == potstill.prepare(recipe).teacher.weights_sha256()

    on = train(**order(recipe, **sizes, save_steps=100, max_steps=6, resume=str(folder)))
    assert logged(on.state.log_history, "loss")[3:] == logged(whole.state.log_history, "loss")[3:]
    assert logged(on.state.log_history, "kd")[3:] == logged(whole.state.log_history, "kd")[3:]
    assert logged(on.state.log_history, "eval_kl")[-1] == logged(whole.state.log_history, "eval_kl")[-1]


@pytest.mark.usefixtures("warm_python")
def test_rollouts_are_those_of_the_own_loop_in_one_process_and_in_ranks(recipe: Path, tmp_path: Path) -> None:
    """The same prompts, random numbers and weights give the same answers, so the same steps."""
    own = {"max_new_tokens": 8, "prompt_tokens": 6}
    recipe.write_text(recipe.read_text().replace("steps: 20", "steps: 5") + f"rollouts: {json.dumps(own)}\n")
    run = potstill.distill(recipe, out=tmp_path / "run")
    lines = [line for line in run.metrics() if "train/loss" in line]
    names = {"loss": "train/loss", "kd": "train/kd", "grad_norm": "train/grad_norm"}
    names |= {"rollout_tokens": "rollout/tokens", "rollout_ended": "rollout/ended"}

    def assert_equal(history: list[dict[str, Any]]) -> None:
        for ours, theirs in names.items():
            expected = [line[theirs] for line in lines]
            assert len(expected) == 5 and logged(history, ours) == pytest.approx(expected, rel=1e-5), ours
        assert not logged(history, "ce")  # no step has a position of the corpus

    seed = potstill.load_recipe(recipe).train.seed
    given = {"rollouts": own, "gradient_accumulation_steps": 2, "seed": seed}
    trainer = train(**order(recipe, per_device_train_batch_size=2, **given))
    assert_equal(trainer.state.log_history)
    given |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 2, "out": str(tmp_path / "ddp")}
    (tmp_path / "ddp.json").write_text(json.dumps(order(recipe, **given)))
    assert ranks(2, tmp_path / "ddp.json", program=(PROGRAM,)).count("wrapped: DistributedDataParallel") == 2
    assert_equal(json.loads((tmp_path / "ddp" / "logged.json").read_text()))


def test_a_share_of_rollouts_resumes_and_leaves_cross_entropy_to_the_corpus(
    recipe: Path, tmp_path: Path
) -> None:
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    sizes |= {"rollouts": {"fraction": 0.5, "max_new_tokens": 8, "prompt_tokens": 6}}
    trainer = train(**order(recipe, **sizes, save_steps=2, max_steps=6))
    whole, drawn = trainer.state.log_history, trainer.rollouts
    assert drawn is not None
    due = [[drawn.is_due(step, number) for number in (0, 1)] for step in range(6)]
    assert {True, False} <= {each for step in due for each in step} and [False, True] in due
    folder = str(tmp_path / "out" / "checkpoint-2")
    on = train(**order(recipe, **sizes, save_steps=100, max_steps=6, resume=folder)).state.log_history
    for name in ("loss", "kd", "ce", "rollout_tokens"):
        lines, later = ([line.get(name) for line in each if "loss" in line] for each in (whole, on))
        assert len(lines) == 6 and later[2:] == lines[2:], name
    # A mean of the micro-batches that are the corpus's, where there is one.
    ce = [line.get("ce") for line in whole if "loss" in line]
    assert [value is None for value in ce] == [all(each) for each in due]
    assert [line.get("rollout_tokens") is None for line in whole if "loss" in line] == [
        not any(each) for each in due
    ]
    if due[0] != [True, True]:
        setup = potstill.prepare(recipe)
        batches = [batch for batch, own in zip(setup.data().step(0), due[0], strict=True) if not own]
        with torch.no_grad():
            sums = [setup.student(batch, potstill.answer(setup.teacher, batch))["ce"] for batch in batches]
        assert ce[0] == pytest.approx(float(sum(sums)) / sum(len(b.positions_N) for b in batches), rel=1e-5)


@pytest.mark.parametrize("options", [{"bf16": True}, {"activation_checkpointing": True}])
def test_rollouts_go_with_the_options_of_a_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = trainer_of(
        tmp_path, TEXTS, rollouts=RolloutsConfig(max_new_tokens=3, prompt_tokens=2), **options
    )
    trainer.train()
    assert len(logged(trainer.state.log_history, "rollout_tokens")) == 2


def rollouts_of(tmp_path: Path, **config: Any) -> BatchRollouts:
    trainer = trainer_of(tmp_path, TEXTS, rollouts=RolloutsConfig(**config))
    assert trainer.rollouts is not None
    return trainer.rollouts


def test_a_prompt_is_what_stands_before_the_last_answer(tmp_path: Path) -> None:
    ids = [[0, 0, 40, 41, 42, 43, 44, 45], [50, 51, 52, 53, 54, 55, 56, 57]]
    inputs = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor([[0, 0, *[1] * 6], [1] * 8]),
        # A turn of one answer, and one of two.
        "labels": torch.tensor(
            [[-100, -100, -100, -100, -100, 43, 44, 45], [-100, 51, 52, -100, -100, -100, 56, 57]]
        ),
    }
    writing = rollouts_of(tmp_path, max_new_tokens=3, prompt_tokens=2)  # which is for text without turns
    batch, written = writing.write(to_batch(inputs, 258), step=4)
    assert [each.prompt.ids for each in written] == [[40, 41, 42], ids[1][:6]]
    assert batch.is_rollout and len(batch.positions_N) == sum(len(each.new) for each in written)
    assert batch.labels_N.tolist() == [token for each in written for token in each.new]
    again, other = (writing.write(to_batch(inputs, 258), step)[1] for step in (4, 5))
    assert [each.new for each in again] == [each.new for each in written] != [each.new for each in other]
    assert all(writing.is_due(step, number) for step in range(9) for number in range(3))
    third = rollouts_of(tmp_path, fraction=0.3)
    assert sum(third.is_due(step) for step in range(1000)) == pytest.approx(300, abs=45)  # three deviations


def test_text_has_the_first_tokens_for_a_prompt_and_what_has_none_is_left_out(tmp_path: Path) -> None:
    ids = torch.arange(40, 120).view(2, 40)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 20:], labels[1, 20:] = 0, -100  # shorter than a prompt is long
    batch = to_batch({"input_ids": ids, "attention_mask": mask, "labels": labels}, 258)
    writing = rollouts_of(tmp_path, max_new_tokens=3)
    own, written = writing.write(batch, step=0)
    assert [each.prompt.ids for each in written] == [ids[0, :32].tolist()] and len(own.input_ids_BT) == 1
    silent = to_batch({"input_ids": ids, "labels": torch.full_like(ids, -100)}, 258)
    own, written = writing.write(silent, step=0)
    assert own.is_rollout and not written and not len(own.positions_N)


def test_a_loop_s_model_keeps_its_mode(tmp_path: Path) -> None:
    writing = rollouts_of(tmp_path, max_new_tokens=3)
    hf = writing.student.model.hf
    batch = to_batch({"input_ids": torch.arange(40, 80)[None], "labels": torch.arange(40, 80)[None]}, 258)
    for is_training in (True, False):
        hf.train(is_training)  # and not the `Student`
        writing.write(batch, step=0)
        assert {module.training for module in hf.modules()} == {is_training}


def test_rollouts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    writing = rollouts_of(tmp_path)
    ids = torch.arange(5, 9)[None]
    packed = to_batch({"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 0, 1]])}, 258)
    with pytest.raises(UserError, match="a row has several documents"):
        writing.write(packed, step=0)
    longest = writing.longest
    assert longest == tiny_config().max_position_embeddings
    long = rollouts_of(tmp_path, prompt_tokens=2, max_new_tokens=longest - 1)
    with pytest.raises(
        UserError, match=f"rollouts.max_new_tokens: {longest - 1} behind a prompt of 2 tokens"
    ):
        long.write(to_batch({"input_ids": ids, "labels": ids}, 258), step=0)
    for field, value in (("every", 2), ("engine", "vllm"), ("truncated", "mask"), ("keep", 3)):
        with pytest.raises(UserError, match=f"rollouts.{field}: {value}"):
            rollouts_of(tmp_path, **{field: value})


def test_a_store_is_a_teacher_like_any_other(recipe: Path, tmp_path: Path) -> None:
    with recipe.open("a") as file:
        file.write("capture: {name: hidden}\n")
    assert main(["capture", str(recipe), "--out", str(tmp_path / "store")]) == 0
    live = train(**order(recipe, max_steps=3, per_device_train_batch_size=4))
    text = recipe.read_text().replace("{name: torch, model", "{name: store, path: store, model")
    stored = recipe.with_name("stored.yaml")
    stored.write_text(text)
    kept = train(**order(stored, max_steps=3, per_device_train_batch_size=4))
    assert type(kept.teacher).__name__ == "StoredTeacher"
    for name in ("loss", "eval_kl"):
        assert logged(kept.state.log_history, name) == pytest.approx(
            logged(live.state.log_history, name), rel=1e-3
        )

    with pytest.raises(UserError, match="rollouts: the teacher has no targets for text"):
        train(**order(stored, max_steps=3, rollouts={}))

    # Without the numbers of its rows a batch has no targets.
    unnumbered = potstill.to_batch(
        {"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 4).long()}, 258
    )
    with pytest.raises(UserError, match="row numbers"):
        kept.teacher.targets(unnumbered)


def trainer_of(tmp_path: Path, texts: list[list[int]], model: Any = None, **options: Any) -> DistillTrainer:
    """Of texts as ids, padded by a collator."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side = options.pop("padding", "right")
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2))
    given = {
        name: options.pop(name)
        for name in ("teacher", "compute_metrics", "processing_class", "rollouts")
        if name in options
    }
    arguments: dict[str, Any] = {
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    arguments |= {"logging_steps": 1, "max_steps": 2, "dataloader_pin_memory": False}
    return DistillTrainer(
        made if model is None else model,
        TrainingArguments(output_dir=str(tmp_path / "out"), **arguments | options),
        objective=Objective(chunk=16),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in texts],
        eval_dataset=[{"input_ids": ids, "labels": ids} for ids in texts[:3]],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        **{"teacher": TorchTeacher.of(transformers.AutoModelForCausalLM.from_config(tiny_config()))} | given,
    )


TEXTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [15]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_served_teacher_is_asked_for_texts_without_padding(
    teacher_folder: Path, tmp_path: Path, side: str
) -> None:
    """With every id of each distribution it is the model itself."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    served = Served(teacher_folder)
    with serving(served) as url:
        config = ServerTeacherConfig(url=url, model="served", tokenizer=str(teacher_folder), top_k=258)
        with contextlib.closing(ServerTeacher.open(config, tokenizer)) as teacher:
            served.requests.clear()
            far = trainer_of(tmp_path, TEXTS, teacher=teacher, processing_class=tokenizer, padding=side)
            far.train()
    asked = sorted({tuple(body["prompt"]) for _, body in served.requests if "prompt" in body})
    assert asked == sorted(tuple(ids) for ids in TEXTS if len(ids) > 1)
    near = trainer_of(
        tmp_path, TEXTS, teacher=TorchTeacher.for_inference(teacher_folder, device="cpu"), padding=side
    )
    near.train()
    ours, theirs = (logged(trainer.state.log_history, "kd") for trainer in (far, near))
    assert len(ours) == 2 and ours == pytest.approx(theirs, rel=1e-4)


def test_evaluation_is_of_positions_and_neither_of_rows_nor_of_batches(tmp_path: Path) -> None:
    for size in (1, 3):
        trainer = trainer_of(tmp_path, TEXTS, per_device_eval_batch_size=size)
        found = trainer.evaluate()["eval_kl"]
        kl, positions = 0.0, 0
        for ids in TEXTS[:3]:
            models = (trainer.model, trainer.teacher.model.hf)
            q_LV, p_LV = (each(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for each in models)
            kl += kl_div(q_LV, p_LV, reduction="sum", log_target=True).item()
            positions += len(ids) - 1
        assert found == pytest.approx(kl / positions, rel=1e-5)


def test_a_micro_batch_without_a_label_counts_for_nothing_and_a_step_without_is_refused(
    tmp_path: Path,
) -> None:
    def losses(texts: list[list[int]], **options: Any) -> list[float]:
        trainer = trainer_of(tmp_path, texts, train_sampling_strategy="sequential", max_steps=1, **options)
        trainer.train()
        return logged(trainer.state.log_history, "loss")

    with_it = losses([[5, 6, 7], [15]], per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert with_it == pytest.approx(losses([[5, 6, 7]], per_device_train_batch_size=1), rel=1e-6)
    with pytest.raises(UserError, match="step 1: no position"):
        losses([[15], [15]], per_device_train_batch_size=2)


def test_bfloat16_is_that_of_the_body_and_the_head(tmp_path: Path) -> None:
    exact, rounded = trainer_of(tmp_path, TEXTS), trainer_of(tmp_path, TEXTS, bf16=True)
    assert rounded.student.objective.matmul_dtype == torch.bfloat16
    assert exact.student.objective.matmul_dtype is None
    kinds: list[set[torch.dtype]] = [set(), set()]
    for trainer, seen in zip((exact, rounded), kinds, strict=True):
        projection = trainer.model.get_submodule("model.layers.0.self_attn.q_proj")
        projection.register_forward_hook(lambda module, given, out, seen=seen: seen.add(out.dtype))
        trainer.train()
    assert kinds == [{torch.float32}, {torch.bfloat16}]
    ours, theirs = (logged(trainer.state.log_history, "loss") for trainer in (exact, rounded))
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.02)
    assert {p.dtype for p in rounded.model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # which peft calls
def test_adapters_alone_are_trained_and_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra lora is not installed; not run")
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2))
    plain = trainer_of(tmp_path, TEXTS).evaluate()
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trainer_of(tmp_path, TEXTS, peft.get_peft_model(base, config), learning_rate=1e-1)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(plain["eval_kl"], rel=1e-6)  # B is 0
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    trainer.save_model(str(tmp_path / "adapter"))
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == {
        name.replace(".default", "") for name in before if "lora_" in name
    }
    head = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    untied = transformers.AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=False))
    with pytest.raises(UserError, match="head"):
        trainer_of(tmp_path, TEXTS, peft.get_peft_model(untied, head))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices"),
        ({"torch_compile": True}, "torch_compile"),
        ({"compute_metrics": lambda found: {}}, "compute_metrics"),
    ],
)
def test_an_argument_that_would_change_the_loss_is_refused(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        trainer_of(tmp_path, TEXTS, **options)


def test_a_pair_that_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(tiny_config())
    with pytest.raises(UserError, match="share weights"):
        trainer_of(tmp_path, TEXTS, model, teacher=TorchTeacher.of(model))
    other = TorchTeacher.of(transformers.AutoModelForCausalLM.from_config(tiny_config(vocab_size=300)))
    with pytest.raises(UserError, match="300 ids and model for 258"):
        trainer_of(tmp_path, TEXTS, teacher=other)
    mixture = transformers.AutoModelForCausalLM.from_pretrained(make_mixture(tmp_path / "experts"))
    with pytest.raises(UserError, match="output_router_logits"):
        trainer_of(tmp_path, TEXTS, mixture)


def test_ids_that_are_padding_get_no_probability(tmp_path: Path) -> None:
    """Teacher and student of one tokenizer, whose logits are padded to other widths."""
    teacher = TorchTeacher.for_inference(make_model(tmp_path / "narrow", vocab_size=288))
    wide = transformers.AutoModelForCausalLM.from_config(tiny_config(vocab_size=320))
    trainer = trainer_of(tmp_path, TEXTS, wide, teacher=teacher, processing_class=make_tokenizer())
    assert trainer.ids == trainer.student.model.head.num_ids == 258
    before = wide.get_output_embeddings().weight[258:].clone()
    trainer.args.weight_decay = 0.0
    trainer.train()
    assert torch.equal(wide.get_output_embeddings().weight[258:], before)
    with pytest.raises(UserError, match="288 ids and model for 320"):
        trainer_of(tmp_path, TEXTS, wide, teacher=teacher)
