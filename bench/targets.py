"""What are a teacher's targets on disk worth, and what do they cost?

SmolLM2-135M-Instruct over a part of the Python standard library; students of 12 of its 30 layers (first 6
and last 6), rows of 4 x 256, AdamW 5e-4, 0.9 KD + 0.1 CE. The teacher is captured once as hidden states in
float32, which a run cannot tell from the teacher itself; every other kind is made of these by the store's own
codec.

    python bench/targets.py students    held-out KL after the same steps: live, kinds by bytes, CE alone
    python bench/targets.py gradients   gradient cosine of each kind by bytes, for the live arm's student
    python bench/targets.py variance    threshold sampling against multinomial sampling at equal bytes
    python bench/targets.py step        seconds of a step from the store, and of the same step with CE alone
    python bench/targets.py rate        tokens/s of a capture, and of the teacher's bare forward pass

`students` goes on where it was cut off: results are lines of --append, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, make_objective, set_up
from potstill.cli.main import main as potstill
from potstill.evals.heldout import heldout
from potstill.preflight.trial_steps import step_seconds
from potstill.recipe.load import load
from potstill.store import sampling
from potstill.store.bitpack import id_bits
from potstill.store.codecs import (
    Codec,
    Hidden,
    Sampled,
    TopK,
    distributions,
    k_of,
    sampled_bytes,
    threshold_of,
)
from potstill.store.sampling import Uniforms
from potstill.teachers.capture_rows import capture_shard, captured
from potstill.teachers.hf import TorchTeacher
from potstill.teachers.stored import StoredTeacher, joined
from potstill.training.loop import Hooks, train
from potstill.types import Batch, Targets
from potstill.workflows.capture_fidelity import certificate

RECIPE = Path(__file__).resolve().parent.parent / "src" / "potstill" / "demo.yaml"
BYTES = (16, 24, 32, 48, 64, 128, 300)


def overrides(options: argparse.Namespace) -> list[str]:
    return [
        f"corpus.path=stdlib:{options.corpus}",
        "corpus.heldout_rows=16",
        "student={name: cut, layers: 12, rule: first_last, repair: false}",
        f"train.steps={options.steps}",
        "train.warmup=3",
        "train.lr=5e-4",
        "train.save_every=0",
    ]


def the_store(options: argparse.Namespace) -> Path:
    """Hidden states of all rows in float32, captured if they are not there."""
    given = ["capture.name=hidden", "capture.dtype=float32", *overrides(options)]
    if not (options.store / "manifest.json").exists():
        code = potstill(["capture", str(RECIPE), *given, "--out", str(options.store)])
        if code:
            sys.exit(code)
    return options.store


def setup_of(options: argparse.Namespace, seed: int = 0) -> RunSetup:
    store = f"teacher={{name: store, path: {the_store(options).absolute()}}}"
    recipe = load(RECIPE, [*overrides(options), store, f"train.seed={seed}"])
    return set_up(resolve(recipe), lambda text: None)


class Derived:
    """A stored teacher of hidden states, whose training rows answer as another kind would."""

    reads_on_cpu = True

    def __init__(self, hidden: StoredTeacher, kind: Codec, seed: int, renormalised: bool = False) -> None:
        self.hidden, self.kind, self.seed, self.renormalised = hidden, kind, seed, renormalised
        self.vocab, self.vocab_size = hidden.vocab, hidden.vocab_size

    def targets(self, batch: Batch) -> Targets:
        T = batch.input_ids_BT.shape[1]
        return joined(
            [self.row(batch, number, T) for number in range(len(batch.rows_B))],
            self.hidden.head.weight_VD.device,
        )

    def row(self, batch: Batch, number: int, T: int) -> Targets:
        row = int(batch.rows_B[number])
        places_P = batch.positions_N[batch.positions_N // T == number] % T
        alone = replace(batch, rows_B=batch.rows_B[number : number + 1], positions_N=places_P)
        full = self.hidden.targets(alone)
        if self.hidden.store.is_heldout(row):
            return full
        uniforms = Uniforms(self.seed, row, places_P.numpy())
        found = self.kind.decode(self.kind.encode(full.hidden_NE, full.head, uniforms), full.head)
        if self.renormalised:
            found = replace(found, logp_NK=found.logp_NK.log_softmax(-1), has_bucket=False)
        return found


def kind_at(name: str, size: int, setup: RunSetup) -> Codec:
    """The kind that takes about so many bytes of a position."""
    teacher = setup.teacher
    ids, head = setup.shared.ids, teacher.head
    if name == "sampled":
        batch = setup.corpus.heldout.batch(range(8))
        return Sampled(threshold_of(size, teacher.targets(batch).hidden_NE, head, 1.0), ids, 1.0)
    return TopK(k_of(size, ids, "float16"), "float16", ids, 1.0)


def students(options: argparse.Namespace) -> None:
    done = {(line["arm"], line["seed"]) for line in results(options, "students")}
    arms = [("live", 0), ("ce", 0), ("sampled", 32), ("topk", 32), ("topk", 300), ("sampled", 16)]
    arms += [("renormalised", 200), ("sampled", 64)]
    for seed in options.seeds:
        for name, size in arms:
            arm = f"{name} {size}" if size else name
            if (arm, seed) not in done:
                append(
                    options,
                    {"bench": "targets students", "arm": arm, "seed": seed}
                    | student(options, name, size, seed),
                )


def student(options: argparse.Namespace, name: str, size: int, seed: int) -> dict[str, Any]:
    setup = setup_of(options, seed)
    recipe, teacher = setup.recipe, setup.teacher
    if name == "ce":
        recipe = replace(recipe, objective=replace(recipe.objective, kd_weight=0.0, ce_weight=1.0))
        setup.student.objective = make_objective(recipe, None)
    elif name != "live":
        kind = kind_at("topk" if name == "renormalised" else name, size, setup)
        teacher = Derived(setup.teacher, kind, seed, name == "renormalised")
    lines: list[dict[str, float]] = []

    def note(step: int, metrics: dict[str, float]) -> None:
        lines.append(metrics)
        figures = f"loss {metrics['train/loss']:.4f}, {metrics['speed/step_s']:.1f} s"
        print(f"{name} {size} seed {seed} step {step} {figures}", flush=True)

    hooks = Hooks(lambda step: {"heldout/loss": math.inf}, note, lambda *_: None)
    asked = teacher if recipe.objective.kd_weight else None
    train(setup.student, asked, setup.data(), recipe, hooks)
    if name == "live" and seed == 0:
        torch.save(setup.student.model.hf.state_dict(), options.store / "live.pt")
    found = heldout(setup.student, setup.teacher, setup.corpus.heldout, recipe.train.micro_batch_rows)
    seconds = statistics.median(line["speed/step_s"] for line in lines)
    return found | {"steps": recipe.train.steps, "step_s": round(seconds, 3)}


def gradients(options: argparse.Namespace) -> None:
    setup = setup_of(options)
    live = options.store / "live.pt"
    if live.exists():
        setup.student.model.hf.load_state_dict(torch.load(live, weights_only=True))
    source = setup.teacher.store.manifest["teacher"]["source"]
    teacher = TorchTeacher.for_inference(source)
    teacher.model.mask_from(setup.shared.ids)
    wanted: list[tuple[str, Codec]] = [(f"hidden {d}", Hidden(d)) for d in ("bfloat16", "int8")]
    wanted += [
        (f"{name} {size}", kind_at(name, size, setup))
        for size in options.sizes
        for name in ("sampled", "topk")
    ]
    for name, kind in wanted:
        found = certificate(setup.student, teacher, setup.corpus.heldout, kind, 0)
        size = bytes_of(kind, teacher, setup)
        record = {
            "bench": "targets gradients",
            "kind": name,
            "bytes": round(size, 1),
            "trained": live.exists(),
        }
        append(options, record | {key: round(value, 6) for key, value in found.items()})


def bytes_of(kind: Codec, teacher: TorchTeacher, setup: RunSetup) -> float:
    """Of a position, as they are written."""
    rows = captured(teacher, setup.corpus.heldout, range(4), kind, 0, 4)
    found = [(len(row.places_P), sum(tensor.nbytes for tensor in row.kept.values())) for row in rows]
    return sum(size for _, size in found) / sum(count for count, _ in found)


def variance(options: argparse.Namespace) -> None:
    """Expected squared error of the targets, which is that of the logits' gradient, summed over ids."""
    setup = setup_of(options)
    targets, ids = setup.teacher.targets(setup.corpus.heldout.batch(range(8))), setup.shared.ids
    all_p = [p_CV for _, p_CV, _ in distributions(targets.hidden_NE, targets.head, 1.0)]
    bits = id_bits(ids) / 8
    for threshold in (0.05, 0.04, 0.03, 0.02, 0.01):
        counts = [sampling.ids_per_position(p_CV, threshold) for p_CV in all_p]
        kept_C, drawn_C = (torch.cat(list(column)) for column in zip(*counts, strict=True))
        size = sampled_bytes(threshold, kept_C, drawn_C, ids)
        ours = statistics.mean(sampling.variance(p_V, threshold) for p_CV in all_p for p_V in p_CV)

        def multinomial(draws: float) -> tuple[float, float]:
            """Bytes, ids bit-packed with half a byte for how often each was drawn, and squared error."""
            distinct = statistics.mean(
                float((1 - (1 - p).pow(draws)).sum()) for q in all_p for p in q.double()
            )
            error = statistics.mean(float(1 - p.square().sum()) / draws for q in all_p for p in q.double())
            return 3 + distinct * (bits + 0.5), error

        low, high = 1.0, 2000.0
        while high / low > 1.01:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if multinomial(middle)[0] < size else (low, middle)
        theirs = multinomial(high)
        append(
            options,
            {
                "bench": "targets variance",
                "threshold": threshold,
                "bytes": round(size, 1),
                "ids": round(float((kept_C + drawn_C).double().mean()), 1),
                "variance": round(ours, 5),
                "multinomial_draws": round(high, 1),
                "multinomial_bytes": round(theirs[0], 1),
                "multinomial_variance": round(theirs[1], 5),
                "ratio": round(ours / theirs[1], 3),
            },
        )


