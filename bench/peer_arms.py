"""What `peers.py` compares: every tool's step on one pair of models, as a function of settings.

Peers' losses (`peer_losses.py`) run in one plain loop, at supervised positions alone; GKDTrainer in its own
trainer.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peer_losses as losses
import step
from peer_losses import Loss, SparseLoss

KEPT = 128  # ids of a position in a store of the largest, as in DistillKit's examples
FEW_FILES = 'corpus.exclude=["site-packages/*", "dist-packages/*", "test/*", "*/test/*", "[b-z]*"]'
SAVING = ["train.activation_checkpointing=true", "train.return_memory=true", "teacher.dtype=bfloat16"]
ONLY_KD = ["objective.kd_weight=1", "objective.ce_weight=0"]
Run = Callable[[argparse.Namespace, list[str]], dict[str, Any]]
"""Options and overrides to losses, seconds of each step, and the peak of memory where it is not the end's."""


@dataclass(frozen=True)
class Arm:
    run: Run
    package: str = ""
    """That it needs."""
    like: str = "ours"
    """The arm of ours that minimises the same."""
    note: str = ""
    exact: bool = True
    """Whether its losses should be equal to those, but for rounding."""


def ours(*more: str, store: str = "") -> Run:
    def run(options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
        given = [*overrides, *more, *(from_store(options, store) if store else ())]
        with tempfile.TemporaryDirectory() as folder:
            return step.ours(step.RECIPE, given, Path(folder))

    return run


def online(make: Callable[[], Loss]) -> Run:
    """`make` imports the peer."""

    def run(options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
        loss = make()
        settings, batches, teacher, student = step.pair(step.RECIPE, overrides)
        optimizer = step.make_adamw(settings.train, student, fused=True)
        found = step.take_steps(
            settings.train, student, optimizer, batches, lambda batch: loss(student, teacher, batch)
        )
        found["peak_gib"] = step.peak_gib()
        if getattr(
            loss, "is_cross_entropy", False
        ):  # the teacher's entropy is taken off after the measurement
            entropies = [entropy(teacher, batch) for batch in batches]
            found["losses"] = [a - 0.5 * b for a, b in zip(found["losses"], entropies, strict=True)]
        return found

    return run


def apart(options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Both bodies forward, the student's backward, and the heads' bare matmuls: no loss, no optimizer."""
    import torch
    from scaling import Case, bare_matmuls

    from potstill.io.cpu_matmul import choose_matmul, matmul_with

    settings, batches, teacher, student = step.pair(step.RECIPE, overrides)
    # The library that our own runs multiply with, too.
    held = contextlib.ExitStack()  # until the function returns
    held.enter_context(matmul_with(choose_matmul(settings.train.matmul, torch.device("cpu"))[0]))
    weights = {
        name: model.get_output_embeddings().weight.detach()
        for name, model in (("weight_VD", student), ("weight_VE", teacher))
    }
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        hidden_NE, hidden_ND = losses.taught(losses.hidden, teacher, batch), losses.hidden(student, batch)
        hidden_ND.backward(torch.ones_like(hidden_ND))
        case = Case(
            len(hidden_ND),
            len(weights["weight_VD"]),
            hidden_ND.shape[1],
            hidden_NE.shape[1],
            settings.objective.positions_at_once,
        )
        bare_matmuls(case, {"hidden_ND": hidden_ND, "hidden_NE": hidden_NE, **weights})()
        student.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    return {"losses": [], "seconds": seconds}


def entropy(teacher: Any, batch: Any) -> float:
    import torch

    with torch.no_grad():
        return float(
            torch.distributions.Categorical(logits=step.full_logits(teacher, batch)).entropy().mean()
        )


def trl_trainer(options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Off-policy forward KL. Rows are one token longer, as it takes labels from the row itself; hooks give
    both models the documents' positions, which it does not pass on.
    """
    import torch
    from torch.nn import functional as F
    from transformers import AutoTokenizer, TrainerCallback

    gkd = losses.quietly("trl.experimental.gkd")
    settings, batches, teacher, student = step.pair(step.RECIPE, [*overrides, *ONLY_KD])
    plan, waiting = settings.train, iter(batches)
    seen: dict[str, list[float]] = {"losses": [], "seconds": []}

    def collate(examples: list[Any]) -> dict[str, Any]:
        batch = next(waiting)
        ids_BT = F.pad(batch.input_ids_BT, (0, 1))
        labels_BT = torch.full_like(ids_BT, -100)
        row_N, place_N = batch.positions_N // options.T, batch.positions_N % options.T
        labels_BT[row_N, place_N + 1] = batch.labels_N
        return {
            "input_ids": ids_BT,
            "attention_mask": torch.ones_like(ids_BT),
            "labels": labels_BT,
            "position_ids": F.pad(batch.position_ids_BT, (0, 1)),
        }

    class Observed(gkd.GKDTrainer):  # type: ignore[name-defined, misc]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *given: Any, **rest: Any) -> Any:
            self.position_ids = inputs.pop("position_ids")
            loss = super().compute_loss(model, inputs, *given, **rest)
            seen["losses"].append(float(loss.detach()))
            return loss

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen["seconds"].append(time.perf_counter() - self.started)

    optimizer = step.make_adamw(plan, student, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: step.rate(plan, number))
    student.is_quantized = (
        False  # its weights are float32; the trainer goes by the kind of file they came from
    )
    gguf = Path(settings.teacher.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Observed(
            model=student,
            teacher_model=teacher,
            args=gkd.GKDConfig(
                output_dir=folder,
                per_device_train_batch_size=plan.rows_per_step,
                max_steps=plan.steps,
                max_grad_norm=plan.clip,
                lmbda=0.0,
                beta=0.0,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            data_collator=collate,
            train_dataset=importlib.import_module("datasets").Dataset.from_dict(
                {"row": list(range(plan.rows_per_step * plan.steps))}
            ),
            processing_class=AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name),
            optimizers=(optimizer, schedule),
            callbacks=[Clock()],
        )

        def placed(model: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            inputs = {"input_ids": given["input_ids"], "position_ids": trainer.position_ids}
            return args, inputs | {"use_cache": False}

        for model in (student, teacher):
            model.register_forward_pre_hook(placed, with_kwargs=True)
        trainer.train()
    return seen


def shape(options: argparse.Namespace) -> list[str]:
    return [
        f"train.steps={options.steps}",
        f"train.rows_per_step={options.B}",
        f"corpus.tokens_per_row={options.T}",
        FEW_FILES,
    ]


def from_store(options: argparse.Namespace, kind: str) -> list[str]:
    """Overrides of a run that reads from it; it is captured in a process of its own."""
    at = options.store / f"{kind}-{options.B}x{options.T}-{options.steps}"
    if not (at / "manifest.json").exists():
        given = [f"capture.name={kind}", "capture.rows=steps", *shape(options)]
        given += [f"capture.k={KEPT}"] if kind == "topk" else []
        command = [sys.executable, "-m", "potstill", "capture", str(step.RECIPE), *given, "--out", str(at)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return [f"teacher={{name: store, path: {at.absolute()}}}"]


def offline(make: Callable[[], SparseLoss]) -> Run:
    """Logits and sparse targets to KL. Targets are in memory before the first step: reading them is free."""

    def run(options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
        from torch.nn import functional as F

        from potstill.build.resolve import resolve
        from potstill.recipe.load import load

        kl = make()
        stored = load(step.RECIPE, [*overrides, *from_store(options, "topk")])
        settings, batches, teacher, student = step.pair(step.RECIPE, overrides)
        del teacher
        store = resolve(stored).teacher.load(stored.corpus.tokens_per_row)
        items = [(batch, store.targets(batch)) for batch in batches]

        def loss(item: Any) -> Any:
            batch, targets = item
            logits_NV = step.full_logits(student, batch)
            return 0.5 * F.cross_entropy(logits_NV, batch.labels_N) + 0.5 * kl(logits_NV, targets)

        optimizer = step.make_adamw(settings.train, student, fused=True)
        return step.take_steps(settings.train, student, optimizer, items, loss)

    return run


ALONE = "its file of losses, loaded alone"
NO_CE = "KL alone, it has no CE"
MEMORY = "kept targets are in memory before the first step"
ARMS = {
    "ours": Arm(ours()),
    "ours, compiled": Arm(ours("train.compile=true"), note="layers through torch.compile"),
    "ours, matmul: blas": Arm(ours("train.matmul=blas"), note="products by the library that peers' are by"),
    "ours, saving memory": Arm(ours(*SAVING), note="layers computed again, teacher in bfloat16", exact=False),
    "ours, selective": Arm(
        ours("train.activation_checkpointing=selective"), note="matrix products and attention kept alone"
    ),
    "bodies and heads apart": Arm(apart, "torch", note="no loss, no optimizer: what a step cannot go below"),
    "plain": Arm(online(lambda: losses.on_logits(step.plain_loss)), "torch"),
    "plain, compiled loss": Arm(online(losses.plain_compiled), "torch"),
    "plain, all compiled": Arm(online(losses.plain_all_compiled), "torch", note="models and loss"),
    "TRL generalized_jsd_loss": Arm(online(losses.trl_loss), "trl"),
    "Liger JSD": Arm(online(losses.liger(False, 1024)), "liger-kernel"),
    "Liger JSD, compiled": Arm(online(losses.liger(True, 1024)), "liger-kernel"),
    "Liger JSD, compiled, chunks of 256": Arm(online(losses.liger(True, 256)), "liger-kernel"),
    "torchtune chunked": Arm(online(losses.torchtune(False)), "torchtune", note=ALONE),
    "torchtune chunked, compiled": Arm(online(losses.torchtune(True)), "torchtune", note=ALONE),
    "DistillKit": Arm(online(losses.distillkit), "distillkit"),
    "ours, KL alone": Arm(ours(*ONLY_KD), like="ours, KL alone"),
    "TRL GKDTrainer": Arm(trl_trainer, "trl", "ours, KL alone", f"{NO_CE}; lmbda 0"),
    "TRL DistillationTrainer's loss": Arm(
        online(losses.trl_chunked),
        "trl",
        "ours, KL alone",
        f"{NO_CE}; the trainer itself always generates its rows",
    ),
}
STORED = {
    "ours, hidden store": Arm(
        ours(store="hidden"), note="bfloat16: not the online loss to the last digit", exact=False
    ),
    "ours, sampled store": Arm(
        ours(store="sampled"), note="unbiased sample: the online loss on average", exact=False
    ),
    "ours, top-k store": Arm(ours(store="topk"), like="ours, top-k store"),
    "plain, top-k": Arm(offline(losses.plain_sparse), "torch", "ours, top-k store", MEMORY),
    "DistillKit, top-k": Arm(offline(losses.distillkit_sparse), "distillkit", "ours, top-k store", MEMORY),
}
