"""A teacher on a server: texts go out as token ids, and the log-probabilities of the likeliest ids come back.

All other ids are one class, the bucket, so that every divergence is a true one of k + 1 classes, and a lower bound of
the full one. Before the first text that counts the server has to show that it is the model that the recipe names: its
tokens, id by id, and its log-probabilities of eight fixed texts, which are compared again after every outage.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from potstill.data.tokenizers import load_tokenizer, vocab_of
from potstill.errors import UserError
from potstill.io.http_client import HttpClient
from potstill.losses.targets import SparseTargets
from potstill.models.decoding import Decode, Row
from potstill.models.hub import tokenizer_files
from potstill.recipe.sections_models import ServerTeacherConfig
from potstill.store.layout import MEANS, SAME_NATS, texts_gap
from potstill.teachers.base import BaseTeacher, Part, TeacherChanged, TeacherSource
from potstill.teachers.server_apis import SEED_BITS, Api, BadAnswer, OpenAI, Place, SGLang, Vllm, Written
from potstill.teachers.toy import require_ids, require_last
from potstill.types import Batch, Vocab

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody in the village was surprised to see it.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total\n",
    "Water boils at 100 degrees Celsius at sea level; on a mountain of 3000 metres it boils at about 90.",
    "Le petit chat dort sur le canapé pendant que la pluie tombe sur les toits de Paris.",
    "SELECT name, COUNT(*) FROM orders WHERE year = 2024 GROUP BY name ORDER BY 2 DESC;",
    "天气很好，我们去公园散步吧。",
    "1 + 1 = 2, 2 + 2 = 4, 3 + 3 = 6, 4 + 4 = 8, 5 + 5 =",
    '{"id": 17, "tags": ["red", "green"], "price": 4.99, "in_stock": true}',
)
"""What a model is known by: its mean log-probability of each."""
TEXT_TOKENS = 48
TEMPERED_NATS = 0.05
OTHER_TEMPERATURE = 0.5
PROBED_IDS = 2048
"""Ids of the vocabulary whose texts are compared with the server's, beside every added one."""
PROBE_TOKENS = 256
LOST_MASS = 0.01
"""Probability that may be lost on ids whose text is not theirs alone, where a server tells texts and not ids."""
ROUNDING, LEAST = 1e-2, -100.0
UNSEEN = "\N{REPLACEMENT CHARACTER}"
SPARE = 2
"""Ids of a row's text beyond the row: the label of its last position, and the token that a server has to write."""


@dataclass(frozen=True)
class _Text:
    """The ids of one document of a batch, and which of the batch's N positions lie in it."""

    ids: list[int]
    places: list[int]
    """Ascending; place i is the distribution behind ids[: i + 1]."""
    at: list[int]
    """Index into the batch's N positions of each place."""


