"""A teacher that was asked before: its targets are read from a store, and the loop does not notice.

It answers for the rows of the store's corpus and for nothing else. Held-out rows are kept as hidden states,
so that what is measured on them is exact whatever kind the training rows are kept as. Refused is whatever
does not fit the store, with the field that differs and both values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.data.tokenizers import load_tokenizer, vocab_of
from potstill.errors import UserError
from potstill.losses.targets import HiddenTargets, SparseTargets
from potstill.models.causal_lm import CausalLM
from potstill.models.load import local_copy
from potstill.models.source import ModelFiles
from potstill.recipe.sections_models import StoreTeacherConfig
from potstill.store.codecs import Hidden
from potstill.store.layout import HELDOUT_CODEC
from potstill.store.reader import ROWS_ADVICE, Store, read_manifest
from potstill.teachers.base import BaseTeacher, Part, TeacherSource
from potstill.teachers.hf import TorchTeacher
from potstill.types import Batch, Head, Targets, Vocab

OF_CORPUS = ("tokenizer_sha256", "vocab_size", "tokens_per_row", "heldout_rows", "documents", "tokens")
"""What of a corpus is compared by name before its fingerprint, which says only that something differs."""


class StoredTeacher(BaseTeacher):
    """Make one with `open`. Reads a row's targets when the row is asked for; nothing is kept in memory."""

    label = "store"
    reads_new_text = False
    reads_on_cpu = (
        True  # the positions decide which bytes are read: a batch on a device would have to be waited for
    )

    def __init__(self, store: Store, device: torch.device | str = "cpu", model: str | None = None) -> None:
        self.store = store
        self.device = torch.device(device)
        self.named_model = model
        """What the recipe says that was captured; None: nothing."""
        folder = store.tokenizer_folder
        self.tokenizer = None if folder is None else load_tokenizer(folder)
        self.vocab = Vocab(size=self.vocab_size) if self.tokenizer is None else self._vocab()
        self.head = _on(store.head, device)

    @classmethod
    def open(
        cls, path: str | Path, device: torch.device | str = "cpu", model: str | None = None
    ) -> StoredTeacher:
        """Raises UserError for a folder that is no whole store."""
        return cls(Store(Path(path)), device, model)

    @property
    def vocab_size(self) -> int:
        """Width of the teacher's logits, a padded end included."""
        return int(self.store.manifest["vocabulary"]["size"])

    def logits_for_batch(self, input_ids_BT: Tensor) -> Tensor:
        self._refuse_ids()

    def logits_per_position(self, input_ids_BT: Tensor) -> Tensor:
        self._refuse_ids()

    def targets(self, batch: Batch) -> Targets:
        """Those of the batch's positions, which may be some of a row's.

        Raises:
            UserError: a row or a position that the store has no targets for, or a damaged block.
        """
        T, rows = batch.input_ids_BT.shape[1], batch.rows_B.tolist()
        found = []
        positions_N = batch.positions_N.cpu()
        for number, row in enumerate(rows):
            asked_P = positions_N[(positions_N >= number * T) & (positions_N < (number + 1) * T)] - number * T
            found.append(self._row(row, asked_P))
        return joined(found, self.head.weight_VD.device)

    def share_ids(self, ids: int) -> int:
        return ids  # which those of the store must be: see `require_fits`

    def require_fits(self, corpus: Mapping[str, Any], objective: Any, ids: int, rows: Iterable[int]) -> None:
        """Refuse what the targets were not made for."""
        kept, theirs = self.store.manifest, self.store.manifest["corpus"]
        for name in (*OF_CORPUS, "fingerprint"):
            if corpus[name] != theirs[name]:
                self._refuse(f"corpus: {name} was {_short(theirs[name])}, is {_short(corpus[name])}.")
        if ids != kept["vocabulary"]["ids"]:
            self._refuse(f"vocabulary: {kept['vocabulary']['ids']} shared ids then, {ids} with this student.")
        if kept["rows"] < theirs["train_rows"] and (missing := self.store.missing(rows)):
            self._refuse(
                f"rows: {len(missing)} of this run's are not in it, one is {missing[0]}.", ROWS_ADVICE
            )
        if isinstance(self.store.codec, Hidden):
            return
        name = kept["kind"]["name"]
        if objective.temperature != kept["temperature"]:
            self._refuse(
                f"temperature: {name} targets at {kept['temperature']}, objective.temperature is"
                f" {objective.temperature}.",
                f"Set it to {kept['temperature']}, or capture again; a store of kind hidden serves all.",
            )
        if name == "sampled" and objective.divergence.name != "forward_kl":
            self._refuse(
                f"divergence: {objective.divergence.name}, and sampled targets are unbiased for forward_kl"
                " alone.",
                "Set objective.divergence: forward_kl, or capture with kind hidden.",
            )

    def require_teacher(self, source: str, weights_sha256: str) -> None:
        """Refuse a model that the targets are not of."""
        theirs = self.store.manifest["teacher"]
        if weights_sha256 != theirs["weights_sha256"]:
            self._refuse(
                f"teacher: captured from {theirs['source']} with weights {_short(theirs['weights_sha256'])},"
                f" {source} has {_short(weights_sha256)}.",
                "Name the model that was captured in teacher.model, or capture this one.",
            )

    def confirm(self) -> None:
        if self.named_model is not None:  # a receipt repeats what the recipe names, so it must be true
            self.to_cut_from()

    def to_cut_from(self) -> tuple[CausalLM, str]:
        """The model that was captured, loaded and compared by its hash."""
        recorded = self.store.manifest["teacher"]
        source = captured_source(self.named_model, recorded)
        options = {"device": self.device, "dtype": recorded["dtype"]}
        bits = {name: recorded[name] for name in ("weights", "backend") if name in recorded}
        model = TorchTeacher.for_inference(source, **options, **bits)
        self.require_teacher(source, model.weights_sha256())
        if bits:
            del model  # before the full one is there
            model = TorchTeacher.for_inference(source, **options)
        return model.model, source

    def describe(self) -> dict[str, Any]:
        manifest = self.store.manifest
        names = ("kind", "temperature", "bytes_per_position", "certificate")
        return {
            "source": captured_source(self.named_model, manifest["teacher"]),
            "weights_sha256": self.weights_sha256(),
            "store": {name: manifest[name] for name in names},
        }

    def fingerprint(self) -> dict[str, str]:
        return {"teacher": str(self.store.manifest["seal"])}

    def weights_sha256(self) -> str:
        return str(self.store.manifest["teacher"]["weights_sha256"])

    def _vocab(self) -> Vocab:
        return vocab_of(self.tokenizer, self.vocab_size)

    def _row(self, row: int, asked_P: Tensor) -> Targets:
        places_P, kept = self.store.row(row)
        codec = HELDOUT_CODEC if self.store.is_heldout(row) else self.store.codec
        index_P = torch.searchsorted(places_P, asked_P).clamp_max(max(len(places_P) - 1, 0))
        if len(asked_P) and not (len(places_P) and torch.equal(places_P[index_P], asked_P)):
            self._refuse(f"row {row}: asked for positions that it has no targets for.")
        targets = codec.decode(kept, self.head)
        return targets if torch.equal(places_P, asked_P) else _picked(targets, index_P)

    def _refuse_ids(self) -> NoReturn:
        raise UserError(
            f"teacher store: {self.store.path} answers for the rows of its corpus alone. Take the model"
            " itself to ask about other tokens."
        )

    def _refuse(
        self, what: str, todo: str = "Capture again, or set the recipe to what was captured."
    ) -> NoReturn:
        raise UserError(f"{self.store.path}: does not fit this recipe: {what} {todo}")


