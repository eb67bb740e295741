"""Uploads to the Hub that complete or can be run again, and downloads of whole repositories.

One commit holds the whole plan. Files already there are not sent again, and no commit is made where the
repository already holds the plan. A commit whose answer was lost is looked for before another attempt, and it
names its parent, so that it cannot be made twice. At the end every file is downloaded and hashed.

The token is the environment's (HF_TOKEN) or that of the Hub's own login, and is removed from every message,
whatever a server answers. HF_ENDPOINT is honored.
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
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import logging
from huggingface_hub.utils.sha import git_hash
from huggingface_hub.utils.tqdm import disable_progress_bars

from potstill.errors import UserError, one_line
from potstill.io.safe_open import read_object

MANIFEST = "manifest.json"
TIMEOUT_S = 120.0
"""Longest silence of the server; the library's own clients wait for ever."""
ATTEMPTS, FIRST_WAIT_S = 4, 1.0
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
TRANSPORT = {"TransportError", "ConnectionError", "LocalEntryNotFoundError"}
"""Names of exceptions, since the library has changed its HTTP client twice."""

Note = Callable[[str], None]


@dataclass(frozen=True)
class Item:
    """One file of a plan."""

    path: str
    """In the repository."""
    file: Path
    bytes: int
    sha256: str


def upload(repo: str, plan: Sequence[Item], *, private: bool, folder: Path, note: Note) -> str:
    """Make the repository's files those of the plan; returns the commit that holds them.

    Args:
        private: a new repository is made private; an existing public one is refused.
        folder: for the files that are downloaded again, one at a time.

    Raises:
        UserError: no token, or the Hub refuses, fails or is silent; running it again continues.
    """
    token = huggingface_hub.get_token()
    if token is None:
        raise UserError(
            "publish: no token for the Hub. Set HF_TOKEN, or run `hf auth login`; --dry-run needs none."
        )
    disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    again = "Run the same command again: files already uploaded are not sent twice."
    api = HfApi(token=token, library_name="potstill")
    with (
        _errors_in_one_line(f"publish {repo}: upload to the Hub failed", again, token),
        _warnings_noted(token, note),
    ):
        return _Upload(api, repo, plan, folder, note).run(private)


def fetch(repo: str, out: Path) -> None:
    """Download all files of a repository into a new folder, or one that an interruption left incomplete."""
    disable_progress_bars()
    token = huggingface_hub.get_token()
    with _errors_in_one_line(f"{repo}: download from the Hub failed", "Run the same command again.", token):
        huggingface_hub.snapshot_download(
            repo, local_dir=out, token=token, ignore_patterns=[".gitattributes"]
        )
    shutil.rmtree(out / ".cache", ignore_errors=True)  # the library's record of what it has downloaded


@contextlib.contextmanager
def _errors_in_one_line(what: str, advice: str, token: str | None) -> Iterator[None]:
    """Whatever the library or a server says becomes one line, without the token and without a traceback."""
    try:
        yield
    except UserError as error:
        raise UserError(*(_redacted(mistake, token) for mistake in error.mistakes)) from None
    except Exception as error:  # a network fails in many ways; each means the same to the user
        if any(_status(one) in (401, 403) for one in _chain(error)):
            advice = "Check the token and what it may access."
        raise UserError(f"{what}: {_redacted(one_line(_cause(error)), token)} {advice}") from None


