"""A finished run to publish, and the real Hub client pointed at a Hub on this machine."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from potstill.cli.main import main
from potstill.publish import hub as client
from publish.hub import Hub, Tree, sha256

REPO = "me/small"
TOKEN = "hf_" + "planted" * 5
LICENSES = ("publish.teacher_license=apache-2.0", "publish.data_license=cc0-1.0")
FAULTS = ("500", "503", "429", "reset", "lost", "silence")
COMMIT = "Publish with potstill"


def publish(run: Path, *more: str, overrides: tuple[str, ...] = LICENSES) -> int:
    return main(["publish", str(run), "--repo", REPO, *overrides, *more])


def point_at(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and similar variables do in a new process, and short waits."""
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_ETAG_TIMEOUT": 0.5,
        "HF_HUB_DOWNLOAD_TIMEOUT": 0.5,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(client, "TIMEOUT_S", 0.5)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    huggingface_hub.close_session()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """Of a process of its own, with the variables that a user sets."""
    source = Path(client.__file__).parents[2]
    return {
        "PYTHONPATH": str(source),
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }


def planned(run: Path) -> dict[str, str]:
    """Path -> sha256, of `plan.json`."""
    plan = json.loads((run / "publish" / "plan.json").read_text())
    return {file["path"]: file["sha256"] for file in plan["files"]}


def remote(hub: Hub) -> dict[str, str]:
    tree: Tree = hub.repos[REPO].tree("main")
    return {path: sha256(content) for path, content in tree.items() if path != ".gitattributes"}


def require_whole(hub: Hub, run: Path) -> None:
    """The remote files are those of the plan, by hash, and one commit holds them."""
    assert remote(hub) == planned(run)
    assert hub.repos[REPO].messages == ["initial commit", COMMIT]


def some_faults(seed: int, requests: int = 32) -> dict[int, str]:
    """One to four, anywhere in a publish; silence takes long and comes once at most."""
    choose = random.Random(seed)
    faults = {choose.randrange(requests): choose.choice(FAULTS) for _ in range(choose.randint(1, 4))}
    silent = [number for number, kind in faults.items() if kind == "silence"]
    return faults | dict.fromkeys(silent[1:], "reset")


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
