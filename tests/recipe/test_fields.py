"""Every field that a recipe accepts changes what happens: one run with it as it is, one with it changed."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_corpus, make_model, make_tokenizer, tiny_config
from cut_off import cut_off
from torch.utils._python_dispatch import TorchDispatchMode

from potstill import distill
from potstill.preflight.checks import Checked
from potstill.recipe import load
from potstill.recipe.plugins import Registered, config_types
from potstill.runs.run_dir import RunDir

Recipe = Callable[..., Path]
BASE = "{steps: 3, rows_per_step: 2, lr: 1e-2, warmup: 1, device: cpu}"

# What changes the weights that come out.
TRAINS_OTHERWISE = {
    "corpus.tokens_per_row": "16",
    "corpus.heldout_rows": "16",
    "corpus.include": "['00*.txt', '01*.txt']",
    "corpus.exclude": "['00*.txt']",
    "teacher.dtype": "bfloat16",
    "student.layers": "3",
    "student.rule": "even",
    "student.ffn_width": "48",
    "student.kv_heads": "1",
    "student.hidden_size": "24",
    "student.repair": "false",
    "objective.divergence": "reverse_kl",
    "objective.kd_weight": "0.5",
    "objective.ce_weight": "0.5",
    "objective.temperature": "2.0",
    "train.steps": "2",
    "train.epochs": "0.02",
    "train.rows_per_step": "3",
    "train.lr": "1e-3",
    "train.warmup": "2",
    "train.final_lr_ratio": "0.9",
    "train.optimizer": "sgd",
    "train.weight_decay": "0.5",
    "train.beta1": "0.5",
    "train.beta2": "0.5",
    "train.clip": "1e-3",
    "train.precision": "bfloat16",
    "train.seed": "1",
}
# Shown elsewhere: by name of the test.
SHOWN_BY = {
    "name": "every name of a corpus, teacher and student has tests of its own",
    "corpus.path": "tests/data",
    "corpus.field": "tests/data",
    "corpus.column": "tests/data",
    "corpus.split": "tests/data",
    "corpus.split_files": "tests/data/test_readers.py",
    "corpus.subset": "tests/data/test_hub_datasets.py",
    "corpus.records": "tests/data/test_hub_datasets.py",
    "corpus.dtype": "tests/data",
    "corpus.document_end": "tests/data",
    "corpus.context": "tests/training/test_prompts.py",
    "corpus.chat": "tests/training/test_prompts.py",
    "write.samples": "tests/workflows/test_write.py",
    "write.max_new_tokens": "tests/workflows/test_write.py",
    "write.temperature": "tests/workflows/test_write.py",
    "write.top_p": "tests/workflows/test_write.py",
    "write.top_k": "tests/workflows/test_write.py",
    "write.truncated": "tests/workflows/test_write.py",
    "write.min_new_tokens": "tests/workflows/test_write.py",
    "write.prompts_at_once": "tests/workflows/test_write.py",
    "write.seed": "tests/workflows/test_write.py",
    "rollouts.fraction": "tests/training/test_rollouts.py",
    "rollouts.every": "tests/training/test_rollouts.py",
    "rollouts.max_new_tokens": "tests/training/test_rollouts.py",
    "rollouts.prompt_tokens": "tests/training/test_rollouts.py",
    "rollouts.temperature": "tests/training/test_rollouts.py",
    "rollouts.top_p": "tests/training/test_rollouts.py",
    "rollouts.top_k": "tests/training/test_rollouts.py",
    "rollouts.truncated": "tests/training/test_rollouts.py",
    "rollouts.engine": "tests/training/test_engines.py",
    "rollouts.vllm_python": "tests/training/test_engines.py",
    "rollouts.max_engine_gap": "tests/training/test_engines.py",
    "rollouts.keep": "tests/training/test_rollouts.py",
    "decontaminate.against": "tests/data/test_decontamination.py",
    "decontaminate.action": "tests/data/test_decontamination.py",
    "decontaminate.ngram": "tests/data/test_decontamination.py",
    "corpus.bos": "tests/cli/test_rows.py",
    "corpus.date": "tests/data/test_chats.py",
    "corpus.sources": "tests/data/test_mixing.py",
    "corpus.source": "tests/data/test_mixing.py",
    "corpus.weight": "tests/data/test_mixing.py",
    "corpus.whole_documents": "tests/data/test_packing.py",
    "corpus.skip_refused": "tests/data/test_what_templates_write.py",
    "corpus.packing": "tests/preflight/test_packing_probe.py",
    "corpus.shards": "tests/data/test_token_cache.py",
    "corpus.tokenizer": "test_a_tokenizer_of_its_own_reads_the_corpus",
    "teacher.model": "tests/teachers",
    "teacher.path": "test_a_student_recovers_a_known_teacher_and_without_its_signal_it_does_not",
    "teacher.vocab_size": "tests/teachers/test_toy.py",
    "student.model": "tests/students",
    "capture.rows": "tests/workflows/test_capture.py",
    "capture.rows_per_batch": "tests/workflows/test_capture.py",
    "capture.rows_per_shard": "tests/workflows/test_capture.py",
    "capture.bytes_per_position": "tests/workflows/test_capture.py",
    "capture.threshold": "tests/workflows/test_capture.py",
    "capture.k": "tests/workflows/test_capture.py",
    "capture.dtype": "tests/workflows/test_capture.py",
    "capture.seed": "tests/workflows/test_capture.py",
    "lora.rank": "tests/models/test_lora.py",
    "lora.alpha": "tests/models/test_lora.py",
    "lora.dropout": "tests/models/test_lora.py",
    "lora.targets": "tests/models/test_lora.py",
    "student.weights": "tests/models/test_sizing.py",
    "student.fraction": "tests/models/test_sizing.py",
    "student.keep": "test_a_list_of_layers_is_kept_as_it_is_given",
    "objective.engine": "tests/losses/test_fused.py",
    "objective.chunk": "test_fields_that_trade_memory_change_what_exists_at_once",
    "train.rows_per_micro_batch": "test_fields_that_trade_memory_change_what_exists_at_once",
    "train.activation_checkpointing": "test_activation_checkpointing_changes_memory_and_no_result",
    "train.compile": "tests/training/test_device.py",
    "train.parallel": "tests/training/test_distributed.py",
    "teacher.weights": "tests/teachers/test_backends.py",
    "teacher.backend": "tests/teachers/test_backends.py",
    "teacher.reference": "tests/teachers/test_backends.py",
    "teacher.sharded": "tests/training/test_distributed.py",
    "teacher.url": "tests/teachers/test_server.py",
    "teacher.tokenizer": "tests/teachers/test_server.py",
    "teacher.api": "tests/teachers/test_server.py",
    "teacher.top_k": "tests/teachers/test_server.py",
    "teacher.requests": "tests/teachers/test_server.py",
    "teacher.timeout_s": "tests/teachers/test_server.py",
    "teacher.deadline_s": "tests/teachers/test_server.py",
    "teacher.api_key_variable": "tests/teachers/test_server.py",
    "teacher.in_memory": "tests/teachers/test_mixture.py",
    "teachers.teacher": "tests/teachers/test_mixture.py",
    "teachers.teaches": "tests/teachers/test_mixture.py",
    "teachers.weight": "tests/teachers/test_mixture.py",
    "train.return_memory": "tests/preflight/test_plan.py",
    "train.schedule": "tests/training/test_optim.py",
    "train.ema": "tests/training/test_optim.py",
    "train.freeze": "tests/training/test_freeze.py",
    "train.quantize": "tests/training/test_grid.py",
    "train.decay": "tests/training/test_optim.py",
    "train.momentum": "tests/training/test_optim.py",
    "train.matmul": "tests/io/test_cpu_matmul.py",
    "guard.policy": "tests/training/test_guard.py",
    "guard.loss_ceiling": "tests/training/test_guard.py",
    "guard.first_step_s": "tests/training/test_guard.py",
    "guard.stall_s": "tests/training/test_guard.py",
    "allow_identical": "tests/preflight/test_checks.py",
    "allow_weak_teacher": "tests/preflight/test_checks.py",
    "allow_coarse_store": "tests/teachers/test_stored.py",
    "allow_any_divergence": "tests/losses/test_laws.py",
    "train.save_every": "test_checkpoints_are_written_as_often_as_asked",
    "train.device": "CUDA asked for and absent, in cli/test_cli.py",
    "eval.every": "test_held_out_rows_are_measured_at_the_start_at_intervals_and_at_the_end",
    "eval.sample_prompt": "test_a_sample_is_of_the_prompt_and_as_long_as_asked",
    "eval.sample_prompts": "test_each_prompt_is_sampled_at_every_evaluation",
    "eval.sample_system": "test_a_student_of_conversations_answers_a_turn",
    "eval.sample_tokens": "test_a_sample_is_of_the_prompt_and_as_long_as_asked",
    "compare.budget": "tests/workflows/test_compare.py",
    "compare.seeds": "tests/workflows/test_compare.py",
    "compare.corrected_steps": "tests/workflows/test_compare.py",
    "compare.corrected_lr": "test_the_rate_of_the_teacher_s_own_training_is_the_one_asked_for",
    "compare.humaneval_tokens": "test_every_arm_s_student_is_put_to_humaneval",
    "publish.teacher": "tests/publish/test_publish.py",
    "publish.student": "tests/publish/test_publish.py",
    "publish.data": "tests/publish/test_hub.py",
    "publish.teacher_license": "tests/publish/test_publish.py",
    "publish.student_license": "tests/publish/test_publish.py",
    "publish.data_license": "tests/publish/test_publish.py",
    "publish.license": "tests/publish/test_publish.py",
    "evaluations.samples": "tests/evals/test_evaluations.py",
    "evaluations.temperature": "tests/evals/test_evaluations.py",
    "evaluations.max_new_tokens": "tests/evals/test_evaluations.py",
    "evaluations.limit": "tests/evals/test_evaluations.py",
    "evaluations.seed": "tests/evals/test_evaluations.py",
    "evaluations.add_bos_token": "tests/evals/test_lm_eval.py",
    "evaluations.apply_chat_template": "tests/evals/test_lm_eval.py",
    "evaluations.tasks": "tests/evals/test_evaluations.py",
    "evaluations.source": "tests/evals/test_tasks.py",
    "evaluations.task": "tests/evals/test_tasks.py",
    "evaluations.options": "tests/evals/test_tasks.py",
    "evaluations.path": "tests/evals/test_tasks.py",
    "evaluations.question": "tests/evals/test_tasks.py",
    "evaluations.answer": "tests/evals/test_tasks.py",
    "evaluations.match": "tests/evals/test_tasks.py",
    "evaluations.cluster": "tests/evals/test_tasks.py",
    "evaluations.size": "tests/evals/test_tasks.py",
    "evaluations.prompt": "tests/evals/test_tasks.py",
    "evaluations.system": "tests/evals/test_tasks.py",
    "evaluations.stop": "tests/evals/test_tasks.py",
    "evaluations.extract": "tests/evals/test_tasks.py",
    "evaluations.top_p": "tests/evals/test_tasks.py",
    "plugins": "test_a_plug_in_divergence_trains",
}


def all_fields(schema: Any = load.Recipe, prefix: str = "") -> set[str]:
    """Dotted, of the sections as they are and of every built-in entry that a section may name."""
    found = set()
    hints = typing.get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        inner = sections_of(hints[field.name])
        if inner:
            for section in inner:
                found |= all_fields(section, f"{field.name}.")
        else:
            found.add("name" if field.name == "name" else f"{prefix}{field.name}")
    return found


def sections_of(hint: Any) -> list[Any]:
    """The config classes that a field may hold."""
    marks = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Registered)]
    if marks:  # a divergence's options have tests of their own
        # Those of a mix are the corpora once more.
        is_known = marks[0].kind == "divergence" or marks[0].only
        return [] if is_known else list(config_types(marks[0].kind))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    return [section for inner in typing.get_args(hint) for section in sections_of(inner)]


def test_no_field_is_left_out_here() -> None:
    assert all_fields() == TRAINS_OTHERWISE.keys() | SHOWN_BY.keys()


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("six") / "teacher", num_hidden_layers=6)


def weights(run: RunDir) -> str:
    return str(run.receipt()["student"]["weights_sha256_end"])


def trained(recipe: Path, out: Path, *overrides: str) -> str:
    """The weights of a run that plans nothing before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "potstill.workflows.distill.require_sound", lambda setup, place, note: Checked("not planned", [])
        )
        return weights(distill(recipe, overrides=overrides, out=out))


