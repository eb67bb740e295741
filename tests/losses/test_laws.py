"""A divergence that breaks its laws is found out before it is used; every divergence of ours keeps them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from potstill.cli.main import main
from potstill.errors import UserError
from potstill.losses.divergences import forward_kl
from potstill.losses.laws import broken_laws
from potstill.registry import entries

Recipe = Callable[..., Path]


@pytest.mark.parametrize("name", entries("divergence"))
def test_ours_keep_every_law(name: str) -> None:
    assert broken_laws(entries("divergence")[name]) == []


def a_sum(student: Tensor, teacher: Tensor) -> Tensor:
    return forward_kl(student, teacher).sum()


def a_mean(student: Tensor, teacher: Tensor) -> Tensor:
    return forward_kl(student, teacher).mean()


def a_mean_for_each(student: Tensor, teacher: Tensor) -> Tensor:
    return forward_kl(student, teacher).mean().expand(len(student))


def a_value_for_each_id(student: Tensor, teacher: Tensor) -> Tensor:
    return teacher.exp() * (teacher - student)


def one_column_each(student: Tensor, teacher: Tensor) -> Tensor:
    return forward_kl(student, teacher)[:, None]


@pytest.mark.parametrize("made", [a_sum, a_mean, a_mean_for_each, a_value_for_each_id, one_column_each])
def test_anything_but_a_value_of_each_position_is_refused(made: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(UserError, match="one value per position"):
        broken_laws(made)


@pytest.mark.parametrize(
    ("made", "law"),
    [
        (lambda s, t: -forward_kl(s, t), "negative"),
        (lambda s, t: -(t.exp() * s).sum(-1), "where student and teacher are equal"),
        (lambda s, t: forward_kl(s.detach(), t), "no gradient"),
        (lambda s, t: forward_kl(s, t) / 0, "its value is inf"),
        (lambda s, t: (s - t).abs().sum(-1).sqrt() * 0 + (s - s).sqrt().sum(-1), "gradient is not finite"),
    ],
)
def test_each_broken_law_is_named(made: Callable[[Tensor, Tensor], Tensor], law: str) -> None:
    assert any(law in each for each in broken_laws(made))


PLUGIN = """
from potstill import register

@register("divergence")
def mine(student_logp_NS, teacher_logp_NS):
    nats_N = (teacher_logp_NS.exp() * (teacher_logp_NS - student_logp_NS)).sum(-1)
    return {value}
"""


@pytest.mark.parametrize(
    ("value", "allow", "code", "words"),
    [
        ("nats_N.sum()", "true", 2, "mine: it returns []"),
        ("nats_N.mean()", "true", 2, "mine: it returns []"),
        ("nats_N + 1", "false", 2, "equal it is 1 nats"),
        ("nats_N + 1", "true", 0, ""),
        ("nats_N", "false", 0, ""),
    ],
)
def test_a_plugin_is_tried_before_it_is_used(
    value: str,
    allow: str,
    code: int,
    words: str,
    tiny_recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN.format(value=value))
    recipe = tiny_recipe(
        objective="{divergence: {name: mine}}", plugins="[mine.py]", allow_any_divergence=allow
    )
    assert main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == code
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert (tmp_path / "run").exists() == (code == 0)
