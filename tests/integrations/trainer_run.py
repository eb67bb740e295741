"""A `DistillTrainer` on a recipe's rows, in the order of the recipe's own loop; as a program, in one of several ranks.

    python -m torch.distributed.run --nproc-per-node 2 tests/integrations/trainer_run.py ORDER

ORDER is a JSON file with the arguments of `train`. The first rank writes what was logged to `logged.json` in `out`.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch.utils.data import Subset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    TrainingArguments,
    default_data_collator,
)

import potstill
from potstill.losses import Objective

ADAMW = {"optim": "adamw_torch_fused", "adam_beta2": 0.95, "weight_decay": 0.1, "max_grad_norm": 1.0}


def prompts_of(setup: Any) -> list[dict[str, Any]]:
    """Behind which the recipe's own loop has the student write, in its order, each with an answer of one token."""
    data = setup.data()
    return [
        {"input_ids": [*prompt, 1], "labels": [*[-100] * len(prompt), 1]}
        for step in range(setup.recipe.train.num_steps)
        for prompt in (data.prompts[index].ids for index in data.order.rows(step, data.per_step))
    ]


def collated(tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
    """Rows of a corpus are as long as each other; prompts are padded."""
    collate = default_data_collator if "rows" in rows[0] else DataCollatorForSeq2Seq(tokenizer)
    return collate(rows)


def train(
    recipe: str,
    student: str,
    out: str,
    resume: bool = False,
    rollouts: dict[str, Any] | None = None,
    **options: Any,
) -> potstill.DistillTrainer:
    """Train the student for the recipe's steps, and evaluate it on the held-out rows before and after."""
    setup = potstill.prepare(recipe)
    train, corpus = setup.recipe.train, setup.corpus
    rows = [
        row
        for step in range(train.num_steps)
        for row in corpus.order(train.seed).rows(step, train.rows_per_step)
    ]
    dataset: Any = Subset(potstill.RowsDataset(corpus.train), rows)
    if setup.recipe.rollouts is not None:
        dataset = prompts_of(setup)
    arguments: dict[str, Any] = {
        "max_steps": train.num_steps,
        "learning_rate": train.lr,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    trainer = potstill.DistillTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        TrainingArguments(output_dir=out, **arguments | ADAMW | options),
        teacher=setup.teacher,
        objective=Objective(kd_weight=0.7, ce_weight=0.3, chunk=16),
        rollouts=None if rollouts is None else potstill.RolloutsConfig(**rollouts),
        train_dataset=dataset,
        eval_dataset=potstill.RowsDataset(corpus.heldout),
        data_collator=partial(collated, setup.tokenizer),
        processing_class=setup.tokenizer,
    )
    if not options.get("fsdp"):  # which accelerate sets up with the optimizer alone
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    trainer.evaluate()
    return trainer


def shards_on_a_cpu() -> None:
    """Accelerate has FSDP for GPUs alone, and on a CPU would take DDP without a word."""
    PartialState(cpu=True, backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    torch.set_num_threads(1)
    order = json.loads(Path(sys.argv[1]).read_text())
    if order.get("fsdp"):
        shards_on_a_cpu()
        order["accelerator_config"] = {"use_configured_state": True}
    trainer = train(**order)
    print(f"wrapped: {type(trainer.model_wrapped).__name__}")
    trainer.save_model(str(Path(order["out"]) / "student"))
    if trainer.is_world_process_zero():
        (Path(order["out"]) / "logged.json").write_text(json.dumps(trainer.state.log_history))
