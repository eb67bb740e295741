"""A SentencePiece tokenizer for a GGUF file: pieces with scores, of which llama.cpp joins the best pair first.

A fast tokenizer has merges in an order, and no scores: a piece's score is the place of its first merge. The
rest (spaces in front, special tokens, characters in bytes) is decided by behaviour: llama.cpp's algorithm is
repeated here on many texts, and a tokenizer that splits one of them otherwise is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from gguf import TokenType

SPACE = "\u2581"
WHOLE = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
"""Found in a text before it is split."""


class SentencePiece:
    """llama.cpp's tokenizer of the type `llama`, whose `scores` go into the file."""

    def __init__(
        self, tokens: list[str], types: list[int], merges: Sequence[Sequence[str]], strips: set[int]
    ) -> None:
        """`strips`: ids after which spaces are dropped."""
        places: dict[str, int] = {}
        for place, (left, right) in enumerate(merges):
            places.setdefault(left + right, place)
        self.scores = [-float(places.get(token, len(places))) for token in tokens]
        self.ids = {token: i for i, token in enumerate(tokens) if types[i] != TokenType.UNUSED}
        whole = [i for i, kind in enumerate(types) if kind in WHOLE and tokens[i]]
        self.whole = sorted(((tokens[i], i) for i in whole), key=lambda pair: -len(pair[0]))
        self.strips = strips

    def split(self, text: str, space_in_front: bool) -> list[int]:
        """Without BOS and EOS; `space_in_front`: of the text and of what follows a special token."""
        parts: list[str | int] = [text] if text else []
        for token, i in self.whole:
            if token in text:
                parts = list(itertools.chain.from_iterable(self._cut(part, token, i) for part in parts))
        ids: list[int] = []
        after_special = True
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                front = " " if space_in_front and after_special else ""
                ids += self._join((front + part).replace(" ", SPACE))
            after_special = isinstance(part, int)
        return ids

    def _cut(self, part: str | int, token: str, i: int) -> list[str | int]:
        if isinstance(part, int):
            return [part]
        first, *others = part.split(token)
        found: list[str | int] = [first] if first else []
        for piece in others:
            piece = piece.lstrip(" \t\n\r\v\f") if i in self.strips else piece
            found += [i, piece] if piece else [i]
        return found

    def _join(self, text: str) -> list[int]:
        pieces = list(text)
        while True:
            pairs = [one + two for one, two in itertools.pairwise(pieces)]
            known = [(self.scores[self.ids[pair]], -at) for at, pair in enumerate(pairs) if pair in self.ids]
            if not known:
                break
            at = -max(known)[1]
            pieces[at : at + 2] = [pairs[at]]
        return [i for piece in pieces for i in self._of(piece)]

    def _of(self, piece: str) -> list[int]:
        if piece in self.ids:
            return [self.ids[piece]]
        return [self.ids.get(f"<0x{byte:02X}>", -1) for byte in piece.encode()]


def space_in_front(known: SentencePiece, tokenizer: Any, texts: list[str]) -> bool:
    """Whether the tokenizer puts a space in front.

    Raises:
        ValueError: it splits a text as llama.cpp would not, whether a space is in front or not.
    """
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for front in (False, True):
        other = (text for text, ids in zip(texts, wanted, strict=True) if known.split(text, front) != ids)
        if (text := next(other, None)) is None:
            return front
    raise ValueError(text)
