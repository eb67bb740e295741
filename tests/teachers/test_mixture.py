"""Several teachers: by source what each would be alone, weighted what float64 makes of them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_corpus, make_model
from cut_off import cut_off
from numpy.typing import NDArray
from refusals import refusal
from serving import Served, serving
from transformers import AutoTokenizer

from potstill import distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.cli.main import main
from potstill.errors import UserError
from potstill.losses.objective import Objective
from potstill.losses.targets import SparseTargets
from potstill.models.causal_lm import CausalLM
from potstill.preflight.plan import plan
from potstill.recipe.plugins import divergence
from potstill.registry import entries
from potstill.teachers.mixture import MixtureTeacher, _joined
from potstill.types import Finding, answer

Recipe = Callable[..., Path]
TRAIN = "{steps: 4, rows_per_step: 4, rows_per_micro_batch: 4, lr: 1e-3, device: cpu}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two teachers, of which the second has another width, a student, and two corpora."""
    place = tmp_path_factory.mktemp("mixture")
    return {
        "code": make_model(place / "code", seed=1),
        "prose": make_model(place / "prose", seed=2, hidden_size=48, num_hidden_layers=2),
        "student": make_model(place / "student", seed=3, num_hidden_layers=2),
        "texts": make_corpus(place / "texts", documents=30),
        "more": make_corpus(place / "more", documents=20, words=37),
    }


@pytest.fixture
def mixed(tiny_recipe: Recipe, folders: dict[str, Path]) -> Recipe:
    """A recipe with the two teachers of a mix; `of` is what stands beside each teacher."""

    def write(
        of: tuple[str, str] = ("teaches: [code]", "teaches: [prose]"), more: str = "", **sections: str
    ) -> Path:
        teachers = ", ".join(
            f"{{{how}, teacher: {{name: torch, model: {folders[name]}}}}}"
            for how, name in zip(of, ("code", "prose"), strict=True)
        )
        corpus = (
            "{name: mix, tokens_per_row: 32, heldout_rows: 2, sources: ["
            f"{{source: code, weight: 1, name: text, path: {folders['texts']}}}, "
            f"{{source: prose, weight: 1, name: text, path: {folders['more']}}}]}}"
        )
        whole = {
            "corpus": corpus,
            "teacher": f"{{name: mixture, teachers: [{teachers}]{more}}}",
            "student": f"{{name: checkpoint, model: {folders['student']}}}",
            "train": TRAIN,
        }
        return tiny_recipe(**whole | sections)

    return write


def built(path: Path) -> RunSetup:
    return set_up(resolve(load_recipe(path)), lambda line: None)


def gradients(setup: RunSetup, source: str) -> dict[str, torch.Tensor]:
    """Of the sum over the rows of one source in a step's first micro-batch."""
    (batch,) = setup.data().step(0)
    setup.student.zero_grad(set_to_none=True)
    for one in batch.split():
        if setup.corpus.source_of(int(one.rows_B)) == source:
            setup.student(one, answer(setup.teacher, one))["loss"].backward()
    return {name: p.grad.clone() for name, p in setup.student.named_parameters() if p.grad is not None}


def test_two_teachers_by_source_are_two_runs(mixed: Recipe, folders: dict[str, Path]) -> None:
    """The gradient of a step is the sum of those of each teacher alone on its rows."""
    whole = built(mixed())
    (batch,) = whole.data().step(0)
    names = [whole.corpus.source_of(row) for row in batch.rows_B.tolist()]
    assert {*names} == {"code", "prose"} and len(batch.rows_B) == 4  # both in one micro-batch
    whole.student(batch, answer(whole.teacher, batch))["loss"].backward()
    found = {name: p.grad for name, p in whole.student.named_parameters()}
    expected: dict[str, torch.Tensor] = {}
    for name in ("code", "prose"):
        alone = built(mixed(teacher=f"{{name: torch, model: {folders[name]}}}"))
        of_rows = gradients(whole, name)  # each row asked by itself
        for key, grad in gradients(alone, name).items():
            expected[key] = expected.get(key, torch.zeros_like(grad)) + grad
            assert float((of_rows[key] - grad).norm() / grad.norm()) < 1e-6, key
    for key, grad in expected.items():
        mine = found[key]
        assert mine is not None and float((mine - grad).norm() / grad.norm()) < 1e-6, key


