"""The recipes of docs/jobs.md, each checked and tried for two steps, with tiny models in the place of its own."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_corpus, make_model
from data.chat_templates import QWEN_3, tokenizer_for
from serving import Served, serving

from potstill.cli.main import main

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "jobs.md").read_text()
JOBS = dict(re.findall(r"```yaml\n# (\w+)\.yaml\n(.*?)```", PAGE, re.DOTALL))
SMALLER = (
    "corpus.tokens_per_row=96",
    "corpus.heldout_rows=2",
    "train.steps=4",
    "train.rows_per_step=4",
    "train.rows_per_micro_batch=2",
    "train.warmup=1",
    "train.device=cpu",
    "eval.every=1",
    "allow_weak_teacher=true",  # it is random
)
"""What makes a recipe of the page one for tiny models."""


def write_models_and_data(folder: Path) -> None:
    """Teacher and student of one tokenizer with a chat template, and each file that a job names."""
    tokenizer = tokenizer_for(QWEN_3)
    for name, seed in (("teacher", 1), ("student", 9)):
        make_model(folder / name, seed, with_tokenizer=False, vocab_size=len(tokenizer))
        tokenizer.save_pretrained(folder / name)
    texts = [path.read_text() for path in sorted(make_corpus(folder / "text").iterdir())]
    records: dict[str, list[dict[str, Any]]] = {
        "code.jsonl": [{"text": text} for text in texts],
        "prompts.jsonl": [{"prompt": text[:20]} for text in texts],
        "chats.jsonl": [
            {
                "messages": [
                    {"role": "user", "content": text[:20]},
                    {"role": "assistant", "content": text[20:60]},
                ]
            }
            for text in texts
        ],
    }
    for name, lines in records.items():
        (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def smaller(job: str, url: str) -> tuple[str, list[str]]:
    """The job's recipe with the tiny models, and overrides for the rest."""
    tree = yaml.safe_load(JOBS[job])
    served = tree["teacher"]["name"] == "server"
    tree["teacher"] |= {"url": url, "tokenizer": "teacher"} if served else {"model": "teacher"}
    tree["student"] |= {"model": "student"} if "model" in tree["student"] else {}
    more = ["rollouts.max_new_tokens=8"] if "rollouts" in tree else []
    return yaml.safe_dump(tree), [*SMALLER, *more]


def test_there_is_a_recipe_for_each_job() -> None:
    assert len(JOBS) == 5 == len(re.findall(r"^\| .* \| \[.*\]\(#", PAGE, re.MULTILINE))
    assert len(JOBS) == len(re.findall(r"^```yaml$", PAGE, re.MULTILINE))


@pytest.mark.parametrize("job", JOBS)
def test_the_recipe_of_a_job_is_checked_and_makes_steps(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "lora:" in JOBS[job]:
        pytest.importorskip("peft", reason="peft is not installed; not run")
    write_models_and_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        url = (
            stack.enter_context(serving(Served(tmp_path / "teacher", name="big"))) if job == "served" else ""
        )
        text, overrides = smaller(job, url)
        recipe = tmp_path / f"{job}.yaml"
        recipe.write_text(text)
        # Behind the checks that need no step, each of which ends it with 2.
        assert main(["distill", str(recipe), "--smoke", "2", "--json", *overrides]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["smoke/of_steps"] == 4 and 0 < figures["train/kd"] < 20
