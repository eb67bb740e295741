"""Publishing with the real client to a Hub on this machine: complete, or complete when run again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from potstill.publish import publish as publishing
from publish.hub import Hub, Request
from publish.lab import (
    COMMIT,
    LICENSES,
    REPO,
    TOKEN,
    environment,
    planned,
    publish,
    remote,
    require_whole,
    some_faults,
)


def errors_in(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error:")]


def test_a_dry_run_uploads_nothing_and_plans_what_is_uploaded(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(run, "--dry-run") == 0
    output = capsys.readouterr().out
    assert hub.requests == []
    assert str(run / "publish" / "README.md") in output
    plan = planned(run)
    assert all(path in output and sha256 in output for path, sha256 in plan.items())
    assert publish(run) == 0
    assert planned(run) == plan
    require_whole(hub, run)
    assert not hub.repos[REPO].private


def test_a_second_publish_makes_no_commit_and_sends_no_file(run: Path, hub: Hub) -> None:
    assert publish(run) == 0
    before = len(hub.requests)
    assert publish(run) == 0
    require_whole(hub, run)
    assert {request.method for request in hub.requests[before:]} == {"GET", "HEAD", "POST"}
    posted = [request.path for request in hub.requests[before:] if request.method == "POST"]
    assert posted == ["/api/repos/create"]


def test_a_changed_card_is_one_more_commit_of_that_alone(run: Path, hub: Hub) -> None:
    assert publish(run) == 0
    assert publish(run, "publish.data=letters of a bakery") == 0
    assert hub.repos[REPO].messages == ["initial commit", COMMIT, COMMIT]
    assert remote(hub) == planned(run)
    sent = [r.body for r in hub.requests if "/commit/" in r.path][-1].decode().splitlines()
    assert {json.loads(line)["value"]["path"] for line in sent[1:]} == {
        "README.md",
        "manifest.json",
        "provenance.json",
    }


def test_a_file_of_an_earlier_publish_is_deleted_and_other_files_stay(run: Path, hub: Hub) -> None:
    assert publish(run) == 0
    repo = hub.repos[REPO]
    manifest = json.loads(repo.tree("main")["manifest.json"])
    manifest["files"]["old.safetensors"] = {"bytes": 1, "sha256": "0" * 64}
    mine = {"old.safetensors": b"x", "manifest.json": json.dumps(manifest).encode()}
    repo.commit({**repo.tree("main"), **mine, "notes.md": b"hello"}, "by hand")
    assert publish(run) == 0
    assert remote(hub).keys() == planned(run).keys() | {"notes.md"}


FAULTY_REQUESTS = [
    ("500", "/commit/"),
    ("lost", "/commit/"),
    ("503", "/repos/create"),
    ("lost", "/repos/create"),
    ("429", "/objects/"),
    ("silence", "/objects/"),
    ("reset", "/tree/"),
    ("reset", "/resolve/"),
]


@pytest.mark.parametrize(("kind", "path"), FAULTY_REQUESTS)
def test_one_fault_is_retried_and_one_commit_is_made(kind: str, path: str, run: Path, hub: Hub) -> None:
    hub.before = lambda number, request: kind if path in request.path and not hub.faults_met else None
    assert publish(run) == 0
    assert hub.faults_met == [kind]
    require_whole(hub, run)


@pytest.mark.parametrize("seed", range(3))
def test_random_faults_and_a_second_attempt(seed: int, run: Path, hub: Hub) -> None:
    publish_with_faults(seed, run, hub)


def publish_with_faults(seed: int, run: Path, hub: Hub) -> None:
    hub.faults = some_faults(seed)
    for _ in range(3):
        if publish(run) == 0:
            break
    require_whole(hub, run)


@pytest.mark.parametrize("when", ["/objects/", "/commit/"])
def test_a_kill_and_the_same_command_again(when: str, run: Path, hub: Hub, tmp_path: Path) -> None:
    publish_with_a_kill(lambda request: when in request.path, run, hub, tmp_path)


def publish_with_a_kill(at: Callable[[Request], bool], run: Path, hub: Hub, home: Path) -> None:
    command = [sys.executable, "-m", "potstill", "publish", str(run), "--repo", REPO, *LICENSES]
    process = subprocess.Popen(
        command, env=environment(hub, home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def kill(number: int, request: Request) -> str | None:
        if at(request) and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        return None

    hub.before = kill
    assert process.wait() == -signal.SIGKILL
    hub.before = lambda number, request: None
    assert publish(run) == 0
    require_whole(hub, run)


def test_the_token_is_in_the_authorization_header_and_nowhere_else(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.echoes_token = True
    hub.faults = {number: "500" for number in range(1, 12)}  # more than is tried
    assert publish(run) == 2
    hub.faults = {}
    hub.corrupts = "README.md"
    assert publish(run) == 2
    hub.corrupts, hub.token = None, "another"
    assert publish(run) == 2
    hub.token = TOKEN
    assert publish(run) == 0
    output = capsys.readouterr()
    assert TOKEN not in output.out + output.err + caplog.text
    assert "[token]" in output.err or "planted 500" not in output.err
    assert "Traceback" not in output.err
    for file in (file for file in run.rglob("*") if file.is_file()):
        assert TOKEN.encode() not in file.read_bytes(), file
    carried = 0
    for request in hub.requests:
        headers = dict(request.headers)
        name = next((name for name in headers if name.lower() == "authorization"), None)
        carried += name is not None and headers.pop(name) == f"Bearer {TOKEN}"
        assert TOKEN not in request.path + json.dumps(headers)
        assert TOKEN.encode() not in request.body
        assert not (request.path.startswith("/objects/") and name), "the token went to another store"
    assert carried > 20


def test_a_file_served_with_other_content_is_reported(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.corrupts = "config.json"
    assert publish(run) == 2
    (error,) = errors_in(capsys.readouterr().err)
    assert "config.json" in error and hub.repos[REPO].head in error


def test_private_makes_a_private_repository_and_will_not_take_a_public_one(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(run, "--private") == 0
    assert hub.repos[REPO].private
    hub.repos[REPO].private = False
    assert publish(run, "--private") == 2
    (error,) = errors_in(capsys.readouterr().err)
    assert "--private" in error and REPO in error


def test_a_rejected_token_is_named_as_the_cause(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.token = "another"
    assert publish(run) == 2
    (error,) = errors_in(capsys.readouterr().err)
    assert "Check the token" in error


def test_a_card_rejected_by_the_hub_stops_before_the_upload(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "metadata", lambda inputs: "tags: [potstill]")
    assert publish(run) == 2
    assert '"license" is required' in capsys.readouterr().err
    assert hub.objects == {} and hub.repos[REPO].messages == ["initial commit"]


def test_without_a_token_no_request_is_made(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(run / "none"))
    assert publish(run) == 2
    assert "HF_TOKEN" in capsys.readouterr().err
    assert hub.requests == []


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 200))
def test_many_publishes_with_faults_and_kills(seed: int, run: Path, hub: Hub, tmp_path: Path) -> None:
    if seed % 4:
        return publish_with_faults(seed, run, hub)
    number = random.Random(seed).randrange(1, 28)
    count = iter(range(1000))
    publish_with_a_kill(lambda request: next(count) == number, run, hub, tmp_path)
