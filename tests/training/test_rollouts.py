"""Rows that the student writes: its gradient is the objective's on its own text, and a run with them is exact."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_mixture, make_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from potstill import UserError, compare, distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.cli.main import main
from potstill.data.completions import Completion, rollout_batch
from potstill.data.packing import build
from potstill.data.prompts import Prompt
from potstill.data.readers import Document, Reading
from potstill.losses.divergences import reverse_kl
from potstill.losses.objective import Objective
from potstill.losses.targets import HiddenTargets
from potstill.models.causal_lm import CausalLM
from potstill.models.decoding import decoding_fault
from potstill.models.student import Student
from potstill.preflight.trial_steps import smoke
from potstill.recipe.sections_rollouts import RolloutsConfig
from potstill.runs.run_dir import RunDir
from potstill.training import engines, sampling
from potstill.training.rollouts import Rollouts
from potstill.training.sampling import write
from potstill.types import Batch, Vocab, answer

Recipe = Callable[..., Path]
OWN = "{max_new_tokens: 8, prompt_tokens: 6}"
STUDENT = "{divergence: reverse_kl, kd_weight: 1.0, ce_weight: 0.0, chunk: 16}"


def built(recipe: Path, *overrides: str) -> tuple[RunSetup, Rollouts]:
    setup = set_up(resolve(load_recipe(recipe, overrides)), lambda text: None)
    data = setup.data()
    assert isinstance(data, Rollouts)
    return setup, data


def gradient(setup: RunSetup, batches: list[Batch]) -> dict[str, torch.Tensor]:
    setup.student.zero_grad(set_to_none=True)
    positions = sum(len(batch.positions_N) for batch in batches)
    for batch in batches:
        (setup.student(batch, answer(setup.teacher, batch))["loss"] / positions).backward()
    return {n: p.grad.clone() for n, p in setup.student.named_parameters() if p.grad is not None}


def own_of(batches: list[Batch]) -> list[list[int]]:
    """The ids of each row that the student wrote, prompt and all."""
    return [
        row.input_ids_BT[0, : int(row.lengths_B[0])].tolist()  # type: ignore[index]
        for batch in batches
        if batch.is_rollout
        for row in batch.split()
    ]


# The laws


def test_a_step_on_own_rows_is_the_step_on_a_corpus_of_them(tiny_recipe: Recipe) -> None:
    """Bit for bit: there is one objective. The corpus is packed by what packs every corpus."""
    setup, data = built(tiny_recipe(rollouts=OWN, objective=STUDENT))
    (batch,) = data.step(0)
    documents = []
    for row in batch.split():
        ids = row.input_ids_BT[0, : int(row.lengths_B[0])].numpy().astype("uint32")  # type: ignore[index]
        documents.append(Document("", ids, torch.arange(len(ids)).ge(6).numpy()))
    first = Document("", torch.arange(2, 9).numpy().astype("uint32"))  # one of the two has to be held out
    reading = Reading(iter([*documents, first]))
    width = batch.input_ids_BT.shape[1]
    corpus = build(
        reading, tokens_per_row=width, heldout_rows=1, vocab=Vocab(258), layout="single", may_be_short=True
    )
    rows = [r for split in (corpus.train, corpus.heldout) for r in split.batch(range(len(split))).split()]
    ours = {bytes(row.input_ids_BT.numpy().tobytes()): row for row in batch.split()}
    theirs = {bytes(row.input_ids_BT.numpy().tobytes()): row for row in rows}
    shared = ours.keys() & theirs.keys()
    assert len(shared) >= 3
    for key in shared:
        on, off = (gradient(setup, [each[key]]) for each in (ours, theirs))
        assert on.keys() == off.keys() and all(torch.equal(on[name], off[name]) for name in on)


def test_the_same_model_as_teacher_gives_nothing_to_learn(tiny_recipe: Recipe, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    setup, data = built(
        tiny_recipe(
            rollouts=OWN,
            objective=STUDENT,
            teacher=f"{{name: torch, model: {model}}}",
            student=f"{{name: checkpoint, model: {model}}}",
            allow_identical="true",
        )
    )
    (batch,) = data.step(0)
    terms = setup.student(batch, answer(setup.teacher, batch))
    assert float(terms["loss"].detach()) == 0
    assert all(float(grad.abs().max()) < 1e-6 for grad in gradient(setup, [batch]).values())


def five_tokens(seed: int) -> CausalLM:
    torch.manual_seed(seed)
    # Not a Llama, whose norm is computed in float32.
    shape = {"vocab_size": 5, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)
    config = transformers.GPT2Config(**shape, initializer_range=0.5, bos_token_id=0, eos_token_id=0)
    return CausalLM(transformers.AutoModelForCausalLM.from_config(config).double().eval(), "five")


def completions_of_three() -> Iterator[list[int]]:
    """All that can be written in three tokens, of which 0 ends."""
    for length in (1, 2, 3):
        for new in itertools.product(range(5), repeat=length):
            if 0 not in new[:-1] and (new[-1] == 0 or length == 3):
                yield list(new)


def test_the_expected_gradient_is_that_of_the_divergence_at_every_prefix() -> None:
    """Every completion of at most three of five tokens: sum over c of q(c) grad(c) = sum over prefixes of
    q(prefix) grad KL(student || teacher), the prefixes held fixed. Neither the gradient of sampled log-ratios, which is
    0 on average, nor that of forward KL is that.
    """
    model, teacher, prompt = five_tokens(1), five_tokens(2), Prompt(0, [3, 4])
    student = Student(model, Objective(reverse_kl, 1.0, 0.5, chunk=2))
    parameters = list(model.hf.parameters())

    def logp(of: CausalLM, ids: list[int]) -> torch.Tensor:
        return of.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)

    expected = [torch.zeros_like(p) for p in parameters]
    actual = [torch.zeros_like(p) for p in parameters]
    total = 0.0
    reached: dict[tuple[int, ...], float] = {}
    for new in completions_of_three():
        ids = [*prompt.ids, *new]
        with torch.no_grad():
            own_TV = logp(model, ids)
        steps = [float(own_TV[len(prompt.ids) - 1 + n, token]) for n, token in enumerate(new)]
        q = math.exp(sum(steps))
        total += q
        for n in range(len(new)):
            reached[tuple(new[:n])] = math.exp(sum(steps[:n]))
        batch = rollout_batch([Completion(prompt, new, steps, new[-1] == 0)], [0])
        with torch.no_grad():
            hidden_NE = teacher.hidden(batch.input_ids_BT, batch.position_ids_BT).flatten(0, 1)[
                batch.positions_N
            ]
        model.zero_grad()
        student(batch, HiddenTargets(hidden_NE, teacher.head))["loss"].backward()
        for into, p in zip(actual, parameters, strict=True):
            into += q * p.grad  # type: ignore[operator]
    for prefix, q in reached.items():
        ids = [*prompt.ids, *prefix]
        own_V = logp(model, ids)[-1]
        with torch.no_grad():
            teacher_V = logp(teacher, ids)[-1]
        divergence = F.kl_div(teacher_V, own_V, log_target=True, reduction="sum")
        for into, grad in zip(expected, torch.autograd.grad(divergence, parameters), strict=True):
            into += q * grad
    assert total == pytest.approx(1, abs=1e-12)
    assert max(float(grad.abs().max()) for grad in expected) > 1e-3
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_what_is_sampled_has_the_model_s_distribution() -> None:
    """Of 4,000 samples, the share of each completion of two tokens is within four standard deviations."""
    model, count = five_tokens(1), 4000
    prompts = [(f"row {n}", Prompt(0, [3, 4])) for n in range(count)]
    student = Student(model, Objective())
    written = write(student.decode, prompts, RolloutsConfig(max_new_tokens=2), frozenset({0}), 5)
    counted: dict[tuple[int, ...], int] = {}
    for each in written:
        counted[tuple(each.new)] = counted.get(tuple(each.new), 0) + 1
    with torch.no_grad():
        for new in {tuple(each[:2]) for each in completions_of_three() if len(each) >= 2} | {(0,)}:
            own_TV = model.hf(input_ids=torch.tensor([[3, 4, *new]])).logits[0].log_softmax(-1)
            p = math.exp(sum(float(own_TV[1 + n, token]) for n, token in enumerate(new)))
            found = counted.get(new, 0) / count
            assert abs(found - p) <= 4 * math.sqrt(p * (1 - p) / count) + 1e-9, (new, p, found)
        for each in written[:50]:
            own_TV = model.hf(input_ids=torch.tensor([each.ids])).logits[0].log_softmax(-1)
            expected = [float(own_TV[1 + n, token]) for n, token in enumerate(each.new)]
            assert each.logps == pytest.approx(expected, abs=1e-9)
            assert each.ended == (each.new[-1] == 0)


def test_no_cross_entropy_falls_on_what_the_student_wrote(tiny_recipe: Recipe) -> None:
    recipe = tiny_recipe(rollouts="{max_new_tokens: 8, prompt_tokens: 6, fraction: 0.5}")
    (setup, data), (with_ce, _) = (
        built(recipe, f"objective.ce_weight={weight}", "objective.kd_weight=1.0") for weight in (0.0, 0.7)
    )
    batches = data.step(0)
    own = [batch for batch in batches if batch.is_rollout]
    given = [batch for batch in batches if not batch.is_rollout]
    for kind, is_equal in ((own, True), (given, False)):
        plain, other = gradient(setup, kind), gradient(with_ce, kind)
        assert all(torch.equal(plain[name], other[name]) for name in plain) == is_equal


def test_prompts_bear_no_loss_and_the_end_does(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """A student that nearly always ends at once: its end is a label, and nothing stands behind it."""
    folder = make_model(tmp_path / "ends", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 0.02
    tensors["lm_head.weight"][0] = 0
    tensors["model.norm.weight"] *= 0.1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    student = f"{{name: checkpoint, model: {folder}}}"
    _, data = built(tiny_recipe(rollouts="{max_new_tokens: 20, prompt_tokens: 6}", student=student))
    rows = [row for step in range(40) for batch in data.step(step) for row in batch.split()]
    ended = 0
    for row in rows:
        length = int(row.lengths_B[0])  # type: ignore[index]
        assert row.positions_N.tolist() == list(range(5, length - 1))
        assert row.labels_N.tolist() == row.input_ids_BT[0, 6:length].tolist()
        assert 0 not in row.labels_N[:-1] and length <= 26
        ended += int(row.labels_N[-1]) == 0
    assert 0 < ended < len(rows)


# The fields


def test_a_share_of_each_step_s_rows_is_own_by_number(tiny_recipe: Recipe) -> None:
    """Never by chance: 0.7 of 10 rows are 7, and the corpus's rows are those that its order gives."""
    train = "{steps: 4, rows_per_step: 10, rows_per_micro_batch: 3, lr: 1e-3, device: cpu}"
    for share, own in ((0.7, 7), (0.35, 3), (1.0, 10)):
        setup, data = built(tiny_recipe(rollouts=f"{{max_new_tokens: 4, fraction: {share}}}", train=train))
        for step in range(3):
            batches = data.step(step)
            assert [len(b.rows_B) for b in batches if b.is_rollout] == [3] * (own // 3) + [own % 3] * bool(
                own % 3
            )
            rows = [row for batch in batches if not batch.is_rollout for row in batch.rows_B.tolist()]
            assert rows == setup.corpus.order(0).rows(step, 10 - own)
            numbers = [row for batch in batches if batch.is_rollout for row in batch.rows_B.tolist()]
            assert min(numbers) >= len(setup.corpus.train) + len(setup.corpus.heldout)


