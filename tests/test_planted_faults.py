"""Each promise proven by breaking it: a fault planted in a copy of the package turns its test red.

The faults are those that trained models wrongly elsewhere while the curve looked fine. A fault whose text is
no longer in the source fails here too, so that the list cannot go stale in silence.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import planted
import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Fault:
    file: str
    right: str
    wrong: str
    test: str
    """What must go red: a pytest node below tests/."""


STEP = "test_invariance.py::test_a_step_is_plain_autograd_s"
ENGINES = "losses/test_fused.py::test_the_two_engines_agree"
SANDBOX = "evals/sandbox/test_sandbox.py::test_"
CODECS = "store/test_codecs.py::test_"
STORE = "store/test_store.py::test_"
DATA = "training/test_data.py::test_"
REFUSAL = "publish/test_publish.py::test_what_must_not_be_published_is_refused_in_one_line"
OWN = "training/test_rollouts.py::test_"
MIX = "data/test_mixing.py::test_"
NARROW = "models/test_stream_width.py::test_"
FAULTS = {
    "embeddings of a narrower Gemma are multiplied by the root of another hidden size": Fault(
        "models/stream_width.py",
        "    if abs(ratio - 1) <= TOLERANCE:",
        "    if True:",
        NARROW + "channels_that_are_empty_go_first_and_cost_nothing[Gemma2]",
    ),
    "the first channels of the residual stream are kept, not those of most importance": Fault(
        "models/stream_width.py",
        "    return most_important(stream_importance(model, dims, batches), hidden_size)",
        "    return torch.arange(hidden_size)",
        NARROW + "a_llama_is_its_tensors_sliced_by_hand",
    ),
    "each step's shares of a mix are rounded by themselves": Fault(
        "data/shares.py",
        "urgent.append((due, not hurries_next, -chain, i))",
        "urgent.append((-rest, False, 0, i))",
        f"{MIX}shares_are_exact_for_any_weights",
    ),
    "a source of a mix may come too early": Fault(
        "data/shares.py",
        "if rest and count * D // rest <= step:",
        "if rest:",
        f"{MIX}shares_are_exact_for_any_weights",
    ),
    "of rows of a mix that are due at once any is taken": Fault(
        "data/shares.py",
        "urgent.append((due, not hurries_next, -chain, i))",
        "urgent.append((due, not hurries_next, 0, i))",
        f"{MIX}shares_are_exact_for_any_weights",
    ),
    "what is due first in a mix is not told from what can wait": Fault(
        "data/shares.py",
        "urgent.append((due, not hurries_next, -chain, i))",
        "urgent.append((due, False, 0, i))",
        f"{MIX}shares_are_exact_for_any_weights",
    ),
    "a source of a mix is read in one order in every epoch": Fault(
        "data/fixed.py",
        "PCG64([seed, epoch, *own])",
        "PCG64([seed, 0, *own])",
        f"{MIX}every_epoch_of_a_source_is_all_its_rows_once_in_another_order",
    ),
    "a source of a mix begins each step with its first rows": Fault(
        "data/mixing.py",
        "for position in range(start, end)]",
        "for position in range(end - start)]",
        f"{MIX}every_epoch_of_a_source_is_all_its_rows_once_in_another_order",
    ),
    "the sources of a step follow each other": Fault(
        "data/mixing.py",
        "return [rows[place] for place in shuffled]",
        "return rows",
        f"{MIX}micro_batches_have_rows_of_several_sources",
    ),
    "a batch of a mix numbers rows as their source does": Fault(
        "data/mixing.py",
        "return batch_of([(self.parts[part], own) for part, own in places], [self.first_row + r for r in rows])",
        "return batch_of([(self.parts[part], own) for part, own in places], [own for _, own in places])",
        f"{MIX}a_row_of_a_mix_is_the_row_of_its_source",
    ),
    "what one source holds out, another trains on": Fault(
        "data/mixing.py",
        "parts = _without_held_out(parts)",
        "parts = dict(parts)",
        f"{MIX}a_document_that_one_source_holds_out_is_in_no_training_row_of_another",
    ),
    "the figures of all sources are the mean of theirs": Fault(
        "evals/heldout.py",
        'metrics = {f"heldout/{metric}": value / total["positions"] for metric, value in total.items()}',
        'metrics = {f"heldout/{metric}": sum(own[metric] / own["positions"] for own in sums.values()) / len(sums)'
        " for metric in total}",
        f"{MIX}a_run_measures_and_records_every_source",
    ),
    "a source's figures are of all rows": Fault(
        "workflows/distill.py",
        "corpus.heldout, size, poll, corpus.heldout_parts)",
        "corpus.heldout, size, poll, {n: range(len(corpus.heldout)) for n in corpus.parts})",
        f"{MIX}a_run_measures_and_records_every_source",
    ),
    "a resumed run does not look at the files of a source": Fault(
        "workflows/start.py",
        "            own = by_file(part)\n",
        "            own = {}\n",
        f"{MIX}a_changed_file_is_named_with_its_source_on_resume",
    ),
    "one source alone is decontaminated": Fault(
        "build/corpus.py",
        "_packed(part, source.afresh(), beat)",
        "_packed(part, source.afresh() if not parts else dataclasses.replace(source, decontamination=None), beat)",
        f"{MIX}every_source_is_decontaminated_and_the_counts_are_added_up",
    ),
    "all sources share the counts of what was found in them": Fault(
        "build/corpus.py",
        "_packed(part, source.afresh(), beat)",
        "_packed(part, source, beat)",
        f"{MIX}every_source_is_decontaminated_and_the_counts_are_added_up",
    ),
    "rows of a step that was left out count as read": Fault(
        "workflows/receipt.py",
        "for step in outcome.left_out if read else ():",
        "for step in ():",
        f"{MIX}rows_of_a_step_that_the_guard_left_out_are_not_counted_as_read",
    ),
    "prompts of a mix are taken one as often as the other": Fault(
        "data/prompts.py",
        "return MixedOrder(tuple(self.of), tuple(map(len, self.of.values())), self.weights, seed)",
        "return Order(len(self), seed)",
        f"{MIX}the_student_goes_on_from_every_source_in_its_share",
    ),
    "a layer is left out by what it does to the first source of a mix": Fault(
        "data/mixing.py",
        "return _Chosen(self.train, self._by_turns())",
        "return self.train",
        f"{MIX}the_first_rows_in_proportion_are_of_all_sources",
    ),
    "a source's rows are cached over another's": Fault(
        "recipe/sections_mix.py",
        "os.path.join(self.shards, str(each.source))",
        "self.shards",
        f"{MIX}each_source_has_its_own_cache_that_it_shares_with_the_corpus_alone",
    ),
    "cross-entropy on what the student wrote": Fault(
        "models/student.py",
        "replace(self.objective, ce_weight=0.0) if batch.is_rollout else self.objective",
        "self.objective",
        f"{OWN}no_cross_entropy_falls_on_what_the_student_wrote",
    ),
    "loss on prompts": Fault(
        "data/completions.py",
        "np.arange(len(each.ids)) >= len(each.prompt.ids)",
        "np.arange(len(each.ids)) >= 1",
        f"{OWN}prompts_bear_no_loss_and_the_end_does",
    ),
    "teacher reads the student's template": Fault(
        "types.py",
        "read = batch if batch.for_teacher is None else batch.for_teacher",
        "read = batch",
        "training/test_prompts.py::test_the_teacher_reads_its_own_template_and_the_same_completion",
    ),
    "rows of a step that is taken again are other ones": Fault(
        "training/rollouts.py",
        "self._read(first) or self._write",
        "None or self._write",
        f"{OWN}rows_of_a_step_that_is_taken_again_are_read_and_not_written",
    ),
    "reversed KL": Fault(
        "losses/divergences.py",
        'return _kl(teacher_logp_NS, student_logp_NS)\n\n\n@register("divergence")\ndef reverse_kl',
        'return _kl(student_logp_NS, teacher_logp_NS)\n\n\n@register("divergence")\ndef reverse_kl',
        ENGINES,
    ),
    "missing T squared": Fault("losses/objective.py", "kd_C = T**2 * kd_C", "kd_C = 1 * kd_C", ENGINES),
    "temperature on one side only": Fault(
        "losses/targets.py", "logits_NV / temperature, dim=-1", "logits_NV, dim=-1", ENGINES
    ),
    "reversed KL, written out": Fault(
        "losses/fused.py",
        "gradient_CV.sub_(p_CV.mul_(weight / total_C1))",
        "gradient_CV.add_(p_CV.mul_(weight / total_C1))",
        STEP,
    ),
    "missing T squared, written out": Fault(
        "losses/fused.py", "kd_C = T**2 * _forward_kl", "kd_C = 1 * _forward_kl", ENGINES
    ),
    "missing T of the chain, written out": Fault(
        "losses/fused.py", "T * weights.kd / softened_C1", "weights.kd / softened_C1", STEP
    ),
    "raw logits back-propagated, written out": Fault(
        "losses/fused.py",
        "q_CV = torch.exp(shifted_CV, out=logits_CV)",
        "q_CV = shifted_CV.exp()",
        "test_invariance.py::test_a_student_equal_to_its_teacher_has_no_kl_and_no_gradient",
    ),
    "a derivative without the softmax's part": Fault(
        "losses/fused.py",
        "grad_logq_CV.sub_(softened_CV * grad_logq_CV.sum(-1, keepdim=True)).mul_(T * weights.kd)",
        "grad_logq_CV.mul_(T * weights.kd)",
        ENGINES,
    ),
    "the temperature's chain lost for other divergences": Fault(
        "losses/fused.py",
        "keepdim=True)).mul_(T * weights.kd)",
        "keepdim=True)).mul_(T**2 * weights.kd)",
        ENGINES,
    ),
    "swapped weights": Fault(
        "losses/objective.py",
        "self.ce_weight * ce_C + self.kd_weight * kd_C",
        "self.kd_weight * ce_C + self.ce_weight * kd_C",
        ENGINES,
    ),
    "mean of means": Fault(
        "training/loop.py",
        'terms["loss"] / step.positions',
        'terms["loss"] / len(batch.positions_N) / len(step.share)',
        STEP,
    ),
    "divided twice": Fault(
        "training/loop.py", '["loss"] / step.positions', '["loss"] / step.positions / len(step.share)', STEP
    ),
    "scaled rope lost on an older library": Fault(
        "models/portable.py",
        'rope.get("rope_type", "default") != "default"',
        'rope.get("rope_type") == "default"',
        "models/test_student.py::test_an_older_transformers_finds_the_rope_scaling",
    ),
    "the least channels kept": Fault(
        "models/matrix_inputs.py",
        ".sort(descending=True, stable=True)",
        ".sort(descending=False, stable=True)",
        "models/test_width.py::test_channels_that_add_nothing_are_dropped_first",
    ),
    "values of other heads than their keys": Fault(
        "models/heads.py",
        '"v_proj": kv_R',
        '"v_proj": (kv_R + self.head_dim) % kv',
        "models/test_heads.py::test_a_student_is_its_teacher_with_the_columns_of_other_heads_set_to_zero",
    ),
    "last row only": Fault(
        "models/student.py",
        "return hidden_BTD.flatten(0, 1)[batch.positions_N]",
        "hidden_ND = hidden_BTD.flatten(0, 1)[batch.positions_N]\n"
        "        last = batch.positions_N >= (len(hidden_BTD) - 1) * hidden_BTD.shape[1]\n"
        "        return torch.where(last[:, None], hidden_ND, hidden_ND.detach())",
        "test_invariance.py::test_every_row_trains_so_opposite_rows_cancel",
    ),
    "raw logits back-propagated": Fault(
        "losses/objective.py",
        '(grad_CV,) = torch.autograd.grad(values["loss"].sum(), product_CV)',
        "grad_CV = product_CV.detach()",
        ENGINES,
    ),
    "upstream gradient ignored": Fault(
        "losses/objective.py",
        "_scaled(grad, upstream[-1], dtype)",
        "_scaled(grad, torch.ones(()), dtype)",
        "test_invariance.py::test_a_zero_upstream_gradient_moves_no_weight",
    ),
    "softcap ignored": Fault(
        "types.py",
        "if self.softcap is not None:",
        "if self.softcap is None and False:",
        "teachers/test_hf.py::test_logits_are_the_library_s_own_in_families_that_scale_or_cap_them",
    ),
    "unshifted mask": Fault(
        "data/packing.py",
        "following = slice(first + 1, min(last + 1, len(self.ids)))",
        "following = slice(first, last)",
        "data/test_packing.py",
    ),
    "documents see each other": Fault(
        "data/packing.py",
        "np.maximum.accumulate(begin)",
        "0",
        "data/test_packing.py",
    ),
    "labels cross documents": Fault(
        "data/memmap.py", "bears[:1] = False", "bears[:1] = True", "data/test_packing.py"
    ),
    "learning rate constant": Fault(
        "training/loop.py",
        "set_lr(optimizer, lr_at(step.number, plan))",
        "set_lr(optimizer, plan.lr)",
        "training/test_loop.py",
    ),
    "learning rate logged but not set": Fault(
        "training/optim.py", 'group["lr"] = lr', "pass", "training/test_loop.py"
    ),
    "embedding frozen": Fault(
        "training/optim.py",
        "if p.requires_grad]",
        "if p.requires_grad and len(p) != 258]",
        "training/test_loop.py",
    ),
    "best chosen by the last evaluation": Fault(
        "training/loop.py",
        'if not outcome.best or metrics["heldout/loss"] < outcome.best["heldout/loss"]:',
        "if True:",
        "training/test_loop.py",
    ),
    "the padded end of a vocabulary not masked": Fault(
        "models/causal_lm.py", "known=self.known,", "known=None,", "test_padding.py"
    ),
    "the padded end may be generated": Fault(
        "models/causal_lm.py",
        "generation.suppress_tokens = sorted(",
        "generation.unused = sorted(",
        "test_padding.py",
    ),
    "an evaluation that a signal cut short is forgotten": Fault(
        "workflows/distill.py",
        "if outcome.evaluated < recipe.train.num_steps:",
        "if outcome.step < recipe.train.num_steps:",
        "training/test_guard.py",
    ),
    "the gradient of a refused step is kept": Fault(
        "training/guard.py",
        "        self.student.zero_grad(set_to_none=True)\n        fault =",
        "        fault =",
        "training/test_guard.py",
    ),
    "a NaN is below the ceiling": Fault(
        "training/guard.py",
        "if not math.isfinite(totals.grad_norm):",
        "if totals.grad_norm > 1e30:",
        "training/test_guard.py",
    ),
    "rows that the student writes are asked for before its update": Fault(
        "training/prefetch.py",
        "elif self.data.fixed and self.is_taken(",
        "elif self.is_taken(",
        f"{DATA}rows_that_the_student_writes_are_of_the_weights_after_the_last_update",
    ),
    "rows that the student wrote once are kept": Fault(
        "training/prefetch.py",
        "return Step(number, self.data.step(number), self.ranks)",
        "self._rows = getattr(self, '_rows', None) or self.data.step(number)\n"
        "        return Step(number, self._rows, self.ranks)",
        f"{DATA}rows_that_the_student_writes_are_of_the_weights_after_the_last_update[False]",
    ),
    "a step's rows are asked for before the last update, whatever the device": Fault(
        "training/loop.py",
        "        totals.clip(plan.clip)\n",
        "        prefetch._next_step = prefetch._make(outcome.step + 1)\n        totals.clip(plan.clip)\n",
        f"{DATA}rows_that_the_student_writes_are_of_the_weights_after_the_last_update[False]",
    ),
    "a step's rows are packed twice": Fault(
        "training/prefetch.py",
        "if made is not None and made.number == number:",
        "if False:",
        f"{DATA}fixed_rows_are_asked_for_once_in_order_and_ahead_only_where_prefetch_is[True]",
    ),
    "a step that the guard leaves out is prefetched": Fault(
        "training/loop.py",
        "return number < recipe.train.num_steps and number + 1 not in outcome.left_out",
        "return number < recipe.train.num_steps",
        f"{DATA}a_step_that_is_left_out_is_not_asked_for[True]",
    ),
    "a row taken out of a batch keeps its place in it": Fault(
        "types.py",
        "self.positions_N[own_N] - b * num_tokens,",
        "self.positions_N[own_N],",
        "data/test_fixed.py::test_a_row_of_a_batch_is_the_row_packed_alone",
    ),
    "a file of a checkpoint is not on the disk when it takes its name": Fault(
        "training/checkpoint.py",
        "            for path in (*fresh.iterdir(), fresh):\n                flush(path)\n",
        "",
        "io/test_atomic.py::test_everything_is_on_the_disk_before_it_takes_its_name_and_its_name_after",
    ),
    "a file of the student is not on the disk when it takes its name": Fault(
        "io/atomic.py",
        "            for path in (*_summed(fresh), fresh / SUMS, fresh):\n                flush(path)\n",
        "            _summed(fresh)\n",
        "io/test_atomic.py::test_everything_is_on_the_disk_before_it_takes_its_name_and_its_name_after",
    ),
    "older checkpoints go before the new one is read back": Fault(
        "training/checkpoint.py",
        "        try:\n            verify(place)\n",
        "        for old in self._newest_first()[CHECKPOINTS_KEPT:]:\n            remove(old)\n        try:\n            verify(place)\n",
        "io/test_atomic.py::test_no_older_checkpoint_goes_before_the_new_one_is_read_back",
    ),
    "what may not be read is damaged": Fault(
        "training/checkpoint.py",
        "                raise Unreadable(error.what, READABLE) from error\n",
        "                continue\n",
        "io/test_atomic.py::test_what_cannot_be_read_is_neither_none_nor_deleted",
    ),
    "a plug-in is no input": Fault(
        "runs/inputs.py",
        "enumerate(plugins)",
        "enumerate([])",
        "runs/test_inputs.py::test_a_run_does_not_go_on_with_another_file",
    ),
    "teacher trained along": Fault(
        "teachers/hf.py",
        "model.eval().requires_grad_(False)",
        "model.train()",
        "teachers/test_hf.py::test_it_is_a_teacher_frozen_and_in_eval_mode",
    ),
    "a copy in half precision is another model": Fault(
        "preflight/same_model.py",
        "allowed = (BF16 + F16) * torch.maximum(a.abs(), b.abs()) + F16_SMALLEST",
        "allowed = torch.zeros_like(a)",
        "preflight/test_checks.py::test_a_student_that_is_a_rounded_copy_of_its_teacher_is_refused",
    ),
    "the rate of the first group alone is read back": Fault(
        "preflight/trial_steps.py",
        'self.rates.append([*rates(self.optimizers[0]), metrics["train/lr"]])',
        'self.rates.append([rates(self.optimizers[0])[0], metrics["train/lr"]])',
        "preflight/test_checks.py::test_a_rate_that_reaches_only_the_first_group_is_red_and_not_logged",
    ),
    "shapes are compared before what the run is made of": Fault(
        "training/checkpoint.py",
        "tensors = {} if differing else _read_tensors(",
        "tensors = _read_tensors(",
        "training/test_checkpoint.py::test_a_model_of_another_shape_is_named_and_no_checkpoint_is_called_damaged",
    ),
    "no filter of system calls": Fault(
        "evals/sandbox/guest.py", "    _seccomp(libc)\n", "", f"{SANDBOX}the_right_answer_passes[landlock]"
    ),
    "no Landlock": Fault(
        "evals/sandbox/guest.py",
        "    _landlock(libc, readable)\n",
        "",
        f"{SANDBOX}the_right_answer_passes[landlock]",
    ),
    "no limit": Fault(
        "evals/sandbox/guest.py",
        "resource.setrlimit(getattr(resource, name), (value, value))",
        "pass",
        f"{SANDBOX}the_right_answer_passes[landlock]",
    ),
    "an early exit is a pass": Fault(
        "evals/sandbox/judge.py",
        'raise self.failed("died", GONE) from error\n        return answer',
        'raise self.failed("passed", GONE) from error\n        return answer',
        f"{SANDBOX}the_right_answer_passes[landlock]",
    ),
    "a subclass is a literal": Fault(
        "evals/sandbox/protocol.py",
        "kind = type(value)\n",
        "kind = ([k for k in type(value).__mro__ if k in (int, str, list, dict)] or [type(value)])[0]\n",
        f"{SANDBOX}the_right_answer_passes[landlock]",
    ),
    "the exit code of the judge is a verdict": Fault(
        "evals/sandbox/sandbox.py",
        'return "error", "the test itself ran out of time or memory", used_s',
        'return ("error" if judge.returncode else "passed"), "", used_s',
        f"{SANDBOX}a_test_that_exits_has_passed_nobody[landlock]",
    ),
    "no goodbye": Fault(
        "evals/sandbox/judge.py",
        "        guest.end()\n",
        "",
        f"{SANDBOX}a_right_answer_is_not_enough[landlock]",
    ),
    "more after the goodbye": Fault(
        "evals/sandbox/judge.py",
        " or os.read(self.answers, 1):",
        ":",
        f"{SANDBOX}a_right_answer_is_not_enough[landlock]",
    ),
    "the environment goes along": Fault(
        "evals/sandbox/sandbox.py",
        'env=ENVIRONMENT,\n                cwd="/",\n                start_new_session',
        'cwd="/",\n                start_new_session',
        f"{SANDBOX}an_environment_reaches_nobody[landlock]",
    ),
    "the number of a question is not looked at": Fault(
        "evals/sandbox/judge.py",
        'if answer.pop("id", None) != number:',
        'if answer.pop("id", None) is None:',
        f"{SANDBOX}a_right_answer_is_not_enough[landlock]",
    ),
    "what a test catches is forgotten": Fault(
        "evals/sandbox/judge.py",
        "        if self.failure is not None:  # a test",
        "        if False:  # a test",
        f"{SANDBOX}a_test_that_asks_what_cannot_be_sent_is_an_error_whatever_it_catches[landlock]",
    ),
    "strings hash anew each time": Fault(
        "evals/sandbox/sandbox.py",
        'ENVIRONMENT = {"PYTHONHASHSEED": "0"}',
        'ENVIRONMENT = {"PYTHONHASHSEED": "random"}',
        f"{SANDBOX}sets_of_strings_are_listed_in_one_order[landlock]",
    ),
    "resume takes a new number": Fault(
        "preflight/auto.py",
        "return with_chunk(recipe, started.objective.chunk) if",
        "return with_chunk(recipe, 64) if",
        "preflight/test_auto.py::test_a_run_goes_on_with_the_number_that_it_began_with",
    ),
    "an unknown license is taken for a free one": Fault(
        "publish/licenses.py",
        "        if one.license is None or NO_DERIVATIVES in one.license\n",
        "        if NO_DERIVATIVES in (one.license or '')\n",
        "publish/test_publish.py::test_a_license_that_the_parents_do_not_allow_is_refused",
    ),
    "a regression is published": Fault(
        "publish/publish.py",
        "    if regressions and not allow_regression:\n",
        "    if False:\n",
        f"{REFUSAL}[behind the untouched]",
    ),
    "another file than the receipt's is published": Fault(
        "publish/publish.py",
        "        elif file_sha256(there[name]) != recorded[name]:\n",
        "        elif False:\n",
        f"{REFUSAL}[another file]",
    ),
    "weights that are no numbers are published": Fault(
        "publish/publish.py", "((bits & mask) == mask).any()", "False", f"{REFUSAL}[weights not finite]"
    ),
    "a commit is made twice": Fault(
        "publish/hub.py",
        "        if not missing and not stale and head:\n",
        "        missing = missing or list(self.plan)\n        if False:\n",
        "publish/test_hub.py::test_a_second_publish_makes_no_commit_and_sends_no_file",
    ),
    "the token is in a message": Fault(
        "publish/hub.py",
        'return text.replace(token, "[token]")',
        "return text",
        "publish/test_hub.py::test_the_token_is_in_the_authorization_header_and_nowhere_else",
    ),
    "a download is not compared": Fault(
        "publish/hub.py",
        "            if sha256 != item.sha256:\n",
        "            if False:\n",
        "publish/test_hub.py::test_a_file_served_with_other_content_is_reported",
    ),
    "the ids of a tail stand for too little": Fault(
        "store/codecs.py",
        "each_P = tail_P / drawn_P.clamp_min(1)",
        "each_P = tail_P / (drawn_P + 1)",
        f"{CODECS}a_stored_sample_is_right_on_average_and_sums_to_one",
    ),
    "the entropy of the full distribution is left out": Fault(
        "losses/fused.py",
        "return cross_C - teacher.entropy()",
        "return cross_C",
        f"{CODECS}the_loss_and_gradient_of_samples_are_the_full_ones_on_average",
    ),
    "where all is kept a sum above one keeps nothing": Fault(
        "store/sampling.py",
        "(1 - (p_CK.double().cumsum(-1) - p_CK)).clamp_min(0)",
        "(1 - (p_CK.double().cumsum(-1) - p_CK))",
        "store/test_sampling.py::test_a_draw_keeps_the_right_ids_and_its_tail_gives_the_number_of_drawn_ones",
    ),
    "kept probabilities are rounded each for itself": Fault(
        "store/bitpack.py",
        "share_CK.cumsum(-1) + uniforms_C[:, None]).floor()",
        "share_CK + uniforms_C[:, None]).floor().cumsum(-1)",
        "store/test_bitpack.py::test_a_probability_is_rounded_to_a_neighbouring_level_without_bias",
    ),
    "a block is not looked at": Fault(
        "store/shards.py",
        "if block_hash(block) != self.record.blocks[number]:",
        "if False:",
        f"{STORE}a_flipped_bit_is_found_when_its_block_is_read_and_not_before",
    ),
    "a shard is taken for the one that its place says": Fault(
        "store/reader.py",
        "if holder is None or holder.rows[number : number + 1] != [row]:",
        "if holder is None:",
        f"{STORE}a_shard_under_another_s_name_is_found_even_where_the_manifest_agrees",
    ),
    "the manifest comes before the shards": Fault(
        "store/writer.py",
        "if not (path / CERTIFICATE).exists() or any(record is None for record in records):",
        "if not (path / CERTIFICATE).exists():",
        f"{STORE}the_manifest_is_written_last_and_only_when_every_file_is_there",
    ),
    "a torn shard is kept": Fault(
        "store/writer.py",
        "if known is not None and not list(flaws(file, known)):",
        "if known is not None:",
        f"{STORE}what_is_not_whole_is_written_again",
    ),
    "two write one shard": Fault(
        "store/writer.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB, count, begin",
        "fcntl.LOCK_UN",
        f"{STORE}a_second_writer_of_a_shard_is_refused_while_the_first_lives",
    ),
    "targets of another temperature are taken": Fault(
        "teachers/stored.py",
        'if objective.temperature != manifest["temperature"]:',
        "if False:",
        "teachers/test_stored.py::test_the_top_of_a_distribution_fits_other_divergences_and_no_other_temperature",
    ),
    "any model is the captured one": Fault(
        "teachers/stored.py",
        'if weights_sha256 != recorded["weights_sha256"]:',
        "if False:",
        "teachers/test_stored.py::test_a_model_that_was_not_captured_is_refused_whatever_the_student",
    ),
    "a program outlives its harness": Fault(
        "evals/sandbox/guest.py",
        "if libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0):",
        "if False:",
        f"{SANDBOX}a_killed_process_takes_its_program_with_it[landlock]",
    ),
}


AT_EVERY_TEST = ("losses/", "test_invariance")
"""Wings whose faults are planted by `make test`; the others', and these, by `make soak`."""
SOAKED = [name for name, fault in FAULTS.items() if not fault.test.startswith(AT_EVERY_TEST)]


