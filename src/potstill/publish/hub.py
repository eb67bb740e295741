"""The Hub: the metadata that it reads, and an upload that ends whole or can be run again.

One commit holds the whole plan. What is there already is not sent again, and where the remote files are those
of the plan no commit is made. A commit whose answer was lost is looked for before it is tried again, and it
names its parent, so that it cannot be made twice. At the end every file is fetched back and hashed.

The token is the environment's (HF_TOKEN) or that of the Hub's own login; it is in no message of ours,
whatever a server says. HF_ENDPOINT is honoured. Called by `publish.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCardData,
    eval_result_entries_to_yaml,
    get_session,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import logging
from huggingface_hub.utils.tqdm import disable_progress_bars

from potstill.errors import UserError, one_line
from potstill.io.safe_open import read_object
from potstill.publish.licenses import HUB
from potstill.publish.model_card import HELDOUT, Known, scores, setting

HUMANEVAL = ("openai/openai_humaneval", "openai_humaneval")
"""The data set on the Hub, and its task."""
MANIFEST = "manifest.json"
TIMEOUT_S = 120.0
"""Longest silence of the server; the library's own clients wait for ever."""
TRIES, FIRST_WAIT_S = 4, 1.0
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
TRANSPORT = {"TransportError", "ConnectionError", "LocalEntryNotFoundError"}
"""Names, since the library has changed its HTTP client twice."""

Note = Callable[[str], None]


@dataclass(frozen=True)
class Item:
    """One file of a plan."""

    path: str
    """In the repository."""
    file: Path
    bytes: int
    sha256: str


def metadata(known: Known) -> str:
    """The YAML that the Hub reads."""
    listed = known.licence.license in HUB
    extra: dict[str, Any] = {} if listed else {"license_name": known.licence.license}
    if known.base is not None:
        extra |= {"base_model_relation": "finetune"}  # the Hub has no word for a distilled model
    if known.taught and known.teacher is not None:
        extra |= {"distilled_from": known.teacher}
    data = ModelCardData(
        license=known.licence.license if listed else "other",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*(["distillation"] if known.taught else []), "potstill"],
        base_model=known.base,
        model_name=known.name,
        eval_results=[*_results(known)],
        **extra,
    )
    return str(data.to_yaml()).strip()


def _results(known: Known) -> Iterator[EvalResult]:
    task: dict[str, Any] = {"task_type": "text-generation", "task_name": "Text Generation"}
    rows = f"{known.corpus['heldout_rows']} held-out rows of the corpus"
    for metric, told in HELDOUT.items():
        value = known.receipt["heldout_best"].get(metric)
        if value is not None:
            kind = metric.removeprefix("heldout/")
            place: dict[str, Any] = {"dataset_type": "held-out", "dataset_name": rows}
            yield EvalResult(**task, **place, metric_type=kind, metric_name=told, metric_value=float(value))
    for name, score in scores(known):
        place = {"dataset_type": HUMANEVAL[0], "dataset_name": "HumanEval", "dataset_split": "test"}
        yield EvalResult(
            **task, **place, metric_type=name, metric_name=name, metric_value=float(score["value"])
        )