def test_a_fraction_of_0_is_the_run_without_rollouts(tiny_recipe: Recipe, tmp_path: Path) -> None:
    one = distill(tiny_recipe(), out=tmp_path / "one").receipt()
    two = distill(tiny_recipe(rollouts="{fraction: 0}"), out=tmp_path / "two").receipt()
    assert one["student"]["weights_sha256_end"] == two["student"]["weights_sha256_end"]
    assert not (tmp_path / "two" / "rollouts").exists()


@pytest.mark.parametrize(
    "change",
    [
        "max_new_tokens: 9",
        "prompt_tokens: 7",
        "temperature: 2.0",
        "top_p: 0.2",
        "top_k: 1",
        "every: 2",
        "fraction: 0.5",
    ],
)
def test_a_field_changes_what_is_written(change: str, tiny_recipe: Recipe) -> None:
    """`every` from the second step on, whose rows are then written before the first update."""
    fields = {"max_new_tokens": "8", "prompt_tokens": "6"}
    name, _, value = change.partition(": ")
    written = []
    for given in (fields, fields | {name: value}):
        text = ", ".join(f"{key}: {number}" for key, number in given.items())
        setup, data = built(tiny_recipe(rollouts=f"{{{text}}}"))
        first = own_of(data.step(0))
        with torch.no_grad():
            for parameter in setup.student.parameters():
                parameter.mul_(1.5)
        written.append((first, own_of(data.step(1))))
    assert written[0][1] != written[1][1]
    assert (written[0][0] == written[1][0]) == (name == "every")