def step(options: argparse.Namespace) -> None:
    """The store is a real one on disk, of the kind that is the default."""
    store = options.store.with_name(f"{options.store.name}-sampled")
    if not (store / "manifest.json").exists():
        given = [*overrides(options), "capture.rows=steps"]
        if potstill(["capture", str(RECIPE), *given, "--out", str(store)]):
            sys.exit(1)
    recipe = load(RECIPE, [*overrides(options), f"teacher={{name: store, path: {store.absolute()}}}"])
    setup = set_up(resolve(recipe), lambda text: None)
    plain = replace(recipe, objective=replace(recipe.objective, kd_weight=0.0, ce_weight=1.0))
    seconds = step_seconds(setup, {"store": recipe, "ce": plain})
    record = {name: round(value, 3) for name, value in seconds.items()}
    append(options, {"bench": "targets step", **record, "ratio": round(seconds["store"] / seconds["ce"], 3)})


def rate(options: argparse.Namespace) -> None:
    """The bare forward pass makes logits as a Transformers user gets them, and drops them."""
    setup = setup_of(options)
    teacher = TorchTeacher.for_inference(setup.teacher.store.manifest["teacher"]["source"])
    rows, T, each = setup.corpus.train, setup.recipe.corpus.tokens_per_row, 8
    kinds = {
        "sampled": kind_at("sampled", 32, setup),
        "topk": kind_at("topk", 32, setup),
        "hidden": Hidden("bfloat16"),
    }
    seen: dict[str, list[float]] = {name: [] for name in ("bare", *kinds)}
    place = options.store / "rate.safetensors"
    for turn in range(options.rounds):
        numbers = range(turn * each, (turn + 1) * each)
        batch = rows.batch(numbers)
        for name in seen:
            started = time.perf_counter()
            if name == "bare":
                with torch.no_grad():
                    teacher.model.hf(
                        input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
                    )
            else:
                capture_shard(place, teacher, rows, numbers, kinds[name], 0, each)
            seen[name].append(each * T / (time.perf_counter() - started))
    place.unlink(missing_ok=True)
    medians = {name: statistics.median(values) for name, values in seen.items()}
    ratios = {f"{name}/bare": round(medians[name] / medians["bare"], 3) for name in kinds}
    append(
        options, {"bench": "targets rate", "tokens_per_s": {n: round(v) for n, v in medians.items()}} | ratios
    )


def results(options: argparse.Namespace, mode: str) -> list[dict[str, Any]]:
    if not options.append.exists():
        return []
    lines = [json.loads(line) for line in options.append.read_text().splitlines()]
    return [
        line for line in lines if line["bench"] == f"targets {mode}" and line.get("steps") == options.steps
    ]


def append(options: argparse.Namespace, record: dict[str, Any]) -> None:
    record |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(record), flush=True)
    with open(options.append, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


MODES = {"students": students, "gradients": gradients, "variance": variance, "step": step, "rate": rate}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=BYTES, help="bytes per position, of gradients"
    )
    parser.add_argument("--corpus", default="unittest", help="folder of the standard library")
    parser.add_argument("--store", type=Path, default=Path("targets/bench"))
    parser.add_argument("--append", type=Path, default=Path("bench/results.jsonl"))
    options = parser.parse_args()
    MODES[options.mode](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
