"""What does decontamination find that is none, and what does it miss?

    python bench/decontamination.py [--ngram 10]

Every .py file of the Python standard library, its tests too, against HumanEval: what is flagged, and how
long it takes. Then each problem's parts planted in a file of the library: how many are found.
"""

from __future__ import annotations

import argparse
import ast
import re
import sysconfig
import textwrap
import time
from pathlib import Path

from potstill.data.decontamination import EvaluationTexts
from potstill.io.safe_open import json_lines
from potstill.recipe.paths import locate_evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ngram", type=int, default=10)
    path = Path(locate_evaluation("humaneval", Path()))
    texts = EvaluationTexts([path], parser.parse_args().ngram)
    print(f"{len(texts.names)} texts, {texts.too_short} too short to be told")

    library = Path(sysconfig.get_path("stdlib"))
    size = flagged = files = 0
    started = time.process_time()
    for file in sorted(library.rglob("*.py")):
        if "-packages" in str(file):
            continue
        text = file.read_text(errors="replace")
        size, files = size + len(text), files + 1
        if hits := texts.hits(str(file.relative_to(library)), text):
            flagged += 1
            print(f"  {hits[0].document}: {hits[0].count} {hits[0].kind} of {hits[0].text}: {hits[0].words}")
    seconds = time.process_time() - started
    print(f"{flagged} of {files} files flagged, {size / 1e6:.1f} MB in {seconds:.1f} s of processor time")

    host = (library / "textwrap.py").read_text()
    problems = [record for _, record in json_lines(path, "")]
    for what, plant in PLANTS.items():
        planted = [plant(problem) for problem in problems]
        found = [
            any(hit.text.startswith(f"{p['task_id']} ") for hit in texts.hits("", f"{host}\n{text}\n{host}"))
            for p, text in zip(problems, planted, strict=True)
        ]
        missed = [
            p["task_id"].split("/")[1] for p, is_found in zip(problems, found, strict=True) if not is_found
        ]
        print(f"{what}: {sum(found)} of {len(found)} found; missed: {', '.join(missed) or 'none'}")


def docstring(problem: dict[str, str]) -> str:
    """Of the function asked for; the comment before it in the one problem that has no docstring."""
    whole = ast.parse(problem["prompt"] + problem["canonical_solution"])
    functions = [node for node in whole.body if getattr(node, "name", "") == problem["entry_point"]]
    return ast.get_docstring(functions[0]) or problem["prompt"]


def words(problem: dict[str, str]) -> str:
    """The docstring without its examples."""
    return re.split(r">>>|[Ee]xample|For |\n\n", docstring(problem).strip())[0]


PLANTS = {
    "the whole problem": lambda p: p["prompt"] + p["canonical_solution"],
    "the docstring": docstring,
    "the docstring's first paragraph": words,
    "the solution alone": lambda p: p["canonical_solution"],
    "the solution, indented, upper case, a comment after each line": lambda p: "\n".join(
        f"{line}  # so it goes"
        for line in textwrap.indent(p["canonical_solution"], "    ").upper().split("\n")
    ),
    "the solution, all spaces and line breaks gone": lambda p: re.sub(r"\s+", "", p["canonical_solution"]),
    "the tests": lambda p: p["test"],
}

if __name__ == "__main__":
    main()
