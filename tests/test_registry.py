"""Names, options and plug-ins: the registry tells what it knows and refuses what it cannot load."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from potstill import registry
from potstill.errors import UserError


def test_the_built_in_divergences_are_known_in_order() -> None:
    assert list(registry.entries("divergence")) == ["forward_kl", "jsd", "reverse_kl", "skew_kl", "tvd"]


def test_a_registered_function_is_known_under_its_own_name_and_stays_as_it_was() -> None:
    def mine(student: Any, teacher: Any) -> Any:
        return student

    assert registry.register("divergence")(mine) is mine
    assert registry.entries("divergence")["mine"] is mine


def test_a_name_taken_by_another_module_is_refused_with_both_modules() -> None:
    def jsd(student: Any, teacher: Any) -> Any:
        return student

    with pytest.raises(
        UserError, match=r"^divergence jsd: registered twice, by potstill\.losses\.divergences and "
    ):
        registry.register("divergence")(jsd)
    assert registry.entries("divergence")["jsd"].__module__ == "potstill.losses.divergences"


def test_options_are_the_keyword_only_parameters_with_their_types_and_defaults() -> None:
    def mine(student: Any, teacher: Any, *, power: float, order: int = 2) -> Any:
        return student

    kind = registry.options_type("mine", mine)
    assert [f.name for f in dataclasses.fields(kind)] == ["name", "power", "order"]
    assert dataclasses.asdict(kind(power=0.5)) == {"name": "mine", "power": 0.5, "order": 2}
    with pytest.raises(TypeError):
        kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind(power=0.5).power = 1.0


def test_a_plugin_is_imported_and_registers(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from potstill.registry import register\n"
        "@register('divergence')\n"
        "def from_a_file(student, teacher, *, power: float = 0.5):\n"
        "    return student\n"
    )
    registry.load_plugin(plugin)
    assert "from_a_file" in registry.entries("divergence")


def test_a_plugin_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^plugins: no file .*absent\.py\. List Python files"):
        registry.load_plugin(tmp_path / "absent.py")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("1/0\n", "ZeroDivisionError: division by zero"),
        ("def f(:\n", "SyntaxError: "),
        ("import no_such_x\n", "No module"),
    ],
)
def test_a_plugin_that_does_not_import_is_refused_with_its_reason(
    tmp_path: Path, code: str, said: str
) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text(code)
    with pytest.raises(UserError) as refused:
        registry.load_plugin(plugin)
    assert str(refused.value).startswith(f"plugins: {plugin}: ")
    assert said in str(refused.value)


def test_a_plugins_own_user_error_is_passed_on(tmp_path: Path) -> None:
    plugin = tmp_path / "strict.py"
    plugin.write_text("from potstill.errors import UserError\nraise UserError('mine: 3 is odd. Give 4.')\n")
    with pytest.raises(UserError, match=r"^mine: 3 is odd\. Give 4\.$"):
        registry.load_plugin(plugin)


def test_the_nearest_name_is_offered_and_else_all_of_them() -> None:
    assert registry.nearest("forward_ql", ["jsd", "forward_kl"]) == " Did you mean forward_kl?"
    assert registry.nearest("zzz", ["jsd", "forward_kl"]) == " Known: forward_kl, jsd."
