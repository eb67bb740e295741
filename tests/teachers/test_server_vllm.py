"""A teacher on a real vLLM server, where `POTSTILL_VLLM` names its Python: `make test-vllm`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from potstill import TorchTeacher, UserError, distill, evaluate, load_recipe
from potstill.data.tokenizers import load_tokenizer
from potstill.io.terminal import Display
from potstill.recipe.sections_models import ServerTeacherConfig
from potstill.runs.run_dir import RunDir
from potstill.store.reader import verify
from potstill.teachers.server import ServerTeacher
from potstill.types import Batch
from potstill.workflows import capture as captures
from potstill.workflows.write import write_corpus

Recipe = Callable[..., Path]
REAL = os.environ.get("POTSTILL_VLLM")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(REAL is None, reason="vllm: POTSTILL_VLLM names no Python that has it; not run"),
]
START_S = 1800
TOKENS = 64


class Server:
    """`vllm serve` on a free port, which may be killed and started again."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.log = folder, log
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert REAL is not None
        command = [
            *(str(Path(REAL).with_name("vllm")), "serve", str(self.folder)),
            *("--served-model-name", "teacher", "--dtype", "float32", "--max-model-len", "258"),
            *("--max-logprobs", "128", "--port", str(self.port)),
        ]
        settings = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | settings, start_new_session=True
            )

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process is not None and self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(1)
        raise AssertionError(f"no answer in {START_S} s: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def folder(real_teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's teacher as a folder."""
    folder: Path = tmp_path_factory.mktemp("served") / "teacher"
    real_teacher.model.save(folder)
    real_teacher.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def only_server(folder: Path) -> Iterator[Server]:
    server = Server(folder, folder.parent / "vllm.log")
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def server(only_server: Server) -> Server:
    """The server, up: the test before may have killed it."""
    if only_server.process is None:
        only_server.start()
    only_server.wait()
    return only_server


@pytest.fixture
def pair(tiny_recipe: Recipe, folder: Path, real_student: Path) -> Recipe:
    """A recipe of the demo's teacher, in this process or served, and a student of two of its layers."""

    def write(server: Server | None, **sections: str) -> Path:
        of_server = (
            ""
            if server is None
            else (
                f"{{name: server, url: {server.url}, model: teacher, tokenizer: {folder}, top_k: 64, deadline_s: {START_S}}}"
            )
        )
        return tiny_recipe(
            **{
                "corpus": f"{{name: text, path: 'stdlib:', include: [json/*.py], tokens_per_row: {TOKENS}, heldout_rows: 4}}",
                "teacher": of_server or f"{{name: torch, model: {folder}}}",
                "student": f"{{name: checkpoint, model: {real_student}}}",
                "train": "{steps: 20, rows_per_step: 2, lr: 3e-4, warmup: 2, device: cpu, save_every: 5}",
                "capture": "{name: topk, k: 64, dtype: float32, rows: steps, rows_per_shard: 8, rows_per_batch: 2}",
                "eval": "{every: 10}",
            }
            | sections
        )

    return write


@pytest.fixture(scope="module")
def real_student(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first and last layers of the teacher, as a run that takes no step that counts saves them."""
    place = tmp_path_factory.mktemp("student")
    path = place / "cut.yaml"
    path.write_text(
        f"corpus: {{name: text, path: 'stdlib:', include: [json/*.py], tokens_per_row: {TOKENS}, heldout_rows: 4}}\n"
        f"teacher: {{name: torch, model: {folder}}}\n"
        "student: {name: cut, layers: 4, rule: first_last, repair: false}\n"
        "train: {steps: 1, rows_per_step: 1, lr: 1e-12, device: cpu}\n"
    )
    return distill(path, out=place / "run").student


def test_log_probabilities_are_those_of_the_model_in_this_process(server: Server, folder: Path) -> None:
    tokenizer, here = load_tokenizer(folder), TorchTeacher.for_inference(folder, device="cpu")
    text = Path(os.__file__).read_text()
    ids_BT = torch.tensor(tokenizer(text)["input_ids"][: 4 * 128]).view(4, 128)
    position_ids_BT = torch.arange(128).repeat(4, 1)
    position_ids_BT[1, 50:] = torch.arange(78)  # two documents in a row
    positions_N = torch.cat([torch.arange(0, 127) + 128 * b for b in range(4)])
    positions_N = positions_N[positions_N != 128 + 49]
    batch = Batch(torch.arange(4), ids_BT, position_ids_BT, positions_N, ids_BT.flatten()[positions_N + 1])
    targets = here.targets(batch)
    logp_NV = targets.head(targets.hidden_NE).log_softmax(-1)
    for api in ("vllm", "openai"):
        config = ServerTeacherConfig(
            url=server.url, model="teacher", tokenizer=str(folder), api=api, top_k=20
        )
        with closing(ServerTeacher.open(config, tokenizer)) as teacher:
            found = teacher.targets(batch)
        known_NK = found.ids_NK >= 0
        gap_NK = (logp_NV.gather(1, found.ids_NK.clamp_min(0)) - found.logp_NK).abs()
        assert float(gap_NK[known_NK].max()) < 1e-3
        if api == "vllm":
            for ids, best in zip(found.ids_NK.tolist(), logp_NV.topk(19).indices.tolist(), strict=True):
                assert {*best} <= {*ids}


def test_a_run_by_a_server_is_that_of_a_store(server: Server, pair: Recipe, tmp_path: Path) -> None:
    """Of the same k: the students of 20 steps are as far from the teacher, within one percent."""
    live = distill(pair(server), out=tmp_path / "live")
    captures.capture(pair(None), [], tmp_path / "store", None, Display(quiet=True))
    stored = distill(
        pair(None, teacher=f"{{name: store, path: {tmp_path / 'store'}}}"), out=tmp_path / "stored"
    )
    exact = load_recipe(pair(None))
    kls = [evaluate(exact, run.student)["heldout/kl"] for run in (live, stored)]
    before = live.metrics()[0]["heldout/kl"]
    assert kls[0] == pytest.approx(kls[1], rel=0.01) and max(kls) < before
    # Of few ids, held-out figures are bounds from below.
    assert live.metrics()[-1]["heldout/kl"] < kls[0]


def test_a_corpus_that_vllm_writes(server: Server, pair: Recipe, tmp_path: Path) -> None:
    """Greedy, so that it is what the model in this process writes."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The capital of France is"}\n{"prompt": "def add(a, b):"}\n' * 2)
    sections = {
        "corpus": f"{{name: prompts, path: {prompts}, tokens_per_row: {TOKENS}, heldout_rows: 1, chat: false}}",
        "rollouts": "{max_new_tokens: 8}",
        "write": "{max_new_tokens: 12, temperature: 0, truncated: keep}",
    }
    write_corpus(pair(server, **sections), out=tmp_path / "there")
    write_corpus(pair(None, **sections), out=tmp_path / "here")
    assert (tmp_path / "there" / "corpus.jsonl").read_text() == (
        tmp_path / "here" / "corpus.jsonl"
    ).read_text()


def killed_and_started_again(server: Server, when: Callable[[], bool]) -> threading.Thread:
    def watch() -> None:
        _wait(when)
        server.kill()
        server.start()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_server_that_is_killed_in_a_run_and_in_a_capture(
    server: Server, pair: Recipe, tmp_path: Path
) -> None:
    """Both wait for it, and end as the undisturbed ones do, to the server's own rounding."""
    whole = distill(pair(server), out=tmp_path / "whole")
    run = RunDir(tmp_path / "run")

    def has_begun() -> bool:
        return (run.path / "metrics.jsonl").exists() and len(run.metrics()) > 4

    watching = killed_and_started_again(server, has_begun)
    distill(pair(server), out=run.path)
    watching.join()
    for one, other in zip(whole.metrics(), run.metrics(), strict=True):
        for name in ("train/loss", "heldout/kl"):
            assert other.get(name, 0.0) == pytest.approx(one.get(name, 0.0), rel=1e-3), (name, one["step"])

    store = tmp_path / "store"
    watching = killed_and_started_again(server, lambda: len(list(store.glob("*.rows/*"))) >= 2)
    captures.capture(pair(server), [], store, None, Display(quiet=True))
    watching.join()
    assert not list(verify(store))


def test_a_server_that_stays_away_ends_the_run_and_resumes(
    server: Server, pair: Recipe, tmp_path: Path
) -> None:
    path = pair(server)
    short = path.with_name("short.yaml")
    short.write_text(path.read_text().replace(f"deadline_s: {START_S}", "deadline_s: 2"))
    out = tmp_path / "run"
    stopper = threading.Thread(
        target=lambda: (
            _wait(lambda: (out / "checkpoints").exists() and any((out / "checkpoints").iterdir())),
            server.kill(),
        )
    )
    stopper.start()
    with pytest.raises(UserError, match=rf"{server.url}: no answer in 2 s.* --resume"):
        distill(short, out=out)
    stopper.join()
    server.start()
    server.wait()
    again = distill(short, out=out, resume=True)
    assert again.receipt()["steps"] == 20


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not until() and time.monotonic() < deadline:
        time.sleep(0.02)
