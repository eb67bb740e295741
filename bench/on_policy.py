"""Does it pay that the student writes? Arms of equal processor time, decoding charged, on a task that a program judges.

reasoning-gym's chain_sum: two numbers of at most two digits, added or subtracted; no test question is trained on. A
teacher of 1.3 million weights learns it from the right answers; students of a quarter of them, which share its
tokenizer, begin with some plain training on the teacher's answers, and go on, each for the same seconds of one core:

    CE              on the teacher's answers
    off-policy KL   forward KL on the teacher's answers
    on-policy       reverse KL on what the student writes
    on-policy JSD   the same with JSD
    half            reverse KL, half of the rows the student's
    control         the student's rows without a teacher: every sampled token gets the advantage -1

    python bench/on_policy.py prepare FOLDER            tokenizer, questions, teacher, its answers
    python bench/on_policy.py tune FOLDER [--seconds 30] [--lrs 5e-5,2e-4,1e-3]
    python bench/on_policy.py run FOLDER [--seconds 60] [--seeds 0,1,2] [--arms CE,half] [--append bench/results.jsonl]
    python bench/on_policy.py table bench/results.jsonl means and intervals of what was appended

`tune` gives each arm the learning rate at which it answers most of 300 questions that no student is trained or tested
on, and `run` uses it: an arm is not to lose because the rate is another's.
Accuracy is of greedy answers to 300 questions; KL is of one sample a prompt at temperature 1, on what the student
wrote (`own/reverse_kl`) and on what the teacher wrote (`heldout/kl`). Seconds are of processor time, so that other work
on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import equal_time

TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
QUESTIONS, TESTED, TEST_SEED, TUNING_SEED, PROMPTS = 12_000, 300, 999, 998, 4_000
TEMPLATE = (
    "{% for m in messages %}{{ '<q>' if m.role == 'user' else '<a>' }}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
TEACHER = {"hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 4, "num_attention_heads": 4}
STUDENT = {"hidden_size": 80, "intermediate_size": 240, "num_hidden_layers": 4, "num_attention_heads": 4}
FIXED = "corpus: {{name: chat, path: {path}, tokens_per_row: 256, heldout_rows: 8}}"
WRITTEN = "corpus: {name: prompts, path: prompts.jsonl, tokens_per_row: 48, heldout_rows: 64}"
MIXED = (
    "corpus: {name: chat, path: written/corpus.jsonl, packing: false, tokens_per_row: 48, heldout_rows: 8}"
)
OF_TEACHER = (
    FIXED.format(path="gold.jsonl")
    + """
