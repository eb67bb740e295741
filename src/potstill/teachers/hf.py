"""A teacher in memory: a Transformers causal LM from a folder, the hub or a GGUF file, on CPU or CUDA.

The training loop gets hidden states and a head, so that [N, V] never exists; inspection gets logits. The model is
frozen: no gradients, eval mode, and the same hash after training as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from potstill.data.tokenizers import vocab_of
from potstill.errors import UserError
from potstill.losses.targets import HiddenTargets
from potstill.models.causal_lm import CausalLM
from potstill.models.llama_cpp import LlamaCppLM
from potstill.models.load import (
    choose_device,
    choose_dtype,
    load_causal_lm,
    longest_row,
    plain_config,
    weights_sha256,
    without_data,
)
from potstill.models.quantization import pack_for_plan, quantisation
from potstill.models.source import ModelFiles
from potstill.recipe.sections_models import HfTeacherConfig
from potstill.teachers.backends import FULL, Choice, choose, fewer_bits
from potstill.teachers.base import BaseTeacher, Part, TeacherSource
from potstill.teachers.quantization_gap import quantization_gap
from potstill.teachers.toy import as_tensor, require_ids, require_known, require_last
from potstill.types import Batch, Finding, Vocab

if TYPE_CHECKING:
    from potstill.build.setup import RunSetup


class TorchTeacher(BaseTeacher):
    """A causal language model as a teacher. Load one with `for_inference`."""

    label = "torch"
    model: CausalLM
    source: HfSource | None = None
    """The source that loaded it; None for a teacher that was made by `for_inference` directly."""

    def __init__(self, model: CausalLM, tokenizer: Any | None, choice: Choice | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.choice = choice or Choice("transformers", FULL, "it was given as a model")
        """The backend that runs its layers, and why."""
        self.tokenizer = tokenizer
        self.vocab = (
            Vocab(size=model.vocab_size) if tokenizer is None else vocab_of(tokenizer, model.vocab_size)
        )
        self.max_length = longest_row(model.hf.config)

    @classmethod
    def for_inference(
        cls,
        checkpoint_dir: str | Path,
        config: Any = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = torch.float32,
        *,
        weights: str = FULL,
        backend: str = "auto",
        tokens: int | None = None,
        files: ModelFiles | None = None,
    ) -> Self:
        """Verify the checkpoint, load it, probe it and freeze it.

        Args:
            checkpoint_dir: Hugging Face folder (safetensors), hub id, or GGUF file.
            config: a config, dictionary or path that the checkpoint must agree with; None: its own.
            device: `auto` is CUDA where there is one; an explicit `cuda` is refused where there is none.
            dtype: type of the weights in memory.
            weights: full, int8, int4, or stored: a GGUF file's own blocks.
            backend: what runs the layers, see `backends`.
            tokens: length of the longest row, for llama.cpp's context; None: the longest that the model supports.
            files: those of `checkpoint_dir`, if they have been opened already.

        Raises:
            UserError: see `load_causal_lm`, `choose_device` and `choose`.
        """
        torch_device, torch_dtype = choose_device(str(device)), choose_dtype(dtype)
        files = files or ModelFiles(checkpoint_dir)
        # Before anything is verified or read: a backend that is not installed is reported at once.
        choice = choose(files.path, weights, backend, torch_device)
        name = f"teacher {checkpoint_dir}"
        if choice.backend == "llama_cpp":
            files.verify()
            model: CausalLM = LlamaCppLM.open(files.path, torch_dtype, tokens, name, files.config)
        else:
            packed = None if choice.is_full else quantisation(choice.backend, weights, torch_dtype)
            files.verify()  # before a library parses its config
            options: dict[str, Any] = {"config": config, "own_config": files.config, "quantisation": packed}
            model = load_causal_lm(files.path, dtype=torch_dtype, device=torch_device, **options)
            model.name = name
        return cls(model, files.tokenizer, choice)

    @classmethod
    def of(cls, hf: Any, tokenizer: Any | None = None) -> Self:
        """A Transformers model that is in memory already; it is frozen.

        Raises:
            UserError: see `CausalLM.of`.
        """
        return cls(CausalLM.of(hf, "teacher"), tokenizer)

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @torch.no_grad()
    def logits_for_batch(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """logits_BV, float32, at each row's last position; with a mask, at the last position that it keeps.

        Args:
            input_ids_BT: whole numbers, within the vocabulary.
            attention_mask_BT: 0 at padding, on either side; None: no padding.

        Raises:
            UserError: another shape or type, an id outside of the vocabulary, or a row without a last position.
        """
        ids_BT, mask_BT = self._require(input_ids_BT, attention_mask_BT)
        require_last("torch", ids_BT)
        if len(ids_BT) == 0:
            return self.model.head.weight_VD.new_zeros(0, self.vocab_size, dtype=torch.float32)
        hidden_BTE = self._hidden(ids_BT, mask_BT)
        if mask_BT is None:
            return self.model.logits(hidden_BTE[:, -1])
        if not bool(mask_BT.any(1).all()):
            raise UserError("teacher torch: a row is all padding and has no last position. Drop the row.")
        last_B = mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(1)
        return self.model.logits(hidden_BTE[torch.arange(len(ids_BT), device=last_B.device), last_B])

    @torch.no_grad()
    def logits_per_position(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """logits_BTV, float32; arguments and errors as of `logits_for_batch`."""
        ids_BT, mask_BT = self._require(input_ids_BT, attention_mask_BT)
        if ids_BT.numel() == 0:
            return self.model.head.weight_VD.new_zeros(*ids_BT.shape, self.vocab_size, dtype=torch.float32)
        return self.model.logits(self._hidden(ids_BT, mask_BT))

    @torch.no_grad()
    def targets(self, batch: Batch) -> HiddenTargets:
        """One forward pass of the body: hidden states at the N positions, and the head that makes logits of them."""
        with torch.inference_mode():
            hidden_BTE = self.model.hidden(batch.input_ids_BT, batch.position_ids_BT)
        # Indexed outside of inference mode: the result is an ordinary tensor, which autograd may save.
        return HiddenTargets(hidden_BTE.flatten(0, 1)[batch.positions_N], self.model.head)

    def share_ids(self, ids: int) -> int:
        self.model.mask_from(ids)
        return ids

    def to_cut_from(self) -> tuple[CausalLM, str]:
        """Its model; for a quantized teacher, its full weights, which are loaded besides it."""
        where = self.model.name.removeprefix("teacher ") if self.source is None else self.source.config.model
        if self.choice.is_full:
            return self.model, where
        dtype, files = self.model.head.weight_VD.dtype, None if self.source is None else self.source.files
        full = TorchTeacher.for_inference(where, device=self.model.device, dtype=dtype, files=files)
        full.model.rows_are_packed = self.model.rows_are_packed
        return full.model, where

    def describe(self) -> dict[str, Any]:
        where = None if self.source is None else self.source.config.model
        left_out = self.model.left_out
        return {"source": where} | ({"left_out": left_out} if left_out else {})

    @property
    def backend(self) -> dict[str, str]:  # type: ignore[override]  # read-only here
        return vars(self.choice)

    def fingerprint(self, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
        return {"teacher": self.weights_sha256()}

    def weights_sha256(self) -> str:
        return weights_sha256(self.model)

    def checks(self, setup: RunSetup, student_kl: float) -> Iterator[Finding]:
        """Of a quantized teacher: it must be closer to its full weights than the untrained student is to it. Otherwise
        the student would mostly learn rounding errors.
        """
        if self.choice.is_full or self.source is None:
            return
        heldout = setup.corpus.heldout
        batch = heldout.batch(range(min(2, len(heldout)))).to(self.model.device)
        full = self.source.full(self.model.device)
        full.model.rows_are_packed = self.model.rows_are_packed
        gap = quantization_gap(self, full, self.source.reference.source, batch, setup.shared.ids)
        advice = f"The student is only {student_kl:.3g} nats away. Take more bits: teacher.weights"
        yield Finding("teacher's bits", gap.summary(), gap.kl < student_kl, advice, gap.as_dict())

    def _require(self, input_ids_BT: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ids_BT = require_ids("torch", input_ids_BT)
        require_known("torch", ids_BT, self.vocab_size)
        if mask_BT is not None:
            mask_BT = as_tensor("torch", "attention_mask", mask_BT).bool().to(self.model.device)
            if mask_BT.shape != ids_BT.shape:
                raise UserError(
                    f"teacher torch: attention_mask has shape {list(mask_BT.shape)}, input_ids"
                    f" {list(ids_BT.shape)}."
                )
        return ids_BT.to(self.model.device), mask_BT

    def _hidden(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        if mask_BT is None:
            return self.model.hidden(ids_BT)
        positions_BT = (mask_BT.long().cumsum(1) - 1).clamp_min(
            0
        )  # positions start at 0 after padding on the left
        return self.model.hidden(ids_BT, positions_BT, mask_BT)


class CudaTrainerTeacher(TorchTeacher):
    """`TorchTeacher` that refuses any device but CUDA; importable without one."""

    @classmethod
    def for_inference(  # defaults to CUDA and bfloat16, and also accepts `model_config`
        cls,
        checkpoint_dir: str | Path,
        config: Any = None,
        device: str | torch.device = "cuda",
        dtype: str | torch.dtype = torch.bfloat16,
        *,
        weights: str = FULL,
        backend: str = "auto",
        tokens: int | None = None,
        files: ModelFiles | None = None,
        model_config: Any = None,
    ) -> Self:
        """See `TorchTeacher.for_inference`; `model_config` takes precedence over `config`."""
        if not str(device).startswith("cuda"):
            raise UserError(
                f"CudaTrainerTeacher: device is {device}, and it runs on CUDA alone. Use TorchTeacher."
            )
        config = config if model_config is None else model_config
        bits = {"weights": weights, "backend": backend}
        return super().for_inference(
            checkpoint_dir, config, device, dtype, tokens=tokens, files=files, **bits
        )


class HfSource(TeacherSource):
    """`teacher.name: torch`: the model's files, opened before its weights are loaded."""

    config: HfTeacherConfig
    captures = ("hidden", "sampled", "topk")
    lacks_tokenizer = "a folder with its tokenizer's files in teacher.model"

    def __init__(self, config: HfTeacherConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.files = ModelFiles(config.model)
        self.reference = self.files if config.reference is None else ModelFiles(config.reference)
        """Files of the full weights that a quantized teacher is compared with."""

    @property
    def checkpoints(self) -> list[ModelFiles]:
        return list(dict.fromkeys([self.files, self.reference]))

    @property
    def vocab_size(self) -> int:
        return self.files.vocab_size

    @property
    def model_config(self) -> Any:
        return self.files.config

    @property
    def inputs(self) -> dict[str, Path]:
        return {"teacher": self.files.path}

    def load(self, tokens_per_row: int) -> TorchTeacher:
        config = self.config
        teacher = TorchTeacher.for_inference(
            config.model,
            device=self.device,
            dtype=config.dtype,
            weights=config.weights,
            backend=config.backend,
            tokens=tokens_per_row,
            files=self.files,
        )
        teacher.source, teacher.is_sharded = self, config.sharded
        return teacher

    def full(self, device: torch.device) -> TorchTeacher:
        """The teacher with its full weights, to compare a quantized one with."""
        files = self.reference
        return TorchTeacher.for_inference(files.source, device=device, dtype=self.config.dtype, files=files)

    def plan_key(self) -> Any:
        config = self.config
        return config.name, config.dtype, config.weights, config.backend, self.files.bytes_of_file

    def double(self, part: Part) -> TorchTeacher:
        teacher = self._full_double()
        if self.config.weights != FULL:
            pack_for_plan(teacher.model, self.config.weights, self.files.bytes_of_file)
        return teacher

    def measured_double(self) -> TorchTeacher | None:
        return None if self.config.weights == FULL else self._full_double()

    def fewer_bits(self, device_type: str) -> str | None:
        if self.config.weights != FULL or self.config.sharded:
            return None
        return fewer_bits(Path(self.files.source), device_type)

    def _full_double(self) -> TorchTeacher:
        dtype = choose_dtype(self.config.dtype)
        return TorchTeacher(
            without_data(plain_config(self.model_config), dtype, self.device, "teacher"), None
        )
