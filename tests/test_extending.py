"""Every kind of plug-in on docs/extending.md, in the files and recipes that are printed there: no line of the package
knows them.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors.torch import save_file

from potstill import distill
from potstill.cli.main import main

Recipe = Callable[..., Path]
PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
KINDS = {"A teacher": "teacher", "A corpus": "corpus", "An evaluation": "evaluations", "A sink": "sinks"}
VOCAB = 258
SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

table = json.load(open(sys.argv[1]))

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        flat = [i for row in question["ids"] for i in row]
        answer = json.dumps([table[flat[position]] for position in question["positions"]]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass

server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""

COUNTED = """
from dataclasses import dataclass
from typing import Literal

from potstill import TeacherConfig, register
from potstill.teachers.base import Uniform


class Counted(Uniform):
    def close(self):
        with open("log", "a") as log:
            log.write("closed ")


@register("teacher")
@dataclass(frozen=True, kw_only=True)
class CountedConfig(TeacherConfig):
    name: Literal["counted"] = "counted"

    def load(self, device):
        with open("log", "a") as log:
            log.write("opened ")
        return Counted(258)
"""


def printed(title: str) -> tuple[str, str, str]:
    """The plug-in under a title, the name that its recipe gives the file, and the recipe's line for it."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    code = section.split("```python\n")[1].split("```")[0]
    plugins, line = section.split("```yaml\n")[1].split("```")[0].strip().splitlines()
    (file,) = re.findall(r"\[(\w+\.py)\]", plugins)
    return code, file, line


def recipe_with(tiny_recipe: Recipe, folder: Path, *titles: str, **sections: str) -> Path:
    """The printed plug-ins beside a tiny recipe that uses them as printed."""
    files = []
    for title in titles:
        code, file, line = printed(title)
        (folder / file).write_text(code)
        files.append(file)
        key, _, value = line.partition(": ")
        assert key == KINDS[title]
        sections = {key: value} | sections
    return tiny_recipe(plugins=f"[{', '.join(files)}]", **sections)


def potstill(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line, in this process: what it registers is gone after the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(each) for each in arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture
def table(tmp_path: Path) -> torch.Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3)) * 3