_unchanged: dict[Path, str] = {}
"""Teacher -> the weights of the run with every field as it is: the same run for all fields."""


@pytest.mark.parametrize("field", TRAINS_OTHERWISE)
def test_a_field_changes_what_is_trained(
    field: str, tiny_recipe: Recipe, six_layers: Path, tmp_path: Path
) -> None:
    path = tiny_recipe(
        train=BASE, teacher=f"{{name: torch, model: {six_layers}}}", student="{name: cut, layers: 4}"
    )
    if six_layers not in _unchanged:
        _unchanged[six_layers] = trained(path, tmp_path / "one")
    two = trained(path, tmp_path / "two", f"{field}={TRAINS_OTHERWISE[field]}")
    assert two != _unchanged[six_layers]


def test_no_field_changed_changes_nothing(tiny_recipe: Recipe, six_layers: Path, tmp_path: Path) -> None:
    """Without which the test above would see a change where there is none."""
    path = tiny_recipe(
        train=BASE, teacher=f"{{name: torch, model: {six_layers}}}", student="{name: cut, layers: 4}"
    )
    assert trained(path, tmp_path / "one") == trained(path, tmp_path / "two")


def test_fields_that_trade_memory_change_what_exists_at_once(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.losses.objective import Objective

    seen: list[tuple[int, int]] = []
    parts = Objective._parts

    def watched(self: Objective, positions: int) -> list[slice]:
        found = parts(self, positions)
        seen.append((positions, max(part.stop - part.start for part in found)))
        return found

    monkeypatch.setattr(
        "potstill.workflows.distill.require_sound", lambda setup, place, note: Checked("not planned", [])
    )  # it looks at rows of its own
    monkeypatch.setattr(Objective, "_parts", watched)
    for rows, chunk in ((4, 16), (1, 8)):
        seen.clear()
        overrides = [f"train.rows_per_micro_batch={rows}", f"objective.chunk={chunk}", "train.steps=1"]
        distill(tiny_recipe(), overrides=overrides, out=tmp_path / f"{rows}")
        assert max(positions for positions, _ in seen) in range(32 * rows - 2 * rows, 32 * rows + 1)
        assert {largest for _, largest in seen} == {chunk}


def test_activation_checkpointing_changes_memory_and_no_result(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "potstill.workflows.distill.require_sound", lambda setup, place, note: Checked("not planned", [])
    )  # it trains a little, too
    kept: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    runs, sums, products, activations = [], [], [], []
    for way in ("false", "selective", "true"):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), Operators() as ran:
            overrides = [f"train.activation_checkpointing={way}", "train.steps=1"]
            runs.append(distill(tiny_recipe(), overrides=overrides, out=tmp_path / way))
        sums.append(sum(kept))
        products.append(ran.count["aten.mm.default"])
        activations.append(ran.count["aten.silu.default"])
    assert weights(runs[0]) == weights(runs[1]) == weights(runs[2])
    assert sums[2] < sums[0] / 2 and sums[1] < sums[0]
    assert products[0] == products[1] < products[2]
    assert activations[0] < activations[1] == activations[2]


