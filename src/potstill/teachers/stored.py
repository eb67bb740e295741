"""A teacher whose targets were computed beforehand and are read from a store.

It has targets for the rows of the store's corpus and for nothing else. Held-out rows are stored as hidden states,
so that evaluations are exact whatever the codec of the training rows. A recipe that does not fit the store is
refused, with the field that differs and both values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from potstill.data.tokenizers import load_tokenizer, vocab_of
from potstill.errors import UserError
from potstill.losses.targets import HiddenTargets, SparseTargets
from potstill.models.causal_lm import CausalLM
from potstill.models.hub import local_copy
from potstill.models.source import ModelFiles
from potstill.recipe.sections_models import StoreTeacherConfig
from potstill.store.codecs import Hidden
from potstill.store.layout import heldout_codec_of
from potstill.store.reader import ROWS_ADVICE, Store, read_manifest
from potstill.teachers.base import BaseTeacher, Part, TeacherSource, refuse_cut
from potstill.teachers.hf import TorchTeacher
from potstill.types import Batch, Finding, Head, Targets, Vocab

if TYPE_CHECKING:
    from potstill.build.setup import RunSetup

LEAST_COSINE = 0.9
"""Of the stored targets' gradient to the full targets': below it, most of a step goes another way (docs/targets.md)."""
OF_CORPUS = ("tokenizer_sha256", "vocab_size", "tokens_per_row", "heldout_rows", "documents", "tokens")
"""Compared one by one before the fingerprint, which shows only that something differs."""


class StoredTeacher(BaseTeacher):
    """Targets of a store, read batch by batch; nothing is kept in memory. Open one with `open`."""

    label = "store"
    reads_new_text = False
    reads_on_cpu = True
    """The positions decide which bytes are read: a batch on a device would have to be copied back first."""

    captured: ModelFiles | None = None
    """The files of the captured model, where they have been looked at already."""

    def __init__(self, store: Store, device: torch.device | str = "cpu", model: str | None = None) -> None:
        self.store = store
        self.device = torch.device(device)
        self.named_model = model
        """The captured model, as the recipe names it in `teacher.model`; None: it does not."""
        folder = store.tokenizer_folder
        self.tokenizer = None if folder is None else load_tokenizer(folder)
        self.vocab = Vocab(size=self.vocab_size) if self.tokenizer is None else self._vocab()
        self.head = None if store.head is None else _on(store.head, device)
        self._heldout_codec = heldout_codec_of(store.manifest)
        self.ids_known = store.manifest["heldout"]["k"] if self.head is None else None

    @classmethod
    def open(
        cls, path: str | Path, device: torch.device | str = "cpu", model: str | None = None
    ) -> StoredTeacher:
        """Open a store.

        Args:
            path: its folder.
            device: of the targets.
            model: path or hub id of the captured model, if it is not where the store says.

        Raises:
            UserError: the folder is not a complete store.
        """
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
        """The targets at the batch's positions, which may be fewer than those of its rows.

        Raises:
            UserError: a row or a position that the store has no targets for, or a damaged block.
        """
        T, rows = batch.input_ids_BT.shape[1], batch.rows_B.tolist()
        targets = []
        if rows and min(rows) < 0:
            raise UserError(
                f"{self.store.path}: the batch has no row numbers, by which targets are found. Add `rows`."
            )
        positions_N = batch.positions_N.cpu()
        for b, row in enumerate(rows):
            places_P = positions_N[(positions_N >= b * T) & (positions_N < (b + 1) * T)] - b * T
            targets.append(self._row(row, places_P))
        return joined(targets, self.device)

    def share_ids(self, ids: int) -> int:
        """Masks nothing: the store was captured over the shared ids, which `require_fits` compares."""
        return ids

    def require_fits(self, corpus: Mapping[str, Any], objective: Any, ids: int, rows: Iterable[int]) -> None:
        """UserError for another corpus, vocabulary, temperature or divergence than the targets were captured for."""
        manifest, captured = self.store.manifest, self.store.manifest["corpus"]
        for name in (*OF_CORPUS, "fingerprint"):
            if corpus[name] != captured[name]:
                self._refuse(f"corpus: {name} was {_short(captured[name])}, is {_short(corpus[name])}.")
        if ids != (captured_ids := manifest["vocabulary"]["ids"]):
            self._refuse(f"vocabulary: captured over {captured_ids} shared ids, {ids} with this student.")
        # After the corpus: row numbers mean nothing in another one.
        if manifest["rows"] < captured["train_rows"] and (missing := self.store.missing(rows)):
            self._refuse(
                f"rows: {len(missing)} of this run's are not in it, one is {missing[0]}.", ROWS_ADVICE
            )
        if isinstance(self.store.codec, Hidden):
            return  # it serves every temperature and divergence
        name = manifest["kind"]["name"]
        if objective.temperature != manifest["temperature"]:
            self._refuse(
                f"temperature: {name} targets at {manifest['temperature']}, objective.temperature is"
                f" {objective.temperature}.",
                f"Set it to {manifest['temperature']}, or capture again; a store of kind hidden serves all.",
            )
        if name == "sampled" and objective.divergence.name != "forward_kl":
            self._refuse(
                f"divergence: {objective.divergence.name}, and sampled targets are unbiased for forward_kl"
                " alone.",
                "Set objective.divergence: forward_kl, or capture with kind hidden.",
            )

    def require_teacher(self, source: str, weights_sha256: str) -> None:
        """UserError for another model than the captured one."""
        recorded = self.store.manifest["teacher"]
        if weights_sha256 != recorded["weights_sha256"]:
            self._refuse(
                f"teacher: captured from {recorded['source']} with weights {_short(recorded['weights_sha256'])},"
                f" {source} has {_short(weights_sha256)}.",
                "Name the model that was captured in teacher.model, or capture this one.",
            )

    def confirm(self) -> None:
        """Load the model that the recipe names, and compare its hash: the receipt repeats that name."""
        if self.named_model is not None:
            self.to_cut_from()

    def to_cut_from(self) -> tuple[CausalLM, str]:
        """The captured model in full precision, and its path or hub id, once its hash has been compared."""
        if self.head is None:
            refuse_cut("a store of a served teacher")
        recorded = self.store.manifest["teacher"]
        source = captured_source(self.named_model, recorded)
        files = self.captured or ModelFiles(source)
        options: dict[str, Any] = {"device": self.device, "dtype": recorded["dtype"], "files": files}
        bits = {name: recorded[name] for name in ("weights", "backend") if name in recorded}
        model = TorchTeacher.for_inference(source, **options, **bits)
        self.require_teacher(source, model.weights_sha256())
        if bits:  # the hash is that of the quantized weights; a student is cut from the full ones
            del model  # first, so that both are not in memory together
            model = TorchTeacher.for_inference(source, **options)
        return model.model, source

    def checks(self, setup: RunSetup, student_kl: float) -> Iterator[Finding]:
        """The gradient that its targets give must be about the one that the teacher itself would."""
        if (cosine := self.store.manifest["certificate"].get("gradient_cosine")) is None:
            return
        figure = f"its certificate has a gradient cosine of {cosine:.3g} to the teacher's own targets"
        is_close, allowed = cosine >= LEAST_COSINE, setup.recipe.allow_coarse_store
        advice = "Capture with more ids a position or hidden states; where it is meant, write allow_coarse_store: true"
        figure += "; allowed" * (allowed and not is_close)
        yield Finding("store", figure, is_close or allowed, advice, ends_run=False)

    def describe(self) -> dict[str, Any]:
        manifest = self.store.manifest
        names = ("kind", "temperature", "bytes_per_position", "certificate")
        return {
            "source": captured_source(self.named_model, manifest["teacher"]),
            "weights_sha256": self.weights_sha256(),
            "store": {name: manifest[name] for name in names},
            **({"held_out": manifest["teacher"]["held_out"]} if self.head is None else {}),
        }

    def fingerprint(self, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
        return {"teacher": str(self.store.manifest["seal"])}

    def weights_sha256(self) -> str | None:
        found: str | None = self.store.manifest["teacher"]["weights_sha256"]
        return found

    def _vocab(self) -> Vocab:
        return vocab_of(self.tokenizer, self.vocab_size)

    def _row(self, row: int, wanted_P: Tensor) -> Targets:
        """The targets of a row at the positions `wanted_P`, ascending."""
        places_P, kept = self.store.row(row)
        codec = self._heldout_codec if self.store.is_heldout(row) else self.store.codec
        index_P = torch.searchsorted(places_P, wanted_P).clamp_max(max(len(places_P) - 1, 0))
        if len(wanted_P) and not (len(places_P) and torch.equal(places_P[index_P], wanted_P)):
            self._refuse(f"row {row}: this run has positions that it has no targets for.")
        targets = codec.decode(kept, self.head)
        return targets if torch.equal(places_P, wanted_P) else _picked(targets, index_P)

    def _refuse_ids(self) -> NoReturn:
        raise UserError(
            f"teacher store: {self.store.path} has targets for the rows of its corpus alone. Use the model itself"
            " for other tokens."
        )

    def _refuse(
        self, what: str, todo: str = "Capture again, or set the recipe to what was captured."
    ) -> NoReturn:
        raise UserError(f"{self.store.path}: does not fit this recipe: {what} {todo}")


def _on(head: Head, device: torch.device | str) -> Head:
    bias_V = None if head.bias_V is None else head.bias_V.to(device)
    return Head(head.weight_VD.to(device), bias_V, head.scale, head.softcap, head.known)


def _picked(targets: Targets, index_P: Tensor) -> Targets:
    """The targets at some of the positions."""
    if isinstance(targets, HiddenTargets):
        return HiddenTargets(targets.hidden_NE[index_P], targets.head)
    assert isinstance(targets, SparseTargets)
    entropy_N = None if targets.entropy_N is None else targets.entropy_N[index_P]
    return replace(
        targets, ids_NK=targets.ids_NK[index_P], logp_NK=targets.logp_NK[index_P], entropy_N=entropy_N
    )


def captured_source(named: str | None, recorded: Mapping[str, Any]) -> str:
    """Path or hub id of a store's model: the one that the recipe names, else the recorded one."""
    return str(named or recorded["source"])


