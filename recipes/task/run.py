"""From nothing to a student that does one job, and its figures: `make task`, or

    python recipes/task/run.py [FOLDER] [--smoke] [--train 14000] [--asked 345] [--ids 8448] [--teacher OVERRIDE …]
        [--student OVERRIDE …]

Each stage is one command, printed before it runs; the same command again goes on where it was stopped, and finished
stages are kept. FOLDER (runs/task) gets the notes, SmolLM2 with the notes' tokens and few others, the teacher's run,
which trains that, its targets, the student's run and `result.json`: the accuracy of the teacher, the student and its
exported files on the test notes, with intervals. Settings are chosen by the held-out notes, which each run is asked at
its end: its held-out rows are of the training notes' words, and a model that knows these by heart is good at them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

from make import SYSTEM, asked_notes

HERE = Path(__file__).resolve().parent
TYPES = ("q8_0", "q4_0")
SMOKE = ("train.steps=4", "train.warmup=1", "train.save_every=1", "eval.every=2")


def say(*command: str) -> None:
    """Run `potstill` with these words, or stop where it stops."""
    print("$", shlex.join(["potstill", *command]), flush=True)
    done = subprocess.run([sys.executable, "-m", "potstill", *command])
    if done.returncode:
        sys.exit(done.returncode)


def task(folder: Path, split: str, size: int) -> dict[str, object]:
    """The first `size` notes of a split, to be answered with their record."""
    found: dict[str, object] = {"source": "jsonl", "path": str(folder / "data" / f"{split}.jsonl")}
    found |= {"question": "question", "answer": "answer", "cluster": "sentence"}
    return found | {"system": SYSTEM, "max_new_tokens": 80, "size": size}


def asked(model: str, folder: Path, name: str, size: int) -> dict[str, object]:
    """A model's accuracy on the first `size` test notes; of a GGUF file in llama.cpp, where that is installed."""
    out = folder / "evals" / name
    runtime = (
        "llama.cpp" if model.endswith(".gguf") and importlib.util.find_spec("xllamacpp") else "transformers"
    )
    say(
        "eval",
        model,
        "--task",
        json.dumps(task(folder, "test", size)),
        "--out",
        str(out),
        "--runtime",
        runtime,
    )
    result = json.loads((out / "result.json").read_text())
    return {"model": name, "runtime": runtime, **result["accuracy"], **result["calibration"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=HERE.parent.parent / "runs" / "task")
    parser.add_argument("--train", default="14000", help="notes to train on (default: 14000)")
    parser.add_argument(
        "--asked", type=int, default=asked_notes("test"), help="test notes that are asked (default: all)"
    )
    parser.add_argument("--ids", default="8448", help="tokens of both models (default: 8448)")
    parser.add_argument("--teacher", action="append", default=[], metavar="OVERRIDE", help="of teacher.yaml")
    parser.add_argument("--student", action="append", default=[], metavar="OVERRIDE", help="of student.yaml")
    parser.add_argument(
        "--smoke", action="store_true", help="every stage, with few notes and steps: does the line work here?"
    )
    options = parser.parse_args()
    folder = options.folder.absolute()
    if options.smoke:
        options.train, options.asked = "200", 5
        options.teacher, options.student = [*SMOKE, *options.teacher], [*SMOKE, *options.student]
    made = [sys.executable, str(HERE / "make.py"), str(folder / "data"), "--train", options.train]
    if subprocess.run(made).returncode:
        sys.exit(1)
    held_out = {"name": "task"} | task(folder, "heldout", min(asked_notes("heldout"), options.asked))
    data = (f"corpus.path={folder / 'data' / 'train.jsonl'}", f"evaluations={json.dumps([held_out])}")
    auto = ("--resume", "auto")
    teacher, student, targets = folder / "teacher", folder / "student", folder / "targets"
    recipe, fewer = str(HERE / "teacher.yaml"), folder / f"trimmed-{options.ids}"
    if not fewer.exists():
        say("trim", recipe, *data, *options.teacher, "--ids", options.ids, "--out", str(fewer))
    own = (f"teacher.model={fewer}", f"student.model={fewer}")
    say("distill", recipe, *data, *options.teacher, *own, "--out", str(teacher), *auto)
    recipe, learnt = str(HERE / "student.yaml"), teacher / "student"
    say("capture", recipe, *data, f"teacher.model={learnt}", *options.student, "--out", str(targets))
    stored = f"teacher={{name: store, path: {targets}, model: {learnt}}}"
    say("distill", recipe, *data, stored, *options.student, "--out", str(student), *auto)
    say("export", str(student), "--quantize", ",".join(TYPES))
    models = {"teacher": str(learnt), "student": str(student / "student")}
    models |= {
        path.stem.replace("-", " "): str(path) for path in sorted((student / "exports").glob("*.gguf"))
    }
    lines = [asked(model, folder, name, options.asked) for name, model in models.items()]
    (folder / "result.json").write_text(json.dumps(lines, indent=2) + "\n")
    for line in lines:
        print(f"{line['model']:>32}  {line['value']:.3f} [{line['low']:.3f}, {line['high']:.3f}]")


if __name__ == "__main__":
    main()
