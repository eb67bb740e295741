"""How fast a student writes: tokens per second of our decoding and of Transformers' `generate`.

The same model, prompts, lengths and sampling (temperature 1, from all ids, no end), interleaved, medians; with prompts
of one length, and with prompts of a mixed batch, which `generate` pads to the longest. Then the share of a training
step that is decoding, in a run of the demo's pair.

    python bench/rollouts.py [--rows 8] [--new 64] [--rounds 3] [--append bench/results.jsonl]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from potstill import TorchTeacher, distill, load_recipe
from potstill.data.prompts import Prompt
from potstill.models.causal_lm import CausalLM
from potstill.models.decoding import decode
from potstill.recipe.sections_rollouts import RolloutsConfig
from potstill.training.sampling import write

DEMO = Path(__file__).resolve().parent.parent / "src" / "potstill" / "demo.yaml"
EQUAL, MIXED = [64] * 8, [16, 24, 32, 48, 64, 96, 128, 256]


def ours(model: CausalLM, prompts: list[list[int]], new: int) -> int:
    config = RolloutsConfig(max_new_tokens=new)
    named = [(f"row {n}", Prompt(n, ids)) for n, ids in enumerate(prompts)]

    def decoder(settings: Any, rows: Any, beat: Any) -> None:
        decode(model, settings, rows, beat)

    return sum(len(each.new) for each in write(decoder, named, config, frozenset(), 0))


@torch.no_grad()
def theirs(model: CausalLM, prompts: list[list[int]], new: int) -> int:
    length = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (length - len(ids)) + ids for ids in prompts])
    mask_BT = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    out_BT = model.hf.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=new,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return len(prompts) * (out_BT.shape[1] - length)


def timed(run: Callable[[], int]) -> float:
    started = time.perf_counter()
    tokens = run()
    return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--append", type=Path)
    options = parser.parse_args()
    model = TorchTeacher.for_inference(load_recipe(DEMO).teacher.model, device="cpu").model  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    lines: list[dict[str, Any]] = []
    for name, lengths in (("equal", EQUAL), ("mixed", MIXED)):
        chosen = [lengths[n % len(lengths)] for n in range(options.rows)]
        prompts = [torch.randint(10, 40_000, (length,), generator=generator).tolist() for length in chosen]
        speeds: dict[str, list[float]] = {"ours": [], "generate": []}
        for number in range(options.rounds + 1):  # the first warms up
            for who, run in (("ours", ours), ("generate", theirs)):
                speed = timed(partial(run, model, prompts, options.new))
                if number:
                    speeds[who].append(speed)
        medians = {who: round(statistics.median(values), 1) for who, values in speeds.items()}
        line = {"bench": "rollouts", "prompts": name, "rows": options.rows, "new": options.new} | medians
        lines.append(line | {"ratio": round(medians["ours"] / medians["generate"], 3)})
        print(json.dumps(lines[-1]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        fields = ["train.steps=4", "rollouts={max_new_tokens: 64}", "eval.sample_prompt=null"]
        done = distill(DEMO, overrides=fields, out=Path(folder) / "run")
        steps = [step for step in done.metrics() if "speed/rollout_s" in step][1:]
    share = statistics.median(step["speed/rollout_s"] / step["speed/step_s"] for step in steps)
    speed = statistics.median(step["speed/rollout_tokens_per_s"] for step in steps)
    lines.append(
        {"bench": "rollouts", "step": "demo", "share": round(share, 3), "tokens_per_s": round(speed, 1)}
    )
    print(json.dumps(lines[-1]), flush=True)
    if options.append is not None:
        with options.append.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
