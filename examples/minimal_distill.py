"""Knowledge distillation of a causal language model: the whole method in one file.

    python examples/minimal_distill.py TEACHER TEXT STUDENT --layers 12 --steps 200

TEACHER is a Hugging Face folder or hub id, TEXT a folder of text files, STUDENT the folder to write. The
student starts as the teacher's first and last layers and learns the teacher's next-token distributions.

`potstill distill` takes the same steps, and adds recipes, checks, checkpoints, chunked logits and a receipt;
`tests/test_examples.py` holds the two to the same losses. A tensor's name ends in its shape:

    B rows of a micro-batch    R rows of the corpus    S tokens of the corpus
    T tokens of a row          V vocabulary            N positions that bear loss, flat over B * T
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

KD_WEIGHT, CE_WEIGHT, TEMPERATURE = 0.9, 0.1, 1.0
ROWS_PER_STEP, ROWS_PER_MICRO_BATCH, TOKENS_PER_ROW = 8, 4, 256
PEAK_LR, WARMUP, WEIGHT_DECAY, BETAS, CLIP = 5e-4, 10, 0.1, (0.9, 0.95), 1.0


class Batch(NamedTuple):
    input_ids_BT: Tensor
    position_ids_BT: Tensor  # restarts at 0 with every document: Transformers keeps attention inside one
    positions_N: Tensor  # into the flat B * T: where the next token is of the same document
    labels_N: Tensor  # that next token. The data has shifted; nothing after it shifts or masks


class Rows:
    """Documents end to end, cut into rows of `tokens_per_row`."""

    def __init__(self, documents: list[list[int]], tokens_per_row: int) -> None:
        ids_S = torch.tensor([token for document in documents for token in document])
        next_S = torch.tensor([token for document in documents for token in [*document[1:], -1]])  # -1: none
        kept = len(ids_S) // tokens_per_row * tokens_per_row
        self.ids_RT = ids_S[:kept].view(-1, tokens_per_row)
        self.next_RT = next_S[:kept].view(-1, tokens_per_row)
        place_T = torch.arange(tokens_per_row)
        is_start_RT = F.pad(self.next_RT[:, :-1] < 0, (1, 0))  # after the last token of a document
        self.position_ids_RT = place_T - torch.where(is_start_RT, place_T, 0).cummax(dim=1).values

    def __len__(self) -> int:
        return len(self.ids_RT)

    def batch(self, rows: Tensor) -> Batch:
        labels = self.next_RT[rows].flatten()
        positions_N = (labels >= 0).nonzero()[:, 0]
        return Batch(self.ids_RT[rows], self.position_ids_RT[rows], positions_N, labels[positions_N])


def cut(teacher: Any, num_layers: int) -> Any:
    """A copy of a Llama-like teacher with only its first and last layers."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    num_first, num_last = (num_layers + 1) // 2, num_layers // 2
    del student.model.layers[num_first : len(student.model.layers) - num_last]
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index  # its place in the key-value cache
    student.config.num_hidden_layers = num_layers
    return student


def logits_NV(model: Any, batch: Batch) -> Tensor:
    logits_BTV = model(batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False).logits
    return logits_BTV.flatten(0, 1)[batch.positions_N].float()


def loss_N(student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor) -> Tensor:
    """CE and KL(teacher || student) of each position, in nats. Never a mean: only `train_step` divides."""
    ce_N = F.cross_entropy(student_NV, labels_N, reduction="none")
    student_logp_NV = F.log_softmax(student_NV / TEMPERATURE, dim=-1)
    teacher_logp_NV = F.log_softmax(teacher_NV / TEMPERATURE, dim=-1)
    kl_N = (teacher_logp_NV.exp() * (teacher_logp_NV - student_logp_NV)).sum(dim=-1)
    # T^2 keeps the size of the gradient when the temperature changes (Hinton et al. 2015).
    return CE_WEIGHT * ce_N + KD_WEIGHT * TEMPERATURE**2 * kl_N


def train_step(student: Any, teacher: Any, batches: list[Batch], optimizer: torch.optim.Optimizer) -> float:
    """One update from all micro-batches of a step. Returns its loss, in nats per position."""
    num_positions = sum(len(batch.labels_N) for batch in batches)  # of the whole step, before any backward
    total = 0.0
    for batch in batches:
        with torch.no_grad():
            teacher_NV = logits_NV(teacher, batch)
        per_position_N = loss_N(logits_NV(student, batch), teacher_NV, batch.labels_N)
        loss = per_position_N.sum() / num_positions  # the one division: micro-batches change nothing
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(student.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def make_optimizer(student: Any) -> torch.optim.Optimizer:
    """AdamW that decays matrices, and leaves norms and biases alone."""
    matrices = {"params": [p for p in student.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY}
    vectors = {"params": [p for p in student.parameters() if p.ndim < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], betas=BETAS)


def lr_at(step: int, steps: int, peak: float = PEAK_LR, warmup: int = WARMUP) -> float:
    """A linear warm-up to the peak, then half a cosine down to a tenth of it at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil a causal language model into some of its layers.")
    for name in ("teacher", "text", "student"):
        parser.add_argument(name)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32)
    teacher.eval().requires_grad_(False)
    student = cut(teacher, options.layers).train()
    texts = [path.read_text() for path in sorted(Path(options.text).rglob("*")) if path.is_file()]
    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    rows = Rows(documents, TOKENS_PER_ROW)

    optimizer = make_optimizer(student)
    torch.manual_seed(0)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, options.steps)
        chosen = torch.randint(len(rows), (ROWS_PER_STEP,))
        batches = [rows.batch(some) for some in chosen.split(ROWS_PER_MICRO_BATCH)]
        loss = train_step(student, teacher, batches, optimizer)
        print(f"step {step + 1} of {options.steps}: {loss:.4f} nats per position")
    student.save_pretrained(options.student)
    tokenizer.save_pretrained(options.student)


if __name__ == "__main__":
    main()