def test_held_out_figures_of_a_source_are_those_of_its_teacher(
    mixed: Recipe, folders: dict[str, Path], tmp_path: Path
) -> None:
    first = distill(mixed(), out=tmp_path / "run").metrics()[0]
    for name in ("code", "prose"):
        alone = distill(mixed(teacher=f"{{name: torch, model: {folders[name]}}}"), out=tmp_path / name)
        for metric in ("kl", "agreement", "teacher_ce"):
            key = f"heldout/{name}/{metric}"
            assert first[key] == pytest.approx(alone.metrics()[0][key], rel=1e-5)


def test_rows_of_no_source_have_no_teacher(mixed: Recipe) -> None:
    setup = built(mixed())
    (batch,) = setup.data().step(0)
    with pytest.raises(UserError, match=r"teacher mixture: rows .* are of no source that it knows"):
        answer(setup.teacher, dataclasses.replace(batch, sources_B=None))


def test_targets_of_several_stores_are_in_the_order_of_the_positions() -> None:
    """The first part has positions 1 and 2 and more ids, the second 0 and 3."""

    def sparse(ids: list[list[int]], temperature: float = 1.0) -> SparseTargets:
        ids_NK = torch.tensor(ids)
        return SparseTargets(ids_NK, -ids_NK.float(), temperature, False, entropy_N=ids_NK[:, 0].float())

    parts, at_N = [sparse([[1, 4], [2, 5]]), sparse([[7], [3]])], torch.tensor([1, 2, 0, 3])
    whole = _joined(parts, at_N)
    assert isinstance(whole, SparseTargets) and whole.entropy_N is not None
    assert whole.ids_NK.tolist() == [[7, -1], [1, 4], [2, 5], [3, -1]]
    assert whole.logp_NK.tolist() == [[-7, -math.inf], [-1, -4], [-2, -5], [-3, -math.inf]]
    assert whole.entropy_N.tolist() == [7, 1, 2, 3]
    with pytest.raises(
        UserError, match=r"targets of different kinds\. Use stores of one kind and temperature"
    ):
        _joined([parts[0], sparse([[7], [3]], temperature=2.0)], at_N)


# --- weighted

WEIGHTS = (3.0, 1.0)