@pytest.fixture
def server(tmp_path: Path, table: torch.Tensor) -> Iterator[str]:
    """The address of a teacher in a process of its own, which knows nothing of potstill."""
    (tmp_path / "table.json").write_text(json.dumps(table.tolist()))
    command = [sys.executable, "-c", SERVER, tmp_path / "table.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


def losses(run: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/kd"] for line in lines if "train/kd" in line]


def test_a_teacher_over_http_teaches_as_the_same_table_in_memory_does(
    tiny_recipe: Recipe, tmp_path: Path, table: torch.Tensor, server: str, teacher_folder: Path
) -> None:
    sections = {
        "corpus": f"{{name: text, path: {tmp_path}, include: ['*.txt'], tokens_per_row: 32, heldout_rows: 2,"
        f" tokenizer: {teacher_folder}}}",
        "student": f"{{name: config, model: {teacher_folder}}}",
    }
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("the cat sat on the mat and the dog ran " * 2 + str(number))
    save_file({"logits": table}, tmp_path / "table.safetensors")
    sections["teacher"] = f"{{name: table, path: {tmp_path / 'table.safetensors'}}}"
    in_memory = distill(tiny_recipe("memory.yaml", **sections), out=tmp_path / "memory")

    del sections["teacher"]
    recipe = recipe_with(tiny_recipe, tmp_path, "A teacher", **sections)
    address = recipe.read_text().replace("http://127.0.0.1:8000", server)
    recipe.write_text(address)
    done = potstill("distill", recipe, "--out", tmp_path / "http")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "http") == pytest.approx(losses(in_memory.path), rel=1e-6)
    receipt = json.loads((tmp_path / "http" / "receipt.json").read_text())
    assert receipt["teacher"]["name"] == "http" and receipt["teacher"]["source"] == server

    checked = potstill("check", recipe)
    assert checked.returncode == 0, checked.stdout


def test_a_teacher_that_does_not_answer_ends_the_run_in_one_line(
    tiny_recipe: Recipe, tmp_path: Path, teacher_folder: Path
) -> None:
    student = f"{{name: config, model: {teacher_folder}}}"
    recipe = recipe_with(tiny_recipe, tmp_path, "A teacher", student=student)
    recipe.write_text(recipe.read_text().replace(":8000", ":9"))
    recipe.write_text(
        recipe.read_text().replace("heldout_rows: 4", f"heldout_rows: 4, tokenizer: {teacher_folder}")
    )
    done = potstill("distill", recipe, "--out", tmp_path / "run")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "teacher.url: http://127.0.0.1:9 does not answer" in line


@pytest.mark.parametrize(
    ("verb", "overrides", "code"),
    [
        ("plan", [], 0),
        ("check", [], 2),  # it knows nothing: `teacher knows the text` is red
        ("distill", [], 2),
        ("distill", ["corpus.tokens_per_row=100000"], 2),
    ],
)
def test_a_teacher_is_closed_as_often_as_it_was_loaded(
    tiny_recipe: Recipe,
    tmp_path: Path,
    teacher_folder: Path,
    corpus_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    overrides: list[str],
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counted.py").write_text(COUNTED)
    sections = {
        "corpus": f"{{name: text, path: {corpus_folder}, tokens_per_row: 32, heldout_rows: 4,"
        f" tokenizer: {teacher_folder}}}",
        "plugins": "[counted.py]",
        "teacher": "{name: counted}",
        "student": f"{{name: config, model: {teacher_folder}}}",
    }
    done = potstill(verb, tiny_recipe(**sections), *overrides)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "log").read_text() == "opened closed "


def test_a_corpus_an_evaluation_and_a_sink_of_one_s_own_in_one_run(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    make_model(tmp_path / "teacher")
    titles = ("A corpus", "An evaluation", "A sink")
    recipe = recipe_with(tiny_recipe, tmp_path, *titles, teacher="{name: torch, model: teacher}")
    done = potstill("distill", recipe, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    figures = receipt["evaluations"]["sums"]
    assert figures["sums/count"] == 5 and 0 <= figures["sums/correct"] <= 1
    assert set(receipt["inputs"]) >= {f"plugins/{n}/{printed(title)[1]}" for n, title in enumerate(titles)}
    corpus = json.loads((tmp_path / "run" / "corpus.json").read_text())
    assert corpus["documents"] == 400
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    in_csv = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    metrics = [(line["step"], name, value) for line in logged for name, value in line.items()]
    assert in_csv == [
        f"{step},{name},{value}" for step, name, value in metrics if name not in ("step", "time")
    ]

    resumed = potstill("distill", recipe, "--resume", "--out", tmp_path / "run")
    assert resumed.returncode == 0 and "finished already" in resumed.stderr
    with (tmp_path / "sums_corpus.py").open("a") as file:
        file.write("# another file\n")
    (tmp_path / "run" / "receipt.json").unlink()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    (tmp_path / "run" / "status.json").write_text(json.dumps(status | {"state": "stopped"}))
    changed = potstill("distill", recipe, "--resume", "--out", tmp_path / "run")
    assert changed.returncode == 2 and "plugins/0/sums_corpus.py" in changed.stderr


def test_options_of_a_plug_in_are_validated_and_explained_like_ours(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    make_model(tmp_path / "teacher")
    titles = ("A teacher", "A corpus", "An evaluation", "A sink")
    recipe = recipe_with(tiny_recipe, tmp_path, *titles)
    wrong = [
        "teacher.vocab_size=0",
        "corpus.cuont=1",
        "evaluations=[{name: sums, count: many}]",
        "sinks=[csvv]",
    ]
    done = potstill("distill", recipe, *wrong, "--out", tmp_path / "run")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    told = done.stderr
    assert "0 must be 1 or more" in told and "corpus.count" in told
    assert "'many' is not a whole number" in told and "csv" in told
    assert len([line for line in told.splitlines() if line.startswith("error:")]) == 4

    shown = potstill("schema", recipe)
    properties = json.loads(shown.stdout)["$defs"]["SumsCorpusConfig"]["properties"]
    assert properties["count"]["description"] == "Number of documents."
    assert properties["tokens_per_row"]["description"].startswith("Length of a row")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("@register('teacher')\ndef f(): ...\n", "teacher f: not a config class."),
        ("@register('tutor')\nclass C: ...\n", "register: no kind 'tutor'."),
        (
            "@register('sink')\n@dataclass(frozen=True, kw_only=True)\nclass C:\n    name: Literal['c'] = 'c'\n",
            "sink c: C is not a SinkConfig.",
        ),
    ],
)
def test_what_is_no_plug_in_is_refused_with_its_place(
    tiny_recipe: Recipe, tmp_path: Path, code: str, said: str
) -> None:
    imports = "from dataclasses import dataclass\nfrom typing import Literal\nfrom potstill import register\n"
    (tmp_path / "odd.py").write_text(imports + code)
    done = potstill("distill", tiny_recipe(plugins="[odd.py]"), "--out", tmp_path / "run")
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_cache_of_a_plug_in_s_corpus_is_that_of_its_code(tiny_recipe: Recipe, tmp_path: Path) -> None:
    make_model(tmp_path / "teacher")
    recipe = recipe_with(tiny_recipe, tmp_path, "A corpus", teacher="{name: torch, model: teacher}")
    cached = ["corpus.shards=sums", "--out"]  # a folder of the name that the corpus has
    assert potstill("distill", recipe, *cached, tmp_path / "one").returncode == 0
    assert potstill("distill", recipe, *cached, tmp_path / "two").returncode == 0
    code = (tmp_path / "sums_corpus.py").read_text()
    (tmp_path / "sums_corpus.py").write_text(code.replace("{a} + {b}", "{b} + {a}"))
    done = potstill("distill", recipe, *cached, tmp_path / "three")
    assert done.returncode == 2 and "plugin was" in done.stderr and not (tmp_path / "three").exists()