def test_the_likeliest_alone_is_greedy(tiny_recipe: Recipe) -> None:
    rows = []
    for field in ("top_k: 1", "top_p: 1e-9", "temperature: 1e-4"):
        _, data = built(tiny_recipe(rollouts=f"{{max_new_tokens: 8, prompt_tokens: 6, {field}}}"))
        rows.append(own_of(data.step(0)))
    assert rows[0] == rows[1] == rows[2]


def test_what_was_cut_off_may_be_left_out(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """A step of nothing else keeps it."""
    recipe = tiny_recipe(rollouts="{max_new_tokens: 8, prompt_tokens: 6, truncated: mask}")
    _, data = built(recipe)
    prompt = data.prompts[0]
    ended = Completion(prompt, [9, 0], [-1.0, -1.0], True)
    cut = Completion(prompt, [9] * 8, [-1.0] * 8, False)
    data._block = (0, [ended, cut, ended, cut])
    (batch,) = data.step(0)
    assert batch.input_ids_BT.shape == (2, len(prompt.ids) + 2)
    assert data.figures(0)["rollout/truncated"] == 0.5
    data._block = (0, [cut] * 4)
    (batch,) = data.step(0)
    assert batch.input_ids_BT.shape == (4, len(prompt.ids) + 8)
    _, mixed = built(recipe, "rollouts.fraction=0.5")
    mixed._block = (0, [cut] * 2)
    assert [each.is_rollout for each in mixed.step(0)] == [False]


def test_only_so_many_files_are_kept(tiny_recipe: Recipe, tmp_path: Path) -> None:
    run = distill(
        tiny_recipe(rollouts="{max_new_tokens: 4, keep: 2}"),
        out=tmp_path / "run",
        overrides=["train.steps=5"],
    )
    assert [path.name for path in sorted(run.rollouts.iterdir())] == [
        "00000004.safetensors",
        "00000005.safetensors",
    ]


# A run


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(("speed/", "memory/"))} for line in lines]