def _on(head: Head, device: torch.device | str) -> Head:
    bias_V = None if head.bias_V is None else head.bias_V.to(device)
    return Head(head.weight_VD.to(device), bias_V, head.scale, head.softcap, head.known)


def _picked(targets: Targets, index_P: Tensor) -> Targets:
    if isinstance(targets, HiddenTargets):
        return HiddenTargets(targets.hidden_NE[index_P], targets.head)
    assert isinstance(targets, SparseTargets)
    entropy_N = None if targets.entropy_N is None else targets.entropy_N[index_P]
    return replace(
        targets, ids_NK=targets.ids_NK[index_P], logp_NK=targets.logp_NK[index_P], entropy_N=entropy_N
    )


def captured_source(named: str | None, recorded: Mapping[str, Any]) -> str:
    """Where the model of a store lies: where the recipe says, else where the capture found it."""
    return str(named or recorded["source"])


def joined(found: list[Targets], device: torch.device) -> Targets:
    """The targets of several rows, which are of one kind, as those of a batch."""
    hidden = [of for of in found if isinstance(of, HiddenTargets)]
    if len(hidden) == len(found):
        return HiddenTargets(torch.cat([of.hidden_NE for of in hidden]), hidden[0].head)
    sparse = [of for of in found if isinstance(of, SparseTargets)]
    if len(sparse) != len(found):
        raise UserError("teacher store: training and held-out rows in one batch. Ask for them apart.")
    K = max(of.ids_NK.shape[1] for of in sparse)
    padded = [(K - of.ids_NK.shape[1], of) for of in sparse]
    ids_NK = torch.cat([F.pad(of.ids_NK, (0, lacking), value=-1) for lacking, of in padded])
    logp_NK = torch.cat([F.pad(of.logp_NK, (0, lacking), value=-torch.inf) for lacking, of in padded])
    entropies = [of.entropy_N for of in sparse if of.entropy_N is not None]
    entropy_N = torch.cat(entropies) if entropies else None
    return replace(sparse[0], ids_NK=ids_NK, logp_NK=logp_NK, entropy_N=entropy_N).to(device)


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)


