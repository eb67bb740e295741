"""A teacher that is several: `teacher: {name: mixture, teachers: [...]}`.

Importing this registers every built-in teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import MinLen

from potstill.recipe.fields import Config, Positive
from potstill.recipe.messages import shown
from potstill.recipe.plugins import Registered
from potstill.recipe.sections_models import TeacherConfig
from potstill.registry import register


@dataclass(frozen=True, kw_only=True)
class MemberConfig(Config):
    teacher: Annotated[TeacherConfig, Registered("teacher", only="can_be_mixed")]
    """A teacher of any kind but mixture."""
    teaches: Annotated[list[str], MinLen(1)] | None = None
    """Sources of a corpus of name mix, whose rows it teaches; null: it has a weight."""
    weight: Positive | None = None
    """Its share of the mean distribution of every row, relative to the other weights; null: it has its own rows."""


LEAST_SHARE = 1e-6
"""Of a teacher in a weighted mean: below it, float32 would not see it."""


@register("teacher")
@dataclass(frozen=True, kw_only=True)
class MixtureTeacherConfig(TeacherConfig):
    name: Literal["mixture"] = "mixture"
    """Several teachers with one vocabulary: each for its own sources of a mixed corpus, or a weighted mean of all."""
    teachers: Annotated[list[MemberConfig], MinLen(2)]
    """Each with `teacher` and either `teaches`, its sources, or `weight`."""
    in_memory: Literal["all", "one"] = "all"
    """How many of them are in memory: all, or the one that was asked last, so that each turn loads it again."""

    source: ClassVar[str] = "potstill.teachers.mixture:MixtureSource"
    can_be_mixed: ClassVar[bool] = False

    def with_dtype(self, dtype: Any) -> MixtureTeacherConfig:
        return replace(
            self, teachers=[replace(each, teacher=each.teacher.with_dtype(dtype)) for each in self.teachers]
        )

    def dtypes(self) -> dict[str, str]:
        return {
            f"teachers.{number}.teacher.{field}": dtype
            for number, each in enumerate(self.teachers)
            for field, dtype in each.teacher.dtypes().items()
        }

    def without_places(self) -> MixtureTeacherConfig:
        return replace(
            self, teachers=[replace(each, teacher=each.teacher.without_places()) for each in self.teachers]
        )

    @property
    def label(self) -> str:
        return " + ".join(each.teacher.label for each in self.teachers)

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Of each teacher in the mean; None where each has its own rows."""
        weights = [each.weight for each in self.teachers if each.weight is not None]
        return tuple(weight / sum(weights) for weight in weights) if weights else None

    @classmethod
    def mistakes(cls, given: Mapping[str, Any], corpus: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        listed = given.get("teachers")
        members = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        weighted = [number for number, each in enumerate(members) if each.get("weight") is not None]
        numbers = {
            n: float(w) for n in weighted if isinstance(w := members[n]["weight"], int | float) and w > 0
        }
        for number, weight in numbers.items():
            if not LEAST_SHARE <= weight / sum(numbers.values()) <= 1:
                yield (
                    f"teachers.{number}.weight",
                    f"{shown(weight)} is less than {LEAST_SHARE:g} of all weights together. Leave that teacher out.",
                )
        of: dict[str, int] = {}
        for number, each in enumerate(members):
            at, teaches = f"teachers.{number}", each.get("teaches")
            if (teaches is None) == (each.get("weight") is None):
                yield at, "give it either teaches, its sources of the corpus, or a weight in every row."
            elif weighted and number not in weighted:
                yield (
                    f"{at}.teaches",
                    f"teachers.{weighted[0]} has a weight. Give all a weight, or all their sources.",
                )
            inner = each.get("teacher")
            if isinstance(inner, dict) and inner.get("sharded"):
                yield (
                    f"{at}.teacher.sharded",
                    "every process keeps the teachers of a mixture whole. Set it to false.",
                )
            for name in teaches if isinstance(teaches, list) else ():
                if of.setdefault(str(name), number) != number:
                    yield f"{at}.teaches", f"{shown(name)} is taught by teachers.{of[str(name)]} already."
        sources = corpus.get("sources")
        names = [each.get("source") for each in sources or () if isinstance(each, dict)]
        if of and corpus.get("name") != "mix":
            yield (
                "teachers",
                "each teaches some sources, which a corpus of name mix has. Use one, or give weights.",
            )
        elif of and (unknown := sorted(of.keys() - set(names))):
            yield "teachers", f"{shown(unknown[0])} is no source of the corpus: {', '.join(map(str, names))}."
        elif of and (alone := [name for name in names if name not in of]):
            yield "teachers", f"source {shown(alone[0])} is taught by none. Name it in teaches of one."
