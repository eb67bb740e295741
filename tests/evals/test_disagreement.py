"""Per token what `heldout` has as a mean, and the text that it is of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.evals.disagreement import CHOICES, disagreement
from potstill.evals.heldout import heldout
from potstill.recipe import load

Recipe = Callable[..., Path]


def setup_of(path: Path) -> RunSetup:
    return set_up(resolve(load.load(path)), lambda text: None)


@pytest.fixture
def setup(tiny_recipe: Recipe) -> RunSetup:
    return setup_of(tiny_recipe(objective="{chunk: 7, temperature: 2.0}"))


def valued(rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [token for row in rows for token in row if "kl" in token]


def test_its_means_are_those_of_the_held_out_evaluation(setup: RunSetup) -> None:
    found = disagreement(setup.student, setup.teacher, setup.corpus.heldout, 10**6, setup.tokenizer)
    tokens, means = valued(found), heldout(setup.student, setup.teacher, setup.corpus.heldout, 4)
    assert len(found) == 4
    assert len(tokens) == setup.corpus.heldout.supervised
    for mine, theirs in (("kl", "heldout/kl"), ("ce", "heldout/ce"), ("teacher_ce", "heldout/teacher_ce")):
        assert sum(token[mine] for token in tokens) / len(tokens) == pytest.approx(means[theirs], rel=1e-5)
    agree = sum(token["teacher"][0][0] == token["student"][0][0] for token in tokens) / len(tokens)
    assert agree == pytest.approx(means["heldout/agreement"])


def test_each_value_is_of_the_token_that_it_stands_at(setup: RunSetup) -> None:
    """Against plain logits of one row, position by position."""
    (row, *_) = disagreement(setup.student, setup.teacher, setup.corpus.heldout, 32, setup.tokenizer)
    batch = setup.corpus.heldout.batch([0])
    with torch.no_grad():
        hidden_BTD = setup.student.model.hidden(batch.input_ids_BT, batch.position_ids_BT)
        student_TV = setup.student.model.logits(hidden_BTD)[0].log_softmax(-1)
    labels = dict(zip(batch.positions_N.tolist(), batch.labels_N.tolist(), strict=True))
    assert {at - 1 for at, token in enumerate(row) if "kl" in token} == {*labels}
    for position, label in labels.items():
        token = row[position + 1]
        assert token["ce"] == pytest.approx(-float(student_TV[position, label]), abs=1e-4)
        p = student_TV[position].exp()
        assert token["entropy"] == pytest.approx(-float((p * p.log()).sum()), abs=1e-4)
        assert [share for _, _, share in token["student"]] == pytest.approx(
            p.topk(CHOICES).values.tolist(), abs=1e-4
        )
        assert token["id"] == label
        assert token["text"] == setup.tokenizer.decode([label])


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_no_more_tokens_than_asked_and_the_same_as_of_all(setup: RunSetup, tokens: int) -> None:
    some = disagreement(setup.student, setup.teacher, setup.corpus.heldout, tokens, setup.tokenizer)
    whole = disagreement(setup.student, setup.teacher, setup.corpus.heldout, 32 * len(some), setup.tokenizer)
    assert 0 < len(valued(some)) <= tokens
    for cut, row in zip(some, whole, strict=True):
        assert [token["text"] for token in cut] == [token["text"] for token in row[: len(cut)]]
        assert [t.get("kl", 0) for t in cut] == pytest.approx(
            [t.get("kl", 0) for t in row[: len(cut)]], abs=1e-5
        )


def test_logits_exist_for_one_chunk_at_a_time(setup: RunSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    softmax = torch.Tensor.log_softmax

    def watched(self: torch.Tensor, dim: int) -> torch.Tensor:
        seen.append(len(self))
        return softmax(self, dim)

    monkeypatch.setattr(torch.Tensor, "log_softmax", watched)
    disagreement(setup.student, setup.teacher, setup.corpus.heldout, 64, setup.tokenizer)
    assert max(seen) == 7


def test_without_a_tokenizer_tokens_are_their_ids() -> None:
    here = Path(__file__).resolve().parents[2] / "recipes" / "tiny-fixture.yaml"
    setup = setup_of(here)
    (row,) = disagreement(setup.student, setup.teacher, setup.corpus.heldout, 8)
    ids = setup.corpus.heldout.batch([0]).input_ids_BT[0].tolist()
    assert [token["text"] for token in row[:8]] == [f"[{id}]" for id in ids[:8]]


def test_the_student_is_left_in_the_mode_it_was_in(setup: RunSetup) -> None:
    for mode in (True, False):
        setup.student.train(mode)
        disagreement(setup.student, setup.teacher, setup.corpus.heldout, 8, setup.tokenizer)
        assert setup.student.training is mode
