"""A teacher on a server: exact where the server is, and one line where it is not what it should be.

The server is a double in this process over a real small model; `test_server_vllm.py` has the real one.
"""

from __future__ import annotations

import contextlib
import html
import itertools
import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from conftest import make_model
from cut_off import cut_off
from refusals import refusal
from serving import Json, Served, serving
from transformers import GenerationConfig

from potstill import distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import set_up
from potstill.cli.main import main
from potstill.data.tokenizers import load_tokenizer
from potstill.errors import UserError
from potstill.evals.disagreement import disagreement
from potstill.io import http_client
from potstill.io.terminal import Display
from potstill.losses.divergences import forward_kl
from potstill.losses.objective import Objective
from potstill.losses.targets import SparseTargets
from potstill.models.decoding import Row
from potstill.models.student import Student
from potstill.recipe.sections_models import ServerTeacherConfig
from potstill.runs.run_dir import RunDir
from potstill.store.reader import Store, verify
from potstill.store.writer import merge
from potstill.teachers import capture_rows, server
from potstill.teachers.server import ServerTeacher
from potstill.teachers.server_apis import Vllm
from potstill.types import Batch, Head
from potstill.workflows import capture as store
from potstill.workflows.write import write_corpus

Recipe = Callable[..., Path]
ALL_IDS = 258
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "FIRST_DEADLINE_S", 0.2)
    monkeypatch.setattr(http_client, "LONGEST_WAIT_S", 0.05)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another model of the same tokens."""
    return f"{{name: checkpoint, model: {make_model(tmp_path_factory.mktemp('models') / 'student', seed=9)}}}"


@pytest.fixture
def served(teacher_folder: Path) -> Served:
    return Served(teacher_folder)


@pytest.fixture
def address(served: Served) -> Iterator[str]:
    with serving(served) as url:
        yield url


Open = Callable[..., ServerTeacher]


@pytest.fixture
def opened(teacher_folder: Path) -> Iterator[Open]:
    with ExitStack() as stack:

        def open_(url: str, **fields: Any) -> ServerTeacher:
            fields = {"model": "served", "top_k": 16, "deadline_s": 1.0} | fields
            fields = {"tokenizer": str(teacher_folder)} | fields
            config = ServerTeacherConfig(url=url, **fields)
            return stack.enter_context(
                closing(ServerTeacher.open(config, load_tokenizer(Path(config.tokenizer))))
            )

        yield open_


@pytest.fixture
def small(corpus_folder: Path) -> dict[str, str]:
    """Few rows: each is a request, and this process answers it, too."""
    return {
        "corpus": f"{{name: text, path: {corpus_folder}, tokens_per_row: 32, heldout_rows: 2}}",
        "train": "{steps: 4, rows_per_step: 2, lr: 1e-3, device: cpu}",
    }


@pytest.fixture
def recipe(
    tiny_recipe: Recipe, teacher_folder: Path, student: str, small: dict[str, str]
) -> Callable[..., Path]:
    """The tiny recipe with a served teacher."""

    def write(url: str, more: str = "", **sections: str) -> Path:
        of_teacher = f"{{name: server, url: {url}, model: served, tokenizer: {teacher_folder}{more}}}"
        return tiny_recipe(**small | {"teacher": of_teacher, "student": student} | sections)

    return write


def packed() -> Batch:
    """Two rows, of which the first has two documents; some positions of each bear loss."""
    generator = torch.Generator().manual_seed(3)
    ids_BT = torch.randint(2, 90, (2, 32), generator=generator)
    position_ids_BT = torch.arange(32).repeat(2, 1)
    position_ids_BT[0, 10:] = torch.arange(22)
    positions_N = torch.tensor([0, 3, 9, 12, 31, 32 + 5, 32 + 31])
    labels_N = torch.tensor([ids_BT[0, 1], ids_BT[0, 4], 7, ids_BT[0, 13], 9, ids_BT[1, 6], 11])
    return Batch(torch.arange(2), ids_BT, position_ids_BT, positions_N, labels_N)


def first_document() -> Batch:
    batch = packed()
    return Batch(
        batch.rows_B, batch.input_ids_BT, batch.position_ids_BT, batch.positions_N[:2], batch.labels_N[:2]
    )


@pytest.mark.parametrize("api", ["vllm", "sglang", "openai", "openai by texts"])
def test_targets_are_the_models_own(
    api: str, served: Served, address: str, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each document alone, also at its last position, whose next token lies in no row."""
    batch = packed()
    if api == "openai by texts":
        served.owner, served.known = "other", 96  # what has a text of its own
        monkeypatch.setattr(server, "LOST_MASS", 1.0)
    teacher = opened(address, api=api.split()[0])
    targets = teacher.targets(batch)
    assert targets.has_bucket and targets.temperature == 1.0
    for n, (position, label) in enumerate(
        zip(batch.positions_N.tolist(), batch.labels_N.tolist(), strict=True)
    ):
        row, place = divmod(position, 32)
        start = 10 if row == 0 and place >= 10 else 0
        logp_V = served.logp(batch.input_ids_BT[row, start : place + 1].tolist(), None, 1.0)[-1]
        known = {
            i: p
            for i, p in zip(targets.ids_NK[n].tolist(), targets.logp_NK[n].tolist(), strict=True)
            if i >= 0
        }
        expected = {*logp_V.topk(16).indices.tolist(), label}
        assert set(known) == {i for i in expected if logp_V[i] > -math.inf}
        for token, p in known.items():
            assert p == pytest.approx(float(logp_V[token]), abs=2e-5)


def test_a_document_is_asked_about_once_and_no_further_than_it_bears_loss(
    served: Served, address: str, opened: Open
) -> None:
    teacher = opened(address)
    served.requests.clear()
    teacher.targets(first_document())
    ((_, body),) = served.requests
    assert body["prompt"] == packed().input_ids_BT[0, :5].tolist()


@pytest.mark.parametrize("api", ["vllm", "openai"])
def test_what_is_impossible_is_no_target(api: str, served: Served, address: str, opened: Open) -> None:
    """vLLM writes -9999, which would be as many nats of a reverse KL."""
    served.known = 10
    targets = opened(address, api=api).targets(packed())
    assert float(targets.logp_NK[targets.ids_NK >= 0].min()) > -100
    assert int(targets.ids_NK.max()) < 10


def test_a_servers_rounding_makes_no_probability(served: Served, address: str, opened: Open) -> None:
    """Of all ids, so that nothing is left to the bucket; their sum is 1.005 at the server."""
    logp = served.logp
    served.logp = lambda *given: logp(*given) + math.log(1.005)  # type: ignore[method-assign]
    targets = opened(address, top_k=ALL_IDS).targets(packed())
    assert targets.logp_NK.double().exp().sum(-1).tolist() == [pytest.approx(1, abs=1e-5)] * 7
    logits_NV = torch.full((7, ALL_IDS), -math.inf).scatter(1, targets.ids_NK, targets.logp_NK)
    student_NS, teacher_NS = targets.on_support(logits_NV, 1.0)
    assert float(forward_kl(student_NS, teacher_NS).min()) > -1e-6


@pytest.mark.parametrize(("owner", "expected"), [("vllm", 4), ("other", 1)])
def test_a_byte_that_ends_a_character_is_not_taken_for_the_character(
    owner: str, expected: int, served: Served, address: str, opened: Open, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """vLLM shows both by the same text; behind a part of a character the texts of others say nothing."""
    monkeypatch.setattr(server, "LOST_MASS", 1.0)
    folder = make_model(tmp_path / "model", vocab_size=ALL_IDS + 2)
    tokenizer = load_tokenizer(folder)
    part, end = tokenizer.encode("ж", add_special_tokens=False)
    assert tokenizer.add_tokens(["ж", "щ"]) == 2
    tokenizer.save_pretrained(folder)
    other = Served(folder)
    served.model, served.tokenizer, served.texts = other.model, other.tokenizer, other.texts
    served.known, served.owner = ALL_IDS + 2, owner
    likely_V = torch.zeros(ALL_IDS + 2)
    likely_V[[end, 5, 9, 11]] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    monkeypatch.setattr(served, "logp", lambda ids, *given: likely_V.log_softmax(-1).repeat(len(ids), 1))
    positions_N, labels_N = torch.tensor([0, 1]), torch.tensor([part, end])
    ids_BT, places_BT = torch.tensor([[5, part, end]]), torch.arange(3)[None]
    teacher = opened(address, api="openai", tokenizer=str(folder), top_k=4)
    targets = teacher.targets(Batch(torch.arange(1), ids_BT, places_BT, positions_N, labels_N))
    found = {each for each in targets.ids_NK[1].tolist() if each >= 0}
    assert end in found and len(found) == expected and not found & {ALL_IDS, ALL_IDS + 1}


@pytest.mark.parametrize("api", ["vllm", "sglang"])
@pytest.mark.parametrize("bad", ["05", "٥", "5.0", 3.9, True, -1, "9" * 30])
def test_an_id_that_is_none_is_refused(
    api: str, bad: Any, served: Served, address: str, opened: Open
) -> None:
    """Two keys of one number would be one id."""
    teacher, answer = opened(address, api=api), served.answer

    def with_bad(path: str, body: Json, fault: str | None) -> Json:
        found = answer(path, body, fault)
        if api == "vllm":
            found["choices"][0]["prompt_logprobs"][1][str(bad)] = {"logprob": -9.0}
        else:
            found["meta_info"]["input_top_logprobs"][1].append([-9.0, bad, "x"])
        return found

    served.answer = with_bad  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"its answer is not what was asked for: an id is "):
        teacher.targets(packed())