@contextlib.contextmanager
def _warnings_noted(token: str, note: Note) -> Iterator[None]:
    """The Hub's remarks on the card are for the publisher; the library's deprecations are not."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    for warning in seen:
        if warning.category is UserWarning:
            note(_redacted(" ".join(str(warning.message).split()), token))


def _redacted(text: str, token: str | None) -> str:
    if token is None:
        return text
    return text.replace(token, "[token]")


def _chain(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _cause(error: BaseException) -> BaseException:
    """The one that says why: the library wraps the errors of its upload threads."""
    wraps = type(error).__name__ in ("RuntimeError", "LocalEntryNotFoundError")
    return error.__cause__ if wraps and error.__cause__ else error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transient(error: BaseException) -> bool:
    for one in _chain(error):
        if (status := _status(one)) is not None:
            return status in TRANSIENT
        if TRANSPORT & {each.__name__ for each in type(one).__mro__}:
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
        user = self.retried(self.api.whoami)["name"]
        self.note(f"{self.api.endpoint}: {self.repo}, as {user}")
        self.retried(lambda: self.api.create_repo(self.repo, private=private or None, exist_ok=True))
        if private and not self.retried(lambda: self.api.repo_info(self.repo)).private:
            raise UserError(
                f"--private: {self.repo} already exists and is public. Make it private on the Hub first, or give"
                " another name."
            )
        commit: str = self.retried(self.commit)
        self.verify(commit)
        return commit

    # The library retries the transfers of large files alone: no commit, whose answer may be lost after it was
    # made, and no other request of the API.
    def retried(self, call: Callable[[], Any]) -> Any:
        """The result of a call that is safe to repeat, repeated after transient failures."""
        for attempt in range(ATTEMPTS):
            get_session().timeout = TIMEOUT_S  # after a failed connection the library makes a new client
            try:
                return call()
            except Exception as error:
                if attempt == ATTEMPTS - 1 or not _is_transient(error):
                    raise
            time.sleep(FIRST_WAIT_S * 2**attempt)
        raise AssertionError("unreachable")

    def commit(self) -> str:
        """The commit that holds the plan: the remote's head, or one made now on top of it."""
        head = self.api.repo_info(self.repo).sha
        remote = self.remote(head) if head else {}
        # `create_commit` also leaves unchanged files out, but only after uploading the large ones again.
        missing = [item for item in self.plan if not _is_there(item, remote.get(item.path))]
        stale = self.stale(remote, head)
        others = remote.keys() - {item.path for item in self.plan} - {*stale, ".gitattributes"}
        if others:
            names = ", ".join(sorted(others)[:5])
            self.note(f"{self.repo}: {len(others)} files from elsewhere stay there: {names}")
        if not missing and not stale and head:
            self.note(f"{self.repo}: nothing to send, commit {head[:12]} holds everything")
            return head
        size = sum(item.bytes for item in missing)
        self.note(f"{self.repo}: sending {len(missing)} files, {size / 2**20:.1f} MiB")
        additions = [CommitOperationAdd(item.path, str(item.file)) for item in missing]
        deletions = [CommitOperationDelete(path, is_folder=False) for path in stale]
        done = self.api.create_commit(
            self.repo,
            [*additions, *deletions],
            commit_message="Publish with potstill",
            parent_commit=head,
        )
        return done.oid

    def remote(self, revision: str | None) -> dict[str, RepoFile]:
        tree = self.api.list_repo_tree(self.repo, recursive=True, revision=revision)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def stale(self, remote: Mapping[str, RepoFile], head: str | None) -> list[str]:
        """Files of an earlier publish that the plan lacks: old weights beside new ones would be loaded."""
        planned = {item.path: item for item in self.plan}
        if MANIFEST not in remote or _is_there(planned[MANIFEST], remote[MANIFEST]):
            return []
        with self.downloaded(MANIFEST, head) as file:
            try:
                files = read_object(file, "").get("files")
            except UserError:  # another tool's manifest
                return []
        return sorted(files.keys() & remote.keys() - planned.keys()) if isinstance(files, dict) else []

    def verify(self, commit: str) -> None:
        """Download and hash every file: the Hub's own listing shows what it was sent, not what it serves."""
        for item in self.plan:
            sha256 = self.retried(partial(self.downloaded_sha256, item.path, commit))
            if sha256 != item.sha256:
                raise UserError(
                    f"publish {self.repo}: {item.path} of commit {commit} has sha256 {sha256[:12]}, the plan"
                    f" {item.sha256[:12]}. Do not use that commit; publish again."
                )
        self.note(f"{self.repo}: {len(self.plan)} files downloaded again, all equal by sha256")

    def downloaded_sha256(self, path: str, commit: str) -> str:
        with self.downloaded(path, commit) as file, open(file, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    @contextlib.contextmanager
    def downloaded(self, path: str, revision: str | None) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="back-") as place:
            yield Path(self.api.hf_hub_download(self.repo, path, revision=revision, local_dir=place))


def _is_there(item: Item, remote: RepoFile | None) -> bool:
    """By hash: sha256 for large files, git's own for the others."""
    if remote is None:
        return False
    if remote.lfs is not None:
        return str(remote.lfs.sha256) == item.sha256
    return remote.size == item.bytes and git_hash(item.file.read_bytes()) == remote.blob_id
