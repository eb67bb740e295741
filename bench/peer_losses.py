"""The losses that `peer_arms.py` runs: each tool's own functions, set to one objective.

0.5 CE + 0.5 forward KL at temperature 1, mean over supervised positions, unless the arm says otherwise. Each
maker imports its tool itself, so that an ImportError says what is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import step

CHUNKS = 8  # torchtune's default
Loss = Callable[[Any, Any, Any], Any]
"""Student, teacher and batch to the loss."""
SparseLoss = Callable[[Any, Any], Any]
"""logits_NV and the teacher's largest probabilities to the mean KL."""


def quietly(name: str) -> ModuleType:
    with warnings.catch_warnings(action="ignore"):
        return importlib.import_module(name)


def alone(package: str, path: str) -> ModuleType:
    """A file of a package whose other requirements need not be there."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"No module named '{package}'")
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(found.origin).parent / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hidden(model: Any, batch: Any) -> Any:
    """hidden_ND, at supervised positions."""
    inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
    return step.supervised(model.model(**inputs).last_hidden_state.flatten(0, 1), batch)


def taught(function: Callable[[Any, Any], Any], teacher: Any, batch: Any) -> Any:
    import torch

    with torch.no_grad():
        return function(teacher, batch)


def on_logits(of_logits: Callable[[Any, Any, Any], Any]) -> Loss:
    def loss(student: Any, teacher: Any, batch: Any) -> Any:
        teacher_logits = taught(step.full_logits, teacher, batch)
        return of_logits(step.full_logits(student, batch), teacher_logits, batch.labels_N)

    return loss


def plain_compiled() -> Loss:
    import torch

    return on_logits(torch.compile(step.plain_loss))


def plain_all_compiled() -> Loss:
    """Both models through torch.compile, too."""
    import torch

    compiled: dict[int, Any] = {}
    of_logits = torch.compile(step.plain_loss)

    def logits(model: Any, batch: Any) -> Any:
        if id(model) not in compiled:
            compiled[id(model)] = torch.compile(model, dynamic=False)
        return step.full_logits(compiled[id(model)], batch)

    def loss(student: Any, teacher: Any, batch: Any) -> Any:
        taught_NV = taught(logits, teacher, batch)
        return of_logits(logits(student, batch), taught_NV, batch.labels_N)

    return loss


def trl_loss() -> Loss:
    from torch.nn import functional as F

    jsd = quietly("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    return on_logits(lambda z, t, y: 0.5 * F.cross_entropy(z, y) + 0.5 * jsd(z, t, labels=y, beta=0.0))


def trl_chunked() -> Loss:
    import torch

    divergence = quietly("trl.trainer.distillation_trainer")._chunked_divergence_loss

    def loss(student: Any, teacher: Any, batch: Any) -> Any:
        hidden_NE = taught(hidden, teacher, batch)
        heads = [model.get_output_embeddings().weight for model in (student, teacher)]
        all_N = torch.ones_like(batch.labels_N)
        return divergence(hidden(student, batch), hidden_NE, *heads, all_N, beta=0.0)[0]

    return loss


def liger(compiled: bool, chunk: int) -> Callable[[], Loss]:
    def make() -> Loss:
        losses = importlib.import_module("liger_kernel.chunked_loss")
        jsd = losses.LigerFusedLinearJSDLoss(0.5, 0.5, beta=0.0, compiled=compiled, chunk_size=chunk)

        def loss(student: Any, teacher: Any, batch: Any) -> Any:
            hidden_NE = taught(hidden, teacher, batch)
            of_student, of_teacher = (model.get_output_embeddings().weight for model in (student, teacher))
            return jsd(hidden(student, batch), of_student, hidden_NE, of_teacher, batch.labels_N)

        return loss

    return make


def torchtune(compiled: bool) -> Callable[[], Loss]:
    """Compiled as its own `compile_loss` does it."""

    def make() -> Loss:
        import torch

        ce = alone("torchtune", "modules/loss/ce_chunked_output_loss.py").CEWithChunkedOutputLoss(CHUNKS)
        kl = alone("torchtune", "modules/loss/kd_losses.py").ForwardKLWithChunkedOutputLoss(CHUNKS)
        if compiled:
            ce.compute_cross_entropy = torch.compile(ce.compute_cross_entropy)
            kl.fkl_loss = torch.compile(kl.fkl_loss)

        def chunked(model: Any, batch: Any) -> list[Any]:
            return [model.lm_head(part) for part in hidden(model, batch)[None].chunk(CHUNKS, dim=1)]

        def loss(student: Any, teacher: Any, batch: Any) -> Any:
            teacher_chunks, labels = taught(chunked, teacher, batch), batch.labels_N[None]
            chunks = chunked(student, batch)
            return 0.5 * ce(chunks, labels) + 0.5 * kl(chunks, teacher_chunks, labels)

        loss.is_cross_entropy = True  # type: ignore[attr-defined]
        return loss

    return make


def distillkit_kl() -> SparseLoss:
    """Logits and signal to the mean over positions; a store's rest is one class, as ours has it."""
    from transformers.modeling_outputs import CausalLMOutput

    kl = importlib.import_module("distillkit.lossfuncs.kl")
    loss = kl.KLDLoss(1.0, kl.MissingProbabilityHandling.SYMMETRIC_UNIFORM)
    return lambda logits_NV, signal: loss(CausalLMOutput(logits=logits_NV[None]), signal)


def distillkit() -> Loss:
    from torch.nn import functional as F

    kl, signals = distillkit_kl(), importlib.import_module("distillkit.signals")

    def of_logits(z: Any, t: Any, y: Any) -> Any:
        signal = signals.DenseSignal(1.0, None, t.shape[-1], logits=t[None])
        return 0.5 * F.cross_entropy(z, y) + 0.5 * kl(z, signal)

    return on_logits(of_logits)


def plain_sparse() -> SparseLoss:
    """What anybody would write: one class for all ids that were not kept."""
    import torch

    def rest(logp_NK: Any) -> Any:
        return (-logp_NK.exp().sum(-1).clamp_max(1 - 1e-6)).log1p()

    def kl(logits_NV: Any, targets: Any) -> Any:
        logp_NK = logits_NV.gather(-1, targets.ids_NK) - logits_NV.logsumexp(-1, keepdim=True)
        p_NK, rest_N = targets.logp_NK.exp(), rest(targets.logp_NK)
        kept_N = (p_NK * (targets.logp_NK - logp_NK)).sum(-1)
        return torch.mean(kept_N + rest_N.exp() * (rest_N - rest(logp_NK)))

    return kl


def distillkit_sparse() -> SparseLoss:
    kl, signals = distillkit_kl(), importlib.import_module("distillkit.signals")

    def of_targets(logits_NV: Any, targets: Any) -> Any:
        kept = {"sparse_ids": targets.ids_NK[None], "sparse_values": targets.logp_NK[None]}
        return kl(logits_NV, signals.SparseSignal(1.0, None, logits_NV.shape[-1], **kept, log_values=True))

    return of_targets