def test_a_step_logs_its_terms_apart(tiny_recipe: Recipe, tmp_path: Path) -> None:
    run = distill(tiny_recipe(rollouts="{max_new_tokens: 6, fraction: 0.5}"), out=tmp_path / "run")
    steps = [line for line in run.metrics() if "train/loss" in line]
    assert len(steps) == 4
    for line in steps:
        assert line["rollout/tokens"] <= 6 and 0 < line["rollout/distinct_4"] <= 1
        assert line["rollout/ended"] + line["rollout/truncated"] == 1
        assert line["rollout/nll"] > 0 and line["rollout/kd"] > 0 and line["speed/rollout_s"] > 0
    setup, data = built(tmp_path / "tiny.yaml")
    (given, own) = data.step(0)
    with torch.no_grad():
        terms = [setup.student(batch, answer(setup.teacher, batch)) for batch in (given, own)]
    counts = [len(batch.positions_N) for batch in (given, own)]
    first = steps[0]
    assert first["train/positions"] == sum(counts)
    assert first["train/ce"] == pytest.approx(float(terms[0]["ce"]) / counts[0], rel=1e-6)
    assert first["rollout/kd"] == pytest.approx(float(terms[1]["kd"]) / counts[1], rel=1e-6)
    loss = sum(float(term["loss"]) for term in terms) / sum(counts)
    assert first["train/loss"] == pytest.approx(loss, rel=1e-6)
    for line in run.metrics():
        if "heldout/loss" in line:
            assert {"own/forward_kl", "own/reverse_kl", "own/student_nll", "own/teacher_nll"} <= line.keys()


