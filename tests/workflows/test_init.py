"""`potstill init`: every recipe that it writes passes `potstill check`, and what cannot work is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import WORDS, demo_gguf, make_corpus
from data.chat_templates import QWEN_3, tokenizer_for
from export.tiny_models import make_run, make_tokenizer
from publish.hub import Repo, loopback
from publish.lab import TOKEN, point_at

from potstill.build.resolve import resolve
from potstill.cli.main import main
from potstill.export.export import export_run
from potstill.io import cpu_matmul
from potstill.preflight import fitting
from potstill.preflight.plan import plan
from potstill.recipe.load import load
from potstill.workflows import init as init_workflow

Maker = Callable[[Path], str]
SHAPE = {
    "vocab_size": 268,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # so that its layers do something that a cut student lacks
}
NO_DATA = "the extra data is not installed; not run"
ENDS = {"bos_token_id": None, "pad_token_id": None}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512}),
    "gpt_neox": ("GPTNeoX", {"tie_word_embeddings": False}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "opt": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),  # cannot keep documents apart
}
"""Family -> its class in Transformers, and what its tiny models have of their own."""


def reader() -> Any:
    return tokenizer_for(QWEN_3)


def make_family(
    folder: Path, family: str, layers: int = 4, steps: int = 12, tokenizer: Any = None, **changes: Any
) -> Path:
    """A model that has seen a little text, so that it teaches something; 0 steps: a random one."""
    torch.manual_seed(layers)
    kind, own = FAMILIES[family]
    tokenizer = reader() if tokenizer is None else tokenizer
    options = SHAPE | {"num_hidden_layers": layers, "vocab_size": len(tokenizer)} | ENDS | own
    options |= {"eos_token_id": tokenizer.eos_token_id} | ({"n_layer": layers} if family == "gpt2" else {})
    config = getattr(transformers, f"{kind}Config")(**options | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        picks = torch.randint(len(WORDS), (8, 40), generator=generator).tolist()
        texts = [" ".join(WORDS[i] for i in row) for row in picks]
        ids = torch.tensor([[*tokenizer(text)["input_ids"][:96], tokenizer.eos_token_id] for text in texts])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The teacher or the student of a family, made once."""
    root = tmp_path_factory.mktemp("families")

    def made(family: str, kind: str) -> Path:
        folder = root / family / kind
        if not folder.exists():
            layers, steps = {"teacher": (4, 12), "checkpoint": (2, 3), "config": (2, 0)}[kind]
            make_family(folder, family, layers, steps)
            if kind == "config":
                for name in ("model.safetensors", "generation_config.json"):
                    (folder / name).unlink(missing_ok=True)
        return folder

    return made


def words(number: int, count: int = 30) -> str:
    generator = torch.Generator().manual_seed(number)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())


