"""A served teacher beside the same one in this process: gap, speed, and the student of each.

Start the server first, as docs/served-teachers.md says, with `--served-model-name smollm2`:

    python bench/served.py smollm2 [--url http://127.0.0.1:8000] [--steps 20] [--append bench/results.jsonl]

gap       largest difference of log-probabilities at the positions of eight rows, in nats
speed     tokens/s of targets, by the server and by the model in this process, interleaved, medians
students  the demo's pair on short rows: so many steps by the server, and from a `topk` store of the same k that the
          model in this process filled; held-out KL of both by the model in this process
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from potstill import TorchTeacher, distill, evaluate, load_recipe
from potstill.build.corpus import make_corpus
from potstill.build.resolve import resolve
from potstill.data.tokenizers import load_tokenizer
from potstill.io.terminal import Display
from potstill.recipe.sections_models import ServerTeacherConfig
from potstill.teachers.server import ServerTeacher
from potstill.types import Batch
from potstill.workflows.capture import capture

K = 64
SHORT = {"corpus.tokens_per_row": 128, "corpus.heldout_rows": 12, "train.rows_per_step": 4, "train.warmup": 2}
QUIET = Display(quiet=True)


def targets(folder: Path, url: str, batch: Batch, rounds: int) -> dict[str, Any]:
    here = TorchTeacher.for_inference(folder, device="cpu")
    config = ServerTeacherConfig(url=url, model=folder.name, tokenizer=str(folder), top_k=K)
    seconds: dict[str, list[float]] = {"server": [], "here": []}
    with closing(ServerTeacher.open(config, load_tokenizer(folder))) as server:
        for _ in range(rounds):
            start = time.perf_counter()
            found = server.targets(batch)
            seconds["server"].append(time.perf_counter() - start)
            start = time.perf_counter()
            whole = here.targets(batch)
            logp_NV = whole.head(whole.hidden_NE).log_softmax(-1)
            seconds["here"].append(time.perf_counter() - start)
    gap_NK = (logp_NV.gather(1, found.ids_NK.clamp_min(0)) - found.logp_NK).abs()
    tokens = batch.input_ids_BT.numel()
    speed = {name: round(tokens / statistics.median(each)) for name, each in seconds.items()}
    return {
        "positions": len(found),
        "largest_gap": float(gap_NK[found.ids_NK >= 0].max()),
        "tokens_per_s": speed,
        "ratio": round(speed["server"] / speed["here"], 3),
    }


def students(folder: Path, url: str, steps: int, recipe: Path, place: Path) -> dict[str, Any]:
    overrides = [f"{name}={value}" for name, value in SHORT.items()] + [f"teacher.model={folder}"]
    cut = distill(
        recipe, overrides=[*overrides, "train.steps=1", "train.warmup=0", "train.lr=1e-12"], out=place / "cut"
    )
    overrides += [
        f"student={{name: checkpoint, model: {cut.student}}}",
        f"train.steps={steps}",
        "eval.every=0",
    ]
    exact = load_recipe(recipe, overrides)
    server = f"teacher={{name: server, url: {url}, model: {folder.name}, tokenizer: {folder}, top_k: {K}}}"
    store = f"teacher={{name: store, path: {place / 'store'}}}"
    kept = [*overrides, f"capture={{name: topk, k: {K}, dtype: float32, rows: steps}}"]
    capture(recipe, kept, place / "store", None, QUIET)
    runs = {
        "server": distill(recipe, overrides=[*overrides, server], out=place / "by-server"),
        "store": distill(recipe, overrides=[*overrides, store], out=place / "by-store"),
    }
    kl = {"before": evaluate(exact, cut.student)["heldout/kl"]}
    kl |= {name: evaluate(exact, run.student)["heldout/kl"] for name, run in runs.items()}
    seconds = {name: run.receipt()["training_seconds"] for name, run in runs.items()}
    return {"steps": steps, "k": K, "heldout_kl": kl, "training_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=lambda text: Path(text).absolute())
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--append", type=Path)
    options = parser.parse_args()
    demo = Path(__file__).resolve().parent.parent / "src" / "potstill" / "demo.yaml"
    settings = [f"{name}={value}" for name, value in SHORT.items()] + [f"teacher.model={options.folder}"]
    corpus, _ = make_corpus(resolve(load_recipe(demo, settings)))
    batch = corpus.train.batch(range(8))
    line = {"bench": "served"} | targets(options.folder, options.url, batch, options.rounds)
    print(json.dumps(line), flush=True)
    with tempfile.TemporaryDirectory() as place:
        line |= students(options.folder, options.url, options.steps, demo, Path(place))
    print(json.dumps(line), flush=True)
    if options.append is not None:
        with options.append.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