def test_a_step_without_labels_asks_nothing(served: Served, address: str, opened: Open) -> None:
    teacher = opened(address)
    served.requests.clear()
    assert len(teacher.targets(packed().without_labels())) == 0
    assert not served.requests


def test_over_all_ids_a_run_is_that_of_the_model_in_this_process(
    recipe: Recipe, small: dict[str, str], tiny_recipe: Recipe, address: str, student: str, tmp_path: Path
) -> None:
    here = distill(tiny_recipe(**small, student=student), out=tmp_path / "here")
    there = distill(recipe(address, f", top_k: {ALL_IDS}"), out=tmp_path / "there")
    for one, other in zip(here.metrics(), there.metrics(), strict=True):
        for name in ("train/kd", "train/ce", "heldout/kl", "heldout/agreement", "heldout/teacher_ce"):
            assert other.get(name, 0.0) == pytest.approx(one.get(name, 0.0), rel=2e-5), name


def test_fewer_ids_give_lower_bounds_and_say_so(recipe: Recipe, address: str, tmp_path: Path) -> None:
    runs = [distill(recipe(address, f", top_k: {k}"), out=tmp_path / str(k)) for k in (4, 32, ALL_IDS)]
    kls = [run.metrics()[0]["heldout/kl"] for run in runs]
    assert kls == sorted(kls) and kls[0] < kls[2]
    assert "lower bounds" in runs[0].receipt()["teacher"]["held_out"]
    # The label comes with every position, and the first of the k likeliest is the likeliest.
    for name in ("heldout/teacher_ce", "heldout/agreement"):
        assert runs[0].metrics()[0][name] == pytest.approx(runs[2].metrics()[0][name], abs=1e-4)