def eval_results(known: Known) -> str | None:
    """`.eval_results/humaneval.yaml`; None where HumanEval gave no score."""
    entries = [
        EvalResultEntry(
            dataset_id=HUMANEVAL[0],
            task_id=HUMANEVAL[1],
            value=round(100 * score["value"], 4),
            notes=f"pass@1 in percent, {setting(known.humaneval or {})},"
            f" 95 % interval {100 * score['low']:.1f} to {100 * score['high']:.1f}",
        )
        for name, score in scores(known)
        if name == "pass@1"
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None


def modelfile(file: str, has_template: bool) -> str:
    """For `ollama create NAME -f Modelfile`; the prompt's form comes from the GGUF file."""
    form = "" if has_template else "TEMPLATE {{ .Prompt }}\n"
    return f"FROM ./{file}\n{form}PARAMETER temperature 0\n"


def upload(repo: str, plan: Sequence[Item], *, private: bool, folder: Path, note: Note) -> str:
    """Make the repository's files those of the plan; returns the commit that holds them.

    Args:
        private: a new repository is made private; one that is there and public is refused.
        folder: where files that are fetched back lie for a moment.

    Raises:
        UserError: no token, or the Hub refuses, fails or is silent; running it again goes on.
    """
    token = huggingface_hub.get_token()
    if token is None:
        raise UserError(
            "publish: no token for the Hub. Set HF_TOKEN, or run `hf auth login`; --dry-run needs none."
        )
    disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with _told_without(token, repo), _warnings_noted(token, note):
        return _Upload(HfApi(token=token, library_name="potstill"), repo, plan, folder, note).run(private)


def fetch(repo: str, out: Path) -> None:
    """All files of a repository into a folder that is not there yet, or one that a cut left half full."""
    disable_progress_bars()
    token = huggingface_hub.get_token()
    try:
        huggingface_hub.snapshot_download(
            repo, local_dir=out, token=token, ignore_patterns=[".gitattributes"]
        )
    except Exception as error:  # a network fails in many ways; each means the same to the user
        said = one_line(_cause(error))
        said = said if token is None else _redacted(said, token)
        raise UserError(f"{repo}: the Hub did not give it: {said} Run the same command again.") from None
    shutil.rmtree(out / ".cache", ignore_errors=True)  # the library's own notes of what it has fetched


@contextlib.contextmanager
def _told_without(token: str, repo: str) -> Iterator[None]:
    """Whatever the library or a server says becomes one line, without the token and without a traceback."""
    try:
        yield
    except UserError as error:
        raise UserError(*(_redacted(mistake, token) for mistake in error.mistakes)) from None
    except Exception as error:
        said = _redacted(one_line(_cause(error)), token)
        todo = "Run the same command again: what is uploaded is not sent twice."
        if any(_status(one) in (401, 403) for one in _chain(error)):
            todo = "Look at the token and what it may write."
        raise UserError(f"publish {repo}: the Hub did not take it: {said} {todo}") from None


@contextlib.contextmanager
def _warnings_noted(token: str, note: Note) -> Iterator[None]:
    """What the Hub remarks on the card is for the publisher; what the library deprecates is not."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    for said in seen:
        if said.category is UserWarning:
            note(_redacted(" ".join(str(said.message).split()), token))


def _redacted(text: str, token: str) -> str:
    return text.replace(token, "[token]")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _cause(error: BaseException) -> BaseException:
    """The one that says why: the library wraps what an upload's thread met."""
    wraps = type(error).__name__ in ("RuntimeError", "LocalEntryNotFoundError")
    return error.__cause__ if wraps and error.__cause__ else error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transient(error: BaseException) -> bool:
    for one in _chain(error):
        if (status := _status(one)) is not None:
            return status in TRANSIENT
        if TRANSPORT & {kind.__name__ for kind in type(one).__mro__}:
            return True
    return False


@dataclass(frozen=True)
class _Upload:
    api: HfApi
    repo: str
    plan: Sequence[Item]
    folder: Path
    note: Note

    def run(self, private: bool) -> str:
        who = self.patiently(self.api.whoami)["name"]
        self.note(f"{self.api.endpoint}: {self.repo}, as {who}")
        self.patiently(lambda: self.api.create_repo(self.repo, private=private or None, exist_ok=True))
        if private and not self.patiently(lambda: self.api.repo_info(self.repo)).private:
            raise UserError(
                f"--private: {self.repo} is there already and is public. Make it private on the Hub first,"
                " or name another."
            )
        commit: str = self.patiently(self.committed)
        self.pull_back(commit)
        return commit

    def patiently(self, call: Callable[[], Any]) -> Any:
        """A call that may be made twice, again after a failure that passes."""
        for number in range(TRIES):
            get_session().timeout = TIMEOUT_S  # after a failed connection the library makes a new client
            try:
                return call()
            except Exception as error:
                if number == TRIES - 1 or not _is_transient(error):
                    raise
            time.sleep(FIRST_WAIT_S * 2**number)
        raise AssertionError("unreachable")

    def committed(self) -> str:
        """The commit that holds the plan: the remote's last, or one made now on top of it."""
        head = self.api.repo_info(self.repo).sha
        remote = self.remote(head) if head else {}
        missing = [item for item in self.plan if not _is_there(item, remote.get(item.path))]
        stale = self.stale(remote, head)
        if not missing and not stale and head:
            self.note(f"{self.repo}: nothing to send, commit {head[:12]} holds it all")
            return head
        if missing:
            size = sum(item.bytes for item in missing)
            self.note(f"{self.repo}: sending {len(missing)} files, {size / 2**20:.1f} MiB")
        self.api.create_commit(
            self.repo,
            [
                *(CommitOperationAdd(item.path, str(item.file)) for item in missing),
                *(CommitOperationDelete(path, is_folder=False) for path in stale),
            ],
            commit_message="Publish with potstill",
            parent_commit=head,
        )
        return self.committed_now()

    def committed_now(self) -> str:
        """The head, which must hold the plan: what was sent is not what lies there until it is looked at."""
        head = self.api.repo_info(self.repo).sha
        remote = self.remote(head)
        if wrong := [item.path for item in self.plan if not _is_there(item, remote.get(item.path))]:
            raise UserError(
                f"publish {self.repo}: commit {head} holds another {wrong[0]} than the plan. The file changed"
                " while it was sent, or someone else wrote there. Run the same command again."
            )
        others = sorted(remote.keys() - {item.path for item in self.plan} - {".gitattributes"})
        if others:
            self.note(f"{self.repo}: {len(others)} files of others stay there: {', '.join(others[:5])}")
        return str(head)

    def remote(self, head: str | None) -> dict[str, RepoFile]:
        found = self.api.list_repo_tree(self.repo, recursive=True, revision=head)
        return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}

    def stale(self, remote: Mapping[str, RepoFile], head: str | None) -> list[str]:
        """Files of an earlier publish that the plan has no more: weights left beside new ones get loaded."""
        planned = {item.path: item for item in self.plan}
        if MANIFEST not in remote or _is_there(planned[MANIFEST], remote[MANIFEST]):
            return []
        with self.fetched(MANIFEST, head) as file:
            try:
                files = read_object(file, "").get("files")
            except UserError:  # another tool's manifest
                return []
        return sorted(files.keys() & remote.keys() - planned.keys()) if isinstance(files, dict) else []

    def pull_back(self, commit: str) -> None:
        """Every file of the commit, fetched and hashed."""
        for item in self.plan:
            sha256 = self.patiently(partial(self.fetched_sha256, item.path, commit))
            if sha256 != item.sha256:
                raise UserError(
                    f"publish {self.repo}: {item.path} comes back from commit {commit} with sha256"
                    f" {sha256[:12]}, sent was {item.sha256[:12]}. Do not use that commit; publish again."
                )
        self.note(f"{self.repo}: {len(self.plan)} files fetched back, all equal by sha256")

    def fetched_sha256(self, path: str, commit: str) -> str:
        with self.fetched(path, commit) as file, open(file, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    @contextlib.contextmanager
    def fetched(self, path: str, revision: str | None) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="back-") as place:
            yield Path(self.api.hf_hub_download(self.repo, path, revision=revision, local_dir=place))


def _is_there(item: Item, remote: RepoFile | None) -> bool:
    """By hash: sha256 for large files, git's own for the others."""
    if remote is None:
        return False
    if remote.lfs is not None:
        return str(remote.lfs.sha256) == item.sha256
    if remote.size != item.bytes:
        return False
    content = item.file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.blob_id