teacher: {name: fixture, vocab_size: VOCAB}
student: {name: config, model: teacher}
objective: {kd_weight: 0, ce_weight: 1}
train: {steps: 3000, rows_per_step: 12, lr: 2e-3, warmup: 100, weight_decay: 0.01, device: cpu}
eval: {every: 1000}
allow_weak_teacher: true
"""
)
PAIR = """
teacher: {name: torch, model: taught/student}
student: {name: checkpoint, model: START}
allow_weak_teacher: true
"""
KL = "objective: {divergence: DIVERGENCE, kd_weight: 1, ce_weight: 0}\n"
OWN = "rollouts: {max_new_tokens: 6, fraction: SHARE}\n"
PLAIN = "objective: {kd_weight: 0, ce_weight: 1}\n"
ON_OWN = "train: {steps: STEPS, rows_per_step: 64, lr: LR, warmup: 10, weight_decay: 0.01, device: cpu}\n"
ON_TEXT = "train: {steps: STEPS, rows_per_step: 8, lr: LR, warmup: 10, weight_decay: 0.01, device: cpu}\n"
TEXT = FIXED.format(path="written/corpus.jsonl")
ARMS = {
    "CE": TEXT + PAIR + PLAIN + ON_TEXT,
    "off-policy KL": TEXT + PAIR + KL.replace("DIVERGENCE", "forward_kl") + ON_TEXT,
    "on-policy": WRITTEN + PAIR + KL.replace("DIVERGENCE", "reverse_kl") + OWN.replace("SHARE", "1") + ON_OWN,
    "on-policy JSD": WRITTEN + PAIR + KL.replace("DIVERGENCE", "jsd") + OWN.replace("SHARE", "1") + ON_OWN,
    "half": MIXED + PAIR + KL.replace("DIVERGENCE", "reverse_kl") + OWN.replace("SHARE", "0.5") + ON_OWN,
    "control": WRITTEN + PAIR + KL.replace("DIVERGENCE", "reverse_kl") + OWN.replace("SHARE", "1") + ON_OWN,
}
KLS = ("heldout_kl", "own_reverse_kl")
START_STEPS = 1500
PER_STEP = 5, 45
"""Steps of the two short runs whose difference in seconds is that of the steps between."""


def prepare(folder: Path) -> None:
    import reasoning_gym
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from potstill import distill
    from potstill.workflows.write import write_corpus

    folder.mkdir(parents=True, exist_ok=True)
    tested, tuned_on = (
        {
            each["question"]
            for each in reasoning_gym.create_dataset("chain_sum", size=TESTED, seed=seed, **TASK)
        }
        for seed in (TEST_SEED, TUNING_SEED)
    )
    found = {
        each["question"]: each["answer"]
        for each in reasoning_gym.create_dataset("chain_sum", size=2 * QUESTIONS, seed=1, **TASK)
        if each["question"] not in tested
    }
    pairs = list(found.items())[:QUESTIONS]
    inner = Tokenizer(models.BPE())
    digits, letters = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>", "<pad>", "<q>", "<a>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    inner.train_from_iterator([question for question, _ in pairs[:2000]], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = TEMPLATE
    for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=0, pad_token_id=1, **shape,
        )  # fmt: skip
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    said = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    (folder / "gold.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in said))
    (folder / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"prompt": q}) + "\n" for q in [q for q, _ in pairs if q not in tuned_on][:PROMPTS]
        )
    )
    recipe = folder / "teacher.yaml"
    text = OF_TEACHER.replace("VOCAB", str(len(tokenizer)))
    recipe.write_text(text.replace("gold.jsonl,", "gold.jsonl, tokenizer: teacher,"))
    if not (folder / "taught" / "receipt.json").exists():
        distill(recipe, out=folder / "taught")
    print(
        json.dumps({"bench": "on_policy", "what": "teacher", **score(folder / "taught" / "student", folder)}),
        flush=True,
    )
    recipe = folder / "write.yaml"
    pair = PAIR.replace("checkpoint, model: START", "config, model: student")
    text = WRITTEN + pair + OWN.replace("SHARE", "1") + ON_OWN.replace("STEPS", "20").replace("LR", "1e-4")
    recipe.write_text(text + "write: {max_new_tokens: 8, temperature: 0, prompts_at_once: 64}\n")
    write_corpus(recipe, out=folder / "written")


def score(model: Path, folder: Path, question_seed: int = TEST_SEED) -> dict[str, float]:
    """Accuracy of greedy answers to the test questions, or to those of another seed."""
    task = {
        "source": "reasoning_gym",
        "task": "chain_sum",
        "size": TESTED,
        "options": TASK,
        "seed": question_seed,
    }
    out = folder / "scores" / f"{model.parent.name}-{question_seed}"
    found = equal_time.asked(model, task | {"max_new_tokens": 8}, out)["accuracy"]
    return {"accuracy": found["value"], "low": found["low"], "high": found["high"]}


def arm(
    folder: Path, name: str, seed: int, seconds: float, lrs: Sequence[float], question_seed: int = TEST_SEED
) -> Iterator[dict[str, Any]]:
    """One arm at each learning rate: its start, its steps for the time, its scores."""
    start = started(folder, seed)
    text = ARMS[name].replace("START", str(start.relative_to(folder)))

    def run(steps: int, lr: float, warmup: int) -> tuple[Path, float]:
        out = folder / "arms" / f"{name.replace(' ', '-')}-{seed}-{steps}-{lr:g}"
        given = text.replace("STEPS", str(steps)).replace("LR", f"{lr:g}")
        given = given.replace("warmup: 10", f"warmup: {warmup}")
        return equal_time.trained(folder / f"{out.name}.yaml", given, seed, out, control=name == "control")

    steps = equal_time.steps_in(seconds, {steps: run(steps, lrs[0], 2)[1] for steps in PER_STEP})
    for lr in lrs:
        student, spent = run(steps, lr, 10)
        line = {"arm": name, "seed": seed, "lr": lr, "steps": steps, "seconds": seconds}
        line |= {"processor_s": round(spent, 1)}
        yield line | score(student, folder, question_seed) | on_text(folder, student)


def started(folder: Path, seed: int) -> Path:
    """The student that every arm of a seed begins with."""
    out = folder / "arms" / f"start-{seed}"
    if not (out / "receipt.json").exists():
        from potstill import distill

        recipe = folder / f"start-{seed}.yaml"
        text = TEXT + PAIR.replace("checkpoint, model: START", "config, model: student") + PLAIN + ON_TEXT
        recipe.write_text(text.replace("STEPS", str(START_STEPS)).replace("LR", "2e-3"))
        distill(recipe, overrides=[f"train.seed={seed}"], out=out)
        line = {"bench": "on_policy", "arm": "start", "seed": seed} | score(out / "student", folder)
        print(json.dumps(line | on_text(folder, out / "student")), flush=True)
    return out / "student"


def on_text(folder: Path, student: Path) -> dict[str, float]:
    """KL on what the student writes, and on what the teacher writes."""
    from potstill import load_recipe
    from potstill.build.resolve import resolve
    from potstill.build.setup import set_up
    from potstill.evals.heldout import heldout
    from potstill.evals.own_samples import own_samples

    recipe = folder / "measure.yaml"
    text = ARMS["on-policy"].replace("START", "student").replace("STEPS", "20")
    recipe.write_text(text.replace("LR", "1e-4"))
    setup = set_up(resolve(load_recipe(recipe), saved_student=student), lambda text: None)
    given = setup.rollouts
    assert given is not None
    own, _ = own_samples(setup.student, setup.teacher, given.heldout, given.config, given.ends, 64)
    held = heldout(setup.student, setup.teacher, setup.corpus.heldout, 64)
    names = {
        "own_reverse_kl": own["own/reverse_kl"],
        "own_ended": own["own/ended"],
        "heldout_kl": held["heldout/kl"],
    }
    return {name: round(value, 4) for name, value in names.items()}


def tune(options: argparse.Namespace) -> None:
    """The learning rates, kept in FOLDER/lrs.json."""
    chosen = {}
    for name in options.arms.split(","):
        lrs = [float(lr) for lr in options.lrs.split(",")]
        lines = list(arm(options.folder, name, options.seed, options.seconds, lrs, TUNING_SEED))
        chosen[name] = max(lines, key=lambda line: line["accuracy"])["lr"]
        for line in lines:
            equal_time.record({"bench": "on_policy", "what": "tuning"} | line, options.append)
    (options.folder / "lrs.json").write_text(json.dumps(chosen))


def run(options: argparse.Namespace) -> None:
    chosen = json.loads((options.folder / "lrs.json").read_text())
    lines = []
    for seed in map(int, options.seeds.split(",")):
        for name in options.arms.split(","):
            lr = chosen[name if name in chosen else "on-policy"]  # the control's is that of what it controls
            for line in arm(options.folder, name, seed, options.seconds, [lr]):
                lines.append({"bench": "on_policy"} | line)
                equal_time.record(lines[-1], options.append)
    print(*_table(lines), sep="\n")


def table(options: argparse.Namespace) -> None:
    """Means over seeds, and 95 % intervals of the differences from CE by seed (Student's t)."""
    given = [json.loads(line) for line in options.file.read_text().splitlines()]
    print(*_table([line for line in given if _is_result(line)]), sep="\n")


def _table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    of = {(line["arm"], line["seed"]): line for line in lines}
    gained = {
        key: line | {"gain": line["accuracy"] - of["start", line["seed"]]["accuracy"]}
        for key, line in of.items()
        if ("start", line["seed"]) in of
    }
    return equal_time.table(gained or of, "CE", ["accuracy", *(["gain"] if gained else []), *KLS])


def _is_result(line: dict[str, Any]) -> bool:
    return line.get("bench") == "on_policy" and "arm" in line and line.get("what") != "tuning"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)
    first = verbs.add_parser("prepare")
    first.set_defaults(verb=lambda options: prepare(options.folder.absolute()))
    first.add_argument("folder", type=Path)
    second = verbs.add_parser("run")
    second.set_defaults(verb=run)
    second.add_argument("folder", type=lambda text: Path(text).absolute())
    second.add_argument("--seconds", type=float, default=60.0)
    second.add_argument("--seeds", default="0,1,2")
    second.add_argument("--arms", default=",".join(ARMS))
    second.add_argument("--append", type=Path)
    tuned = verbs.add_parser("tune")
    tuned.set_defaults(verb=tune)
    tuned.add_argument("folder", type=lambda text: Path(text).absolute())
    tuned.add_argument("--seconds", type=float, default=30.0)
    tuned.add_argument("--seed", type=int, default=0)
    tuned.add_argument("--arms", default=",".join(name for name in ARMS if name != "control"))
    tuned.add_argument("--lrs", default="5e-5,2e-4,1e-3")
    tuned.add_argument("--append", type=Path)
    shown = verbs.add_parser("table")
    shown.set_defaults(verb=table)
    shown.add_argument("file", type=Path)
    options = parser.parse_args()
    options.verb(options)


if __name__ == "__main__":
    main()