def test_asks_for_the_next_micro_batch_while_the_student_computes(
    recipe: Recipe, served: Served, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the steps, and no row twice."""
    train = "{steps: 3, rows_per_step: 4, rows_per_micro_batch: 2, lr: 1e-3, device: cpu}"
    path = recipe(address, train=train, eval="{every: 0}")
    main_thread, asked = threading.get_ident(), []
    targets = ServerTeacher.targets

    def recording(self: ServerTeacher, batch: Batch) -> Any:
        asked.append((threading.get_ident() == main_thread, batch.rows_B.tolist()))
        return targets(self, batch)

    trained: list[list[int]] = []
    forward = Student.forward

    def noted(self: Student, batch: Batch, *given: Any) -> Any:
        trained.append(batch.rows_B.tolist())
        return forward(self, batch, *given)

    monkeypatch.setattr(Student, "forward", noted)
    monkeypatch.setattr(ServerTeacher, "targets", recording)
    distill(path, out=tmp_path / "run")
    ahead = [rows for is_main, rows in asked if not is_main]
    steps = trained[-6:]  # behind those of the checks
    assert ahead == steps[1:]  # all but the first
    assert [rows for is_main, rows in asked if is_main and rows in steps] == steps[:1]


def test_requests_in_flight_are_bounded(served: Served, address: str, opened: Open) -> None:
    teacher = opened(address, requests=3)
    served.most_in_flight, served.fault = 0, lambda path, body: "late"
    rows = torch.randint(2, 90, (8, 16))
    positions_N = torch.arange(8 * 16)
    teacher.targets(
        Batch(torch.arange(8), rows, torch.arange(16).repeat(8, 1), positions_N, rows.roll(-1, 1).flatten())
    )
    assert served.most_in_flight == 3


def wait_until(is_so: Callable[[], bool], at_most_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + at_most_s
    while not is_so() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return is_so()


def now_and_then(fault: str, times: int) -> Callable[[str, Json], str | None]:
    left = [times]

    def of(path: str, body: Json) -> str | None:
        left[0] -= 1
        return fault if left[0] >= 0 else None

    return of


@pytest.mark.parametrize("fault", ["500", "gone", "cut"])
def test_what_passes_is_asked_again(fault: str, served: Served, address: str, opened: Open) -> None:
    teacher = opened(address)
    notes: list[str] = []
    teacher.note = notes.append
    expected = teacher.targets(packed())
    served.fault = now_and_then(fault, 2)
    found = teacher.targets(packed())
    assert torch.equal(found.ids_NK, expected.ids_NK) and torch.equal(found.logp_NK, expected.logp_NK)
    assert notes and all(re.search("asking again for up to 1 s", note) for note in notes)


def test_a_request_that_takes_too_long_is_asked_again(served: Served, address: str, opened: Open) -> None:
    teacher = opened(address, timeout_s=0.3)
    served.fault = now_and_then("late", 1)
    assert len(teacher.targets(packed())) == 7


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", r"no answer in 1 s: status 500: out of memory.* --resume"),
        ("gone", r"no answer in 1 s: "),
        ("cut", r"no answer in 1 s: "),
        ("400", r"refuses POST /v1/completions with status 400: logprobs: at most 20\."),
        ("echo", r"refuses POST /v1/completions with status 401: no such key: "),
        ("moved", r"redirects to http://elsewhere\.example/v1\."),
        ("short", r"entries of prompt_logprobs, where \d+ were asked for"),
        ("fewer ids", r"15 ids at a place, where 16 were asked for"),
        ("nan", r"a log-probability is nan"),
        ("logits", r"the probabilities of a place sum to"),
    ],
)
@pytest.mark.parametrize("when", ["at the start", "later"])
def test_what_does_not_pass_is_one_line(
    when: str, fault: str, message: str, served: Served, address: str, opened: Open
) -> None:
    def broken(path: str, body: Json) -> str | None:
        # At the start with as many ids as in a run, so that messages are the same.
        return fault if path != "/v1/models" else None

    if when == "at the start":
        served.fault = broken
        message = message.replace("1 s", r"0\.2 s")
    with pytest.raises(UserError, match=message) as caught:
        teacher = opened(address)
        served.fault = broken
        teacher.targets(packed())
    assert "\n" not in str(caught.value)


def test_sglangs_answers_are_counted_too(served: Served, address: str, opened: Open) -> None:
    teacher = opened(address, api="sglang")
    served.fault = lambda path, body: "short"
    with pytest.raises(UserError, match=r"entries of input_token_logprobs, where"):
        teacher.targets(packed())


MALFORMED: list[tuple[str, Callable[[Json], Any]]] = [
    ("vllm", lambda answer: [answer]),
    ("vllm", lambda answer: {"choices": 3}),
    ("vllm", lambda answer: {"choices": [7]}),
    ("vllm", lambda answer: {"choices": [{"prompt_logprobs": {}}]}),
    ("vllm", lambda answer: changed(answer, r'"logprob": [^,]*', '"logprob": "low"')),
    ("vllm", lambda answer: changed(answer, r'"logprob": [^,]*', f'"logprob": -1{"0" * 400}')),
    ("vllm", lambda answer: changed(answer, r'"decoded_token": "(?:[^"\\]|\\.)*"', '"decoded_token": 5')),
    ("vllm", lambda answer: changed(answer, r'"\d+": {', '"x": {')),
    ("sglang", lambda answer: {"meta_info": answer["meta_info"] | {"input_top_logprobs": 4}}),
    ("sglang", lambda answer: changed(answer, r"null, \[\[.*", "null, 1, 2]}}")),
    ("sglang", lambda answer: changed(answer, r'(\d, \d+), "', r'\1, 8, "')),
    ("sglang", lambda answer: changed(answer, r', \d+, "', ', Infinity, "')),
    ("openai", lambda answer: changed(answer, r'"top_logprobs": \[null, {.*', '"top_logprobs": [[1]]}}]}')),
    ("openai", lambda answer: {"choices": [{"logprobs": of_each(answer, top_logprobs=[1])}]}),
    ("openai", lambda answer: {"choices": [{"logprobs": of_each(answer, token_logprobs="low")}]}),
    ("openai", lambda answer: {"choices": [{"logprobs": of_each(answer, tokens=5)}]}),
    (
        "openai",
        lambda answer: {"choices": [{"logprobs": {"tokens": [], "token_logprobs": [], "top_logprobs": []}}]},
    ),
]
"""Answers of an API that mean nothing."""


def of_each(answer: Json, **fields: Any) -> Json:
    found = answer["choices"][0]["logprobs"]
    return found | {name: [value] * len(found[name]) for name, value in fields.items()}


def changed(answer: Json, pattern: str, by: str) -> Any:
    text = json.dumps(answer)
    found = re.sub(pattern, lambda match: match.expand(by) if "\\1" in by else by, text)
    assert found != text
    return json.loads(found)


@pytest.mark.parametrize("which", range(len(MALFORMED)))
def test_an_answer_without_a_meaning_is_one_line(
    which: int, served: Served, address: str, opened: Open
) -> None:
    api, damage = MALFORMED[which]
    served.known, answer = 96, served.answer
    served.answer = lambda path, *more: (  # type: ignore[method-assign]
        answer(path, *more) if path == "/v1/models" else damage(answer(path, *more))
    )
    with pytest.raises(
        UserError, match=r"its answer is not what was asked for|teacher\.tokenizer: id"
    ) as caught:
        opened(address, api=api)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("listed", [[], 5, None, {"data": 5}, {"data": [5]}, {"data": {"served": {}}}])
def test_a_list_of_models_that_is_none_is_one_line(
    listed: Any, served: Served, address: str, opened: Open
) -> None:
    served.answer = lambda *given: listed  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"teacher.model: .* has no served; it has none\."):
        opened(address)


@pytest.mark.parametrize(
    ("page", "shown"),
    [("<html>\n<p>Hello</p>", "<html> <p>Hello</p>"), ("[" * 100_000 + "]" * 100_000, "[" * 300)],
)
def test_a_page_in_place_of_a_list_of_models_is_one_line(
    page: str, shown: str, served: Served, address: str, opened: Open
) -> None:
    served.answer = lambda *given: page  # type: ignore[method-assign]
    message = rf"no answer in \S+ s: what came back is no JSON: '{re.escape(shown)}'"
    with pytest.raises(UserError, match=message):
        opened(address)


def test_a_servers_message_gives_the_terminal_no_orders(address: str) -> None:
    with closing(http_client.HttpClient(address, None, 1, 1, 1)) as client:
        assert client.clean("\x1b]0;owned\x07 \x1b[2J\ud800\nis é 天") == "�]0;owned� �[2J� is é 天"


def test_a_fixed_text_that_the_tokenizer_cannot_write_ends_nothing(
    address: str, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "TEXTS", (server.TEXTS[0], ""))
    assert len(opened(address).means) == 2


def test_a_model_without_a_longest_row_reads_any(served: Served, address: str, opened: Open) -> None:
    served.max_length = None  # type: ignore[assignment]
    assert opened(address).max_length is None


def test_every_answer_behind_an_outage_waits_for_the_proof(address: str, served: Served) -> None:
    """Of two requests that met it, the one that does not ask for the proof must not be used without it."""
    with closing(http_client.HttpClient(address, None, 5, 5, 2)) as client:
        client.is_proven, served.fault = True, now_and_then("gone", 2)

        def refuse() -> None:
            time.sleep(0.3)  # until the other one waits
            raise UserError("another model")

        client.on_return = refuse

        def refusal_of(number: int) -> str:
            with pytest.raises(UserError) as caught:
                client.get("/v1/models")
            return str(caught.value)

        assert client.map(refusal_of, range(2)) == ["another model"] * 2


def test_an_outage_is_followed_by_one_proof(address: str, served: Served) -> None:
    with closing(http_client.HttpClient(address, None, 5, 5, 4)) as client:
        proofs: list[float] = []
        client.on_return = lambda: proofs.append(time.monotonic())
        client.is_proven = True
        for outages in (1, 2):
            served.fault = now_and_then("gone", 4)
            client.map(lambda number: client.get("/v1/models"), range(4))
            assert len(proofs) == outages


@pytest.mark.parametrize(
    ("fault", "proofs"),
    [(fault, 1) for fault in ("gone", "502", "503", "504", "522", "200 502")]
    + [(fault, 0) for fault in ("429", "500", "529", "200 429", "200 0")],
)
def test_an_outage_is_a_server_out_of_reach(fault: str, proofs: int, address: str, served: Served) -> None:
    """One that answers, but not yet, is still there; all of them are asked again."""
    with closing(http_client.HttpClient(address, None, 5, 5, 1)) as client:
        proved: list[int] = []
        client.on_return, client.is_proven = lambda: proved.append(1), True
        served.fault = now_and_then(fault, 2)
        assert client.get("/v1/models")["data"] and len(proved) == proofs


def test_an_outage_during_a_proof_does_not_start_another(served: Served, address: str, opened: Open) -> None:
    """Every other request meets one; a proof that proves itself has no end."""
    teacher = opened(address, deadline_s=20.0)
    prove, depth, deepest = teacher.client.on_return, 0, 0

    def counting() -> None:
        nonlocal depth, deepest
        depth, deepest = depth + 1, max(deepest, depth + 1)
        prove()
        depth -= 1

    teacher.client.on_return = counting
    served.requests.clear()
    served.fault = lambda path, body: (
        "502" if len(served.requests) % 2 and len(served.requests) < 60 else None
    )
    teacher.targets(first_document())
    assert deepest == 1 and len(served.requests) == 2 * (1 + len(server.TEXTS))


def test_a_second_outage_of_a_long_request_is_proven_too(served: Served, address: str) -> None:
    """What counts is when it failed, and not when it began."""
    with closing(http_client.HttpClient(address, None, 5, 5, 2)) as client:
        proofs: list[int] = []
        client.on_return, client.is_proven = lambda: proofs.append(1), True

        def answer(path: str, body: Json, fault: str | None) -> Json:
            if path == "/long" and len(proofs) < 2 and wait_until(lambda: bool(proofs)):
                proofs.append(0)
                raise ConnectionError("which closes the connection")
            return {"data": []}

        served.answer = answer  # type: ignore[method-assign]
        faults = ["gone"]
        served.fault = lambda path, body: faults.pop() if path == "/short" and faults else None
        client.map(client.get, ["/long", "/short"])
        assert proofs == [1, 0, 1]


@pytest.mark.parametrize("fault", ["400", "401", "404", "501", "505", "200 400"])
def test_what_is_refused_is_asked_once(fault: str, served: Served, address: str) -> None:
    with closing(http_client.HttpClient(address, None, 5, 5, 1)) as client:
        client.is_proven, served.fault = True, lambda path, body: fault
        with pytest.raises(UserError, match=rf"refuses GET /v1/models with status {fault[-3:]}: "):
            client.get("/v1/models")
    assert len(served.requests) == 1


def test_an_error_under_a_status_of_200_is_quoted(served: Served, address: str, opened: Open) -> None:
    teacher = opened(address, deadline_s=0.3)
    served.fault = lambda path, body: "200 502"
    with pytest.raises(
        UserError, match=r"no answer in 0\.3 s: status 502: Provider returned error: overload"
    ):
        teacher.targets(packed())


@pytest.mark.parametrize("by_date", [False, True])
def test_a_server_that_names_a_time_is_left_alone_until_then(
    by_date: bool, served: Served, address: str
) -> None:
    # Dates are of whole seconds.
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    with closing(http_client.HttpClient(address, None, 5, 30, 1)) as client:
        client.is_proven, served.fault = True, now_and_then("429", 1)
        served.retry_after, began_s = date if by_date else "1", time.monotonic()
        assert client.get("/v1/models")
        assert len(served.requests) == 2 and time.monotonic() - began_s >= 0.9


@pytest.mark.parametrize("header", ["3600", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_server_that_names_a_time_behind_the_deadline_is_asked_once_more(
    header: str, served: Served, address: str
) -> None:
    with closing(http_client.HttpClient(address, None, 5, 0.7, 1)) as client:
        client.is_proven, served.fault = True, lambda path, body: "503"
        served.retry_after = header
        with pytest.raises(UserError, match=r"no answer in 0\.7 s: status 503"):
            client.get("/v1/models")
    assert len(served.requests) == 2


@pytest.mark.parametrize("header", ["", "soon", "-1", "1.5", "0", "Thu, 01 Jan 1970 00:00:00 GMT", "²"])
def test_a_time_that_is_none_or_past_is_none(header: str, served: Served, address: str) -> None:
    with closing(http_client.HttpClient(address, None, 5, 5, 1)) as client:
        client.is_proven, served.fault = True, now_and_then("503", 1)
        served.retry_after = header
        assert client.get("/v1/models")


def test_it_is_asked_again_no_longer_than_the_deadline(served: Served, address: str, opened: Open) -> None:
    teacher = opened(address, deadline_s=0.5)
    served.fault = lambda path, body: "500"
    began_s = time.monotonic()
    with pytest.raises(UserError, match=r"no answer in 0\.5 s"):
        teacher.targets(packed())
    assert time.monotonic() - began_s < 1.4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "other tokenizer",
            r"teacher\.tokenizer: id \d+ is .* Name the tokenizer of the model that is served",
        ),
        ("tempered", r"move by .* nats with the temperature of a request.* raw_logprobs"),
    ],
)
@pytest.mark.parametrize("api", ["vllm", "sglang", "openai"])
def test_another_tokenizer_or_temperature_is_refused_at_the_first_probe(
    api: str, fault: str, message: str, served: Served, address: str, opened: Open
) -> None:
    served.fault = lambda path, body: fault
    with pytest.raises(UserError, match=message):
        opened(address, api=api)


@pytest.mark.parametrize(("token", "constant"), [(1, "PROBED_IDS"), (90, "PROBE_TOKENS")])
def test_added_ids_and_those_of_every_request_are_compared(
    token: int, constant: str, served: Served, address: str, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the others one in many, where there are many; over several requests, where one has no room for all."""
    monkeypatch.setattr(server, constant, {"PROBED_IDS": 1, "PROBE_TOKENS": 32}[constant])
    assert opened(address)
    served.texts[token] = "~~"
    with pytest.raises(UserError, match=rf"teacher\.tokenizer: id {token} is .* and '~~' on "):
        opened(address)


def test_a_server_that_shows_no_token_is_refused(
    served: Served, address: str, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "text", lambda *given: None)
    with pytest.raises(UserError, match=r"gives no text of any id.* Start the server with its tokenizer"):
        opened(address)


def test_an_answer_without_the_ids_that_were_sent_is_refused(
    served: Served, address: str, opened: Open
) -> None:
    teacher, answer = opened(address), served.answer

    def without(path: str, body: Json, fault: str | None) -> Json:
        found = answer(path, body, fault)
        for entry, given in zip(found["choices"][0]["prompt_logprobs"], body["prompt"], strict=True):
            if entry is not None and len(entry) > 16:
                entry.pop(str(given))
        return found

    served.answer = without  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"it has no log-probability of id \d+, which was sent"):
        teacher.targets(packed())