class Operators(TorchDispatchMode):
    """Counts what runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_checkpoints_are_written_as_often_as_asked(tiny_recipe: Recipe, tmp_path: Path) -> None:
    for every, kept in ((0, []), (2, ["00000002", "00000004"]), (3, ["00000003"])):
        run = distill(tiny_recipe(), overrides=[f"train.save_every={every}"], out=tmp_path / f"{every}")
        assert sorted(path.name for path in run.checkpoints.glob("*")) == kept


def test_a_sample_is_of_the_prompt_and_as_long_as_asked(tiny_recipe: Recipe, tmp_path: Path) -> None:
    samples = {}
    for prompt, tokens in (("the cat", 4), ("the cat", 9), ("a dog", 9)):
        overrides = [f"eval.sample_prompt={prompt}", f"eval.sample_tokens={tokens}"]
        run = distill(tiny_recipe(), overrides=overrides, out=tmp_path / f"{prompt}{tokens}")
        samples[prompt, tokens] = run.receipt()["samples"]["before"]
    assert samples["the cat", 9].startswith(samples["the cat", 4])
    assert len({*samples.values()}) == 3


def test_each_prompt_is_sampled_at_every_evaluation(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_recipe(
        eval="{every: 2, sample_prompt: the cat, sample_prompts: [the cat, a dog], sample_tokens: 5}",
        train="{steps: 4, rows_per_step: 4, lr: 1e-2, device: cpu, save_every: 2}",
    )
    run = distill(path, out=tmp_path / "run")
    samples = run.samples()
    assert [line["step"] for line in samples] == [0, 2, 4]
    assert all([each["prompt"] for each in line["samples"]] == ["the cat", "a dog"] for line in samples)
    assert samples[0]["samples"][0]["text"] == run.receipt()["samples"]["before"]
    # The teacher's own answer is there once, and is the greedy one.
    tokenizer, source = make_tokenizer(), run.receipt()["teacher"]["source"]
    ids = torch.tensor([tokenizer("the cat")["input_ids"]])
    hf = transformers.AutoModelForCausalLM.from_pretrained(source)
    out = hf.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1)
    by_teacher = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert samples[0]["samples"][0]["teacher"] == by_teacher == run.receipt()["samples"]["teacher"]
    assert all("teacher" not in each for line in samples[1:] for each in line["samples"])
    assert samples[-1]["samples"][0]["text"] == run.receipt()["samples"]["after"]
    # They change nothing, and a run that is cut off and goes on has each once.
    without = distill(path, overrides=["eval.sample_prompts=[]"], out=tmp_path / "without")
    assert without.receipt()["output"] == run.receipt()["output"] and without.samples() == []
    cut_off(path, tmp_path / "cut", 3, monkeypatch)
    with (tmp_path / "cut" / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "samples": []}) + "\n")
    assert distill(path, out=tmp_path / "cut", resume=True).samples() == samples


@pytest.mark.parametrize("system", [None, "be brief"])
def test_a_student_of_conversations_answers_a_turn(
    tiny_recipe: Recipe, tmp_path: Path, system: str | None
) -> None:
    teacher, tokenizer = make_model(tmp_path / "teacher"), make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(teacher)
    chats = [
        {"messages": [{"role": "user", "content": f"cat {n}"}, {"role": "assistant", "content": f"sat {n}"}]}
        for n in range(40)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    path = tiny_recipe(
        corpus=f"{{name: chat, path: {tmp_path / 'chats.jsonl'}, tokens_per_row: 64, heldout_rows: 2}}",
        teacher=f"{{name: torch, model: {teacher}}}",
        student=f"{{name: checkpoint, model: {teacher}}}",
        eval=f"{{sample_prompt: the cat, sample_system: {json.dumps(system)}, sample_tokens: 6}}",
        allow_identical="true",
    )
    samples = distill(path, overrides=["train.steps=1"], out=tmp_path / "run").receipt()["samples"]
    before = samples["before"]
    said = "" if system is None else f"<system>{system}<eos>"
    ids = torch.tensor([tokenizer(f"{said}<user>the cat<eos><assistant>")["input_ids"]])
    hf = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    out = hf.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1)
    assert before == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert samples["teacher"] == before  # it has the same weights, and is asked the same way


def test_a_list_of_layers_is_kept_as_it_is_given(tiny_recipe: Recipe, tmp_path: Path) -> None:
    run = distill(tiny_recipe(student="{name: cut, keep: [1, 2]}"), out=tmp_path / "run")
    assert run.receipt()["student"]["layers_kept"] == [1, 2]


def test_a_tokenizer_of_its_own_reads_the_corpus(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Teacher and student without a tokenizer: the corpus brings one, and the student is saved with it."""
    teacher = make_model(tmp_path / "teacher", with_tokenizer=False)
    tiny_config().save_pretrained(tmp_path / "config")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    texts = make_corpus(tmp_path / "texts")
    path = tiny_recipe(
        corpus=f"{{name: text, path: {texts}, tokens_per_row: 32, tokenizer: {tmp_path / 'tokenizer'}}}",
        teacher=f"{{name: torch, model: {teacher}}}",
        student=f"{{name: config, model: {tmp_path / 'config'}}}",
        train="{steps: 2, rows_per_step: 2, lr: 1e-3, device: cpu, seed: 1}",
    )
    run = distill(path, out=tmp_path / "run")
    saved = transformers.AutoTokenizer.from_pretrained(run.student)
    assert saved("the cat")["input_ids"] == make_tokenizer()("the cat")["input_ids"]