def joined(rows: list[Targets], device: torch.device) -> Targets:
    """The targets of several rows as those of one batch, on the device.

    Raises:
        UserError: rows of both splits, which are stored in different forms.
    """
    hidden = [of for of in rows if isinstance(of, HiddenTargets)]
    if len(hidden) == len(rows):
        return HiddenTargets(torch.cat([of.hidden_NE for of in hidden]), hidden[0].head)
    sparse = [of for of in rows if isinstance(of, SparseTargets)]
    if len(sparse) != len(rows):
        raise UserError("teacher store: training and held-out rows in one batch. Batch them separately.")
    return SparseTargets.joined(sparse).to(device)


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)


class StoreSource(TeacherSource):
    """`teacher.name: store`: the manifest of a store, read before its targets."""

    config: StoreTeacherConfig
    part = "store"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_manifest(Path(self.config.path))

    @cached_property
    def captured(self) -> ModelFiles:
        """The files of the captured model."""
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
        return None if self.manifest["head"] is None else self.captured.config

    @property
    def inputs(self) -> dict[str, Path]:
        named = {} if self.config.model is None else {"teacher": local_copy(self.config.model)}
        return named | {"teacher/manifest.json": Path(self.config.path) / "manifest.json"}

    def load(self, tokens_per_row: int) -> StoredTeacher:
        teacher = StoredTeacher.open(self.config.path, self.device, self.config.model)
        teacher.captured = self.captured
        return teacher

    def plan_key(self) -> Any:
        return self.manifest

    def double(self, part: Part) -> StoreDouble:
        return StoreDouble(self.manifest, self.device, part)


