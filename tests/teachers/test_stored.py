"""A store in the teacher's place: it answers for the rows of its corpus, and refuses what it was not made for."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_corpus, make_model
from torch import Tensor

from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.cli.main import main
from potstill.errors import UserError
from potstill.losses.targets import HiddenTargets, SparseTargets
from potstill.recipe import load as recipes
from potstill.teachers.hf import TorchTeacher
from potstill.teachers.stored import StoredTeacher
from potstill.types import Batch
from potstill.workflows.distill import evaluate

Recipe = Callable[..., Path]
CAPTURES = {
    "sampled": "{name: sampled, threshold: 0.05, rows_per_shard: 64}",
    "topk": "{name: topk, k: 8, rows_per_shard: 64}",
    "hidden": "{name: hidden, dtype: float32, rows_per_shard: 64}",
}


@dataclasses.dataclass
class Lab:
    """One teacher, one corpus, and stores of them."""

    folder: Path

    def recipe(self, name: str = "tiny.yaml", **sections: str) -> Path:
        text = {
            "corpus": "{name: text, path: text, tokens_per_row: 32, heldout_rows: 4}",
            "teacher": "{name: torch, model: teacher}",
            "student": "{name: cut, layers: 2}",
            "objective": "{chunk: 16}",
            "train": "{steps: 4, rows_per_step: 4, lr: 1e-3, device: cpu}",
            "eval": "{every: 2}",
        } | sections
        path = self.folder / name
        path.write_text("".join(f"{key}: {value}\n" for key, value in text.items()))
        return path

    def store(self, name: str, **sections: str) -> Path:
        out = self.folder / "stores" / name
        if not out.exists():
            assert main(["capture", str(self.recipe(**sections)), "--out", str(out)]) == 0
        return out

    def setup(self, teacher: str, **sections: str) -> RunSetup:
        return set_up(resolve(recipes.load(self.recipe(teacher=teacher, **sections))), lambda line: None)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("stored")
    make_model(folder / "teacher")
    make_corpus(folder / "text", documents=16)
    made = Lab(folder)
    for name, section in CAPTURES.items():
        made.store(name, capture=section)
    return made


@pytest.fixture(scope="module")
def live(lab: Lab) -> RunSetup:
    return lab.setup("{name: torch, model: teacher}")


def some_of(batch: Batch, keep: Tensor) -> Batch:
    return dataclasses.replace(batch, positions_N=batch.positions_N[keep], labels_N=batch.labels_N[keep])


def asked(targets: Any) -> tuple[Tensor, ...]:
    if isinstance(targets, HiddenTargets):
        return (targets.hidden_NE,)
    assert isinstance(targets, SparseTargets)
    # What fills up depends on the others of a batch.
    order = torch.where(targets.ids_NK >= 0, targets.ids_NK, 10**6).sort(dim=-1).indices[:, :4]
    entropy = () if targets.entropy_N is None else (targets.entropy_N,)
    return targets.ids_NK.gather(1, order), targets.logp_NK.gather(1, order), *entropy


@pytest.mark.parametrize("kind", CAPTURES)
def test_some_positions_of_some_rows_have_the_targets_that_they_have_among_all(
    lab: Lab, live: RunSetup, kind: str
) -> None:
    teacher, rows = StoredTeacher.open(lab.store(kind)), live.corpus.train
    whole = rows.batch(range(len(rows)))
    everything = asked(teacher.targets(whole))
    generator = torch.Generator().manual_seed(0)
    T = whole.input_ids_BT.shape[1]
    for picked in ([5], [7, 2], [0, 0, 3]):
        batch = rows.batch(picked)
        keep = torch.rand(len(batch.positions_N), generator=generator) < 0.4
        keep &= batch.positions_N >= T // 2  # one row has none before, and some rows few
        some = some_of(batch, keep)
        found = teacher.targets(some)
        assert len(found) == len(some.positions_N)
        b_N, t_N = some.positions_N // T, some.positions_N % T
        place_N = torch.tensor(picked)[b_N] * T + t_N
        index_N = torch.searchsorted(whole.positions_N, place_N)
        for ours, theirs in zip(asked(found), everything, strict=True):
            assert torch.equal(ours, theirs[index_N])


@pytest.mark.parametrize("kind", CAPTURES)
def test_held_out_rows_are_the_live_teacher_s_exactly(lab: Lab, live: RunSetup, kind: str) -> None:
    teacher, batch = StoredTeacher.open(lab.store(kind)), live.corpus.heldout.batch(range(4))
    stored, model = teacher.targets(batch), live.teacher.targets(batch)
    assert isinstance(stored, HiddenTargets) and isinstance(model, HiddenTargets)
    assert torch.equal(stored.hidden_NE, model.hidden_NE)
    assert torch.equal(stored.head(stored.hidden_NE), model.head(model.hidden_NE))


def test_hidden_states_in_float32_are_the_live_teacher_s(lab: Lab, live: RunSetup) -> None:
    teacher = StoredTeacher.open(lab.store("hidden"))
    for start in (0, 8, 16):  # in the batches of the capture, whose size moves last bits
        batch = live.corpus.train.batch(range(start, start + 8))
        stored, model = teacher.targets(batch), live.teacher.targets(batch)
        assert isinstance(stored, HiddenTargets) and isinstance(model, HiddenTargets)
        assert torch.equal(stored.hidden_NE, model.hidden_NE)


def test_what_it_has_not_is_refused(lab: Lab, live: RunSetup) -> None:
    teacher, rows = StoredTeacher.open(lab.store("topk")), live.corpus.train
    # A document's first token has no targets for its place: the one before it is the end of another.
    row = next(row for row in range(len(rows)) if len(rows.batch([row]).positions_N) < 32)
    batch = rows.batch([row])
    (place, *_) = set(range(32)) - set(batch.positions_N.tolist())
    odd = dataclasses.replace(batch, positions_N=torch.tensor([place]), labels_N=batch.labels_N[:1])
    with pytest.raises(UserError, match=f"row {row}: .*positions that it has no targets for"):
        teacher.targets(odd)
    unknown = dataclasses.replace(batch, rows_B=torch.tensor([10_000]))
    with pytest.raises(UserError, match="has no targets for row 10000"):
        teacher.targets(unknown)
    held = live.corpus.heldout.batch([0])
    both = Batch(
        torch.cat([batch.rows_B, held.rows_B]),
        torch.cat([batch.input_ids_BT, held.input_ids_BT]),
        torch.cat([batch.position_ids_BT, held.position_ids_BT]),
        torch.cat([batch.positions_N, held.positions_N + 32]),
        torch.cat([batch.labels_N, held.labels_N]),
    )
    with pytest.raises(UserError, match=r"training and held-out rows in one batch"):
        teacher.targets(both)
    for ask in (teacher.logits_for_batch, teacher.logits_per_position):
        with pytest.raises(UserError, match="for the rows of its corpus alone"):
            ask(batch.input_ids_BT)


def test_it_is_a_teacher_with_the_tokenizer_and_the_vocabulary_of_the_captured_one(
    lab: Lab, live: RunSetup
) -> None:
    teacher = StoredTeacher.open(lab.store("sampled"))
    assert (teacher.vocab_size, teacher.vocab.tokens) == (258, live.teacher.vocab.tokens)
    assert teacher.tokenizer is not None and teacher.tokenizer.decode([67, 66]) == "ba"


# --- what does not fit


REFUSED = {
    "corpus": (
        {"corpus": "{name: text, path: other, tokens_per_row: 32, heldout_rows: 4}"},
        r"corpus: documents was 16, is 17\.",
    ),
    "text": (
        {"corpus": "{name: text, path: same-size, tokens_per_row: 32, heldout_rows: 4}"},
        r"corpus: fingerprint was [0-9a-f]{12}…, is [0-9a-f]{12}…\.",
    ),
    "packing": (
        {"corpus": "{name: text, path: text, tokens_per_row: 16, heldout_rows: 4}"},
        r"corpus: tokens_per_row was 32, is 16\.",
    ),
    "held-out": (
        {"corpus": "{name: text, path: text, tokens_per_row: 32, heldout_rows: 5}"},
        r"corpus: heldout_rows was 4, is 5\.",
    ),
    "temperature": (
        {"objective": "{chunk: 16, temperature: 2.0}"},
        r"temperature: sampled targets at 1\.0, objective\.temperature is 2\.0\. Set it to 1\.0",
    ),
    "divergence": (
        {"objective": "{chunk: 16, divergence: reverse_kl}"},
        r"divergence: reverse_kl, and sampled targets are unbiased for forward_kl alone",
    ),
    "smaller student": (
        {"student": "{name: config, model: small}"},
        r"small has logits for 257 of the 258 tokens",
    ),
}


@pytest.fixture(scope="module")
def others(lab: Lab) -> None:
    make_corpus(lab.folder / "other", documents=17)
    same = make_corpus(lab.folder / "same-size", documents=16)
    text = (same / "003.txt").read_text()
    (same / "003.txt").write_text(text.replace("e", "x", 1))
    make_model(lab.folder / "small", vocab_size=257, with_tokenizer=False)


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.usefixtures("others")
def test_what_the_targets_were_not_made_for_is_refused_by_name_with_both_values(lab: Lab, what: str) -> None:
    sections, said = REFUSED[what]
    with pytest.raises(UserError, match=said) as error:
        lab.setup(f"{{name: store, path: {lab.store('sampled')}}}", **sections)
    assert "\n" not in str(error.value)


def test_the_top_of_a_distribution_fits_other_divergences_and_no_other_temperature(lab: Lab) -> None:
    teacher = f"{{name: store, path: {lab.store('topk')}}}"
    lab.setup(teacher, objective="{chunk: 16, divergence: reverse_kl}")
    with pytest.raises(UserError, match=r"temperature: topk targets at 1\.0"):
        lab.setup(teacher, objective="{chunk: 16, temperature: 1.5}")
    hidden = f"{{name: store, path: {lab.store('hidden')}}}"
    lab.setup(hidden, objective="{chunk: 16, divergence: jsd, temperature: 1.5}")


def test_another_tokenizer_is_refused_by_name(lab: Lab, live: RunSetup) -> None:
    teacher = StoredTeacher.open(lab.store("sampled"))
    objective = SimpleNamespace(temperature=1.0, divergence=SimpleNamespace(name="forward_kl"))
    counts = live.corpus.manifest
    teacher.require_fits(counts, objective, 258, [0])
    for name, value in (("tokenizer_sha256", "0" * 64), ("vocab_size", 300), ("tokens", 7)):
        with pytest.raises(UserError, match=f"corpus: {name} was .*, is {str(value)[:12]}"):
            teacher.require_fits(counts | {name: value}, objective, 258, [0])
    with pytest.raises(UserError, match=r"vocabulary: .*258 .*200"):
        teacher.require_fits(counts, objective, 200, [0])


def test_rows_of_other_steps_are_refused(lab: Lab) -> None:
    store = lab.store("steps", capture="{name: topk, k: 2, rows: steps}")
    teacher = f"{{name: store, path: {store}}}"
    assert StoredTeacher.open(store).store.manifest["rows"] == 16
    lab.setup(teacher)
    lab.setup(teacher, train="{steps: 3, rows_per_step: 4, lr: 1e-3, device: cpu}")
    with pytest.raises(UserError, match=r"rows: \d+ of this run's are not in it, one is \d+\. Capture with"):
        lab.setup(teacher, train="{steps: 4, rows_per_step: 4, lr: 1e-3, device: cpu, seed: 1}")


@pytest.mark.parametrize(
    "student", ["{name: cut, layers: 2}", "{name: checkpoint, model: twin}", "{name: config, model: twin}"]
)
def test_a_model_that_was_not_captured_is_refused_whatever_the_student(lab: Lab, student: str) -> None:
    if not (lab.folder / "twin").exists():
        make_model(lab.folder / "twin", seed=1)
    named = f"{{name: store, path: {lab.store('sampled')}, model: twin}}"
    with pytest.raises(
        UserError, match=r"teacher: captured from .*teacher with weights \w{12}…, .*twin has \w{12}…"
    ):
        lab.setup(named, student=student)
    lab.setup(named.replace("twin", "teacher"), student=student)


def test_a_student_is_cut_from_the_captured_model_and_is_the_one_of_the_live_recipe(
    lab: Lab, live: RunSetup
) -> None:
    stored = lab.setup(f"{{name: store, path: {lab.store('hidden')}}}")
    assert stored.student.weights_sha256() == live.student.weights_sha256()
    assert stored.origin == live.origin
    assert isinstance(stored.teacher, StoredTeacher) and isinstance(live.teacher, TorchTeacher)


def test_a_narrow_student_is_cut_from_the_captured_model_too(lab: Lab) -> None:
    narrow = "{name: cut, layers: 2, ffn_width: 48}"
    stored = lab.setup(f"{{name: store, path: {lab.store('hidden')}}}", student=narrow)
    live = lab.setup("{name: torch, model: teacher}", student=narrow)
    assert stored.student.weights_sha256() == live.student.weights_sha256()
    assert stored.origin == live.origin
    assert (live.origin["ffn_width"], live.origin["of_ffn_width"]) == (48, 64)


def test_a_captured_model_that_is_gone_is_told(lab: Lab, tmp_path: Path) -> None:
    moved = Lab(tmp_path)
    make_model(tmp_path / "teacher")
    make_corpus(tmp_path / "text", documents=16)
    store = moved.store("x", capture="{name: topk, k: 2, rows: steps}")
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="teacher"):
        moved.setup(f"{{name: store, path: {store}}}")
    moved.setup(f"{{name: store, path: {store}, model: elsewhere}}")
    moved.setup(f"{{name: store, path: {store}}}", student="{name: checkpoint, model: elsewhere}")


def test_a_saved_student_is_measured_although_the_captured_model_is_gone(lab: Lab, tmp_path: Path) -> None:
    shutil.copytree(lab.folder / "teacher", tmp_path / "captured")
    shutil.copytree(lab.folder / "teacher", tmp_path / "student")
    teacher = f"{{name: store, path: {lab.store('hidden', capture=CAPTURES['hidden'])}, model: {tmp_path / 'captured'}}}"
    recipe = recipes.load(lab.recipe("measured.yaml", teacher=teacher))
    (tmp_path / "captured" / "model.safetensors").write_bytes(b"gone")
    assert evaluate(recipe, tmp_path / "student")["heldout/kl"] == pytest.approx(0, abs=1e-4)


def test_a_store_whose_gradient_is_another_fails_the_check_and_warns_the_run(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = lab.store("coarse", capture="{name: topk, k: 1, rows_per_shard: 64}")
    sections = {"teacher": f"{{name: store, path: {store}}}", "allow_weak_teacher": "true"}
    recipe = str(lab.recipe("coarse.yaml", **sections))
    assert main(["check", recipe]) == 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("RED")]
    assert "store: its certificate has a gradient cosine of 0." in line and "allow_coarse_store" in line
    assert main(["distill", recipe, "--out", str(tmp_path / "run")]) == 0
    assert "warning: check: store: its certificate" in capsys.readouterr().err
    assert main(["check", recipe, "allow_coarse_store=true"]) == 0
    fine = f"{{name: store, path: {lab.store('hidden')}}}"
    assert main(["check", str(lab.recipe("fine.yaml", **sections | {"teacher": fine}))]) == 0
