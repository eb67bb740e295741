"""What a hub id may look like, and what messages and folders call a model."""

from __future__ import annotations

import pytest

from potstill.io.hub import hub_id
from potstill.recipe.paths import short_name


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("owner/name", ("owner/name", "main")),
        ("owner/name@v1.0+cu", ("owner/name", "v1.0+cu")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("owner/name.v2@" + "a" * 40, ("owner/name.v2", "a" * 40)),
        ("owner/name@", None),
        ("owner/name@../../x", None),
        ("owner/name@a b", None),
        ("owner/name@-v", None),
        ("owner/model.gguf@v1", None),
        ("owner/name@v1/model.gguf", None),
        ("name@v1", None),
        ("/owner/name@v1", None),
        ("a/b/c@v1", None),
    ],
)
def test_a_hub_id_may_name_a_branch_a_tag_or_a_commit(value: str, expected: tuple[str, str] | None) -> None:
    assert hub_id(value) == expected


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/models/a/model@v1", "model@v1"),
        ("owner/name", "name"),
        ("owner/name@refs/pr/3", "name@refs-pr-3"),
        ("owner/name@" + "ab" * 20, "name@abababababab"),
    ],
)
def test_a_name_in_messages_is_short_and_one_folder(model: str, name: str) -> None:
    assert short_name(model) == name
