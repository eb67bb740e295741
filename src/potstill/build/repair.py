"""Which training rows a cut student is repaired on, and in what order its parts are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from potstill.models.causal_lm import CausalLM
from potstill.models.pruning import stack_of
from potstill.models.refit import Refit, refit_channels, refit_heads, set_weights
from potstill.models.repair import NO_GAP, Repair, fold_gaps
from potstill.types import Batch, Rows

REPAIR_ROWS = 16
"""Training rows to which a cut student is fitted; behind them, as many as `JUDGE_ROWS` say whether that was good."""
JUDGE_ROWS = 4
BATCH_ROWS = 4
"""Of these, read at once."""


def fitted_and_judged(rows: Rows) -> tuple[list[Batch], list[Batch]]:
    """Those to which a cut student is fitted, and those that say whether that was good."""
    count = min(REPAIR_ROWS + JUDGE_ROWS, len(rows))
    judges = min(JUDGE_ROWS, count // 2)
    fitted, judged = (
        [rows.batch([*part[at : at + BATCH_ROWS]]) for at in range(0, len(part), BATCH_ROWS)]
        for part in (range(count - judges), range(count - judges, count))
    )
    return fitted, judged


def repaired(
    uncut: CausalLM,
    student: CausalLM,
    keep: Sequence[int],
    channels: Mapping[int, Tensor],
    groups: Mapping[int, Tensor],
    rows: Rows,
    note: Callable[[str], None],
) -> Repair:
    """What layers, channels and heads that were left out did, made up for by what was kept.

    Args:
        keep: numbers of the teacher's layers, in the student's order.
        channels: those of each MLP that were kept, by the teacher's layer; empty: all.
        groups: the same, of the KV groups of each attention.
        rows: training rows.
        note: called with one line for each step.
    """
    student.rows_are_packed = uncut.rows_are_packed
    fitted, judged = fitted_and_judged(rows)
    stack = stack_of(uncut)[0].removesuffix(".")
    refits, refitted = dict[str, Refit](), dict[str, Tensor]()
    before = dict[str, Tensor]()
    try:
        for name, what, refit, of in (
            ("refit_heads", "heads", refit_heads, groups),
            ("refit", "channels", refit_channels, channels),
        ):
            if not of or not any(len(batch.positions_N) for batch in judged):
                continue
            refits[name], weights = refit(uncut, student, stack, of, fitted, judged)
            done = "are left as they are" if refits[name].ridge is None else "make up for the others"
            kl = f"KL {refits[name].kl_before:.3f} -> {refits[name].kl_after:.3f}"
            note(f"student: the {what} that were kept {done}: {kl}")
            before |= {each: student.hf.get_parameter(each).detach().clone() for each in weights}
            set_weights(student, weights)  # what is next is fitted behind it
            refitted |= weights
        repair = fold_gaps(uncut, student, stack, keep, fitted, judged, note)
    finally:
        set_weights(student, before)  # the first rank's choice is that of all
    if repair.why_not is not None and not ((channels or groups) and repair.why_not == NO_GAP):
        note(f"student: repair: nothing is folded: {repair.why_not}")
    weights = refitted | repair.weights
    return replace(repair, weights=weights, refit=refits.get("refit"), refit_heads=refits.get("refit_heads"))
