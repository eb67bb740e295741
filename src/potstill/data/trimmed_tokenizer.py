"""A tokenizer with fewer tokens, which tokenizes some texts as before and any other into more pieces, down to bytes.

Of a BPE tokenizer the kept tokens are closed under merging: whatever a kept token is merged from is kept, too. Then a
text whose tokens are all kept goes through the same merges as before, in the same order, and no other one is possible
before them. Vocabulary trimming: Ushio et al. 2023, arXiv 2305.15020.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from potstill.data.tokenizers import SETTINGS, load_tokenizer, save_tokenizer, vocab_of
from potstill.errors import UserError
from potstill.io.safe_open import FETCH_AGAIN, read_object

TOKENIZER, CONFIG = SETTINGS[:2]
OLDER = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "special_tokens_map.json")
"""Files with the same tokens once more, for programs that read no tokenizer.json: they would be of the old ids."""
BYTES = ({*ByteLevel.alphabet()}, {f"<0x{byte:02X}>" for byte in range(256)})
"""What any text can be written with: of a byte-level tokenizer its 256 letters, or one token for each byte. Those that
a tokenizer never had are no loss: SmolLM2 lacks 21, most of them in no UTF-8.
"""
USE_WHOLE = "Use the model with all of its tokens."
Json = dict[str, Any]


class Trimmable:
    """A tokenizer of which some tokens are kept.

    Args:
        tokenizer: a fast one, of BPE with all bytes.
        size: ids that the model has logits for; a token beyond them is none of the model's.

    Raises:
        UserError: a tokenizer of another kind, or one that cannot write every text.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer = tokenizer
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.settings: Json = json.loads(backend.to_str()) if backend is not None else {}
        self.model: Json = self.settings.get("model", {})
        kind = self.model.get("type", type(tokenizer).__name__)
        if kind != "BPE":
            raise UserError(f"{self.name}: its tokenizer is {kind}, and only BPE can be trimmed. {USE_WHOLE}")
        known = vocab_of(tokenizer, size).tokens or ()
        self.tokens = {id_: token for id_, token in enumerate(known[:size]) if token}
        self.ids = {token: id_ for id_, token in self.tokens.items()}
        if not (_is_byte_level(self.settings) or self.model.get("byte_fallback")):
            raise UserError(
                f"{self.name}: its tokenizer has no tokens for single bytes, so that with fewer tokens it would lose"
                f" what it cannot write. {USE_WHOLE}"
            )
        self.merges = list(_merges(self.model))
        self.made_of: dict[str, list[str]] = {}
        """By token, all that any merge makes it from."""
        for first, second, token in self.merges:
            self.made_of.setdefault(token, []).extend((first, second))

    def kept_ids(self, used: Iterable[int], most: int) -> list[int]:
        """The ids to keep, rising: those used, the added tokens, the bytes, what these are merged from, and as many
        others as make at most `most` in all: the earliest merges, which are the most frequent pairs, then by id.

        Raises:
            UserError: what must be kept is more than `most`.
        """
        needed = {self.tokens[id_] for id_ in used} | self._named()
        kept = self._closed(needed)
        if len(kept) > most:
            raise UserError(
                f"--ids: {most}, and the corpus with the added tokens, the bytes and what they are merged from needs"
                f" {len(kept)} tokens. Give {len(kept)} or more."
            )
        for token in (*(token for _, _, token in self.merges), *self.ids):
            more = self._closed({token}) - kept if token in self.ids else set()
            if len(kept) + len(more) > most:
                break
            kept |= more
        return sorted(self.ids[token] for token in kept)

    def _named(self) -> set[str]:
        """Tokens that the tokenizer itself needs."""
        names = {entry["content"] for entry in self.settings["added_tokens"]}
        names |= {*_in_processor(self.settings.get("post_processor")), self.model.get("unk_token") or ""}
        return names & self.ids.keys() | {token for bytes_ in BYTES for token in bytes_ & self.ids.keys()}

    def _closed(self, tokens: set[str]) -> set[str]:
        """These tokens, and all that they are merged from."""
        closed, todo = set[str](), [*tokens]
        while todo:
            token = todo.pop()
            if token not in closed:
                closed.add(token)
                todo += self.made_of.get(token, [])
        return closed

    def save(self, keep: Sequence[int], folder: Path) -> Any:
        """Write the tokenizer with these tokens alone, numbered in their order, and load it again.

        Raises:
            UserError: it does not come back with these tokens.
        """
        tokens = [self.tokens[id_] for id_ in keep]
        new_id = {token: number for number, token in enumerate(tokens)}
        save_tokenizer(self.tokenizer, folder)
        for name in OLDER:
            (folder / name).unlink(missing_ok=True)
        pairs = [
            [first, second] for first, second, token in self.merges if {first, second, token} <= new_id.keys()
        ]
        model = self.model | {
            "vocab": {token: new_id[token] for token in self.model["vocab"] if token in new_id},
            "merges": pairs,
        }
        added = [
            entry | {"id": new_id[entry["content"]]}
            for entry in self.settings["added_tokens"]
            if entry["content"] in new_id
        ]
        own = {"model": model, "added_tokens": added, "padding": None, "truncation": None}
        own["post_processor"] = _renumbered(self.settings.get("post_processor"), new_id)
        _write(folder / TOKENIZER, self.settings | own)
        if (folder / CONFIG).exists():
            _write(folder / CONFIG, _config(read_object(folder / CONFIG, FETCH_AGAIN), new_id))
        loaded = load_tokenizer(folder)
        found = vocab_of(loaded, len(tokens)).tokens or ()
        if found != tuple(tokens):
            others = [*{*found} ^ {*tokens}] or [
                next(b for a, b in zip(tokens, found, strict=True) if a != b)
            ]
            raise UserError(
                f"{self.name}: its tokenizer cannot be trimmed: {others[0]!r:.60} does not come back as it was."
                f" {USE_WHOLE}"
            )
        return loaded