def test_sglangs_answer_of_another_text_is_refused(served: Served, address: str, opened: Open) -> None:
    teacher, answer = opened(address, api="sglang"), served.answer
    served.answer = lambda path, body, fault: answer(  # type: ignore[method-assign]
        path, body | {"input_ids": [(token + 1) % 90 for token in body["input_ids"]]}, fault
    )
    with pytest.raises(UserError, match=r"it is of another text: id \d+ where \d+ was sent"):
        teacher.targets(packed())


def test_ids_that_the_student_lacks_are_of_no_target(address: str, opened: Open) -> None:
    teacher = opened(address)
    assert int(teacher.targets(packed()).ids_NK.max()) >= 50
    assert teacher.share_ids(50) == 50
    assert int(teacher.targets(packed()).ids_NK.max()) < 50


@pytest.mark.parametrize("known", [ALL_IDS, 96])
def test_texts_that_several_ids_have_are_refused_where_they_matter(
    known: int, served: Served, address: str, opened: Open
) -> None:
    """Of single bytes, as this tokenizer has, half are no text; where English needs none of them, Chinese does."""
    served.known, served.owner = known, "other"
    with pytest.raises(UserError, match=r"of texts that several ids have .*Use a server of teacher.api vllm"):
        opened(address, api="openai")


def test_another_model_is_refused(address: str, opened: Open) -> None:
    with pytest.raises(UserError, match=r"teacher.model: .* has no other; it has served. Name one of these"):
        opened(address, model="other")


