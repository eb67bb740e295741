"""Which channels of an MLP may go? KL right after the cut, by what the channels are ranked by.

    python bench/width.py recipes/half-depth.yaml [--rows 8]

All layers of the recipe's teacher with fewer channels; ranked on its first training rows, measured on its
held-out ones, nats per position.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill import load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import set_up
from potstill.evals.heldout import heldout
from potstill.losses.objective import Objective
from potstill.models import pruning
from potstill.models.causal_lm import CausalLM
from potstill.models.matrix_inputs import summed_inputs
from potstill.models.student import Student
from potstill.types import Batch

Ranking = Callable[[CausalLM, set[str], Sequence[Batch]], dict[str, Tensor]]


def mean_magnitude(teacher: CausalLM, outs: set[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    modules = {name: teacher.hf.get_submodule(name) for name in outs}
    return summed_inputs(teacher, modules, batches, lambda x_NC: x_NC.abs().sum(0))


def chance(teacher: CausalLM, outs: set[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = pruning.ffn_width_of(teacher.hf.config)
    return {name: torch.rand(width, generator=generator) for name in sorted(outs)}


def weights_alone(teacher: CausalLM, outs: set[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    found = {}
    for name in outs:
        mlp = teacher.hf.get_submodule(name.rpartition(".")[0])
        into = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1)
        found[name] = into * mlp.down_proj.weight.norm(dim=0)
    return found


RANKINGS: dict[str, Ranking] = {
    "RMS activation x column": pruning.ffn_importance,
    "mean |activation|": mean_magnitude,
    "chance, one draw": chance,
    "gate x up x column": weights_alone,
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--rows", type=int, default=8, help="to rank by, and to measure on")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, [f"corpus.heldout_rows={options.rows}", "teacher.dtype=float32"])
    setup = set_up(resolve(recipe), lambda text: None)
    teacher: Any = setup.teacher
    batches = [setup.corpus.train.batch([row]) for row in range(options.rows)]
    width = pruning.ffn_width_of(teacher.model.hf.config)
    layers = range(teacher.model.hf.config.num_hidden_layers)
    widths = [width * 3 // 4, width * 2 // 3, width // 2]
    print(f"{'ranked by':26}" + "".join(f"{kept:>8}" for kept in widths) + f"  of {width} channels")
    # What is cut at random rounds so much that a probe of packed rows takes it for a leak.
    CausalLM.probe = lambda model: None  # type: ignore[method-assign]
    for name, ranking in RANKINGS.items():
        pruning.ffn_importance = ranking
        found = []
        for kept in widths:
            student = Student(pruning.cut(teacher.model, layers, kept, batches), Objective(chunk=256))
            found.append(heldout(student, teacher, setup.corpus.heldout, 1)["heldout/kl"])
        print(f"{name:26}" + "".join(f"{kl:8.2f}" for kl in found), flush=True)


if __name__ == "__main__":
    main()