@pytest.mark.parametrize("name", FAULTS)
def test_the_text_that_a_fault_replaces_is_there(name: str) -> None:
    text = (ROOT / "src" / "potstill" / FAULTS[name].file).read_text()
    assert text.count(FAULTS[name].right) == 1, f"{FAULTS[name].file} no longer has it"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] if name in SOAKED else []) for name in FAULTS]
)
def test_a_planted_fault_turns_its_test_red(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    # With the compiled files, which Python takes where source and time are theirs.
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    file = tmp_path / "src" / "potstill" / fault.file
    file.write_text(file.read_text().replace(fault.right, fault.wrong))
    code = planted.run(tmp_path / "src", fault.test, tmp_path / "told.txt")
    told = (tmp_path / "told.txt").read_text()
    if fault.test.startswith(SANDBOX) and "1 skipped" in told:
        pytest.skip("no Landlock on this machine; not run")
    assert "another package was tested" not in told, told[-2000:]
    assert code == 1, f"no test went red:\n{told[-2000:]}"
    assert "1 failed" in told or "1 error" in told, told[-2000:]


def test_without_a_fault_the_same_way_is_green(tmp_path: Path) -> None:
    assert planted.run(ROOT / "src", STEP, tmp_path / "told.txt") == 0, (tmp_path / "told.txt").read_text()
