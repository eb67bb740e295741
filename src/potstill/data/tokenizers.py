"""What ids mean: tokenizers read from a folder or a GGUF file, and two vocabularies compared id by id.

Token-level distillation is only right where both models mean the same token by the same id, so token lists
are compared, not sizes. A model without a tokenizer can only be compared by size. Two lists that differ are
refused, with the first id that does.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import transformers

from potstill.errors import UserError, one_line
from potstill.io.gguf_library import quick_gguf
from potstill.io.safe_open import opened, read_object, require_plain
from potstill.io.silence import quiet_process, quiet_transformers
from potstill.types import Vocab

# Read as JSON first: of two equal keys a library would silently use the last.
SETTINGS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SPARE_IDS = 1024
"""Unused ids that a list may have beyond twice its tokens: more is a damaged id, and would fill the memory.
"""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def has_tokenizer(path: Path) -> bool:
    return path.suffix == ".gguf" or any((path / name).is_file() for name in TOKENIZER_FILES)


def behaviour_sha256(tokenizer: Any) -> str:
    """sha256 of everything a tokenizer does to a text, beyond its list of tokens. Of one written in Python,
    that of the files it saves.
    """
    if hasattr(tokenizer, "backend_tokenizer"):
        settings = str(tokenizer.backend_tokenizer.to_str()) + str(tokenizer.chat_template)
        return hashlib.sha256(settings.encode("utf-8", "surrogatepass")).hexdigest()
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        for file in sorted(Path(folder).iterdir()):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """As a Hugging Face folder, which `load_tokenizer` reads; UserError where it cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exception
        if not (isinstance(error, OSError) or type(error) is Exception):
            raise
        raise UserError(f"{folder}: the tokenizer cannot be written: {one_line(error)} Make room.") from error


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a Hugging Face folder or a GGUF file; code that comes with it is never run.

    Cached as long as its files are unchanged: corpus and teacher mostly share one, and reading one from a
    GGUF file takes seconds and tens of MiB.
    """
    if not has_tokenizer(path):
        raise UserError(
            f"{path}: has no tokenizer. Name a folder with tokenizer.json, a hub id or a GGUF file."
        )
    try:
        files = [path] if path.suffix == ".gguf" else sorted(path.iterdir())
        stats = [os.stat(file) for file in files if file.exists()]
        return _read(path, tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats))
    except BaseException as error:  # the tokenizers library raises bare Exception, and panics
        if not _is_library_error(error):
            raise
        what = str(error).removeprefix(f"{path}{os.sep}") if isinstance(error, UserError) else one_line(error)
        raise UserError(f"{path}: its tokenizer cannot be read: {what}") from error


@lru_cache(maxsize=2)
def _read(path: Path, files: tuple[tuple[int, int, int], ...]) -> Any:
    """`files` has their inodes, sizes and times: the part of the cache key that changes with them."""
    settings = _settings(path)
    with quiet_transformers(), quiet_process(), quick_gguf():
        if path.suffix == ".gguf":
            return transformers.AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, trust_remote_code=False
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    _require_added(tokenizer, settings.get("tokenizer.json", {}).get("added_tokens") or [])
    _require_end(tokenizer, settings)
    return tokenizer


def _settings(path: Path) -> dict[str, Any]:
    if path.suffix == ".gguf":
        with opened(path, "a GGUF file", "Fetch it again."):
            return {}
    require_plain(path, "Remove it.")
    there = [name for name in SETTINGS if os.path.lexists(path / name)]
    return {name: read_object(path / name, "Fetch it again.") for name in there}


def _require_added(tokenizer: Any, added: list[Any]) -> None:
    """The library silently renumbers an added token whose id is taken or out of order."""
    known = tokenizer.get_vocab()
    for entry in added:
        if known.get(entry["content"]) != entry["id"]:
            loaded = known.get(entry["content"])
            raise UserError(
                f"tokenizer.json: the added token {entry['content']!r:.60} has id {entry['id']}, and {loaded}"
                " once it is loaded: that id is another token's or out of order. Fetch it again."
            )


def _require_end(tokenizer: Any, settings: dict[str, Any]) -> None:
    """The library gives an EOS that is not in the list a new id, which no model has learned."""
    listed = settings.get("tokenizer.json", {})
    decoder = settings.get("tokenizer_config.json", {}).get("added_tokens_decoder") or {}
    added = [entry["content"] for entry in (*(listed.get("added_tokens") or []), *decoder.values())]
    vocab = listed.get("model", {}).get("vocab", ())
    pieces = vocab if isinstance(vocab, dict) else [piece[0] for piece in vocab]  # of Unigram: [piece, score]
    end, known = tokenizer.eos_token, (added, pieces, settings.get("added_tokens.json", {}))
    if listed and end is not None and not any(end in tokens for tokens in known):
        raise UserError(
            f"tokenizer_config.json: eos_token is {end!r:.60}, which is none of its tokens. Set it to the one that"
            " ends a text."
        )


def encode(where: str, contents: list[str], tokenizer: Any) -> list[list[int]]:
    """The ids of each text, without special tokens added; `where` names the first text, for errors."""
    try:
        with quiet_transformers(), quiet_process():
            encoded = tokenizer(contents, add_special_tokens=False, split_special_tokens=True)
    except BaseException as error:
        if not _is_library_error(error):
            raise
        more = f" or a document of the {len(contents) - 1} after it" if len(contents) > 1 else ""
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer fails on {where}{more}: {one_line(error)}"
            " Set corpus.tokenizer to one that works."
        ) from error
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def bos_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself: the BOS of Llama, Gemma and Mistral, mostly nothing."""
    plain = encode("a text", ["a"], tokenizer)[0]
    try:
        with quiet_process():
            whole: list[int] = tokenizer("a")["input_ids"]
    except BaseException as error:
        if not _is_library_error(error):
            raise
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer cannot be read: what it puts before a text fails:"
            f" {one_line(error)} Set corpus.tokenizer to one that works."
        ) from error
    for before in range(len(whole) - len(plain) + 1):
        if whole[before : before + len(plain)] == plain:
            return whole[:before]
    return []


