"""A tokenizer with fewer tokens, which reads some texts as before and any other in more pieces, down to its bytes.

Of a BPE tokenizer the kept tokens are closed under merging: whatever a kept token is merged from is kept, too. Then a
text whose tokens are all kept goes through the same merges as before, in the same order, and no other one is possible
before them. Vocabulary trimming: Ushio et al. 2023, arXiv 2305.15020.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from potstill.data.tokenizers import SETTINGS, load_tokenizer, save_tokenizer, vocab_of
from potstill.errors import UserError
from potstill.io.safe_open import FETCH_AGAIN, read_object

TOKENIZER, CONFIG = SETTINGS[:2]
OLDER = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
"""Files with the same tokens once more, for programs that read no tokenizer.json: they would be of the old ids."""
Json = dict[str, Any]


def kept_ids(tokenizer: Any, used: Iterable[int], most: int) -> list[int]:
    """The ids to keep, rising: those used, the added tokens, the bytes, what these are merged from, and as many of the
    earliest merges, which are those of the most frequent pairs, as make at most `most` in all.

    Raises:
        UserError: a tokenizer that is not BPE, or more than `most` without any further merge.
    """
    settings = _settings_of(tokenizer)
    vocabulary: dict[str, int] = settings["model"]["vocab"]
    tokens = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    merges = _merges(settings["model"])
    made_of: dict[str, list[str]] = {}
    for first, second in merges:
        made_of.setdefault(first + second, []).extend((first, second))
    known = vocab_of(tokenizer, len(tokens)).tokens or ()
    if outside := sorted({*used} - {*tokens}):
        raise UserError(f"trim: the corpus has id {outside[0]}, which is no token of {_name(tokenizer)}.")
    added = {entry["content"] for entry in settings["added_tokens"] if entry["id"] < len(known)}
    needed = {tokens[id_] for id_ in used} | added | (_bytes(settings) & vocabulary.keys())
    kept = _closed(needed, made_of)
    if len(kept) > most:
        raise UserError(
            f"--ids: {most}, and the corpus with the added tokens, the bytes and what they are merged from has"
            f" {len(kept)} tokens. Give {len(kept)} or more."
        )
    for first, second in merges:
        more = _closed({first + second}, made_of) - kept
        if len(kept) + len(more) > most:
            break
        kept |= more
    own = tokenizer.get_vocab()
    return sorted(own[token] for token in kept)


def save_trimmed(tokenizer: Any, keep: Sequence[int], folder: Path) -> Any:
    """Write the tokenizer with these tokens alone, numbered in their order, and load it again.

    Raises:
        UserError: it does not come back with these tokens.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(keep))
    new_id = {token: number for number, token in enumerate(tokens)}
    save_tokenizer(tokenizer, folder)
    for name in OLDER:
        (folder / name).unlink(missing_ok=True)
    settings = _settings_of(tokenizer)
    model = settings["model"]
    model["vocab"] = {token: new_id[token] for token in model["vocab"] if token in new_id}
    model["merges"] = [pair for pair in _merges(model) if {*pair, pair[0] + pair[1]} <= model["vocab"].keys()]
    settings["added_tokens"] = [
        entry | {"id": new_id[entry["content"]]}
        for entry in settings["added_tokens"]
        if entry["content"] in new_id
    ]
    settings["post_processor"] = _renumbered(settings.get("post_processor"), new_id)
    settings["padding"] = settings["truncation"] = None  # of a call, not of a tokenizer
    _write(folder / TOKENIZER, settings)
    if (folder / CONFIG).exists():
        config = read_object(folder / CONFIG, FETCH_AGAIN)
        if decoder := config.get("added_tokens_decoder"):
            config["added_tokens_decoder"] = {
                str(new_id[entry["content"]]): entry
                for entry in decoder.values()
                if entry["content"] in new_id
            }
        _write(folder / CONFIG, config)
    loaded = load_tokenizer(folder)
    if (found := vocab_of(loaded, len(tokens)).tokens) != tuple(tokens):
        raise UserError(
            f"{_name(tokenizer)}: cannot be trimmed: of {len(tokens)} tokens {len(found or ())} come back. Use the"
            " model with all of its tokens."
        )
    return loaded


def _settings_of(tokenizer: Any) -> Json:
    """Those of tokenizer.json; UserError where it is no BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings: Json = json.loads(backend.to_str()) if backend is not None else {}
    kind = settings.get("model", {}).get("type", type(tokenizer).__name__)
    if kind != "BPE":
        raise UserError(f"{_name(tokenizer)}: its tokenizer is {kind}; only BPE can be trimmed.")
    return settings


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _merges(model: Json) -> list[tuple[str, str]]:
    """In their order; written as pairs, or with a space between in older files."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(first, second) for first, second in pairs]


def _bytes(settings: Json) -> set[str]:
    """What any text can be written with: of a byte-level tokenizer its 256 letters, else <0x00> to <0xFF>."""
    return {*ByteLevel.alphabet()} | {f"<0x{byte:02X}>" for byte in range(256)}


def _closed(tokens: set[str], made_of: Mapping[str, list[str]]) -> set[str]:
    """These tokens, and all that they are merged from."""
    closed, todo = set[str](), [*tokens]
    while todo:
        token = todo.pop()
        if token not in closed:
            closed.add(token)
            todo += made_of.get(token, [])
    return closed


def _renumbered(processor: Any, new_id: Mapping[str, int]) -> Any:
    """A post-processor, whose special tokens are named with their ids: templates, and those of BERT and RoBERTa."""
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


def _write(path: Path, settings: Json) -> None:
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
