"""What the student writes by itself, measured: KL to the teacher on its own text, whether it ends, how it repeats.

own/reverse_kl   KL(student || teacher) at temperature 1, nats per position that the student wrote
own/forward_kl   KL(teacher || student) there
own/student_nll  nats per token that it wrote, under itself; its mean is the student's entropy where it samples from all
own/teacher_nll  the same under the teacher, which finds unlikely what it would not write
own/tokens       mean length; own/ended the share that ends by itself; own/distinct_4 the share of distinct 4-grams

With a teacher whose targets are few ids and a bucket for the rest, both KL are those of these classes: lower bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from potstill.data.completions import Completion, CompletionRows, figures
from potstill.data.prompts import Prompt
from potstill.losses.divergences import forward_kl, reverse_kl
from potstill.losses.targets import SparseTargets
from potstill.models.student import Student
from potstill.recipe.sections_rollouts import RolloutsConfig
from potstill.training.sampling import write
from potstill.types import Teacher, answer

SEED = 0
"""Of the samples: the same numbers at every evaluation and for every seed of a run."""


def own_samples(
    student: Student,
    teacher: Teacher,
    prompts: Sequence[Prompt],
    config: RolloutsConfig,
    ends: frozenset[int],
    rows_per_batch: int,
    poll: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], list[Completion]]:
    """One sample of each prompt at temperature 1, and what it comes to; in eval mode, with the weights of the file that
    the student is trained for.

    `poll` is called with every token and batch and may raise.
    """
    plain = RolloutsConfig(max_new_tokens=config.max_new_tokens)
    named = [(f"own sample {number}", prompt) for number, prompt in enumerate(prompts)]
    was_training = student.training
    student.eval()
    try:
        with student.on_grid():
            written = write(student.decode, named, plain, ends, SEED, poll)
            measured = _measured(student, teacher, CompletionRows(written), rows_per_batch, poll)
    finally:
        student.train(was_training)
    own = {f"own/{name.partition('/')[2]}": value for name, value in figures(written).items()}
    own.pop("own/truncated")
    return measured | own, written


@torch.no_grad()
def _measured(
    student: Student, teacher: Teacher, rows: CompletionRows, rows_per_batch: int, poll: Callable[[], None]
) -> dict[str, float]:
    sums = dict.fromkeys(("forward_kl", "reverse_kl", "student_nll", "teacher_nll"), 0.0)
    for start in range(0, len(rows), rows_per_batch):
        poll()
        batch = rows.batch(range(start, min(start + rows_per_batch, len(rows)))).to(student.model.device)
        targets = answer(teacher, batch)
        for part, logits_CV in student.logits(batch):
            logp_CV, labels_C1 = logits_CV.log_softmax(-1), batch.labels_N[part, None]
            own_CS, teacher_CS = targets[part].on_support(logp_CV, 1.0)
            values = {
                "forward_kl": forward_kl(own_CS, teacher_CS),
                "reverse_kl": reverse_kl(own_CS, teacher_CS),
                "student_nll": -logp_CV.gather(-1, labels_C1),
            }
            classes_C1 = labels_C1
            if isinstance(sparse := targets[part], SparseTargets):
                classes_C1 = sparse.classes_of(labels_C1[:, 0])[:, None]
            values["teacher_nll"] = -teacher_CS.gather(-1, classes_C1)
            for name, value in values.items():
                sums[name] += float(value.sum())
    return {f"own/{name}": value / rows.supervised for name, value in sums.items()}