class StoreSource(TeacherSource):
    """`teacher.name: store`: a store's manifest, read before its targets are."""

    config: StoreTeacherConfig
    part = "store"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_manifest(Path(self.config.path))

    @cached_property
    def captured(self) -> ModelFiles:
        """The files of the model that was captured."""
        return ModelFiles(captured_source(self.config.model, self.manifest["teacher"]))

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["vocabulary"]["size"])

    @property
    def tokenizers(self) -> list[Path]:
        folder = Store(Path(self.config.path)).tokenizer_folder
        return [] if folder is None else [folder]

    @property
    def layers_config(self) -> Any:
        return self.captured.config

    @property
    def inputs(self) -> dict[str, Path]:
        named = {} if self.config.model is None else {"teacher": local_copy(self.config.model)}
        return named | {"teacher/manifest.json": Path(self.config.path) / "manifest.json"}

    def load(self, tokens_per_row: int) -> StoredTeacher:
        return StoredTeacher.open(self.config.path, self.device, self.config.model)

    def plan_key(self) -> Any:
        return self.manifest

    def double(self, part: Part) -> StoreDouble:
        return StoreDouble(self.manifest, self.device, part)


class StoreDouble(BaseTeacher):
    """What a stored teacher holds in memory: its head, and a batch's targets while a step has them."""

    def __init__(self, manifest: Mapping[str, Any], device: torch.device, part: Part) -> None:
        kind = manifest["kind"]
        self.vocab = Vocab(size=manifest["vocabulary"]["size"])
        dtype = getattr(torch, manifest["teacher"]["dtype"])
        weight_VE = torch.zeros(self.vocab_size, manifest["head"]["width"], dtype=dtype, device=device)
        self.head, self.part = Head(weight_VE), part
        most = {"hidden": 0, "topk": kind.get("k")}
        self.num_kept = most.get(kind["name"], int(1 / kind.get("threshold", 1)) + 1)
        """Ids of a position at most; 0 for hidden states."""
        self.temperature = manifest["temperature"] or 1.0

    def targets(self, batch: Batch) -> Targets:
        N, weight_VE = len(batch.positions_N), self.head.weight_VD
        with self.part("store"):
            if not self.num_kept:
                return HiddenTargets(weight_VE.new_zeros(N, weight_VE.shape[1]), self.head)
            ids_NK = torch.zeros(N, self.num_kept, dtype=torch.int64, device=weight_VE.device)
            return SparseTargets(ids_NK, ids_NK.float(), self.temperature, has_bucket=False)