class StoreDouble(BaseTeacher):
    """The stand-in of a stored teacher, for a plan: its head, and targets of the largest possible size."""

    def __init__(self, manifest: Mapping[str, Any], device: torch.device, part: Part) -> None:
        kind = manifest["kind"]
        self.vocab = Vocab(size=manifest["vocabulary"]["size"])
        dtype, width = (
            getattr(torch, manifest["teacher"]["dtype"]),
            (manifest["head"] or {"width": 0})["width"],
        )
        weight_VE = torch.zeros(self.vocab_size, width, dtype=dtype, device=device)
        self.head, self.part = Head(weight_VE), part
        limits = {"hidden": 0, "topk": kind.get("k")}
        # Sampled: the ids above the threshold and the draws of the rest are at most 1 / threshold, rounded up.
        self.num_kept = limits.get(kind["name"], int(1 / kind.get("threshold", 1)) + 1)
        """Largest number of ids at a position; 0 for hidden states."""
        self.temperature = manifest["temperature"] or 1.0

    def targets(self, batch: Batch) -> Targets:
        N, weight_VE = len(batch.positions_N), self.head.weight_VD
        with self.part("store"):
            if not self.num_kept:
                return HiddenTargets(weight_VE.new_zeros(N, weight_VE.shape[1]), self.head)
            ids_NK = torch.zeros(N, self.num_kept, dtype=torch.int64, device=weight_VE.device)
            return SparseTargets(ids_NK, ids_NK.float(), self.temperature, has_bucket=False)
