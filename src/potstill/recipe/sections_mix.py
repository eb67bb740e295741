"""A corpus that is a mix of others: `corpus: {name: mix, sources: [...]}`.

Each source is a corpus of any kind with two fields more, `source` (its name) and `weight`. What rows of one mix have in
common is a field of the mix and passed on to its sources. Importing this registers every built-in corpus.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import MinLen

from potstill.recipe.messages import shown
from potstill.recipe.plugins import Registered
from potstill.recipe.sections_data import CorpusConfig
from potstill.registry import register

IN_COMMON = {
    "tokens_per_row": "rows of one step have one length",
    "packing": "the models read all rows in the same way",
    "tokenizer": "all rows have the same ids",
    "bos": "texts begin in the same way",
    "decontaminate": "every document is compared with the same texts",
}
"""Fields that a source has from its mix, and why."""


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class MixCorpusConfig(CorpusConfig):
    name: Literal["mix"] = "mix"
    """Several corpora, of which every step has rows in the proportion of their weights. heldout_rows are those of each
    source, unless it has its own; with shards, each source is cached in a folder there of its name."""
    sources: Annotated[list[Annotated[CorpusConfig, Registered("corpus", only="can_be_mixed")]], MinLen(1)]
    """Corpora of any kind but mix, each with `source`, a name of its own, and `weight`; prompts with prompts alone."""

    can_be_mixed: ClassVar[bool] = False

    @classmethod
    def complete(cls, given: dict[str, Any]) -> Iterator[tuple[str, ...]]:
        listed = given.get("sources")
        for number, source in enumerate(listed if isinstance(listed, list) else []):
            for name in (*IN_COMMON, "heldout_rows", "whole_documents"):
                if isinstance(source, dict) and name in given and name not in source:
                    source[name] = given[name]
                    yield ("sources", str(number), name)

    @classmethod
    def mistakes(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield from super().mistakes(given)
        listed, names = given.get("sources"), dict[str, int]()
        sources = listed if isinstance(listed, list) else []
        kinds = [source.get("name") for source in sources if isinstance(source, dict)]
        others = [kind for kind in kinds if kind != "prompts"]
        for number, source in enumerate(sources):
            if not isinstance(source, dict):
                continue
            at = f"sources.{number}"
            if source.get("name") == "prompts" and others:
                yield (
                    f"{at}.name",
                    f"prompts have no answers, and rows of {others[0]} have: of one step the student writes the answers"
                    " to all prompts. Mix prompts with prompts alone; of chat its questions are prompts, too.",
                )
            for name in ("source", "weight"):
                if source.get(name) is None:
                    yield f"{at}.{name}", "missing. Every source of a mix needs it."
            for name, why in IN_COMMON.items():
                of_mix = given.get(name, getattr(cls, name))
                if name in source and source[name] != of_mix:
                    values = f"{shown(source[name])}, and corpus.{name} is {shown(of_mix)}"
                    yield f"{at}.{name}", f"{values}: {why}. Set corpus.{name} alone."
            if isinstance(called := source.get("source"), str) and names.setdefault(called, number) != number:
                yield (
                    f"{at}.source",
                    f"{shown(called)} is also the name of corpus.sources.{names[called]}. Give each its own.",
                )

    @property
    def parts(self) -> dict[str, CorpusConfig]:
        """Each source by its name, with its own folder of shards where the mix has one."""
        return {
            str(each.source): replace(each, shards=os.path.join(self.shards, str(each.source)))
            if self.shards is not None and each.shards is None
            else each
            for each in self.sources
        }

    @property
    def is_prompts(self) -> bool:
        return all(each.is_prompts for each in self.sources)

    @property
    def is_streamed(self) -> bool:
        return any(each.is_streamed for each in self.sources)

    @property
    def origin(self) -> str:
        return ", ".join(each.origin for each in self.sources)

    def without_places(self) -> CorpusConfig:
        sources = [each.without_places() for each in self.sources]
        return replace(self, shards=None, sources=sources)
