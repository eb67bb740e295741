"""How servers are asked for log-probabilities of a given text, and how their answers are read: one class an API.

A text of L ids has L - 1 places: place i is the distribution behind ids[: i + 1], whose next token is ids[i + 1]. An
answer is what a server says of the places from the first one asked for. Nothing here trusts a server: what is missing,
too short or no number is a `BadAnswer`.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

Json = dict[str, Any]
SEED_BITS = 31
NO_LOGP = -9999.0
"""What vLLM writes for the log-probability of an impossible id, since JSON has no infinity."""
NAMED = re.compile(r"token_id:([0-9]+)")
"""How vLLM names an id in the place of its text."""
CANONICAL = re.compile(r"0|[1-9][0-9]{0,17}")
NEUTRAL = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
}
"""Servers take what a request leaves out from the model's `generation_config.json` or their own settings."""


class BadAnswer(Exception):
    """The server answered something else than it was asked for."""


@dataclass(frozen=True)
class Place:
    """One place of a text: what the server says of the next token."""

    logps: dict[int, float]
    """Of the likeliest ids and the next token, in nats."""
    text: str | None
    """The server's own text of the next token; None where it gives none."""


@dataclass(frozen=True)
class Written:
    """How a server is to write: `transformers.GenerationConfig` in the words of an API."""

    max_new: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    ends: Sequence[int]
    past_eos: bool = False
    """Also past the server's own end of a sequence, where that is none of `ends`."""


class Api(Protocol):
    """A way of asking. A new one is a class here and a name in `ServerTeacherConfig.api`."""

    def ask(
        self,
        model: str,
        ids: Sequence[int],
        first: int,
        top_k: int,
        temperature: float,
        with_texts: bool = False,
    ) -> tuple[str, Json]:
        """Path and body of a request for the places from `first` on; with the texts of the ids if they are wanted."""
        ...

    def read(self, answer: Any, ids: Sequence[int], first: int) -> list[Place]:
        """The places from `first` on.

        Raises:
            BadAnswer: it is none, or of another text.
        """
        ...

    def ask_to_write(self, model: str, ids: Sequence[int], how: Written) -> tuple[str, Json]:
        """Path and body of a request for new tokens, which end at one of `how.ends` or after `how.max_new`.

        A server that cannot do otherwise ends at its own end of a sequence, too, where `how.past_eos` is false; where
        it is true, it may go on behind an end.

        Raises:
            BadAnswer: this API has no way to ask for ids.
        """
        ...

    def read_written(self, answer: Any) -> list[int]:
        """The new ids, the end included."""
        ...


class Vllm:
    """vLLM's own fields of `/v1/completions`: `prompt_logprobs`, `return_token_ids`."""

    def ask(
        self,
        model: str,
        ids: Sequence[int],
        first: int,
        top_k: int,
        temperature: float,
        with_texts: bool = False,
    ) -> tuple[str, Json]:
        return "/v1/completions", _one_token(model, ids, temperature) | {"prompt_logprobs": top_k}

    def read(self, answer: Any, ids: Sequence[int], first: int) -> list[Place]:
        found = _field(_choice(answer), "prompt_logprobs", list)
        _require_count(len(found), len(ids), "entries of prompt_logprobs")
        places = []
        for entry, given in zip(found[first + 1 :], ids[first + 1 :], strict=True):
            if not isinstance(entry, dict):
                raise BadAnswer(f"an entry of prompt_logprobs is {_kind(entry)}")
            logps = {_id(key): _logp(_field(one, "logprob", float)) for key, one in entry.items()}
            places.append(Place(logps, _text(entry.get(str(given), {}).get("decoded_token"))))
        return places

    def ask_to_write(self, model: str, ids: Sequence[int], how: Written) -> tuple[str, Json]:
        # `ignore_eos`: the server's own end of sequence may be no end here; those that are, it is told.
        return "/v1/completions", {
            "model": model,
            "prompt": list(ids),
            "max_tokens": how.max_new,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "top_k": how.top_k,
            "seed": how.seed,
            "min_tokens": 0,
            "ignore_eos": True,
            "stop_token_ids": list(how.ends),
            "return_token_ids": True,
            **NEUTRAL,
        }

    def read_written(self, answer: Any) -> list[int]:
        return [_id(each) for each in _field(_choice(answer), "token_ids", list)]