def _is_library_error(error: BaseException) -> bool:
    """Whether a library failed: a panic of tokenizers, too, which is a BaseException."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def vocab_of(tokenizer: Any, size: int) -> Vocab:
    """The tokenizer's list, '' for unused ids; `size` is the width of the model's logits.

    A GGUF file lists the padding at a vocabulary's end, as [PAD151665]; here these are no tokens.
    """
    known, name = tokenizer.get_vocab(), getattr(tokenizer, "name_or_path", "tokenizer")
    last = max(known, key=known.__getitem__, default="")
    if known and known[last] >= 2 * max(len(known), size) + SPARE_IDS:
        raise UserError(
            f"{name}: its tokenizer gives {last!r:.60} the id {known[last]}, in a list of"
            f" {len(known)} tokens. Use the tokenizer that came with the model."
        )
    tokens = [""] * (max(known.values(), default=-1) + 1)
    for token, i in known.items():
        if tokens[i]:
            both = " and ".join(sorted(f"{each!r:.60}" for each in (tokens[i], token)))
            raise UserError(
                f"{name}: its tokenizer gives {both} the same id {i}."
                " Use the tokenizer that came with the model."
            )
        tokens[i] = token
    while tokens and tokens[-1] in ("", f"[PAD{len(tokens) - 1}]"):
        tokens.pop()
    template = tokenizer.chat_template
    return Vocab(
        size=size,
        tokens=tuple(tokens),
        eos_id=tokenizer.eos_token_id,
        bos_id=tokenizer.bos_token_id,
        pad_id=tokenizer.pad_token_id,
        chat_template=template if isinstance(template, str) or template is None else str(template),
        added=frozenset(i for i in tokenizer.added_tokens_decoder if i < len(tokens)),
    )


def require_same(one: Vocab, other: Vocab, one_name: str, other_name: str) -> int:
    """The number of ids that two vocabularies share: those with a meaning, when both have the same list.

    Logits may be wider than the list on either side (Qwen2.5 has 151,936 or 152,064 for 151,665 tokens).

    Raises: UserError: the lists differ; or a model has no logits for one of the tokens; or sizes differ and
    there is no list that shows which ids are padding.
    """
    if one.tokens is not None and other.tokens is not None:
        for i, pair in enumerate(zip_longest(one.tokens, other.tokens)):
            if pair[0] != pair[1]:
                first, second = ("no such id" if token is None else repr(token) for token in pair)
                raise UserError(
                    f"{one_name} and {other_name} use different tokenizers: id {i} is {first} in"
                    f" the one and {second} in the other. Token-level distillation needs one vocabulary:"
                    " use a student of the teacher's family."
                )
    tokens = one.tokens if one.tokens is not None else other.tokens
    if one.size == other.size:
        return min(one.known, other.known)
    wider, narrower = sorted((one.size, other.size), reverse=True)
    if tokens is None or (one.tokens is None) != (other.tokens is None):
        raise UserError(
            f"{one_name} has logits for {one.size} ids and {other_name} for {other.size}, and not both have"
            " a tokenizer, which would show which ids are padding. Give each its tokenizer's files, or use a"
            " student with as many ids as its teacher."
        )
    if narrower < len(tokens):
        name = one_name if one.size == narrower else other_name
        raise UserError(
            f"{name} has logits for {narrower} of the {len(tokens)} tokens, the other side for {wider} ids;"
            f" the first without is id {narrower}, {tokens[narrower]!r}. Token-level distillation needs one"
            " vocabulary: use a student with logits for all of it."
        )
    return len(tokens)


def not_compared(missing: dict[str, str]) -> list[str]:
    """Warnings that token lists were not compared, for each model without one and the recipe line that adds
    it.
    """
    return [
        f"token lists not compared: the {who} has none, only its size is known; if its ids mean other tokens,"
        f" training yields nonsense while the loss falls; {line} settles it."
        for who, line in missing.items()
    ]


def special_differences(teacher: Vocab, other: Vocab, settled: str, other_name: str = "student") -> list[str]:
    """What differs beside the token list, with its effect and the recipe line `settled` that decides it."""

    def named(vocab: Vocab, i: int | None) -> str:
        if i is None:
            return "none"
        return f"id {i} ({vocab.tokens[i]!r})" if vocab.tokens and i < len(vocab.tokens) else f"id {i}"

    differences = []
    for name, effect in (
        (
            "eos_id",
            "documents end with the corpus's, and the student may not stop where its base did",
        ),
        ("bos_id", "prompts start differently"),
        ("pad_id", "batches of prompts are padded differently"),
    ):
        teacher_id, other_id = getattr(teacher, name), getattr(other, name)
        if teacher_id != other_id:
            token = name.removesuffix("_id").upper()
            differences.append(
                f"{token} token: the teacher has {named(teacher, teacher_id)}, the {other_name}"
                f" {named(other, other_id)}: {effect}"
            )
    if teacher.chat_template != other.chat_template:
        differences.append(
            f"chat templates of teacher and {other_name} differ: conversations are written with the corpus's"
        )
    if differing := sorted(teacher.added ^ other.added):
        has, has_not = "teacher", other_name
        if differing[0] in other.added:
            has, has_not = has_not, has
        differences.append(
            f"{len(differing)} tokens are added ones on one side only, first {named(teacher, differing[0])}:"
            f" the {has}'s tokenizer takes it whole and the {has_not}'s in pieces"
        )
    return [f"{what}; {settled}." for what in differences]