def test_a_run_that_was_cut_off_ends_as_the_one_that_was_not(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Resumed from step 4 of 6, with the file of steps 5 and 6 damaged, or gone."""
    own = "{max_new_tokens: 6, every: 2, fraction: 0.5}"
    train = "{steps: 6, rows_per_step: 4, lr: 1e-2, save_every: 4, device: cpu}"
    recipe = tiny_recipe(rollouts=own, train=train)
    whole = distill(recipe, out=tmp_path / "whole")
    files = {path.name: path.read_bytes() for path in whole.rollouts.iterdir()}
    assert sorted(files) == ["00000001.safetensors", "00000003.safetensors", "00000005.safetensors"]
    for what in ("damaged", "gone"):
        cut = as_killed(whole.path, tmp_path / what, 4)
        path = cut / "rollouts" / "00000005.safetensors"
        path.write_bytes(path.read_bytes()[:-3] + b"abc") if what == "damaged" else path.unlink()
        again = distill(recipe, out=cut, resume=True)
        assert metrics_of(cut) == metrics_of(whole.path)
        assert again.receipt()["student"] == whole.receipt()["student"]
        assert {path.name: path.read_bytes() for path in again.rollouts.iterdir()} == files


def as_killed(run: Path, to: Path, step: int) -> Path:
    """As a kill after this step's checkpoint left it."""
    shutil.copytree(run, to)
    for path in (to / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    (to / "receipt.json").unlink()
    (to / "status.json").write_text(json.dumps({"state": "running"}))
    return to


def gone_on(recipe: Path, folder: Path, step: int) -> RunDir:
    """A run, which one that was killed after this step's checkpoint has ended as."""
    whole = distill(recipe, out=folder / "whole")
    same = distill(recipe, out=as_killed(whole.path, folder / "same", step), resume=True)
    assert same.receipt()["student"] == whole.receipt()["student"]
    return whole


def test_rows_that_cannot_be_written_again_end_the_run(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Resumed in the middle of a block, whose rows were written by the weights before it."""
    train = "{steps: 4, rows_per_step: 2, lr: 1e-2, save_every: 3, device: cpu}"
    recipe = tiny_recipe(rollouts="{max_new_tokens: 6, every: 2}", train=train)
    whole = gone_on(recipe, tmp_path, 3)
    cut = as_killed(whole.path, tmp_path / "cut", 3)
    (cut / "rollouts" / "00000003.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"00000003\.safetensors: missing or damaged, and the rows of steps 3 to 4"
    ):
        distill(recipe, out=cut, resume=True)


def test_rows_of_a_step_that_is_taken_again_are_read_and_not_written(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, data = built(tiny_recipe(rollouts=OWN))
    data.folder = tmp_path / "rollouts"
    first = data.step(0)
    with torch.no_grad():
        for parameter in setup.student.parameters():
            parameter.mul_(1.5)
    again = dataclasses.replace(setup).data(folder=data.folder)
    assert own_of(again.step(0)) == own_of(first)
    other = setup.data(folder=tmp_path / "elsewhere")
    assert own_of(other.step(0)) != own_of(first)


@pytest.mark.parametrize("kind", ["lora", "quantised", "bfloat16", "mixture", "ema"])
def test_students_of_every_kind_write(kind: str, tiny_recipe: Recipe, tmp_path: Path) -> None:
    sections: dict[str, str] = {}
    overrides: list[str] = []
    if kind == "lora":
        pytest.importorskip("peft", reason="peft is not installed")
        folder = make_model(tmp_path / "student", seed=3)
        sections["student"] = f"{{name: checkpoint, model: {folder}, lora: {{rank: 2}}}}"
    elif kind == "quantised":
        overrides = ["train.quantize=q8_0"]
    elif kind == "bfloat16":
        overrides = ["train.precision=bfloat16"]
    elif kind == "ema":
        overrides = ["train.ema=0.5"]
    else:
        sections["student"] = f"{{name: checkpoint, model: {make_mixture(tmp_path / 'student')}}}"
    run = distill(
        tiny_recipe(rollouts="{max_new_tokens: 6, fraction: 0.5}", **sections),
        out=tmp_path / "run",
        overrides=overrides,
    )
    assert len(list(run.rollouts.iterdir())) == 4
    assert all(math.isfinite(line["rollout/kd"]) for line in run.metrics() if "rollout/kd" in line)


def test_a_quantised_student_writes_with_the_file_s_numbers(tiny_recipe: Recipe) -> None:
    recipe = tiny_recipe(rollouts=OWN)
    (plain, one), (_, two) = built(recipe), built(recipe, "train.quantize=q4_0")
    assert own_of(one.step(0)) != own_of(two.step(0))
    assert plain.student.grid is None


def test_files_that_a_checkpoint_needs_are_kept(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """`keep: 1`, and a checkpoint in the middle of the block before."""
    train = "{steps: 8, rows_per_step: 2, lr: 1e-2, save_every: 4, device: cpu}"
    gone_on(tiny_recipe(rollouts="{max_new_tokens: 6, every: 3, keep: 1}", train=train), tmp_path, 4)


def test_a_model_that_decodes_otherwise_than_it_computes_is_refused(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """Mamba's state reads the padding on the left."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=8, eos_token_id=0, pad_token_id=1
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    recipe = tiny_recipe(rollouts=OWN, student=f"{{name: checkpoint, model: {tmp_path / 'mamba'}}}")
    with pytest.raises(UserError, match=r"rollouts: student .*mamba: .*Mamba"):
        built(recipe, "corpus.packing=false")


@pytest.mark.parametrize("name", ["MistralConfig", "Gemma3TextConfig", "GPT2Config", "Qwen3Config"])
def test_what_other_families_decode_is_what_they_compute(name: str) -> None:
    """Sliding windows, learned positions, caches of other kinds."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    if name == "GPT2Config":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    config = getattr(transformers, name)(vocab_size=258, pad_token_id=1, **small)
    model = CausalLM(transformers.AutoModelForCausalLM.from_config(config).eval(), name)
    assert decoding_fault(model) is None


def test_a_fault_goes_back_to_the_same_rows(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """`guard.policy: rollback`: the steps that are taken again read what was written."""
    run = distill(
        tiny_recipe(
            rollouts="{max_new_tokens: 6}",
            train="{steps: 6, rows_per_step: 2, lr: 1e-3, save_every: 2, device: cpu}",
            guard="{policy: rollback, loss_ceiling: 1e-9}",
        ),
        out=tmp_path / "run",
        overrides=["train.steps=3"],
    )
    assert run.receipt()["steps"] == 3
    assert len(run.faults()) == 3


def test_arms_are_compared_where_one_of_them_writes(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Plain training has no rows of the student's."""
    folder = compare(
        tiny_recipe(rollouts="{max_new_tokens: 6, fraction: 0.5}", compare="{budget: steps, seeds: [0]}"),
        out=tmp_path / "arms",
    )
    assert folder is not None
    written = [path.parent.name for path in folder.rglob("rollouts") if path.is_dir()]
    assert len(written) == 1 and "kd" in written[0]


# What is refused


def test_prompts_are_neither_compared_nor_captured(tiny_recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"what is {n}?"}) + "\n" for n in range(20)))
    recipe = tiny_recipe(
        corpus=f"{{name: prompts, path: {path}, tokens_per_row: 64, heldout_rows: 3}}",
        rollouts="{max_new_tokens: 6}",
    )
    with pytest.raises(UserError, match=r"corpus.name: prompts have no answers"):
        compare(recipe, out=tmp_path / "arms")
    assert main(["capture", str(recipe), "--out", str(tmp_path / "store")]) == 2
    assert not (tmp_path / "arms").exists() and not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollouts": "{fraction: 1.5}"}, "rollouts.fraction"),
        ({"rollouts": "{fraction: -0.1}"}, "rollouts.fraction"),
        ({"rollouts": "{fraction: 0.2}"}, "rollouts.fraction: 0.2 of 4 rows"),
        ({"rollouts": "{max_new_tokens: 32}"}, "rollouts.max_new_tokens: 32 tokens leave no room"),
        ({"rollouts": "{engine: vlm}"}, "rollouts.engine"),
        ({"rollouts": "{temprature: 1}"}, "temperature"),
        ({"rollouts": "{}", "objective": "{kd_weight: 0, ce_weight: 1}"}, "objective.kd_weight"),
        ({"rollouts": "{truncated: drop}"}, "rollouts.truncated"),
        (
            {"rollouts": "{max_new_tokens: 8, max_engine_gap: 0.1}"},
            "rollouts.max_engine_gap: is of engine: vllm",
        ),
        (
            {"rollouts": "{max_new_tokens: 8, vllm_python: /bin/sh}"},
            "rollouts.vllm_python: is of engine: vllm",
        ),
        ({"rollouts": "{}", "teacher": "{name: store, path: .}"}, "teacher"),
        ({"rollouts": "{prompt_tokens: 30, max_new_tokens: 8}"}, "rollouts.prompt_tokens: 30 tokens and 8"),
        (
            {
                "rollouts": "{max_new_tokens: 8}",
                "train": "{epochs: 1, rows_per_step: 4, lr: 1e-3, device: cpu}",
            },
            "train.epochs: counts rows of the corpus",
        ),
    ],
)
def test_a_wrong_section_is_refused(sections: dict[str, str], message: str, tiny_recipe: Recipe) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(tiny_recipe(**sections))


