"""What a `DistillTrainer` refuses: whatever would change its loss without a word, or run it in a way that it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer

from potstill.errors import UserError
from potstill.models.student import Student
from potstill.types import Teacher

OPTIONS = ("compute_loss_func", "compute_metrics", "model_init", "preprocess_logits_for_metrics")


def require_supported(trainer: Trainer, options: Mapping[str, Any]) -> None:
    """UserError for an argument of `Trainer` that has no place in a `DistillTrainer`."""
    args = trainer.args
    asked = {
        "args.label_smoothing_factor": args.label_smoothing_factor,
        "args.deepspeed": args.deepspeed,
        "args.parallelism_config": args.parallelism_config,
        "args.torch_compile": args.torch_compile,
        "args.average_tokens_across_devices=False": not args.average_tokens_across_devices,
        "a model that is sharded already": trainer.is_distributed_loading_by_transformers,
        "nn.DataParallel on several GPUs (start it by torchrun)": args.n_gpu > 1,
        **{name: options.get(name) is not None for name in OPTIONS},
    }
    if found := [name for name, is_asked in asked.items() if is_asked]:
        raise UserError(f"DistillTrainer: it cannot distil with {found[0]}. Leave that out.")


def require_apart(student: Student, teacher: Teacher) -> None:
    """UserError for a student whose weights are the teacher's, which are frozen, or whose loss is not its own alone."""
    if student.router_coefficient:
        raise UserError(
            "DistillTrainer: model asks for a balancing loss of its experts. Set output_router_logits: false in its"
            " config, or use `potstill distill`."
        )
    own = {id(weight) for weight in student.parameters()}
    if teacher.model is not None and not own.isdisjoint(map(id, teacher.model.parameters())):
        raise UserError("DistillTrainer: teacher and model share weights, which are frozen. Load them apart.")


def require_whole(trainer: Trainer) -> None:
    """UserError for a student that cannot write, as no rank has its weights whole."""
    if trainer.is_fsdp_enabled:
        raise UserError("DistillTrainer: rollouts under FSDP are not built. Use DDP, or `potstill distill`.")