def test_rows_longer_than_the_server_reads_are_refused(
    recipe: Recipe, served: Served, address: str, tmp_path: Path
) -> None:
    served.max_length = 33
    with pytest.raises(UserError, match=r"corpus.tokens_per_row"):
        distill(recipe(address), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (", url: 'ftp://x'", "teacher.url: is not the address of a server"),
        (", url: 'http://me:hunter2@x'", "teacher.url: has a user or a password in it"),
        (", url: 'http://x/v1'", "teacher.url: .* ends in /v1"),
        (", url: 'http://x:port'", "teacher.url: is not the address of a server"),
        (", url: 'http://x:99999'", "teacher.url: is not the address of a server"),
        (", url: 'http://[::1'", "teacher.url: is not the address of a server"),
        (", url: 'http://a..b'", "teacher.url: http://a..b: .* Write it as http://HOST:PORT"),
        (
            f", api_key_variable: {KEY}",
            "teacher.api_key_variable: is not the name of an environment variable",
        ),
        (", api_key_variable: NOT_THERE_AT_ALL", "the environment has no NOT_THERE_AT_ALL"),
        (", top_k: 0", "teacher.top_k: 0 must be 1 or more"),
        (", api: vlm", "teacher.api: 'vlm' is not one of vllm, sglang, openai. Did you mean vllm"),
    ],
)
def test_wrong_fields(
    fields: str, message: str, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url, more = ("http://127.0.0.1:9", fields) if "url" not in fields else (fields.split("url: ")[1], "")
    line = refusal(["distill", str(recipe(url, more)), "--out", str(tmp_path / "run")], capsys, tmp_path)
    assert re.search(message, line)
    assert KEY not in line and "hunter2" not in line


def test_a_temperature_cannot_be_applied_to_few_ids(recipe: Recipe, address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"objective.temperature: is 2.0, and teacher served at"):
        distill(recipe(address, objective="{chunk: 16, temperature: 2}"), out=tmp_path / "run")


def test_no_student_is_cut_from_a_server_which_is_not_asked(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"student.name: cut needs a teacher with layers"):
        distill(recipe("http://127.0.0.1:9", student="{name: cut, layers: 2}"), out=tmp_path / "run")


def test_no_server_is_named_at_once(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = refusal(
        ["distill", str(recipe("http://127.0.0.1:9")), "--out", str(tmp_path / "run")], capsys, tmp_path
    )
    assert re.search(r"http://127.0.0.1:9: no answer in \S+ s: ConnectError", line)


@pytest.mark.parametrize(
    ("url", "variable", "value", "named"),
    [
        ("http://127.0.0.1:9", "ALL_PROXY", "socks5://127.0.0.1:9", "socksio"),
        ("http://127.0.0.1:9", "HTTP_PROXY", "ftp://127.0.0.1:9", "Unknown scheme for proxy"),
        ("http://127.0.0.1:9", "HTTP_PROXY", "http://127.0.0.1:80x", "a proxy's address cannot be read"),
        (
            "http://127.0.0.1:9",
            "HTTP_PROXY",
            "http://me:hunter2/3@127.0.0.1:80",
            "a proxy's address cannot be read",
        ),
        ("https://127.0.0.1:9", "SSL_CERT_FILE", "/no/such/file.pem", "No such file"),
    ],
)
def test_a_proxy_or_certificates_that_cannot_be_used_are_one_line(
    url: str,
    variable: str,
    value: str,
    named: str,
    recipe: Recipe,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    line = refusal(["distill", str(recipe(url)), "--out", str(tmp_path / "run")], capsys, tmp_path)
    assert url in line and named in line and "See HTTP_PROXY" in line and "hunter2" not in line


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_proxy_is_not_asked_for_this_machine(
    host: str, served: Served, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host == "[::1]" and not has_ipv6():
        pytest.skip("IPv6: this machine has no ::1; not run")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(served, host=host.strip("[]")) as url:
        assert host in url and len(opened(url).targets(packed())) == 7


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as one:
        one.bind(("::1", 0))
        return True
    return False


@pytest.mark.parametrize("url", ["http://[::1]:9", "http://[2001:db8::1]:8000", "http://[::1]"])
def test_an_address_of_ipv6_is_one(url: str) -> None:
    with closing(http_client.HttpClient(url, None, 1, 0.1, 1)) as client, pytest.raises(UserError) as caught:
        client.get("/v1/models")
    assert f"{url}: no answer in" in str(caught.value)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Of 127.0.0.1, signed by itself, and its key."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl: not installed, and it makes the certificate; not run")
    paths = tmp_path / "certificate.pem", tmp_path / "key.pem"
    asked = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=double"
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run([openssl, *asked.split(), *more], check=True, capture_output=True)
    return paths


def test_certificates_are_verified(
    served: Served, opened: Open, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that nobody vouches for gets no request, and so no key; one that the environment trusts does."""
    monkeypatch.setenv("SERVED_KEY", KEY)
    with serving(served, certificate=certificate) as url:
        with pytest.raises(
            UserError,
            match=r"its certificate cannot be verified: .*CERTIFICATE_VERIFY_FAILED.* SSL_CERT_FILE",
        ):
            opened(url, api_key_variable="SERVED_KEY")
        assert not served.requests
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        assert len(opened(url, api_key_variable="SERVED_KEY").targets(packed())) == 7


def with_outage(served: Served, begins: Callable[[], bool], last: float) -> None:
    """No connection for `last` seconds, once it begins."""
    since = [0.0]

    def fault(path: str, body: Json) -> str | None:
        if not since[0] and begins():
            since[0] = time.monotonic()
        return "gone" if since[0] and time.monotonic() - since[0] < last else None

    served.fault = fault


def after_step(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: (
        (folder / "metrics.jsonl").exists()
        and any(line.get("train/loss") and line["step"] == step for line in RunDir(folder).metrics())
    )


def weights(run: RunDir) -> bytes:
    return (run.student / "model.safetensors").read_bytes()


def test_a_run_outlives_an_outage(recipe: Recipe, served: Served, address: str, tmp_path: Path) -> None:
    path = recipe(address, ", deadline_s: 20")
    whole = distill(path, out=tmp_path / "whole")
    with_outage(served, after_step(tmp_path / "again", 1), 1.0)
    again = distill(path, out=tmp_path / "again")
    assert weights(again) == weights(whole)


def test_a_server_that_stays_away_ends_the_run_which_goes_on_from_its_checkpoint(
    recipe: Recipe, teacher_folder: Path, tmp_path: Path
) -> None:
    train = "{steps: 4, rows_per_step: 2, lr: 1e-3, device: cpu, save_every: 1}"
    served = Served(teacher_folder)
    with ExitStack() as stack:
        url = stack.enter_context(serving(served))
        path = recipe(url, ", deadline_s: 0.3", train=train)
        whole = distill(path, out=tmp_path / "whole")
        with_outage(served, after_step(tmp_path / "run", 2), 1e9)
        with pytest.raises(UserError, match=r"no answer in 0.3 s.* --resume"):
            distill(path, out=tmp_path / "run")
    run = RunDir(tmp_path / "run")
    assert any(run.checkpoints.iterdir()) and not (run.path / "receipt.json").exists()
    served.fault = lambda path, body: None
    with serving(served, int(url.rpartition(":")[2])):
        assert weights(distill(path, out=tmp_path / "run", resume=True)) == weights(whole)


def test_a_server_that_comes_back_as_another_model_ends_the_run(
    recipe: Recipe, served: Served, address: str, tmp_path: Path
) -> None:
    other = Served(make_model(tmp_path / "other", seed=5))
    path, model = recipe(address, ", deadline_s: 20"), served.model
    whole = distill(path, out=tmp_path / "whole")
    with_outage(served, after_step(tmp_path / "run", 1), 0.5)
    outage = served.fault

    def fault(path: str, body: Json) -> str | None:
        if (found := outage(path, body)) is not None:
            served.model = other.model
        return found

    served.fault = fault
    with pytest.raises(UserError, match=r"is another model than before: its log-probabilities"):
        distill(path, out=tmp_path / "run")
    # Nor does it go on with it.
    with pytest.raises(UserError, match=r"another input: teacher/texts"):
        distill(path, out=tmp_path / "run", resume=True)
    served.model = model
    assert weights(distill(path, out=tmp_path / "run", resume=True)) == weights(whole)


def test_a_run_goes_on_with_a_server_that_has_moved(
    recipe: Recipe, served: Served, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How it is asked may change as well, and its model may not."""
    path = recipe(address)
    whole = distill(path, out=tmp_path / "whole")
    cut_off(path, tmp_path / "run", 2, monkeypatch)
    with serving(served) as moved:
        there = recipe(moved, ", deadline_s: 30, requests: 2, timeout_s: 9")
        assert weights(distill(there, out=tmp_path / "run", resume=True)) == weights(whole)
        with pytest.raises(UserError, match=r"teacher.top_k"):
            distill(recipe(moved, ", top_k: 5"), out=tmp_path / "run", resume=True)


def test_rounding_of_a_server_is_no_other_teacher(
    recipe: Recipe, served: Served, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It adds up in another order with every batch: the fixed texts are compared within a bound."""
    path = recipe(address)
    cut_off(path, tmp_path / "run", 2, monkeypatch)
    logp = served.logp
    monkeypatch.setattr(served, "logp", lambda *given: logp(*given) - 1e-3)
    assert distill(path, out=tmp_path / "run", resume=True).receipt()


def test_the_key_is_in_one_header_and_nowhere_else(
    recipe: Recipe, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("SERVED_KEY", KEY)
    served = Served(teacher_folder, key=KEY)
    with serving(served) as url:
        path = recipe(url, ", api_key_variable: SERVED_KEY, deadline_s: 0.3")
        assert main(["distill", str(path), "--out", str(tmp_path / "run")]) == 0
        for headers in served.headers:
            assert [name for name, value in headers.items() if KEY in value] == ["Authorization"]
        assert not any(KEY in json.dumps(body) for _, body in served.requests)
        # Also where the server repeats it, or the wrong one.
        for key in (KEY, f"{KEY}-wrong"):
            monkeypatch.setenv("SERVED_KEY", key)
            served.fault = lambda path, body: "echo"
            assert main(["distill", str(path), "--out", str(tmp_path / "other")]) == 2
    said = "".join(capfd.readouterr())
    assert "no such key: Bearer ***" in said and KEY not in said
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes(), file


def test_a_key_that_is_cut_off_is_hidden_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVED_KEY", KEY)
    client = http_client.HttpClient("http://127.0.0.1:9", "SERVED_KEY", 1, 1, 1)
    assert KEY[:4] not in client.clean("x" * (http_client.SHOWN - 8) + KEY)


FORMS = 'sk-a/b+c="d\\e'
"""A key that JSON, Python and addresses write in another way than it is."""


@pytest.mark.parametrize(
    "said",
    [
        FORMS,
        json.dumps({"key": FORMS}),
        json.dumps({"key": FORMS}).replace("/", r"\/"),
        repr({"key": FORMS}),
        f"/login?key={quote(FORMS)}",
        f"/login?key={quote(FORMS, safe='')}",
    ],
)
def test_a_key_is_hidden_however_it_is_written(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVED_KEY", FORMS)
    with closing(http_client.HttpClient("http://127.0.0.1:9", "SERVED_KEY", 1, 1, 1)) as client:
        found = client.clean(said)
    assert "***" in found and "sk-a" not in found and "d\\" not in found


ESCAPED = "sk-ab/cd+ef&gh=ijklmnop"


@pytest.mark.parametrize(
    "said",
    [
        html.escape(ESCAPED),
        ESCAPED.replace("&", "&amp;").replace("+", "&#43;"),
        html.escape(ESCAPED).replace("/", "&#x2F;"),
        html.escape("".join(f"&#{ord(each)};" for each in ESCAPED)),
        json.dumps(ESCAPED).replace("&", r"\u0026"),
        ESCAPED.replace("+", r"\x2b").replace("/", r"\057"),
        html.escape(json.dumps(ESCAPED).replace("&", r"\u0026")),
        "".join(f"%{ord(each):02x}" for each in ESCAPED),
        "".join(f"&#{ord(each)};" for each in ESCAPED),
        ESCAPED[:14] + "...",
        "..." + ESCAPED[-12:],
        ESCAPED[:7] + "\n" + ESCAPED[7:],
        "x" * (http_client.SHOWN - 35) + html.escape(ESCAPED),
    ],
)
def test_a_message_with_a_part_of_the_key_is_not_shown(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVED_KEY", ESCAPED)
    with closing(http_client.HttpClient("http://127.0.0.1:9", "SERVED_KEY", 1, 1, 1)) as client:
        found = client.clean(f"no such key: Bearer {said}")
    assert found == http_client.HIDDEN


def test_a_message_without_the_key_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVED_KEY", ESCAPED)
    message = r"no key begins with sk-ab: C:\new\u00e9\U00110000, 5 &lt; 6 and 100 %"
    with closing(http_client.HttpClient("http://127.0.0.1:9", "SERVED_KEY", 1, 1, 1)) as client:
        assert client.clean(message) == message


def test_a_key_in_the_place_of_a_number_is_hidden_whole(
    served: Served, address: str, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that is shortened first would show the beginning of it."""
    key = "sk-" + "0123456789abcdef" * 4
    monkeypatch.setenv("SERVED_KEY", key)
    answers = {"choices": [{"prompt_logprobs": [None, *[{key: {"logprob": -1.0}}] * 2]}]}
    listed = served.answer
    monkeypatch.setattr(
        served, "answer", lambda path, *more: listed(path, *more) if path == "/v1/models" else answers
    )
    monkeypatch.setattr(server, "PROBE_TOKENS", 3)
    with pytest.raises(UserError, match=r"an id is '\*\*\*'\.") as caught:
        opened(address, api_key_variable="SERVED_KEY")
    assert key[:8] not in str(caught.value)


# Capture


def capture(recipe: Path, out: Path) -> None:
    store.capture(recipe, [], out, None, Display())


CAPTURE = "{name: topk, k: 8, dtype: float32, rows: steps, rows_per_shard: 8, rows_per_batch: 2}"


def test_a_store_by_a_server_is_that_of_the_model(
    recipe: Recipe, small: dict[str, str], tiny_recipe: Recipe, address: str, student: str, tmp_path: Path
) -> None:
    capture(recipe(address, ", top_k: 8", capture=CAPTURE), out=tmp_path / "there")
    capture(tiny_recipe(**small, student=student, capture=CAPTURE), out=tmp_path / "here")
    there, here = Store(tmp_path / "there"), Store(tmp_path / "here")
    assert not list(verify(there.path)) and there.head is None
    for row in here.rows.tolist():
        (places, one), (others, other) = here.row(row), there.row(row)
        assert torch.equal(places, others)
        mine, theirs = here.codec.decode(one, here.head), there.codec.decode(other, None)
        # By id: of two that are as likely, either may come first.
        by_id = [
            torch.zeros(len(each), ALL_IDS).scatter(1, each.ids_NK, each.logp_NK)
            for each in (mine, theirs)
            if isinstance(each, SparseTargets)
        ]
        assert len(by_id) == 2 and torch.allclose(*by_id, atol=2e-5)
    assert there.manifest["certificate"].keys() == {"positions", "captured_mass", "student"}
    assert not list((tmp_path / "there").glob("*.rows"))


def test_a_run_from_a_store_by_a_server_is_that_of_the_server(
    recipe: Recipe, small: dict[str, str], tiny_recipe: Recipe, address: str, student: str, tmp_path: Path
) -> None:
    """Of all ids, so that a label that is none of the k makes no difference."""
    whole = CAPTURE.replace("k: 8", f"k: {ALL_IDS}")
    served = recipe(address, f", top_k: {ALL_IDS}", capture=whole)
    live = distill(served, out=tmp_path / "live")
    capture(served, out=tmp_path / "store")
    stored = distill(
        tiny_recipe(
            **small,
            teacher=f"{{name: store, path: {tmp_path / 'store'}}}",
            student=student,
        ),
        out=tmp_path / "stored",
    )
    for one, other in zip(live.metrics(), stored.metrics(), strict=True):
        for name in ("train/kd", "heldout/kl", "heldout/agreement", "heldout/teacher_ce"):
            assert other.get(name, 0.0) == pytest.approx(one.get(name, 0.0), rel=1e-5), name
    assert "lower bounds" in stored.receipt()["teacher"]["held_out"]


@pytest.mark.parametrize("top_k", [2, 16])
def test_held_out_rows_of_a_store_keep_their_labels(
    top_k: int,
    recipe: Recipe,
    small: dict[str, str],
    tiny_recipe: Recipe,
    address: str,
    student: str,
    tmp_path: Path,
) -> None:
    """Also where the server gives more ids than are kept."""
    path = recipe(address, f", top_k: {top_k}", capture=CAPTURE.replace("k: 8", "k: 2"))
    live = distill(path, out=tmp_path / "live").metrics()[0]
    capture(path, out=tmp_path / "store")
    of_store = tiny_recipe(**small, teacher=f"{{name: store, path: {tmp_path / 'store'}}}", student=student)
    stored = distill(of_store, out=tmp_path / "stored").metrics()[0]
    for name in ("heldout/agreement", "heldout/teacher_ce", *(["heldout/kl"] if top_k == 2 else [])):
        assert stored[name] == pytest.approx(live[name], rel=1e-5), name


def exchanged_once(served: Served, folder: Path, when: Callable[[], bool]) -> None:
    """Another model answers from then on, without an outage."""
    other = Served(make_model(folder, seed=5)).model

    def fault(path: str, body: Json) -> None:
        if when():
            served.model = other

    served.fault = fault


def test_a_server_that_is_exchanged_during_a_capture_ends_it(
    recipe: Recipe, served: Served, address: str, tmp_path: Path
) -> None:
    """No shard has rows of both, and what is left to resume has none of the other model's."""
    shards = CAPTURE.replace("rows_per_shard: 8", "rows_per_shard: 4")
    path, model, out = recipe(address, capture=shards), served.model, tmp_path / "store"
    capture(path, out=tmp_path / "whole")
    exchanged_once(served, tmp_path / "other", lambda: (out / "00000.json").exists())
    with pytest.raises(UserError, match=r"is another model than before"):
        capture(path, out=out)
    assert not (out / "manifest.json").exists() and not list(out.glob("*.rows"))
    served.fault, served.model = lambda path, body: None, model
    capture(path, out=out)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (out / file.name).read_bytes()


def test_parts_of_a_capture_belong_together_although_the_server_rounds(
    recipe: Recipe, served: Served, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, logp = (
        recipe(address, capture=CAPTURE.replace("rows_per_shard: 8", "rows_per_shard: 4")),
        served.logp,
    )
    store.capture(path, [], tmp_path / "one", "1/2", Display())
    monkeypatch.setattr(served, "logp", lambda *given: logp(*given) - 1e-3)
    store.capture(path, [], tmp_path / "other", "2/2", Display())
    assert merge([tmp_path / "one", tmp_path / "other"], tmp_path / "both") == 0
    monkeypatch.setattr(served, "logp", lambda *given: logp(*given) - 0.5)
    store.capture(path, [], tmp_path / "third", "2/2", Display())
    with pytest.raises(UserError, match=r"captured with another teacher.teacher/texts"):
        merge([tmp_path / "one", tmp_path / "third"], tmp_path / "wrong")


def test_the_next_rows_are_asked_for_while_these_are_kept(
    recipe: Recipe, served: Served, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the first row of a batch is handed over, texts of the next are being asked for or have been."""
    texts: list[int] = []
    kept = capture_rows._encoded

    def encoded(*given: Any) -> Any:
        time.sleep(0.05)
        texts.append(sum(path == "/v1/completions" for path, _ in served.requests))
        return kept(*given)

    monkeypatch.setattr(capture_rows, "_encoded", encoded)
    rows = recipe(address, capture=CAPTURE.replace("rows_per_batch: 2", "rows_per_batch: 1"))
    capture(rows, out=tmp_path / "store")
    per_row = sorted(later - before for before, later in itertools.pairwise(texts))
    assert per_row[len(per_row) // 2] > 0  # each row's texts come one row before it


def test_a_disk_without_room_for_a_row_is_one_line(
    recipe: Recipe, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def full(self: Path, *given: Any, **options: Any) -> None:
        if self.suffix == ".rows":
            raise OSError(28, "No space left on device")
        mkdir(self, *given, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(UserError, match=r"No space left on device"):
        capture(recipe(address, capture=CAPTURE), out=tmp_path / "store")


def test_a_server_that_gives_fewer_ids_than_asked_for_is_refused_before_anything_is_written(
    recipe: Recipe, served: Served, address: str, tmp_path: Path
) -> None:
    served.fault = lambda path, body: "400" if (body.get("prompt_logprobs") or 0) > 32 else None
    with pytest.raises(UserError, match=r"refuses"):
        capture(recipe(address, ", top_k: 64", capture=CAPTURE), out=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_capture_goes_on_at_the_row(
    recipe: Recipe, served: Served, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(address, ", deadline_s: 0.2, requests: 1", capture=CAPTURE)
    capture(path, out=tmp_path / "whole")
    served.requests.clear()
    capture(path, out=tmp_path / "counted")
    total = len(served.requests)
    with_outage(served, lambda: len(list((tmp_path / "again").glob("*.rows/*"))) >= 3, 1e9)
    with pytest.raises(UserError, match=r"no answer in \S+ s"):
        capture(path, out=tmp_path / "again")
    kept = sorted((tmp_path / "again").glob("*.rows/*.safetensors"))
    assert len(kept) >= 3
    kept[0].write_bytes(kept[0].read_bytes()[:-8])
    served.fault = lambda path, body: None
    served.requests.clear()
    notes: list[str] = []
    monkeypatch.setattr(Display, "note", lambda self, text: notes.append(text))
    capture(path, out=tmp_path / "again")
    # What proves the server, and what was missing or damaged.
    assert len(served.requests) <= total - len(kept) + 1
    # What was kept counts as done.
    assert any(re.match(r"(\d+)/\1 rows, .* left", note) for note in notes), notes
    for file in (tmp_path / "whole").iterdir():
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "{name: hidden}",
            "capture.name: hidden needs more than teacher.name: server gives. Set capture.name: topk",
        ),
        ("{name: topk, k: 65}", "capture.k: 65, and the teacher gives 64 ids"),
    ],
)
def test_a_store_that_a_server_cannot_fill_is_refused(
    section: str, message: str, recipe: Recipe, address: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        capture(recipe(address, capture=section), out=tmp_path / "store")
    assert not (tmp_path / "store").exists()


# Rollouts, writing, checks


@pytest.mark.parametrize("api", ["vllm", pytest.param("sglang", marks=pytest.mark.soak)])
def test_a_server_grades_what_the_student_writes(
    api: str,
    recipe: Recipe,
    small: dict[str, str],
    tiny_recipe: Recipe,
    address: str,
    student: str,
    tmp_path: Path,
) -> None:
    sections = {
        "rollouts": "{max_new_tokens: 8, prompt_tokens: 6}",
        "student": student,
    }
    here = distill(tiny_recipe(**small, **sections), out=tmp_path / "here")
    there = distill(recipe(address, f", api: {api}, top_k: {ALL_IDS}", **sections), out=tmp_path / "there")
    for one, other in zip(here.metrics(), there.metrics(), strict=True):
        for name in ("train/rollout_kd", "own/reverse_kl", "own/teacher_nll"):
            assert other.get(name, 0.0) == pytest.approx(one.get(name, 0.0), rel=1e-4), name


@pytest.mark.parametrize(
    ("temperature", "api"),
    [
        (0, "vllm"),
        (1, "sglang"),
        pytest.param(0, "sglang", marks=pytest.mark.soak),
        pytest.param(1, "vllm", marks=pytest.mark.soak),
    ],
)
def test_a_server_writes_a_corpus(
    api: str,
    temperature: int,
    recipe: Recipe,
    tiny_recipe: Recipe,
    served: Served,
    address: str,
    student: str,
    tmp_path: Path,
) -> None:
    """At temperature 0 what the model in this process writes; else by the server's numbers, alike every time."""
    drawn = ", top_p: 0.9, top_k: 50" * temperature
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the cat {n} "}) + "\n" for n in range(6)))
    sections = {
        "corpus": f"{{name: prompts, path: {prompts}, tokens_per_row: 64, heldout_rows: 2}}",
        "write": f"{{max_new_tokens: 10, truncated: keep, temperature: {temperature}{drawn}}}",
        "rollouts": "{max_new_tokens: 8}",
        "student": student,
    }
    path = recipe(address, f", api: {api}", **sections)
    served.requests.clear()
    write_corpus(path, out=tmp_path / "there")
    asked = [body for _, body in served.requests if "stop_token_ids" in str(body)]
    asked = [body | body.get("sampling_params", {}) for body in asked]
    assert len(asked) == 6 and {body["temperature"] for body in asked} == {temperature}
    if temperature:
        assert {(body["top_p"], body["top_k"]) for body in asked} == {(0.9, 50)}
        assert len({body.get("seed", body.get("sampling_seed")) for body in asked}) == 6
    write_corpus(path, out=tmp_path / "again")
    there = (tmp_path / "there" / "corpus.jsonl").read_text()
    assert there == (tmp_path / "again" / "corpus.jsonl").read_text()
    if not temperature:
        write_corpus(tiny_recipe(**sections), out=tmp_path / "here")
        assert there == (tmp_path / "here" / "corpus.jsonl").read_text()


def test_a_server_that_is_exchanged_while_it_writes_ends_it(
    recipe: Recipe, served: Served, address: str, student: str, tmp_path: Path
) -> None:
    prompts, model, out = tmp_path / "prompts.jsonl", served.model, tmp_path / "there"
    prompts.write_text("".join(json.dumps({"prompt": f"the cat {n} "}) + "\n" for n in range(12)))
    path = recipe(
        address,
        corpus=f"{{name: prompts, path: {prompts}, tokens_per_row: 64, heldout_rows: 2}}",
        write="{max_new_tokens: 10, truncated: keep, temperature: 0, prompts_at_once: 3}",
        rollouts="{max_new_tokens: 8}",
        student=student,
    )
    write_corpus(path, out=tmp_path / "whole")
    whole = (tmp_path / "whole" / "corpus.jsonl").read_text()
    written = out / "corpus.jsonl"
    exchanged_once(served, tmp_path / "other", lambda: written.exists() and written.stat().st_size > 0)
    with pytest.raises(UserError, match=r"is another model than before"):
        write_corpus(path, out=out)
    assert not (out / "receipt.json").exists() and whole.startswith((out / "corpus.jsonl").read_text())
    served.fault, served.model = lambda path, body: None, model
    assert (
        write_corpus(path, out=out)["teacher"]["teacher/texts"]
        == json.loads((tmp_path / "whole" / "receipt.json").read_text())["teacher"]["teacher/texts"]
    )
    assert (out / "corpus.jsonl").read_text() == whole


@dataclass
class Answer(Row):
    ends: set[int] = field(default_factory=set)

    def add(self, token: int) -> None:
        self.new.append(token)
        self.finish = "end" if token in self.ends else "length" if len(self.new) == self.max_new else ""


def written(teacher: ServerTeacher, temperature: float, ends: list[int]) -> list[int]:
    """Sixteen tokens, or up to an end."""
    row = Answer("row", [5, 9, 11], 16, [0.3] if temperature else [], ends={*ends})
    settings = {"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {}
    how = GenerationConfig(do_sample=temperature > 0, eos_token_id=ends, **settings)
    teacher.decoder(ALL_IDS)(how, [row], lambda: None)
    return row.new


GENERATION: list[Json] = [
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.0},
    {"frequency_penalty": 1.0},
    {"temperature": 0.3},
    {"top_p": 0.1},
    {"top_k": 2},
    {"min_p": 0.9},
]


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_a_generation_config_of_the_server_is_not_used(
    api: str, served: Served, address: str, opened: Open
) -> None:
    teacher = opened(address, api=api)
    for temperature in (0.0, 1.0):
        served.generation = {}
        expected = written(teacher, temperature, [])
        for served.generation in GENERATION:
            assert written(teacher, temperature, []) == expected, served.generation


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_a_server_stops_at_an_end(api: str, served: Served, address: str, opened: Open) -> None:
    teacher = opened(address, api=api)
    whole = written(teacher, 1.0, [])
    last = max(i for i in range(12) if whole.index(whole[i]) == i)
    served.answers.clear()
    assert written(teacher, 1.0, [whole[last], ALL_IDS - 1]) == whole[: last + 1]
    assert last > 0 and served.answers == [whole[: last + 1]]
    # The server's own is none, where the student has another.
    served.own_end = whole[last // 2]
    assert written(teacher, 1.0, [whole[last]]) == whole[: last + 1]
    assert written(teacher, 1.0, []) == whole


def test_prompts_alone_are_answered_by_the_server(recipe: Recipe, address: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the dog {n} "}) + "\n" for n in range(12)))
    corpus = f"{{name: prompts, path: {prompts}, tokens_per_row: 64, heldout_rows: 3}}"
    path = recipe(address, corpus=corpus, rollouts="{max_new_tokens: 8}")
    assert distill(path, out=tmp_path / "run").metrics()[-1]["heldout/kl"] > 0


def test_an_id_that_is_none_ends_the_writing(
    recipe: Recipe, served: Served, address: str, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n' * 3)
    corpus = f"{{name: prompts, path: {prompts}, tokens_per_row: 64, heldout_rows: 1}}"
    served.written = lambda *given: [5, ALL_IDS]  # type: ignore[method-assign]
    path = recipe(address, corpus=corpus, write="{max_new_tokens: 4}", rollouts="{max_new_tokens: 4}")
    with pytest.raises(UserError, match=r"it wrote id 258, which is none of the 258 of teacher.tokenizer"):
        write_corpus(path, out=tmp_path / "there")


def test_openai_cannot_write(
    recipe: Recipe, served: Served, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LOST_MASS", 1.0)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n' * 3)
    path = recipe(address, ", api: openai", corpus=f"{{name: prompts, path: {prompts}, tokens_per_row: 64, heldout_rows: 1}}",
                  write="{max_new_tokens: 4}", rollouts="{max_new_tokens: 4}")  # fmt: skip
    with pytest.raises(UserError, match=r"have no ids of what is written: set teacher.api: vllm or sglang"):
        write_corpus(path, out=tmp_path / "there")


def test_check_and_plan_of_a_served_teacher(
    recipe: Recipe, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recipe(address))
    assert main(["plan", path]) == 0
    assert main(["check", path]) == 0, capsys.readouterr()
    assert "teacher" in capsys.readouterr().out


def test_the_report_shows_what_a_served_teacher_chooses(
    recipe: Recipe, tiny_recipe: Recipe, student: str, small: dict[str, str], address: str, tmp_path: Path
) -> None:
    """Ids, not the places of a few of them; the bucket is no choice."""
    there = distill(recipe(address, ", top_k: 5"), out=tmp_path / "there")
    here = distill(tiny_recipe(**small, student=student), out=tmp_path / "here")
    assert main(["report", str(there.path)]) == 0
    assert "lower bound" in (there.path / "report.html").read_text()
    for ours, theirs in zip(*(_tokens(run, here.student) for run in (here, there)), strict=True):
        if "teacher" in ours:
            assert [c[0] for c in ours["teacher"]] == [c[0] for c in theirs["teacher"]]
            assert theirs["teacher_ce"] == pytest.approx(ours["teacher_ce"], abs=1e-4)
            assert theirs["kl"] <= ours["kl"] + 1e-4 and theirs["entropy"] == pytest.approx(
                ours["entropy"], abs=1e-4
            )


def _tokens(run: RunDir, student: Path) -> list[dict[str, Any]]:
    resolved = resolve(load_recipe(run.path / "resolved.yaml"), saved_student=student)
    setup = set_up(resolved, lambda line: None)
    with closing(setup.teacher):
        rows = disagreement(setup.student, setup.teacher, setup.corpus.heldout, 40, setup.tokenizer)
    return [token for row in rows for token in row]


def test_logits_for_batch_are_log_probabilities_of_the_known(
    served: Served, address: str, opened: Open
) -> None:
    teacher = opened(address)
    ids_BT = torch.tensor([[5, 9, 11], [7, 30, 2]])
    for ids, logits_V in zip(ids_BT.tolist(), teacher.logits_for_batch(ids_BT), strict=True):
        logp_V = served.logp(ids, None, 1.0)[-1]
        known_V = logits_V > -math.inf
        assert int(known_V.sum()) in (16, 17)
        assert torch.allclose(logits_V[known_V], logp_V[known_V], atol=2e-5)


def test_padding_of_the_servers_head_goes_to_the_bucket() -> None:
    """Ids that the student does not have: their probability is that of what it cannot say."""
    found = server._sparse([{3: math.log(0.5), 9: math.log(0.25)}], ids=5)
    student_NV = torch.full((1, 5), 0.2).log()
    student_NS, teacher_NS = found.on_support(student_NV, 1.0)
    assert teacher_NS.exp().tolist() == [pytest.approx([0.5, 0.5])]
    assert student_NS.exp().tolist() == [pytest.approx([0.2, 0.8])]


def test_ids_in_the_bucket_are_of_its_class() -> None:
    """A student whose likeliest id is none of the k does not agree, and such a label has the bucket's probability."""
    found = server._sparse([{3: math.log(0.5), 9: math.log(0.2)}, {7: math.log(0.9)}], ids=12)
    assert found.classes_of(torch.tensor([3, 9])).tolist() == [0, 2]
    assert found.classes_of(torch.tensor([9, 7])).tolist() == [1, 0]
    objective = Objective(forward_kl, 1.0, 0.0, 1.0, 4)
    first_ND = torch.eye(12)[[5, 7]] * 3.0  # whose likeliest ids these are
    sums = objective.measure(first_ND, Head(torch.eye(12)), torch.tensor([4, 7]), found)
    assert float(sums["agreement"]) == 1
    assert float(sums["teacher_ce"]) == pytest.approx(-math.log(0.3) - math.log(0.9))


def test_vllm_reads_what_vllm_writes() -> None:
    """An answer of vLLM 0.32, shortened."""
    answer = {
        "id": "cmpl-1",
        "choices": [
            {
                "index": 0,
                "text": " x",
                "prompt_logprobs": [
                    None,
                    {"28": {"logprob": -1.5, "rank": 4, "decoded_token": ","},
                     "216": {"logprob": -1.0, "rank": 1, "decoded_token": " "}},
                ],
            }
        ],
    }  # fmt: skip
    (place,) = Vllm().read(answer, [504, 28], 0)
    assert place.logps == {28: -1.5, 216: -1.0} and place.text == ","


def test_nothing_is_left_of_a_refused_server(served: Served, address: str, opened: Open) -> None:
    served.owner = "other"

    def requesting() -> int:
        return sum("potstill-request" in thread.name for thread in threading.enumerate())

    before = requesting()
    refused = []  # kept, as a traceback keeps what it passed through
    for _ in range(3):
        with pytest.raises(UserError) as caught:
            opened(address, model="served", api="openai")
        refused.append(caught)
    assert wait_until(lambda: requesting() <= before)


@pytest.mark.parametrize("is_https", [False, True])
def test_what_is_in_flight_ends_when_it_is_closed(
    is_https: bool, served: Served, opened: Open, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The interpreter waits for these threads."""
    certificate = request.getfixturevalue("certificate") if is_https else None
    if certificate is not None:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    answer, goes_on = served.answer, threading.Event()
    with serving(served, certificate=certificate) as url:
        teacher = opened(url, timeout_s=60.0, deadline_s=60.0)
        served.answer = lambda *given: goes_on.wait(60) and answer(*given)  # type: ignore[method-assign]
        refused: list[str] = []

        def ask() -> None:
            with pytest.raises(UserError) as caught:
                teacher.targets(packed())
            refused.append(str(caught.value))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        assert wait_until(lambda: served.in_flight == 3)
        teacher.close()
        asking.join(10)
        threads = [each for each in threading.enumerate() if "potstill-request" in each.name]
        ended = wait_until(lambda: not any(each.is_alive() for each in threads))
        goes_on.set()
    assert ended and refused == [f"{url}: the connection was closed."]


def test_a_connection_is_not_kept_until_the_server_closes_it(
    served: Served, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert http_client.KEPT_S < 5
    monkeypatch.setattr(http_client, "KEPT_S", 0.05)
    with closing(http_client.HttpClient(address, None, 5, 5, 1)) as client:
        client.get("/v1/models")
        time.sleep(0.1)
        client.get("/v1/models")
    assert served.connections == 2


def test_a_kept_row_that_was_damaged_is_asked_for_again(
    recipe: Recipe, served: Served, address: str, tmp_path: Path
) -> None:
    path = recipe(address, ", deadline_s: 0.2, requests: 1", capture=CAPTURE)
    capture(path, out=tmp_path / "whole")
    with_outage(served, lambda: len(list((tmp_path / "again").glob("*.rows/*"))) >= 2, 1e9)
    with pytest.raises(UserError, match=r"no answer in"):
        capture(path, out=tmp_path / "again")
    kept = sorted((tmp_path / "again").glob("*.rows/*.safetensors"))[0]
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(bytes(content))
    served.fault = lambda path, body: None
    capture(path, out=tmp_path / "again")
    assert shards(tmp_path / "again") == shards(tmp_path / "whole")


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_a_server_exchanged_between_two_requests_shows_at_the_end(
    recipe: Recipe, served: Served, address: str, tmp_path: Path
) -> None:
    other, is_last = Served(make_model(tmp_path / "other", seed=5)), after_step(tmp_path / "run", 4)

    def exchanged(path: str, body: Json) -> None:
        if is_last():
            served.model = other.model

    served.fault = exchanged
    with pytest.raises(UserError, match=r"the teacher changed during training: teacher/texts"):
        distill(recipe(address), out=tmp_path / "run")
    assert not (tmp_path / "run" / "receipt.json").exists()


def test_an_answer_that_drips_is_given_up(
    served: Served, address: str, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = opened(address, timeout_s=0.3, deadline_s=0.5)
    served.fault = lambda path, body: "drip"
    started_s = time.monotonic()
    with pytest.raises(UserError, match=r"it took more than 0\.3 s \(teacher\.timeout_s\)|ReadTimeout"):
        teacher.targets(packed())
    assert time.monotonic() - started_s < 10