class SGLang:
    """SGLang's `/generate`."""

    def ask(
        self,
        model: str,
        ids: Sequence[int],
        first: int,
        top_k: int,
        temperature: float,
        with_texts: bool = False,
    ) -> tuple[str, Json]:
        return "/generate", {
            "input_ids": list(ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": temperature},
            "return_logprob": True,
            "logprob_start_len": first,
            "top_logprobs_num": top_k,
            "return_text_in_logprobs": with_texts,
        }

    def read(self, answer: Any, ids: Sequence[int], first: int) -> list[Place]:
        about = _field(answer, "meta_info", dict)
        given, likeliest = (
            _field(about, name, list) for name in ("input_token_logprobs", "input_top_logprobs")
        )
        for name, found in (("input_token_logprobs", given), ("input_top_logprobs", likeliest)):
            _require_count(len(found), len(ids) - first, f"entries of {name}")
        places = []
        # The first entry is of the id at `first` itself, which nothing was asked about.
        for one, others, expected in zip(given[1:], likeliest[1:], ids[first + 1 :], strict=True):
            logp, token, text = _triple(one)
            if token != expected:
                raise BadAnswer(f"it is of another text: id {token} where {expected} was sent")
            found = [_triple(each) for each in _optional(others, list)]
            places.append(Place({each_id: p for p, each_id, _ in found} | {token: logp}, text))
        return places

    def ask_to_write(self, model: str, ids: Sequence[int], how: Written) -> tuple[str, Json]:
        return "/generate", {
            "input_ids": list(ids),
            "sampling_params": {
                "max_new_tokens": how.max_new,
                "temperature": how.temperature,
                "top_p": how.top_p,
                "top_k": how.top_k or -1,
                "sampling_seed": how.seed,
                "min_new_tokens": 0,
                # Where it is true, SGLang does not look at `stop_token_ids` either.
                "ignore_eos": how.past_eos,
                "stop_token_ids": list(how.ends),
                **NEUTRAL,
            },
        }

    def read_written(self, answer: Any) -> list[int]:
        return [_id(each) for each in _field(answer, "output_ids", list)]


class OpenAI:
    """`/v1/completions` with `echo` and `logprobs`, as OpenAI's API had it and many servers have it.

    Its tokens are texts. Ids of the same text cannot be told apart, and are left to the bucket. So is every id at a
    place behind a part of a character: vLLM shows a byte that ends it as the whole character, which is the text of
    another id. vLLM names ids as well, where it is asked to.

    Args:
        id_of: the one id of a text; None where several have it, or none.
        fragments: ids whose text ends inside of a character.
    """

    names_ids = False
    """Whether the server is asked for ids in place of texts: others may refuse a field that they do not know."""

    def __init__(self, id_of: dict[str, int | None], fragments: Set[int]) -> None:
        self.id_of, self.fragments = id_of, fragments

    def ask(
        self,
        model: str,
        ids: Sequence[int],
        first: int,
        top_k: int,
        temperature: float,
        with_texts: bool = False,
    ) -> tuple[str, Json]:
        named = {"return_tokens_as_token_ids": not with_texts} if self.names_ids else {}
        return "/v1/completions", _one_token(model, ids, temperature) | named | {
            "echo": True,
            "logprobs": top_k,
        }

    def read(self, answer: Any, ids: Sequence[int], first: int) -> list[Place]:
        found = _field(_choice(answer), "logprobs", dict)
        texts, logps, likeliest = (
            _field(found, name, list) for name in ("tokens", "token_logprobs", "top_logprobs")
        )
        # One more than was sent: the token that had to be written.
        for name, each in (("tokens", texts), ("token_logprobs", logps), ("top_logprobs", likeliest)):
            if len(each) not in (len(ids), len(ids) + 1):
                _require_count(len(each), len(ids), f"entries of {name}")
        places = []
        for i in range(first + 1, len(ids)):
            known = {
                self._named(text, ids[i - 1]): _logp(p) for text, p in _optional(likeliest[i], dict).items()
            }
            known.pop(None, None)
            text = _text(texts[i])
            logps_of = {**known, ids[i]: _logp(logps[i])}
            places.append(Place(logps_of, None if NAMED.fullmatch(text or "") else text))  # type: ignore[arg-type]
        return places

    def _named(self, text: str, before: int) -> int | None:
        """The id that is meant at a place behind the id `before`, if it is known."""
        if named := NAMED.fullmatch(text):
            return _id(named[1])
        return None if before in self.fragments else self.id_of.get(text)

    def ask_to_write(self, model: str, ids: Sequence[int], how: Written) -> tuple[str, Json]:
        raise BadAnswer(
            "OpenAI's completions have no ids of what is written: set teacher.api: vllm or sglang"
        )

    def read_written(self, answer: Any) -> list[int]:
        raise BadAnswer("it has no ids of what is written")


def _one_token(model: str, ids: Sequence[int], temperature: float) -> Json:
    """A completion of a text by the fewest tokens that servers allow."""
    return {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": temperature}


def _choice(answer: Any) -> Json:
    choices = _field(answer, "choices", list)
    _require_count(len(choices), 1, "choices")
    if not isinstance(choices[0], dict):
        raise BadAnswer(f"its choice is {_kind(choices[0])}")
    return choices[0]


def _field(tree: Any, name: str, kind: type) -> Any:
    value = tree.get(name) if isinstance(tree, dict) else None
    if kind is float and type(value) in (int, float):
        return value
    if not isinstance(value, kind):
        raise BadAnswer(f"it has no {name}" if value is None else f"its {name} is {_kind(value)}")
    return value


def _triple(entry: Any) -> tuple[float, int, str | None]:
    """SGLang's [log-probability, id, text]."""
    if not isinstance(entry, list | tuple) or len(entry) < 2:
        raise BadAnswer(f"an entry of its log-probabilities is {_kind(entry)}")
    return _logp(entry[0]), _id(entry[1]), _text(entry[2]) if len(entry) > 2 else None


def _optional(value: Any, kind: type) -> Any:
    """A value that may be null: an empty one then."""
    if value is not None and not isinstance(value, kind):
        raise BadAnswer(f"an entry of its log-probabilities is {_kind(value)}")
    return kind() if value is None else value


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise BadAnswer(f"the text of a token is {_kind(value)}")
    return value


def _id(value: Any) -> int:
    """Of an integer, or of a text as `str` writes it: of "5" and "05" one would overwrite the other."""
    if type(value) is int and value >= 0:
        return value
    if isinstance(value, str) and CANONICAL.fullmatch(value):
        return int(value)
    raise BadAnswer(f"an id is {value!r}")  # whole: a key in it is found before it is shortened


def _logp(value: Any) -> float:
    with contextlib.suppress(OverflowError):
        if type(value) in (int, float) and value < math.inf:  # which NaN is not
            p = float(value)
            return p if p > NO_LOGP else -math.inf
    raise BadAnswer(f"a log-probability is {value!r}")


def _require_count(found: int, expected: int, what: str) -> None:
    if found != expected:
        raise BadAnswer(f"{found} {what}, where {expected} were asked for")


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
