"""What does a corpus cost at the start of a run: seconds, and memory that is not the files' own pages?

    python bench/corpus.py recipes/long.yaml corpus.shards=null

Read twice, each time by a process of its own: the first writes the shards where the recipe names a folder
that is not there yet, the second maps them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path


def anonymous_mib() -> float:
    """Memory of this process that no file lies behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon:"))) / 1024


def read(recipe: str, overrides: list[str]) -> None:
    from potstill.build.corpus import make_corpus
    from potstill.build.resolve import resolve
    from potstill.recipe.load import load

    asked = load(Path(recipe), overrides)
    before, peak, done = anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak.append(anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    corpus, _ = make_corpus(resolve(asked))
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    found = {name: corpus.manifest[name] for name in ("documents", "tokens", "train_rows", "fingerprint")}
    compared = corpus.manifest["decontamination"]
    found["documents_dropped"] = None if compared is None else compared["documents_dropped"]
    told = {
        "seconds": round(seconds, 1),
        "peak_mib": round(max(peak) - before),
        "after_mib": round(anonymous_mib() - before),
    }
    print(json.dumps(found | told), flush=True)


def main() -> int:
    if sys.argv[1] == "--read":
        read(sys.argv[2], sys.argv[3:])
        return 0
    for _ in range(2):
        if code := subprocess.run(
            [sys.executable, __file__, "--read", *sys.argv[1:]], check=False
        ).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
