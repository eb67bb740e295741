"""What other trainers call the fields of a recipe, where the spelling does not lead to potstill's name."""

from __future__ import annotations

from collections.abc import Mapping

_ROWS = "train.rows_per_step, the rows of an optimizer step on all devices"
_MICRO = (
    "train.rows_per_micro_batch, and a step has train.rows_per_step: this, times the steps of accumulation, times the"
    " devices"
)
_ROW_LENGTH = "corpus.tokens_per_row"
_WEIGHTS = "objective.kd_weight and objective.ce_weight: alpha and 1 - alpha, or the other way round"
_RATIO = "train.warmup, in steps: the ratio times train.steps"
_PRECISION = "train.precision: bfloat16 or float32"
_HELDOUT = "corpus.heldout_rows, a number of rows and not a share"

_WORDS: dict[str, str] = {
    "learning_rate max_lr peak_lr": "train.lr",
    "min_lr min_lr_ratio min_lr_rate": "train.final_lr_ratio, as a share of train.lr",
    "batch_size train_batch_size global_batch_size effective_batch_size total_batch_size": _ROWS,
    "per_device_train_batch_size per_device_batch_size micro_batch_size mini_batch_size device_batch_size": _MICRO,
    "gradient_accumulation_steps gradient_accumulation grad_accum accumulate_grad_batches": _MICRO,
    "max_steps num_steps total_steps num_train_steps training_steps iterations max_iters": "train.steps",
    "num_train_epochs num_epochs max_epochs n_epochs": "train.epochs",
    "max_seq_length max_seq_len max_length seq_length seq_len sequence_length sequence_len": _ROW_LENGTH,
    "block_size context_length max_context_length cutoff_len model_max_length": _ROW_LENGTH,
    "alpha kd_alpha distill_alpha distillation_alpha kd_ratio": _WEIGHTS,
    "temperature kd_temperature distill_temperature distillation_temperature tau": "objective.temperature",
    "loss loss_type loss_fn kd_loss distill_loss distillation_loss criterion": "objective.divergence",
    "warmup_steps num_warmup_steps warmup_iters": "train.warmup",
    "warmup_ratio warmup_fraction": _RATIO,
    "lr_scheduler_type lr_scheduler scheduler lr_schedule lr_decay_style": "train.schedule",
    "max_grad_norm grad_clip gradient_clip_val gradient_clipping clip_grad_norm clip_grad": "train.clip",
    "gradient_checkpointing use_gradient_checkpointing": "train.activation_checkpointing",
    "bf16 fp16 mixed_precision amp autocast tf32": _PRECISION,
    "torch_dtype dtype": f"teacher.dtype for the teacher, and {_PRECISION} for the student",
    "freeze_embeddings freeze_layers frozen_parameters frozen_layers": "train.freeze, names of weights",
    "adam_beta1": "train.beta1",
    "adam_beta2": "train.beta2",
    "betas adam_betas": "train.beta1 and train.beta2",
    "optim optimizer_type": "train.optimizer",
    "save_steps save_interval checkpoint_every checkpoint_interval": "train.save_every",
    "eval_steps eval_interval evaluation_steps val_check_interval eval_every": "eval.every",
    "logging_steps log_every log_interval log_every_n_steps": "not needed: every step is in metrics.jsonl",
    "output_dir out_dir save_dir run_name experiment_name": "the run's folder, which --out names",
    "resume_from_checkpoint resume resume_from": "--resume, a flag of distill",
    "report_to logger loggers trackers": "sinks",
    "fsdp deepspeed strategy ddp": "train.parallel: ddp or fsdp",
    "torch_compile use_compile": "train.compile",
    "num_gpus n_gpu gpus world_size num_processes": "torchrun --nproc-per-node N -m potstill distill",
    "load_in_8bit load_in_4bit": "teacher.weights",
    "teacher_model teacher_model_name_or_path teacher_name_or_path teacher_path": "teacher.model",
    "student_model student_model_name_or_path student_name_or_path student_path": "student.model",
    "model_name_or_path model_name base_model pretrained": "student.model, and teacher.model for the teacher",
    "dataset dataset_name dataset_path data data_path train_file train_data data_files": "corpus.path",
    "text_column text_field dataset_text_field content_field": "corpus.field, or corpus.column of parquet and hf",
    "val_size eval_size test_size validation_split val_split eval_split": _HELDOUT,
    "lora peft peft_config lora_config": "student.lora",
    "r lora_r lora_rank": "student.lora.rank",
    "lora_alpha": "student.lora.alpha",
    "lora_dropout": "student.lora.dropout",
    "target_modules lora_target_modules": "student.lora.targets",
    "training trainer training_args training_arguments": "train",
    "distillation distill kd": "objective",
    "num_layers num_hidden_layers n_layers": "student.layers, of student.name: cut",
}
FIELDS: dict[str, str] = {word: field for words, field in _WORDS.items() for word in words.split()}
"""Another trainer's name of a field -> potstill's, with the conversion where the meaning differs."""

NAMES: Mapping[str, Mapping[str, str]] = {
    "divergence": {
        **dict.fromkeys(("kl", "kld", "kl_div", "kldiv", "kl_divergence", "fkl"), "forward_kl"),
        **dict.fromkeys(("rkl", "minillm"), "reverse_kl"),
        **dict.fromkeys(("js", "gkd", "generalized_jsd"), "jsd"),
        **dict.fromkeys(("tv", "total_variation"), "tvd"),
        "skl": "skew_kl",
    },
    "teacher": {
        **dict.fromkeys(("hf", "huggingface", "transformers", "model", "checkpoint", "gguf"), "torch"),
        **dict.fromkeys(("vllm", "sglang", "openai", "api", "http"), "server"),
        **dict.fromkeys(("cache", "cached", "offline", "stored", "logits"), "store"),
        "ensemble": "mixture",
    },
    "student": {
        **dict.fromkeys(("hf", "huggingface", "transformers", "model", "torch", "pretrained"), "checkpoint"),
        **dict.fromkeys(("prune", "pruned", "truncate", "truncated"), "cut"),
        **dict.fromkeys(("scratch", "random"), "config"),
    },
    "corpus": {
        **dict.fromkeys(("dataset", "datasets", "huggingface", "hub"), "hf"),
        **dict.fromkeys(("json", "ndjson"), "jsonl"),
        **dict.fromkeys(("txt", "folder", "files", "code"), "text"),
        **dict.fromkeys(("sft", "messages", "sharegpt", "conversations", "instruct"), "chat"),
        **dict.fromkeys(("bin", "memmap", "npy"), "tokens"),
        **dict.fromkeys(("interleave", "mixture"), "mix"),
    },
}
"""Another's name of an entry of the registry -> potstill's, by kind."""


VALUES = {
    **dict.fromkeys(("fp32", "f32", "float", "32"), "float32"),
    **dict.fromkeys(("bf16", "bf16-mixed"), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "f16", "16-mixed"), "float16"),
}


def meant_field(key: str) -> str | None:
    """What potstill has for another trainer's field, as a phrase that begins with its name."""
    return FIELDS.get(key.lower().replace("-", "_"))


def meant_name(kind: str, name: str) -> str | None:
    return NAMES.get(kind, {}).get(name.lower().replace("-", "_"))