def test_documents_without_a_prompt_are_refused(tiny_recipe: Recipe) -> None:
    recipe = tiny_recipe(rollouts="{max_new_tokens: 4, prompt_tokens: 28}")
    built(recipe)
    with pytest.raises(UserError, match=r"rollouts: not one prompt .* Lower rollouts.prompt_tokens"):
        built(recipe, "corpus.tokens_per_row=400", "rollouts.prompt_tokens=390", "corpus.heldout_rows=1")


@pytest.mark.parametrize("every", [1, 3])
def test_the_time_of_writing_is_that_of_its_blocks(
    every: int, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps are measured, and of a block of three the first alone writes: for all of them."""
    write_, slept_s = sampling.write, 0.5
    monkeypatch.setattr(engines, "write", lambda *given: time.sleep(slept_s) or write_(*given))
    train = "{steps: 6, rows_per_step: 2, lr: 1e-3, device: cpu}"
    recipe = load_recipe(
        tiny_recipe(rollouts=f"{{{OWN.strip('{}')}, every: {every}}}", train=train, eval="{every: 0}")
    )
    figures = smoke(resolve(recipe), 3)
    written_s = figures["smoke/projected_rollout_s"]
    assert 6 / every * slept_s <= written_s < figures["smoke/projected_s"]


def test_the_measured_plan_has_the_time_of_writing_apart(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tiny_recipe(rollouts=OWN)), "--measure", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert 0 < planned["rollout_time_s"] < planned["time_s"]
    assert main(["plan", str(tiny_recipe()), "--measure", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rollout_time_s"] is None
    assert main(["distill", str(tiny_recipe(rollouts=OWN)), "--smoke", "2"]) == 0
    assert "of it writing rollouts" in capsys.readouterr().out