class ServerTeacher(BaseTeacher):
    """A model behind HTTP. Open one with `open`, which requires that it is the one that the recipe names."""

    label = "server"
    reads_on_cpu = True
    is_elsewhere = True

    def __init__(
        self, config: ServerTeacherConfig, client: HttpClient, tokenizer: Any, device: torch.device
    ) -> None:
        self.config, self.client, self.tokenizer, self.device = config, client, tokenizer, device
        self.vocab = _vocab(tokenizer)
        self.ids = self.vocab.size
        self.ids_known = config.top_k
        self.api = _api(config, tokenizer, self.vocab)
        self.place = f"teacher {config.label}"
        self.means: list[float] = []
        """Log-probability of each of TEXTS, in nats a token."""

    @classmethod
    def open(
        cls, config: ServerTeacherConfig, tokenizer: Any, device: torch.device | str = "cpu"
    ) -> ServerTeacher:
        """Connect to the server.

        Raises:
            UserError: it does not answer, has no such model, another tokenizer, or no log-probabilities at
                temperature 1 of the text that it is sent.
        """
        client = HttpClient(
            config.url, config.api_key_variable, config.timeout_s, config.deadline_s, config.requests
        )
        try:
            teacher = cls(config, client, tokenizer, torch.device(device))
            teacher._prove()
        except BaseException:
            client.close()
            raise
        client.note = lambda line: teacher.note(line)
        client.on_return, client.is_proven = teacher._require_still_itself, True
        return teacher

    def targets(self, batch: Batch) -> SparseTargets:
        """The k likeliest ids of each position, and the next token of the text.

        Raises:
            UserError: the server is gone, is another one now, or answers something else than it was asked.
        """
        texts = list(_texts(batch))
        answers = self.client.map(lambda text: self._ask(text.ids, text.places, self.config.top_k), texts)
        found: list[dict[int, float]] = [{}] * len(batch.positions_N)
        for text, places in zip(texts, answers, strict=True):
            for n, place in zip(text.at, places, strict=True):
                found[n] = place.logps
        return _sparse(found, self.ids).to(self.device)

    def logits_for_batch(self, input_ids_BT: Tensor) -> Tensor:
        """logits_BV with the log-probabilities that the server gives, and -inf for every other id."""
        ids_BT = require_ids(self.label, input_ids_BT)
        require_last(self.label, ids_BT)
        rows = [[*row, row[-1]] for row in ids_BT.tolist()]
        answers = self.client.map(lambda ids: self._ask(ids, [len(ids) - 2], self.config.top_k), rows)
        logits_BV = torch.full((len(rows), self.vocab_size), -math.inf)
        for logits_V, (place,) in zip(logits_BV, answers, strict=True):
            known = {each: p for each, p in place.logps.items() if each < self.vocab_size}
            logits_V[list(known)] = torch.tensor(list(known.values()))
        return logits_BV

    def decoder(self, ids: int) -> Decode:
        return partial(self._write, ids)

    def share_ids(self, ids: int) -> int:
        """Ids from `ids` on belong to the bucket."""
        self.ids = ids
        return ids

    def require_fits(self, corpus: Mapping[str, Any], objective: Any, ids: int, rows: Iterable[int]) -> None:
        if objective.temperature != 1:
            raise UserError(
                f"objective.temperature: is {objective.temperature}, and {self.place} has too few ids of each"
                " distribution to soften it. Set it to 1, or use a teacher in this process."
            )

    def describe(self) -> dict[str, Any]:
        config = self.config
        return {
            "source": config.model,
            "url": config.url,
            "api": config.api,
            "top_k": config.top_k,
            "held_out": f"lower bounds: over {config.top_k} ids a position and one class for all others",
        }

    def fingerprint(self, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
        """Its name, top_k and list of tokens by hash, and its log-probabilities of fixed texts."""
        about = f"{self.config.model} {self.config.top_k} {self.vocab.fingerprint}"
        # Asked anew, also at the end of a run: a server that was exchanged between two requests shows here.
        found = self._means()
        means = _written_out(found)
        before = (recorded or {}).get(MEANS, "")
        if before and texts_gap(means, before) < SAME_NATS:
            means = before
        return {"teacher": hashlib.sha256(about.encode()).hexdigest(), MEANS: means}

    def require_unchanged(self) -> None:
        """TeacherChanged: the fixed texts have other log-probabilities than at the beginning."""
        self._require_still_itself()

    def activity(self) -> str:
        return f"{self.client.answered} requests answered, {self.client.in_flight} in flight"

    def close(self) -> None:
        self.client.close()

    def _ask(
        self,
        ids: Sequence[int],
        places: Sequence[int],
        top_k: int,
        temperature: float = 1.0,
        with_texts: bool = False,
    ) -> list[Place]:
        """What the server says of these places of a text."""
        first = places[0]
        path, body = self.api.ask(self.config.model, ids, first, top_k, temperature, with_texts)
        answer = self.client.post(path, body)
        try:
            read = self.api.read(answer, ids, first)
            found = [read[place - first] for place in places]
            least = min(top_k, self.vocab.known)
            return [
                _distribution(place, ids[asked + 1], least, self.api)
                for place, asked in zip(found, places, strict=True)
            ]
        except (BadAnswer, IndexError) as error:
            self._refuse_answer(error)

    def _write(
        self,
        ids: int,
        settings: GenerationConfig,
        rows: Sequence[Row],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """As `models.decoding.decode`, of the first `ids` ids; what is drawn follows from the server's own numbers."""
        live = [row for row in rows if not row.finish]
        for row, new in zip(live, self.client.map(partial(self._written, ids, settings), live), strict=True):
            beat()
            for token in new:
                row.add(token)
                if row.finish:
                    break
            if not row.finish:
                self._refuse_answer(
                    BadAnswer(f"{len(new)} new tokens without an end, of {row.max_new} asked for")
                )

    def _written(self, ids: int, settings: GenerationConfig, row: Row) -> list[int]:
        how = Written(
            max_new=row.max_new,
            temperature=float(settings.temperature) if settings.do_sample else 0.0,
            top_p=float(settings.top_p) if settings.do_sample else 1.0,
            top_k=int(settings.top_k or 0) if settings.do_sample else 0,
            seed=int(row.uniforms[0] * 2**SEED_BITS) if row.uniforms else 0,
            ends=list(settings.eos_token_id or ()),
            past_eos=not settings.eos_token_id,
        )
        new = self._more(ids, row.prompt_ids, how)
        if len(new) < how.max_new and not {*new[-1:]} & {*how.ends}:
            # It ended at an end of its own, which is none here.
            rest = replace(how, max_new=how.max_new - len(new), past_eos=True)
            new += self._more(ids, [*row.prompt_ids, *new], rest)
        return new

    def _more(self, ids: int, text: Sequence[int], how: Written) -> list[int]:
        try:
            path, body = self.api.ask_to_write(self.config.model, text, how)
            new = self.api.read_written(self.client.post(path, body))
            for token in new:
                if not 0 <= token < ids:
                    raise BadAnswer(f"it wrote id {token}, which is none of the {ids} of teacher.tokenizer")
            return new
        except BadAnswer as error:
            self._refuse_answer(error)

    def _prove(self) -> None:
        """Require that the server is what the recipe says."""
        listed = self._listed()
        longest = listed.get("max_model_len")
        self.max_length = longest - SPARE if type(longest) is int and longest > SPARE else None
        if isinstance(self.api, OpenAI):
            self.api.names_ids = listed.get("owned_by") == "vllm"
        self._require_tokens()
        self._require_temperature()
        ids = self._ids_of(TEXTS[0])
        self._ask(ids, range(len(ids) - 1), self.config.top_k)  # a server may give fewer ids at most
        self.means = self._means()
        if self.config.api == "openai":
            self._require_told_apart()

    def _listed(self) -> dict[str, Any]:
        """What the server lists of the model; UserError where it has no such."""
        listed = self.client.get("/v1/models")
        models = listed.get("data") if isinstance(listed, dict) else None
        entries = models if isinstance(models, list) else []
        named = {str(each.get("id")): each for each in entries if isinstance(each, dict)}
        if self.config.model not in named:
            names = ", ".join(sorted(named)) or "none"
            raise UserError(
                f"teacher.model: {self.config.url} has no {self.config.model}; it has {self.client.clean(names)}."
                " Name one of these."
            )
        return named[self.config.model]

    def _require_tokens(self) -> None:
        """The server's text of an id must be ours: of every added id, and of others all over the list."""
        known = self.vocab.known
        spread = range(0, known, max(1, known // PROBED_IDS))
        ids = sorted({*spread, *(each for each in self.vocab.added if each < known)})
        length = min(PROBE_TOKENS, self.max_length or PROBE_TOKENS) - 1
        parts = [[ids[0], *ids[at : at + length]] for at in range(0, len(ids), length)]
        asked = self.client.map(lambda part: self._ask(part, range(len(part) - 1), 1, with_texts=True), parts)
        compared = 0
        for part, places in zip(parts, asked, strict=True):
            for token, place in zip(part[1:], places, strict=True):
                compared += self._require_same_text(token, place.text)
        if not compared:
            raise UserError(
                f"{self.place}: gives no text of any id, so that its tokens cannot be compared with those of"
                f" {self.config.tokenizer}. Start the server with its tokenizer."
            )

    def _require_same_text(self, token: int, theirs: str | None) -> bool:
        """Whether a text could be compared."""
        # Spaces are left out: libraries differ in how they show one that begins a text.
        ours = "".join(_decoded(self.tokenizer, token).split())
        if theirs is None or UNSEEN in ours + theirs or not ours:
            return False
        if "".join(theirs.split()) not in (
            ours,
            "".join(str(self.tokenizer.convert_ids_to_tokens(token)).split()),
        ):
            raise UserError(
                f"teacher.tokenizer: id {token} is {ours!r:.40} in {self.config.tokenizer} and"
                f" {self.client.clean(theirs)!r:.40} on {self.config.url}. Name the tokenizer of the model that is"
                " served."
            )
        return True

    def _require_temperature(self) -> None:
        """Log-probabilities must not depend on the temperature of a request: what they are of would be unknown."""
        ids = self._ids_of(TEXTS[0])
        one, other = (
            self._ask(ids, range(len(ids) - 1), 1, temperature) for temperature in (1.0, OTHER_TEMPERATURE)
        )
        pairs = zip(_given(one, ids), _given(other, ids), strict=True)
        gap = sum(abs(a - b) for a, b in pairs) / len(one)
        if not gap < TEMPERED_NATS:
            raise UserError(
                f"{self.place}: its log-probabilities move by {gap:.2g} nats with the temperature of a request. Start"
                " the server so that it gives those of the model itself (vLLM: --logprobs-mode raw_logprobs)."
            )

    def _means(self) -> list[float]:
        means = []
        for ids in map(self._ids_of, TEXTS):
            given = _given(self._ask(ids, range(len(ids) - 1), 1), ids)
            means.append(sum(given) / len(given))
        return means

    def _require_still_itself(self) -> None:
        """After an outage: the server may have been started with another model."""
        gap = texts_gap(_written_out(self._means()), _written_out(self.means))
        if not gap < SAME_NATS:
            raise TeacherChanged(
                f"{self.place}: is another model than before: its log-probabilities of fixed texts have moved by"
                f" {gap:.3g} nats. Start the one that this began with, and go on (a run by --resume)."
            )

    def _require_told_apart(self) -> None:
        """Where tokens are texts, the k likeliest must nearly all be known by theirs, in other scripts, too."""
        texts = [self._ids_of(text) for text in TEXTS]
        lost = sum(self.client.map(self._lost, texts)) / sum(len(ids) - 1 for ids in texts)
        if lost > LOST_MASS:
            raise UserError(
                f"{self.place}: names tokens by their texts, and {lost:.1%} of the probability is of texts that several"
                " ids have or that end inside of a character. Use a server of teacher.api vllm or sglang, which names"
                " ids."
            )

    def _lost(self, ids: Sequence[int]) -> float:
        """Probability that the server gives to texts that are no id's alone, summed over the places."""
        path, body = self.api.ask(self.config.model, ids, 0, self.config.top_k, 1.0)
        answer = self.client.post(path, body)
        try:
            places = self.api.read(answer, ids, 0)
            told = answer["choices"][0]["logprobs"]["top_logprobs"][1 : len(ids)]
            of_texts = sum(math.exp(p) for place in told for p in (place or {}).values())
            return of_texts - sum(math.exp(p) for place in places for p in place.logps.values())
        except (BadAnswer, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            self._refuse_answer(error)

    def _ids_of(self, text: str) -> list[int]:
        # A tokenizer may have no id for a script.
        encoded: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] or [0]
        return (encoded * 2)[: max(min(TEXT_TOKENS, len(encoded)), 2)]

    def _refuse_answer(self, error: Exception) -> NoReturn:
        what = self.client.clean(str(error)) or "it is too short"
        raise UserError(
            f"{self.place}: its answer is not what was asked for: {what}. See teacher.api, and the server's own log."
        ) from None


def _texts(batch: Batch) -> Iterator[_Text]:
    """Each document of a batch that has positions, up to the label of its last one."""
    T = batch.input_ids_BT.shape[1]
    positions, labels = batch.positions_N.tolist(), batch.labels_N.tolist()
    starts_BT = batch.position_ids_BT == 0
    number_BT = starts_BT.long().cumsum(1)
    ids, number, starts = batch.input_ids_BT.tolist(), number_BT.tolist(), {}
    for b, t in starts_BT.nonzero().tolist():
        starts[b, number[b][t]] = t
    members: dict[tuple[int, int], list[int]] = {}
    for n, position in enumerate(positions):
        b, t = divmod(position, T)
        members.setdefault((b, number[b][t]), []).append(n)
    for (b, document), at in members.items():
        start = starts[b, document]
        places = [positions[n] % T - start for n in at]
        yield _Text([*ids[b][start : start + places[-1] + 1], labels[at[-1]]], places, at)


def _sparse(found: Sequence[Mapping[int, float]], ids: int) -> SparseTargets:
    """Targets of N positions out of the log-probabilities of ids; those from `ids` on go to the bucket."""
    known = [{each: p for each, p in place.items() if each < ids and p > -math.inf} for place in found]
    if not known:
        return SparseTargets(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1), 1.0, has_bucket=True)
    ids_NK = pad_sequence([torch.tensor([*each], dtype=torch.int64) for each in known], True, -1)
    logp_NK = pad_sequence([torch.tensor([*each.values()]) for each in known], True, -math.inf)
    return SparseTargets(ids_NK, logp_NK, 1.0, has_bucket=True)


def _distribution(place: Place, given: int, least: int, api: Api) -> Place:
    """A place whose probabilities sum to 1 at most; BadAnswer where they are none, or of fewer ids than asked for."""
    if given not in place.logps:
        raise BadAnswer(f"it has no log-probability of id {given}, which was sent")
    # Of texts that several ids have none is kept.
    if len(place.logps) < least and not isinstance(api, OpenAI):
        raise BadAnswer(f"{len(place.logps)} ids at a place, where {least} were asked for")
    total = sum(math.exp(min(p, 10.0)) for p in place.logps.values())
    if max(place.logps.values()) > ROUNDING or total > 1 + ROUNDING:
        raise BadAnswer(f"the probabilities of a place sum to {total:.4g}")
    if total <= 1:
        return place
    # A server's rounding: a divergence to more than a distribution may be negative.
    return Place({each: p - math.log(total) for each, p in place.logps.items()}, place.text)


def _given(places: Sequence[Place], ids: Sequence[int]) -> list[float]:
    """Log-probabilities of the ids themselves, from below where a model finds one impossible."""
    return [max(place.logps[token], LEAST) for place, token in zip(places, ids[1:], strict=True)]


def _written_out(means: Sequence[float]) -> str:
    """As fingerprints and stores have them."""
    return " ".join(f"{mean:.4f}" for mean in means)


def _vocab(tokenizer: Any) -> Vocab:
    """As wide as its list of tokens: nobody here knows the model's logits."""
    known = vocab_of(tokenizer, 0)
    return replace(known, size=len(known.tokens or ()))


def _decoded(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _api(config: ServerTeacherConfig, tokenizer: Any, vocab: Vocab) -> Api:
    if config.api == "vllm":
        return Vllm()
    if config.api == "sglang":
        return SGLang()
    # Of no text: what vLLM shows of a part of a character.
    id_of: dict[str, int | None] = {"": None}
    fragments = set()
    for token in range(vocab.known):
        text = _decoded(tokenizer, token)
        id_of[text] = None if text in id_of or UNSEEN in text else token
        if text.endswith(UNSEEN):
            fragments.add(token)
    return OpenAI(id_of, fragments)


class ServerSource(TeacherSource):
    """`teacher.name: server`: its tokenizer, and the server once it is asked."""

    config: ServerTeacherConfig
    captures = ("topk",)

    @cached_property
    def folder(self) -> Path:
        return tokenizer_files(self.config.tokenizer)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    @property
    def vocab_size(self) -> int:
        return _vocab(self.tokenizer).size

    @property
    def tokenizers(self) -> list[Path]:
        return [self.folder]

    @property
    def inputs(self) -> dict[str, Path]:
        return {"teacher": self.folder}

    def load(self, tokens_per_row: int) -> ServerTeacher:
        return ServerTeacher.open(self.config, self.tokenizer, self.device)

    def plan_key(self) -> Any:
        return self.config.top_k, self.vocab_size

    def double(self, part: Part) -> ServerDouble:
        return ServerDouble(self.vocab_size, self.config.top_k, self.device, part)


class ServerDouble(BaseTeacher):
    """The stand-in of a served teacher, for a plan: targets of the largest possible size."""

    def __init__(self, vocab_size: int, top_k: int, device: torch.device, part: Part) -> None:
        self.vocab, self.top_k, self.device, self.part = Vocab(size=vocab_size), top_k, device, part

    def targets(self, batch: Batch) -> SparseTargets:
        with self.part("teacher"):
            ids_NK = torch.zeros(
                len(batch.positions_N), self.top_k + 1, dtype=torch.int64, device=self.device
            )
            return SparseTargets(ids_NK, ids_NK.float(), 1.0, has_bucket=True)