def write_lines(file: Path, records: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file.name


def a_text_file(folder: Path) -> str:
    (folder / "book.txt").write_text("\n\n".join(words(n) for n in range(150)))
    return "book.txt"


def a_folder_of_sources(folder: Path) -> str:
    make_corpus(folder / "code")
    for number, file in enumerate(sorted((folder / "code").iterdir())):
        file.rename(file.with_suffix(".py" if number % 3 else ".md"))
    (folder / "code" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\xff")
    return "code"


def lines_of(key: str) -> Maker:
    def make(folder: Path) -> str:
        records = [{"id": f"document-{n}", key: words(n), "stars": n} for n in range(60)]
        return write_lines(folder / "data.jsonl", records)

    return make


def an_array(folder: Path) -> str:
    (folder / "data.json").write_text(json.dumps([{"abstract": words(n)} for n in range(60)], indent=1))
    return "data.json"


def messages(folder: Path) -> str:
    turns = [
        [{"role": "user", "content": words(n, 5)}, {"role": "assistant", "content": words(n, 9)}]
        for n in range(60)
    ]
    return write_lines(folder / "chats.jsonl", [{"messages": each} for each in turns])


def under_a_system_message(folder: Path) -> str:
    turns = [
        [
            {"role": "system", "content": words(7, 4)},
            {"role": "user", "content": words(n, 5)},
            {"role": "assistant", "content": words(n, 9)},
        ]
        for n in range(60)
    ]
    return write_lines(folder / "chats.jsonl", [{"messages": each} for each in turns])


def sharegpt(folder: Path) -> str:
    turns = [
        [{"from": "human", "value": words(n, 5)}, {"from": "gpt", "value": words(n, 9)}] for n in range(60)
    ]
    (folder / "chats.json").write_text(json.dumps([{"conversations": each} for each in turns]))
    return "chats.json"


def chosen_and_rejected(folder: Path) -> str:
    def of(n: int, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": words(n, 5)}, {"role": "assistant", "content": answer}]

    records = [{"chosen": of(n, words(n, 9)), "rejected": of(n, "no")} for n in range(60)]
    return write_lines(folder / "pairs.jsonl", records)


def pairs_of(question: str, answer: str) -> Maker:
    def make(folder: Path) -> str:
        records = [{question: words(n, 5), answer: words(n, 9)} for n in range(60)]
        return write_lines(folder / "pairs.jsonl", records)

    return make


def prompts(folder: Path) -> str:
    return write_lines(folder / "prompts.jsonl", [{"prompt": words(n, 5), "id": n} for n in range(40)])


def _write_table(columns: dict[str, Any], file: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason=NO_DATA)
    pytest.importorskip("pyarrow.parquet", reason=NO_DATA).write_table(arrow.table(columns), file)


def a_table(folder: Path) -> str:
    table = {"url": [f"http://{n}" for n in range(60)], "body": [words(n) for n in range(60)]}
    _write_table(table, folder / "table.parquet")
    return "table.parquet"


def a_table_of_chats(folder: Path) -> str:
    turns = [
        [{"role": "user", "content": words(n, 5)}, {"role": "assistant", "content": words(n, 9)}]
        for n in range(60)
    ]
    (folder / "tables").mkdir()
    _write_table({"messages": turns}, folder / "tables" / "one.parquet")
    return "tables"


def shards_of(dtype: str) -> Maker:
    def make(folder: Path) -> str:
        tokenizer = reader()
        ids = [i for n in range(60) for i in (*tokenizer(words(n))["input_ids"], tokenizer.eos_token_id)]
        (folder / "shards").mkdir()
        np.array(ids, f"<u{ {'uint16': 2, 'uint32': 4}[dtype] }").tofile(folder / "shards" / "000.bin")
        return "shards"

    return make


def a_saved_dataset(folder: Path) -> str:
    datasets = pytest.importorskip("datasets", reason=NO_DATA)
    rows = datasets.Dataset.from_dict({"content": [words(n) for n in range(60)]})
    datasets.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(str(folder / "saved"))
    return "saved"


def tool_calls(folder: Path) -> str:
    tool = {
        "type": "function",
        "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}},
    }
    records = []
    for n in range(60):
        call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": words(n, 1)}}}
        turns = [
            {"role": "user", "content": words(n, 5)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": words(n, 3)},
            {"role": "assistant", "content": words(n, 6)},
        ]
        records.append({"messages": turns, "tools": [tool]})
    return write_lines(folder / "calls.jsonl", records)


SHAPES: dict[str, tuple[Maker, dict[str, Any]]] = {
    "a text file": (a_text_file, {"name": "text", "split_files": True}),
    "a folder of sources": (a_folder_of_sources, {"name": "text", "include": ["*.py", "*.md"]}),
    "lines with text": (lines_of("text"), {"name": "jsonl", "field": "text"}),
    "lines with content": (lines_of("content"), {"name": "jsonl", "field": "content"}),
    "lines with another key": (lines_of("abstract"), {"name": "jsonl", "field": "abstract"}),
    "an array of records": (an_array, {"name": "jsonl", "field": "abstract"}),
    "messages": (messages, {"name": "chat"}),
    "sharegpt": (sharegpt, {"name": "chat"}),
    "chosen and rejected": (chosen_and_rejected, {"name": "chat", "field": "chosen"}),
    "prompt and completion": (pairs_of("prompt", "completion"), {"name": "chat"}),
    "instruction and output": (pairs_of("instruction", "output"), {"name": "chat"}),
    "question and answer": (pairs_of("question", "answer"), {"name": "chat"}),
    "prompts": (prompts, {"name": "prompts"}),
    "a table": (a_table, {"name": "parquet", "column": "body"}),
    "a table of chats": (a_table_of_chats, {"name": "chat"}),
    "shards of two bytes": (shards_of("uint16"), {"name": "tokens", "dtype": "uint16"}),
    "shards of four bytes": (shards_of("uint32"), {"name": "tokens", "dtype": "uint32"}),
    "a saved dataset": (a_saved_dataset, {"name": "hf", "column": "content", "split": "train"}),
    "tool calls": (tool_calls, {"name": "chat"}),
}
"""Shape of data -> who makes it, and what of `corpus` must be found."""


def require_checked(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real command. What it says of a red line is in the failure."""
    capsys.readouterr()
    code = main(["check", str(recipe)])
    shown = capsys.readouterr()
    assert code == 0, shown.out + shown.err + recipe.read_text()


def run_init(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, dict[str, Any] | None, Path]:
    """Exit code, the recipe as YAML's own reader reads it, and its path."""
    monkeypatch.chdir(folder)
    code = main(["init", *arguments])
    out = folder / "recipe.yaml"
    return code, yaml.safe_load(out.read_text()) if out.exists() else None, out


def cases(every: Iterable[Any], checked: Iterable[Any]) -> list[Any]:
    """Each with whether its recipe is given to check, too: `make test` does so for some, `make soak` for the rest."""
    some = {*checked}
    rest = [each for each in every if each not in some]
    return [
        *((each, True) for each in every if each in some),
        *((each, False) for each in rest),
        *(pytest.param(each, True, marks=pytest.mark.soak) for each in rest),
    ]


@pytest.mark.parametrize(
    ("shape", "is_checked"), cases(SHAPES, ["messages", "prompts", "shards of two bytes"])
)
def test_each_shape_of_data_is_recognised_and_its_recipe_passes_check(
    shape: str,
    is_checked: bool,
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, expected = SHAPES[shape]
    teacher, student = (str(models("llama", kind)) for kind in ("teacher", "checkpoint"))
    code, recipe, out = run_init(tmp_path, monkeypatch, teacher, student, make(tmp_path))
    assert code == 0 and recipe is not None
    assert recipe["corpus"] | expected == recipe["corpus"]
    if is_checked:
        require_checked(out, capsys)
    else:
        capsys.readouterr()
        assert main(["rows", str(out), "--json"]) == 0
        assert len(capsys.readouterr().out.splitlines()) > 1


@pytest.mark.parametrize("make", [messages, under_a_system_message, lines_of("text")])
def test_teacher_and_student_are_to_answer_prompts_of_the_data(
    make: Maker, models: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(tmp_path)
    _, recipe, _ = run_init(tmp_path, monkeypatch, str(models("llama", "teacher")), "cut", data)
    assert recipe is not None
    first, second = recipe["eval"]["sample_prompts"]
    records = [json.loads(line) for line in (tmp_path / data).read_text().splitlines()][:2]
    if make is not messages and "messages" in records[0]:
        assert recipe["eval"]["sample_system"] == records[0]["messages"][0]["content"]
    else:
        assert "sample_system" not in recipe["eval"]
    if "messages" in records[0]:
        assert [first, second] == [record["messages"][-2]["content"] for record in records]
    else:
        assert all(
            record["text"].startswith(each.strip())
            for record, each in zip(records, (first, second), strict=True)
        )


PAIRS = [
    ("llama", "cut"),
    ("qwen2", "config"),
    ("qwen3", "checkpoint"),
    ("gemma2", "cut"),
    ("gpt2", "cut"),
    ("gpt_neox", "checkpoint"),
    ("mistral", "config"),
    ("qwen3_moe", "checkpoint"),
    ("qwen3_moe", "cut"),
    ("opt", "checkpoint"),
]


@pytest.mark.parametrize(("pair", "is_checked"), cases(PAIRS, PAIRS[1:4] + PAIRS[-1:]))
def test_the_recipe_of_each_family_and_kind_of_student_passes_check(
    pair: tuple[str, str],
    is_checked: bool,
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    family, kind = pair
    student = kind if kind == "cut" else str(models(family, kind))
    data = lines_of("text")(tmp_path)
    code, recipe, out = run_init(tmp_path, monkeypatch, str(models(family, "teacher")), student, data)
    assert code == 0 and recipe is not None and recipe["student"]["name"] == kind
    assert recipe["corpus"]["packing"] == (family != "opt")
    if is_checked:
        require_checked(out, capsys)


def test_the_student_s_chat_template_writes_the_rows_where_the_teacher_has_none(
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher, student, data = without_template(models, tmp_path)
    tokenizer = reader()
    tokenizer.save_pretrained(student)
    code, recipe, out = run_init(tmp_path, monkeypatch, teacher, student, data)
    assert code == 0 and recipe is not None and recipe["corpus"]["tokenizer"] == student
    require_checked(out, capsys)


def test_two_chat_templates_are_a_warning(
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    student = copied(models("llama", "checkpoint"), tmp_path / "S")
    tokenizer = tokenizer_for(QWEN_3.replace("# Tools", "# Functions"))
    tokenizer.save_pretrained(student)
    teacher = str(models("llama", "teacher"))
    code, recipe, _ = run_init(tmp_path, monkeypatch, teacher, str(student), messages(tmp_path), "--json")
    assert code == 0 and recipe is not None and "tokenizer" not in recipe["corpus"]
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert f"corpus.tokenizer={student}" in warning


def test_records_that_cannot_be_learnt_from_are_left_out_and_the_first_is_named(
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / messages(tmp_path)
    file.write_text('{"messages": [{"role": "narrator", "content": "once"}]}\n' + file.read_text())
    pair = [str(models("llama", kind)) for kind in ("teacher", "checkpoint")]
    code, recipe, out = run_init(tmp_path, monkeypatch, *pair, "chats.jsonl")
    assert code == 0 and recipe is not None and recipe["corpus"]["skip_refused"] is True
    assert "chats.jsonl:1: message 0" in out.read_text() and "1 of 61" in capsys.readouterr().out
    require_checked(out, capsys)


def test_a_row_is_no_longer_than_either_model_reads(
    models: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [(words(n, 20), words(n + 100, 100)) for n in range(60)]
    data = write_lines(
        tmp_path / "long.jsonl", [{"prompt": one, "completion": other} for one, other in texts]
    )
    student = make_family(tmp_path / "S", "llama", 2, 0, max_position_embeddings=300)
    _, recipe, out = run_init(tmp_path, monkeypatch, str(models("llama", "teacher")), str(student), data)
    assert recipe is not None and recipe["corpus"]["tokens_per_row"] == 300
    assert "the student has at most 300" in out.read_text().replace("\n  # ", " ")


def copied(source: Path, to: Path) -> Path:
    return Path(shutil.copytree(source, to))


def other_tokens(models: Callable[[str, str], Path], folder: Path) -> list[str]:
    """A student with as many ids of another meaning."""
    student = copied(models("llama", "checkpoint"), folder / "other")
    file = student / "tokenizer.json"
    settings = json.loads(file.read_text())
    vocab = settings["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(settings))
    return [str(models("llama", "teacher")), str(student), lines_of("text")(folder)]


def without_template(models: Callable[[str, str], Path], folder: Path) -> list[str]:
    pair = [copied(models("llama", kind), folder / kind) for kind in ("teacher", "checkpoint")]
    for each in pair:
        tokenizer = reader()
        tokenizer.chat_template = None
        (each / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(each)
    return [*map(str, pair), messages(folder)]


def of_llama(make: Maker, student: str = "checkpoint") -> Callable[..., list[str]]:
    def arguments(models: Callable[[str, str], Path], folder: Path) -> list[str]:
        of = student if student == "cut" else str(models("llama", student))
        return [str(models("llama", "teacher")), of, make(folder)]

    return arguments


def with_student(make: Callable[[Path, Path], str]) -> Callable[..., list[str]]:
    def arguments(models: Callable[[str, str], Path], folder: Path) -> list[str]:
        teacher = models("llama", "teacher")
        return [str(teacher), make(teacher, folder), lines_of("text")(folder)]

    return arguments


def linked(teacher: Path, folder: Path) -> str:
    (folder / "link").symlink_to(teacher)
    return "link"


def binary(name: str, content: bytes) -> Maker:
    def make(folder: Path) -> str:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        return name

    return make


def in_folder(make: Maker, name: str) -> Maker:
    def folder_of(folder: Path) -> str:
        make(folder)
        return name

    return folder_of


PICTURE = b"\x89PNG\r\n\x1a\n\0\0\0\xff"
WRONG: dict[str, tuple[Callable[..., list[str]], str]] = {
    "an empty file": (of_llama(binary("a.txt", b"")), "a.txt"),
    "an empty file of records": (of_llama(binary("a.jsonl", b"\n")), "a.jsonl"),
    "a picture": (of_llama(binary("a.png", PICTURE)), "a.png"),
    "a compressed file": (of_llama(binary("a.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0")), "a.jsonl.gz"),
    "another encoding": (of_llama(binary("a.txt", "the cat".encode("utf-16"))), "a.txt"),
    "a folder of pictures": (of_llama(in_folder(binary("pictures/a.png", PICTURE), "pictures")), "pictures"),
    "a folder of an empty file": (of_llama(in_folder(binary("empty/a.txt", b""), "empty")), "empty"),
    "no such data": (of_llama(lambda folder: "nothing.jsonl"), "nothing.jsonl"),
    "records without text": (
        of_llama(lambda folder: write_lines(folder / "n.jsonl", [{"a": n, "b": [n]} for n in range(60)])),
        "n.jsonl",
    ),
    "records of empty texts": (
        of_llama(lambda folder: write_lines(folder / "n.jsonl", [{"text": ""} for n in range(60)])),
        "n.jsonl",
    ),
    "a damaged line": (of_llama(binary("n.jsonl", b'{"text": "a"}\n{"text": ')), "n.jsonl:2"),
    "too little text": (
        of_llama(lambda folder: write_lines(folder / "n.jsonl", [{"text": "the cat"}])),
        "too little text",
    ),
    "conversations without a template": (without_template, "chat template"),
    "prompts for random weights": (of_llama(prompts, "config"), "prompts"),
    "other tokens": (other_tokens, "different tokenizers"),
    "the teacher as its student": (with_student(lambda teacher, folder: str(teacher)), "the same model"),
    "the teacher by a link": (with_student(linked), "the same model"),
    "a copy of the teacher": (
        with_student(lambda teacher, folder: str(copied(teacher, folder / "copy"))),
        "the same model",
    ),
    "no such student": (with_student(lambda teacher, folder: "./nothing"), "student: "),
    "a folder without a model": (with_student(lambda teacher, folder: str(folder)), "not a model"),
    "Latin-1": (
        of_llama(binary("a.txt", ("the cat " * 9 + "caf\xe9").encode("latin-1"))),
        "byte 0xe9 at 75 of 76",
    ),
    "lines in Latin-1": (of_llama(binary("a.jsonl", '{"text": "caf\xe9"}'.encode("latin-1"))), "iconv"),
    "a table": (of_llama(binary("a.csv", b"id,text\n1,the cat\n")), "csv.DictReader"),
    "a folder of tables": (
        of_llama(in_folder(binary("t/a.tsv", b"id\ttext\n1\tthe cat\n"), "t")),
        "DictReader",
    ),
    "a folder of objects": (of_llama(in_folder(binary("o/a.json", b'{"text": "the cat"}'), "o")), "jq -c ."),
    "texts without names": (of_llama(binary("a.jsonl", b'"the cat"\n"the mat"\n')), "a string"),
    "two keys by turns": (
        of_llama(
            lambda folder: write_lines(
                folder / "n.jsonl", [{("text", "content", "body")[n % 3]: words(n)} for n in range(60)]
            )
        ),
        "'content' in 20",
    ),
    "one text over and over": (
        of_llama(lambda folder: write_lines(folder / "n.jsonl", [{"text": words(1)}] * 60)),
        "60 documents, all equal",
    ),
    "one long record": (
        of_llama(lambda folder: write_lines(folder / "n.jsonl", [{"text": words(1, 9000)}])),
        "one document",
    ),
    "a server": (with_student(lambda teacher, folder: "http://127.0.0.1:8000"), "server"),
}
"""What is wrong -> the arguments, and what the error must name."""


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return error


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_work_is_refused_in_one_line_and_nothing_is_written(
    wrong: str,
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, named = WRONG[wrong]
    arguments = make(models, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, recipe, _ = run_init(tmp_path, monkeypatch, *arguments)
    assert (code, recipe) == (2, None)
    assert named in only_error(capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "override",
    [
        *("train.steps=abc", "train.steps=null", "train.steps=[1]", "train.steps=.inf", "train.steps.x=3"),
        *("train.epochs=abc", "train.epochs=.nan", "train.rows_per_step=abc"),
        *("train.rows_per_step=0", "train=abc", "train=null", "corpus=foo", "corpus=null", "corpus.name=[1]"),
        *("corpus.exclude=3", "corpus.split=3", "corpus.tokens_per_row=abc", "corpus.heldout_rows=abc"),
        *(
            "teacher=foo",
            "teacher=null",
            "student=cut",
            "student=null",
            "eval=3",
            "rollouts=3",
            "objective=3",
        ),
    ],
)
def test_an_override_that_no_recipe_can_have_is_refused_in_one_line(
    override: str,
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pair = [str(models("llama", kind)) for kind in ("teacher", "checkpoint")]
    code, recipe, _ = run_init(tmp_path, monkeypatch, *pair, lines_of("text")(tmp_path), override)
    assert (code, recipe) == (2, None)
    assert override.partition("=")[0].removesuffix(".x") in only_error(capsys)


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ({"source": "https://example.org/wiki/an-article-of-the-cat"}, "passage_text"),
        ({"content": "category 1", "title": "the cat"}, "passage_text"),
        ({"content": "the cat sat on the mat and on the other mat"}, "content"),
        ({"text": "the cat sat on the mat and on the other mat", "html": "<p>" * 400}, "text"),
    ],
)
def test_the_text_is_what_is_long_and_not_what_is_named_so_alone(
    others: dict[str, str],
    chosen: str,
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = [others | {"passage_text": words(n, 40), "html": others.get("html", "")} for n in range(60)]
    pair = [str(models("llama", kind)) for kind in ("teacher", "checkpoint")]
    for number, record in enumerate(records):  # no two equal texts
        record |= {key: f"{record[key]} {number}" for key in others}
    code, recipe, _ = run_init(tmp_path, monkeypatch, *pair, write_lines(tmp_path / "n.jsonl", records))
    assert code == 0 and recipe is not None
    assert recipe["corpus"].get("field", "text") == chosen


def test_what_it_prints_and_writes_can_be_pasted(
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    pair = [str(models("llama", kind)) for kind in ("teacher", "checkpoint")]
    data = lines_of("text")(tmp_path)
    command = ["init", *pair, data, "train.steps=3", "--out", "my rec's.yaml"]
    assert main(command) == 0
    said = capsys.readouterr().out
    written = (tmp_path / "my rec's.yaml").read_text()
    assert shlex.split(said.splitlines()[-1]) == ["potstill", "distill", "my rec's.yaml"]
    head = written.partition("On the machine")[0].replace("\n# ", " ").partition("Written by: ")[2]
    assert shlex.split(head.rstrip("# \n")) == ["potstill", *command]


def test_more_rows_a_step_than_there_are_is_a_warning(
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pair = [str(models("llama", kind)) for kind in ("teacher", "checkpoint")]
    data = lines_of("text")(tmp_path)
    assert run_init(tmp_path, monkeypatch, *pair, data, "train.rows_per_step=5000")[0] == 0
    assert "train.rows_per_step: 5,000 rows a step" in capsys.readouterr().out


def test_a_file_that_is_there_is_never_overwritten(
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        *(str(models("llama", kind)) for kind in ("teacher", "checkpoint")),
        lines_of("text")(tmp_path),
    ]
    (tmp_path / "mine.yaml").write_text("mine")
    (tmp_path / "link.yaml").symlink_to("nowhere")
    for name in ("mine.yaml", "link.yaml", "no/such/folder.yaml"):
        assert main(["init", *arguments, "--out", name]) == 2
        assert capsys.readouterr().err.count("error: ") == 1
    assert (tmp_path / "mine.yaml").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_a_file_that_comes_there_meanwhile_is_not_overwritten(
    models: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any) -> Any:
        (tmp_path / "recipe.yaml").write_text("mine: 1")
        return planned(*arguments)

    planned = init_workflow.fitted
    monkeypatch.setattr(init_workflow, "fitted", slow)
    pair = [str(models("llama", kind)) for kind in ("teacher", "checkpoint")]
    assert run_init(tmp_path, monkeypatch, *pair, lines_of("text")(tmp_path))[:2] == (2, {"mine": 1})


def test_what_the_user_sets_is_kept_and_paths_are_relative_to_the_recipe(
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    teacher = copied(models("llama", "teacher"), tmp_path / "models" / "T")
    (tmp_path / "out").mkdir()
    data = lines_of("content")(tmp_path)
    own = ["train.steps=7", "corpus.tokens_per_row=64", "student.fraction=0.9", "eval.sample_prompt=the cat"]
    assert main(["init", "models/T", "cut", data, "--out", "out/r.yaml", "--json", *own]) == 0
    said = json.loads(capsys.readouterr().out)
    recipe = yaml.safe_load((tmp_path / "out" / "r.yaml").read_text())
    assert (recipe["teacher"]["model"], recipe["corpus"]["path"]) == ("../models/T", "../data.jsonl")
    assert teacher.exists() and recipe["student"] == {"name": "cut", "fraction": 0.9}
    assert (recipe["train"]["steps"], recipe["corpus"]["tokens_per_row"]) == (7, 64)
    assert recipe["eval"]["sample_prompt"] == "the cat" and recipe["train"]["warmup"] <= 7
    assert said["fits"] and said["peak_bytes"] < said["memory_available_bytes"]
    chosen = {each["field"]: each["value"] for each in said["chosen"]}
    dotted = {f"{section}.{name}": value for section, of in recipe.items() for name, value in of.items()}
    assert chosen == dotted
    assert main(["init", "models/T", "cut", data, "train.stepps=7"]) == 2
    assert "Did you mean train.steps?" in capsys.readouterr().err
    assert not (tmp_path / "recipe.yaml").exists()


def test_every_value_has_its_reason_above_it_with_the_figure(
    models: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = lines_of("text")
    _, recipe, out = run_init(tmp_path, monkeypatch, str(models("llama", "teacher")), "cut", make(tmp_path))
    assert recipe is not None
    lines = out.read_text().splitlines()
    bare = {
        line.strip()
        for before, line in pairwise(lines)
        if line.startswith("  ") and not line.strip().startswith("#") and not before.strip().startswith("#")
    }
    # The models and data that the command names, and the other half of a pair of weights.
    assert bare == {
        f"model: {models('llama', 'teacher')}",
        "path: data.jsonl",
        "field: text",
        "ce_weight: 0.1",
    }
    lengths = sorted(len(words(n)) + 1 for n in range(60))  # a token a byte, and the EOS
    reason = next(before for before, line in pairwise(lines) if line.startswith("  tokens_per_row:"))
    assert f"at most {lengths[53]} tokens" in reason and f"at most {lengths[30]}" in reason


def test_a_student_larger_than_its_teacher_is_a_warning(
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pair = [str(models("llama", kind)) for kind in ("checkpoint", "teacher")]
    code, recipe, _ = run_init(tmp_path, monkeypatch, *pair, lines_of("text")(tmp_path), "--json")
    assert code == 0 and recipe is not None
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert "45,568" in warning and "27,008" in warning


@pytest.fixture
def wide(tmp_path: Path) -> list[str]:
    """Two models whose weights take more than a row does, and data."""
    options = {"hidden_size": 192, "intermediate_size": 768, "head_dim": 48, "num_key_value_heads": 4}
    names = [str(make_family(tmp_path / name, "llama", n, 0, **options)) for name, n in (("T", 4), ("S", 3))]
    return [*names, lines_of("text")(tmp_path), "corpus.tokens_per_row=32", "train.rows_per_step=32"]


LADDER: list[tuple[str, dict[str, Any]]] = [
    ("rows", {"train.rows_per_micro_batch": 1}),
    ("checkpointing", {"train.activation_checkpointing": True}),
    ("teacher", {"teacher.dtype": "bfloat16"}),
    ("lora", {"student.lora": {"rank": 16, "alpha": 32}}),
]


def test_what_does_not_fit_is_made_smaller_until_it_does(
    wide: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With as much memory as the plan of each step of the ladder needs, and one byte less."""

    def bare(resolved: Any) -> Any:  # what this process holds by now is not of the recipe
        return dataclasses.replace(plan(resolved), libraries=0, corpus=0, allocator=0)

    def peak(**changes: Any) -> int:
        overrides = [f"{field}={json.dumps(value)}" for field, value in changes.items()]
        return int(bare(resolve(load(whole, overrides))).peak_bytes)

    def made(memory: int, name: str) -> dict[str, Any]:
        monkeypatch.setattr(fitting, "available", lambda *_: (memory, 10**12))
        capsys.readouterr()
        assert main(["init", *wide, "--out", f"{name}.yaml", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        values = {each["field"]: each["value"] for each in said["chosen"]}
        recipe = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        rows = peak(**{"train.rows_per_micro_batch": recipe["train"]["rows_per_step"]})
        assert said["fits"] == (said["peak_bytes"] <= memory) and said["peak_bytes"] <= rows
        return values | {"fits": said["fits"]}

    # A processor without bfloat16, which `auto` would choose: of the teacher there would be nothing to halve.
    (tmp_path / "cpuinfo").write_text("flags\t: fpu\n")
    monkeypatch.setattr(cpu_matmul, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fitting, "plan", bare)
    monkeypatch.setattr(fitting, "SHARE", 1)
    monkeypatch.setattr(fitting, "available", lambda *_: (10**12, 10**12))
    assert main(["init", *wide, "--out", "whole.yaml"]) == 0
    whole = tmp_path / "whole.yaml"
    changes: dict[str, Any] = {}
    peaks = [peak()]
    for _, step in LADDER:
        changes |= step
        peaks.append(peak(**changes))
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    assert "train.activation_checkpointing" not in made(peaks[0], "all")
    some = made(
        (peak(**{"train.rows_per_micro_batch": 4}) + peak(**{"train.rows_per_micro_batch": 8})) // 2, "some"
    )
    assert some["train.rows_per_micro_batch"] == 4 and "train.activation_checkpointing" not in some
    done: dict[str, Any] = {}
    for (name, step), enough in zip(LADDER, peaks[1:], strict=True):
        done |= step
        found = made(enough, name)
        assert {field: found.get(field) for field in done} == done and found["fits"]
        assert not any(
            field in found and found[field] != "auto" for _, of in LADDER for field in of if field not in done
        )
    assert found["train.lr"] == 10 * some["train.lr"]
    none = made(1000, "none")
    assert not none["fits"] and "student.lora" not in none


PLUGIN = """
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from potstill import CorpusConfig, register
from potstill.recipe.fields import LocalPath


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class CsvCorpusConfig(CorpusConfig):
    name: Literal["csv"] = "csv"
    path: LocalPath
    column: str

    @classmethod
    def recognise(cls, data: Any) -> tuple[dict[str, Any], str] | None:
        if not data.path.endswith(".csv"):
            return None
        with open(data.path) as file:
            columns = next(csv.reader(file))
        return {"path": data.path, "column": columns[-1]}, f"a table with the columns {columns}"

    def texts(self) -> Iterator[tuple[str, str]]:
        with open(self.path) as file:
            for number, row in enumerate(csv.DictReader(file)):
                yield f"{self.path}:{number}", row[self.column]
"""


def test_a_plug_in_s_corpus_recognises_its_own_data_before_the_built_in_ones(
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tables.py").write_text(PLUGIN)
    (tmp_path / "t.csv").write_text("id,words\n" + "".join(f"{n},{words(n)}\n" for n in range(60)))
    pair = [str(models("llama", kind)) for kind in ("teacher", "checkpoint")]
    code, recipe, out = run_init(tmp_path, monkeypatch, *pair, "t.csv", "plugins=[tables.py]")
    assert code == 0 and recipe is not None and recipe["plugins"] == ["tables.py"]
    assert (recipe["corpus"]["name"], recipe["corpus"]["column"]) == ("csv", "words")
    require_checked(out, capsys)
    (tmp_path / "b.csv").write_bytes(b"\0\xff\n")  # also what no built-in kind reads
    assert main(["init", *pair, "b.csv", "plugins=[tables.py]", "--out", "b.yaml"]) == 2
    assert "error: corpus csv: recognise: " in capsys.readouterr().err


def test_models_and_a_data_set_of_the_hub_are_named_as_they_were_given(
    models: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    datasets = pytest.importorskip("datasets", reason=NO_DATA)
    from huggingface_hub import HfFileSystem, constants

    with loopback(TOKEN) as hub:
        point_at(hub, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        HfFileSystem.clear_instance_cache()
        for name, kind in (("me/teacher", "teacher"), ("me/student", "checkpoint")):
            files = sorted(models("llama", kind).iterdir())
            hub.repos[name] = Repo(private=False)
            hub.repos[name].commit({file.name: file.read_bytes() for file in files}, "one")
        texts = "".join(json.dumps({"content": words(n)}) + "\n" for n in range(60)).encode()
        repo = hub.repos["datasets/me/texts"] = Repo(private=False)
        repo.commit({"train.jsonl": texts, "test.jsonl": texts}, "one")
        code, recipe, out = run_init(tmp_path, monkeypatch, "me/teacher", "me/student", "me/texts")
        assert code == 0 and recipe is not None
        assert (recipe["teacher"]["model"], recipe["student"]["model"]) == ("me/teacher", "me/student")
        found = {"name": "hf", "path": "me/texts", "split": "train", "column": "content", "shards": "tokens"}
        assert recipe["corpus"] | found == recipe["corpus"]
        require_checked(out, capsys)


def test_a_recipe_for_a_teacher_in_a_gguf_file_passes_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer("smollm")
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        make_family(tmp_path / "T", "llama", tokenizer=tokenizer)
    )
    run = make_run(tmp_path / "run", hf, tokenizer)
    export_run(run.path, tmp_path, ["f16"], check=False)
    data = lines_of("text")(tmp_path)
    code, recipe, out = run_init(tmp_path, monkeypatch, "run-F16.gguf", "cut", data)
    assert code == 0 and recipe is not None and recipe["teacher"]["model"] == "run-F16.gguf"
    require_checked(out, capsys)


@pytest.mark.soak
@pytest.mark.real
def test_the_recipe_of_the_demo_s_teacher_passes_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two layers by place, and short rows: what a cut is measured by, and ten steps of the demo take minutes."""
    if demo_gguf() is None:
        pytest.skip("real teacher: the demo extra is not installed; not run")
    own = ["student.layers=2", "student.rule=first_last", "student.repair=false"]
    own += ["corpus.tokens_per_row=64", "train.rows_per_step=2"]
    code, recipe, out = run_init(tmp_path, monkeypatch, str(demo_gguf()), "cut", "stdlib:json", *own)
    assert code == 0 and recipe is not None and recipe["corpus"]["path"] == "stdlib:json"
    require_checked(out, capsys)