def log_softmax(logits: NDArray[Any]) -> NDArray[Any]:
    logits = logits - logits.max(-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def by_numpy(name: str, q: NDArray[Any], p: NDArray[Any]) -> NDArray[Any]:
    """Each divergence by its definition, with its default options."""

    def kl(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        return np.asarray((a * (np.log(a) - np.log(b))).sum(-1))

    match name:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            m = (p + q) / 2
            return (kl(p, m) + kl(q, m)) / 2
        case "skew_kl":
            return kl(p, 0.1 * p + 0.9 * q)
        case _:
            return np.asarray(np.abs(p - q).sum(-1) / 2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd"])
@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_a_weighted_mixture_is_the_mean_distribution(
    engine: str, name: str, temperature: float, mixed: Recipe, folders: dict[str, Path]
) -> None:
    # A document a row: the reference reads rows from their beginning.
    corpus = f"{{name: text, path: {folders['texts']}, tokens_per_row: 32, heldout_rows: 2, packing: false}}"
    setup = built(mixed(("weight: 3", "weight: 1"), corpus=corpus))
    teacher, student = setup.teacher, setup.student
    assert isinstance(teacher, MixtureTeacher)
    (batch,) = setup.data().step(0)
    members = [teacher.members[number] for number in range(2)]
    logits = [t.logits_per_position(batch.input_ids_BT).flatten(0, 1)[batch.positions_N] for t in members]
    mean = sum(
        weight / 4 * np.exp(log_softmax(each.double().numpy()))
        for weight, each in zip(WEIGHTS, logits, strict=True)
    )
    p = np.exp(log_softmax(np.log(mean) / temperature))
    with torch.no_grad():
        own = torch.cat([logits_CV for _, logits_CV in student.logits(batch)])
    q = np.exp(log_softmax(own.double().numpy() / temperature))
    options = {f: v for f, v in vars(divergence(name)).items() if f != "name"}
    objective = Objective(
        partial(entries("divergence")[name], **options), 1.0, 0.0, temperature, 16, engine=engine
    )
    hidden_ND = student.hidden_ND(batch)
    sums = objective(hidden_ND, student.model.head, batch.labels_N, teacher.targets(batch))
    expected = temperature**2 * by_numpy(name, q, p).sum()
    assert float(sums["kd"]) == pytest.approx(expected, rel=1e-5)


def test_logits_of_a_weighted_mixture_are_its_logarithms(mixed: Recipe) -> None:
    teacher = built(mixed(("weight: 3", "weight: 1"))).teacher
    assert isinstance(teacher, MixtureTeacher)
    ids_BT = torch.randint(2, 200, (2, 9))
    one, other = (teacher.members[n].logits_per_position(ids_BT).softmax(-1) for n in range(2))
    assert torch.allclose(teacher.logits_per_position(ids_BT).exp(), 0.75 * one + 0.25 * other, atol=1e-6)
    assert torch.allclose(
        teacher.logits_for_batch(ids_BT), teacher.logits_per_position(ids_BT)[:, -1], atol=1e-6
    )


def test_a_weighted_mixture_grades_what_the_student_writes(mixed: Recipe, tmp_path: Path) -> None:
    run = distill(
        mixed(("weight: 3", "weight: 1"), rollouts="{max_new_tokens: 6, prompt_tokens: 6}"),
        out=tmp_path / "r",
    )
    assert run.metrics()[-1]["own/reverse_kl"] > 0


def beginnings(setup: RunSetup, source: str, tokens: int) -> set[tuple[int, ...]]:
    """The first tokens of each training document of a source."""
    rows = setup.corpus.parts[source].train
    return {tuple(rows.ids[start : start + tokens].tolist()) for start in rows.starts}


def test_what_the_student_writes_is_graded_by_the_teacher_of_its_prompt(
    mixed: Recipe, folders: dict[str, Path]
) -> None:
    """The gradient of a step is the sum of those of each teacher alone behind the prompts of its source."""
    rollouts = "{max_new_tokens: 6, prompt_tokens: 6}"
    whole = built(mixed(rollouts=rollouts))
    alone = {
        name: built(mixed(teacher=f"{{name: torch, model: {folders[name]}}}", rollouts=rollouts))
        for name in ("code", "prose")
    }
    ours = {name: beginnings(whole, name, 6) for name in alone}
    ours = {"code": ours["code"] - ours["prose"], "prose": ours["prose"] - ours["code"]}
    expected: dict[str, torch.Tensor] = {}
    graded = []
    for batch in whole.data().step(0):
        whole.student(batch, answer(whole.teacher, batch))["loss"].backward()
        for row in batch.split():
            (source,) = [name for name in ours if tuple(row.input_ids_BT[0, :6].tolist()) in ours[name]]
            graded.append(source)
            setup = alone[source]
            setup.student(row, answer(setup.teacher, row))["loss"].backward()
    assert sorted(graded) == ["code", "code", "prose", "prose"]
    for setup in alone.values():
        for name, parameter in setup.student.named_parameters():
            if parameter.grad is not None:
                expected[name] = expected.get(name, torch.zeros_like(parameter)) + parameter.grad
    for name, parameter in whole.student.named_parameters():
        if name in expected:
            assert parameter.grad is not None
            gap = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert float(gap) < 1e-6, name


@pytest.mark.parametrize("more", [pytest.param("", marks=pytest.mark.soak), ", in_memory: one"])
def test_held_out_prompts_are_answered_by_the_teacher_of_their_source(
    more: str, mixed: Recipe, folders: dict[str, Path], tmp_path: Path
) -> None:
    rollouts = "{max_new_tokens: 6, prompt_tokens: 6}"
    run = distill(mixed(more=more, rollouts=rollouts), out=tmp_path / "run")
    shown = {"run": run.answers()}
    for name in ("code", "prose"):
        recipe = mixed(teacher=f"{{name: torch, model: {folders[name]}}}", rollouts=rollouts)
        shown[name] = distill(recipe, out=tmp_path / name).answers()
    assert shown["run"]["prompt"] == shown["code"]["prompt"] == shown["prose"]["prompt"]
    assert len(shown["run"]["prompt"]) == 4  # two of each source, in their order
    assert shown["code"]["teacher"] != shown["prose"]["teacher"]
    assert shown["run"]["teacher"] == shown["code"]["teacher"][:2] + shown["prose"]["teacher"][2:]
    assert run.metrics()[-1]["own/reverse_kl"] > 0


# --- runs

OF_TWO = [
    ("teaches: [code]", "teaches: [prose]"),
    pytest.param(("weight: 3", "weight: 1"), marks=pytest.mark.soak),
]


@pytest.mark.parametrize("of", OF_TWO)
def test_one_teacher_in_memory_gives_the_same_run(
    of: tuple[str, str], mixed: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distill(mixed(of), out=tmp_path / "all")
    most: list[int] = []
    ask = MixtureTeacher._ask

    def counting(self: MixtureTeacher, *given: Any) -> Any:
        found = ask(self, *given)
        most.append(len(self.members._loaded))
        return found

    monkeypatch.setattr(MixtureTeacher, "_ask", counting)
    one = distill(mixed(of, ", in_memory: one"), out=tmp_path / "one")
    assert {*most} == {1}
    assert (one.student / "model.safetensors").read_bytes() == (
        whole.student / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("of", OF_TWO)
def test_padding_of_a_wider_head_is_masked_each_time_that_it_is_loaded(
    of: tuple[str, str], mixed: Recipe, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Heads of one family differ in how far they are padded: Qwen2.5 has 151,936 rows or 152,064."""
    wider = make_model(tmp_path / "wider", seed=2, vocab_size=320, tie_word_embeddings=False)
    runs = []
    for how in ("all", "one"):
        path = mixed(of, f", in_memory: {how}")
        path.write_text(path.read_text().replace(str(folders["prose"]), str(wider)))
        runs.append(distill(path, out=tmp_path / how))
    assert {name: runs[0].metrics()[-1][name] for name in ("heldout/kl", "heldout/teacher_ce")} == {
        name: runs[1].metrics()[-1][name] for name in ("heldout/kl", "heldout/teacher_ce")
    }
    assert runs[0].receipt()["student"] == runs[1].receipt()["student"]


def test_receipt_resume_and_card_name_each_teacher(
    mixed: Recipe, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mixed()
    whole = distill(path, out=tmp_path / "whole")
    told = whole.receipt()["teacher"]
    assert [each["teaches"] for each in told["teachers"]] == [["code"], ["prose"]]
    assert [each["source"] for each in told["teachers"]] == [str(folders["code"]), str(folders["prose"])]
    assert {"teacher-0/teacher", "teacher-1/teacher"} <= whole.inputs().keys()
    cut_off(path, tmp_path / "again", 2, monkeypatch)
    again = distill(path, out=tmp_path / "again", resume=True)
    assert again.receipt()["student"] == whole.receipt()["student"]
    # With the two exchanged, the first teacher is another one.
    with pytest.raises(UserError, match=r"another input: .*teacher-0/teacher"):
        cut_off(path, tmp_path / "other", 2, monkeypatch)
        other = mixed(("teaches: [code]", "teaches: [prose]"))
        text = other.read_text()
        one, two = str(folders["code"]), str(folders["prose"])
        other.write_text(text.replace(one, "@").replace(two, one).replace("@", two))
        (tmp_path / "other" / "recipe.yaml").write_text(other.read_text())
        resolved = tmp_path / "other" / "resolved.yaml"
        resolved.write_text(resolved.read_text().replace(one, "@").replace(two, one).replace("@", two))
        distill(other, out=tmp_path / "other", resume=True)


def test_files_and_checks_of_each_teacher_are_its_own(mixed: Recipe, folders: dict[str, Path]) -> None:
    setup = built(mixed())
    inputs = setup.resolved.teacher.inputs
    assert inputs == {"teacher-0": folders["code"], "teacher-1": folders["prose"]}
    teacher: Any = setup.teacher
    for number in range(2):
        teacher.members[number].checks = lambda *given: iter([Finding("gap", "0", True)])
    found = [finding.name for finding in teacher.checks(setup, 1.0)]
    assert found == ["packing of code", "gap of code", "packing of prose", "gap of prose"]


def test_check_and_plan_know_the_teachers(mixed: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    for of in (("teaches: [code]", "teaches: [prose]"), ("weight: 3", "weight: 1")):
        assert main(["check", str(mixed(of))]) == 0, capsys.readouterr()
    assert main(["plan", str(mixed()), "--json"]) == 0
    both = capsys.readouterr().out
    assert main(["plan", str(mixed(more=", in_memory: one")), "--json"]) == 0
    one = capsys.readouterr().out
    assert both != one


def test_check_looks_at_the_packing_of_each_teacher(
    mixed: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(self: CausalLM, tokens: int = 0) -> str | None:
        """In rows as long as the recipe's alone, as with a sliding window: not in the short probe at loading."""
        return "its documents see each other" if tokens == 32 and self.name.endswith("prose") else None

    monkeypatch.setattr(CausalLM, "find_packing_fault", fault)
    assert main(["check", str(mixed())]) == 2
    said = "".join(capsys.readouterr())
    assert "packing of prose: its documents see each other" in " ".join(said.split())


def test_the_plan_counts_the_largest_where_one_is_in_memory(mixed: Recipe, folders: dict[str, Path]) -> None:
    sizes = [
        plan(resolve(load_recipe(mixed(more=f", in_memory: {how}")))).parts["teacher"]
        for how in ("all", "one")
    ]
    alone = [
        plan(resolve(load_recipe(mixed(teacher=f"{{name: torch, model: {folders[name]}}}")))).parts["teacher"]
        for name in ("code", "prose")
    ]
    assert alone[0] != alone[1] and sizes == [sum(alone), max(alone)]


@pytest.fixture
def address(folders: dict[str, Path]) -> Iterator[str]:
    with serving(Served(folders["code"])) as url:
        yield url


def served(url: str, folder: Path) -> str:
    return f"{{name: server, url: {url}, model: served, tokenizer: {folder}, top_k: 258}}"


def test_a_server_may_be_one_of_several(
    mixed: Recipe, folders: dict[str, Path], address: str, tmp_path: Path
) -> None:
    """Both of few ids: of all of them here, so that the run is that of the models in this process."""
    with serving(Served(folders["prose"])) as other:
        members = ", ".join(
            f"{{teaches: [{name}], teacher: {served(url, folders[name])}}}"
            for name, url in (("code", address), ("prose", other))
        )
        there = distill(mixed(teacher=f"{{name: mixture, teachers: [{members}]}}"), out=tmp_path / "there")
    here = distill(mixed(), out=tmp_path / "here")
    for one, two in zip(here.metrics(), there.metrics(), strict=True):
        for name in ("train/kd", "heldout/kl", "heldout/prose/kl"):
            assert two.get(name, 0.0) == pytest.approx(one.get(name, 0.0), rel=2e-5), name
    assert "lower bounds" in there.receipt()["teacher"]["held_out"]


@pytest.fixture
def both_served(
    mixed: Recipe, folders: dict[str, Path]
) -> Iterator[tuple[Callable[..., Path], list[Served]]]:
    """A recipe with both teachers on servers, and these."""
    doubles = [Served(folders[name]) for name in ("code", "prose")]
    with serving(doubles[0]) as one, serving(doubles[1]) as two:
        members = ", ".join(
            f"{{teaches: [{name}], teacher: {served(url, folders[name])}}}"
            for name, url in (("code", one), ("prose", two))
        )
        yield (
            lambda more="", **sections: mixed(
                teacher=f"{{name: mixture, teachers: [{members}]{more}}}", **sections
            ),
            doubles,
        )


@pytest.mark.soak
def test_a_teacher_elsewhere_stays_where_one_is_in_memory(
    both_served: tuple[Callable[..., Path], list[Served]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes no memory here, and while an evaluation asks one, a thread asks the other for the next step."""
    recipe, doubles = both_served
    train = TRAIN.replace("steps: 4", "steps: 2")
    path = recipe(", in_memory: one", eval="{every: 1}", train=train)
    distill(path, out=tmp_path / "run")
    for double in doubles:
        assert [path for path, _ in double.requests].count("/v1/models") == 1
    # Nor is it another one for adding up in another order.
    cut_off(path, tmp_path / "again", 1, monkeypatch)
    for double in doubles:
        logp = double.logp
        double.logp = lambda *given, logp=logp: logp(*given) - 1e-3  # type: ignore[method-assign, misc]
    assert distill(path, out=tmp_path / "again", resume=True).receipt()


def test_what_a_member_has_no_targets_for_is_refused(
    both_served: tuple[Callable[..., Path], list[Served]], tmp_path: Path
) -> None:
    recipe, doubles = both_served
    doubles[1].max_length = 33
    with pytest.raises(UserError, match=r"corpus\.tokens_per_row: 32 tokens, teacher .* for 31 at most"):
        distill(recipe(), out=tmp_path / "run")
    doubles[1].max_length = 512
    with pytest.raises(UserError, match=r"objective\.temperature: is 2\.0, and teacher served at"):
        distill(recipe(objective="{chunk: 16, temperature: 2}"), out=tmp_path / "run")


def test_an_outage_of_one_of_several_is_told(both_served: tuple[Callable[..., Path], list[Served]]) -> None:
    recipe, doubles = both_served
    notes: list[str] = []
    setup = set_up(resolve(load_recipe(recipe())), notes.append)
    with contextlib.closing(setup.teacher):
        (batch,) = setup.data().step(0)
        left = [1]

        def gone_once(path: str, body: Any) -> str | None:
            left[0] -= 1
            return "gone" if left[0] >= 0 else None

        doubles[1].fault = gone_once
        answer(setup.teacher, batch)
    assert any("asking again for up to" in note for note in notes)


def test_what_is_closed_loads_no_teacher_again(
    both_served: tuple[Callable[..., Path], list[Served]],
) -> None:
    """As a thread would that asks ahead while the run ends."""
    recipe, doubles = both_served
    teacher = built(recipe()).teacher
    assert isinstance(teacher, MixtureTeacher)
    each: list[Any] = [teacher.members[number] for number in range(2)]
    teacher.close()
    for one in each:
        with pytest.raises(UserError, match="the connection was closed"):
            one.client.get("/v1/models")
    before = [len(double.requests) for double in doubles]
    with pytest.raises(UserError, match="teacher mixture: it was closed"):
        teacher.members[0]
    assert [len(double.requests) for double in doubles] == before


@pytest.mark.parametrize(
    ("how", "message"), [("teaches: [{}]", "cannot be added up"), ("weight: 1", "cannot be added")]
)
def test_few_ids_and_all_are_not_mixed(
    how: str, message: str, mixed: Recipe, folders: dict[str, Path], address: str, tmp_path: Path
) -> None:
    members = (
        f"{{{how.format('code')}, teacher: {served(address, folders['code'])}}}, "
        f"{{{how.format('prose')}, teacher: {{name: torch, model: {folders['prose']}}}}}"
    )

    def requesting() -> bool:
        return any("potstill-request" in thread.name for thread in threading.enumerate())

    with pytest.raises(UserError, match=message) as caught:
        distill(mixed(teacher=f"{{name: mixture, teachers: [{members}]}}"), out=tmp_path / "run")
    # The one that was connected already is closed, although the traceback still holds it.
    deadline_s = time.monotonic() + 5
    while requesting() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert caught and not requesting()


def test_servers_have_no_mean(mixed: Recipe, folders: dict[str, Path], address: str, tmp_path: Path) -> None:
    members = ", ".join(f"{{weight: 1, teacher: {served(address, folders['code'])}}}" for _ in range(2))
    with pytest.raises(UserError, match="weighted teachers need whole distributions"):
        distill(mixed(teacher=f"{{name: mixture, teachers: [{members}]}}"), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (("teaches: [code]", "teaches: [code]"), "teacher.teachers.1.teaches: 'code' is taught by teachers.0 already"),
        (("teaches: [code]", "teaches: [poems]"), "teacher.teachers: 'poems' is no source of the corpus: code, prose"),
        (("teaches: [code, prose]", "weight: 1"), "teacher.teachers.0.teaches: teachers.1 has a weight"),
        (("teaches: [code]", "teaches: null"), "teacher.teachers.1: give it either teaches"),
        (("weight: 1", "weight: 0"), "teacher.teachers.1.weight: 0 must be greater than 0"),
        (("weight: 1", "weight: 1e-200"), "teacher.teachers.1.weight: 1e-200 is less than 1e-06 of all weights together"),
        (("weight: 1e308", "weight: 1e308"), "teacher.teachers.0.weight: "),
        (("teaches: [code]", "teach: [prose]"), "teacher.teachers.1.teach: unknown key. Did you mean teacher.teachers.1.teaches"),
    ],
)  # fmt: skip
def test_wrong_members(of: tuple[str, str], message: str, mixed: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        distill(mixed(of), out=tmp_path / "run")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "teacher.teachers: a list of 0, wanted 2 or more entries"),
        (
            ["{teaches: [code], teacher: ONE}", "{teaches: [code2], teacher: ONE}"],
            "'code2' is no source of the corpus",
        ),
        (["{weight: 1, teacher: {name: mixture, teachers: []}}"] * 2, "teacher.teachers.0.teacher.name: no"),
        (["{weight: 1, teacher: {name: torhc, model: x}}"] * 2, "teacher.teachers.0.teacher.name: no"),
        (
            ["{weight: 1, teacher: {name: torch, modle: x}}"] * 2,
            "teacher.teachers.0.teacher.modle: unknown key",
        ),
    ],
)
def test_wrong_mixtures(
    members: list[str], message: str, mixed: Recipe, folders: dict[str, Path], tmp_path: Path
) -> None:
    listed = ", ".join(members).replace("ONE", f"{{name: torch, model: {folders['code']}}}")
    with pytest.raises(UserError) as caught:
        distill(mixed(teacher=f"{{name: mixture, teachers: [{listed}]}}"), out=tmp_path / "run")
    assert message in str(caught.value)


def test_sources_and_teachers_belong_together(
    mixed: Recipe, corpus_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def said(path: Path) -> str:
        return refusal(["distill", str(path), "--out", str(tmp_path / "run")], capsys, tmp_path)

    plain = f"{{name: text, path: {corpus_folder}, tokens_per_row: 32, heldout_rows: 2}}"
    assert "which a corpus of name mix has" in said(mixed(corpus=plain))
    text = mixed().read_text()
    third = text.replace(
        "sources: [", f"sources: [{{source: poems, weight: 1, name: text, path: {corpus_folder}}}, "
    )
    path = tmp_path / "third.yaml"
    path.write_text(third)
    assert "source 'poems' is taught by none" in said(path)


def test_another_vocabulary_is_named(mixed: Recipe, folders: dict[str, Path], tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=5)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    members = (
        f"{{teaches: [code], teacher: {{name: torch, model: {folders['code']}}}}}, "
        f"{{teaches: [prose], teacher: {{name: torch, model: {other}}}}}"
    )
    with pytest.raises(UserError, match="teacher other"):
        distill(mixed(teacher=f"{{name: mixture, teachers: [{members}]}}"), out=tmp_path / "run")


def test_no_student_is_cut_from_several(mixed: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"student\.name: cut needs a teacher with layers"):
        distill(mixed(student="{name: cut, layers: 2}"), out=tmp_path / "run")