def _is_byte_level(settings: Json) -> bool:
    """Whether a text is cut into bytes before it is merged."""
    steps = [settings.get("pre_tokenizer"), settings.get("normalizer")]
    while steps:
        step = steps.pop() or {}
        if step.get("type") == "ByteLevel":
            return True
        steps += [*step.get("pretokenizers", ()), *step.get("normalizers", ())]
    return False


def _merges(model: Json) -> Iterator[tuple[str, str, str]]:
    """Both parts and what they make, in their order; older files have a space between the parts."""
    prefix = model.get("continuing_subword_prefix") or ""
    for pair in model["merges"]:
        first, second = pair.split(" ", 1) if isinstance(pair, str) else pair
        yield first, second, first + second.removeprefix(prefix)


def _in_processor(processor: Any) -> Iterator[str]:
    """The special tokens that a post-processor puts around a text: of templates, and those of BERT and RoBERTa."""
    if isinstance(processor, list):
        for each in processor:
            yield from _in_processor(each)
    elif isinstance(processor, dict):
        if {"ids", "tokens"} <= processor.keys():
            yield from processor["tokens"]
        for key, value in processor.items():
            if key in ("sep", "cls"):
                yield value[0]
            else:
                yield from _in_processor(value)


def _renumbered(processor: Any, new_id: Mapping[str, int]) -> Any:
    """A post-processor with the new ids of its special tokens."""
    if isinstance(processor, list):
        return [_renumbered(each, new_id) for each in processor]
    if not isinstance(processor, dict):
        return processor
    changed = {key: _renumbered(value, new_id) for key, value in processor.items()}
    if {"ids", "tokens"} <= changed.keys():
        changed["ids"] = [new_id[token] for token in changed["tokens"]]
    for key in ("sep", "cls"):
        if key in changed:
            changed[key] = [changed[key][0], new_id[changed[key][0]]]
    return changed


def _config(config: Json, new_id: Mapping[str, int]) -> Json:
    """A tokenizer_config.json without the tokens that are gone: a library would add them again, under new ids."""

    def is_gone(value: Any) -> bool:
        content = value.get("content") if isinstance(value, dict) else value
        return isinstance(content, str) and content not in new_id

    kept = {key: value for key, value in config.items() if not (key.endswith("_token") and is_gone(value))}
    for key, value in kept.items():
        if key.endswith("special_tokens") and isinstance(value, list):
            kept[key] = [each for each in value if not is_gone(each)]
    if decoder := kept.get("added_tokens_decoder"):
        kept["added_tokens_decoder"] = {
            str(new_id[entry["content"]]): entry for entry in decoder.values() if not is_gone(entry)
        }
    return kept


def _write(path: Path, settings: Json) -> None:
    """Unsorted: a vocabulary is read in the order of its ids."""
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
