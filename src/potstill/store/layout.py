"""What lies in the folder of a store, by name. Reader and writer share it.

capture.json            what the targets are of and how they are kept; written first, compared on resume
tokenizer/              that of the teacher, which read the corpus
head.safetensors        the teacher's output embedding; scale and softcap are in capture.json
heldout.safetensors     hidden states of the held-out rows in float32: evaluation is exact; where the teacher gave few
                        ids of each distribution, those, and no head
00000.safetensors …     shards of training rows, see `shards`
00000.json …            bytes and hashes of a shard, written after it: the mark that it is whole
certificate.json        how far the kept targets are from the full ones, measured on the held-out rows
manifest.json           all of the above in one, written last: without it there is no store
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.io.safe_open import read_object
from potstill.store.codecs import Codec, Hidden, Sampled, TopK
from potstill.store.shards import AGAIN, FileRecord

SCHEMA = 1
CAPTURE, MANIFEST, CERTIFICATE = "capture.json", "manifest.json", "certificate.json"
HEAD, HELDOUT, TOKENIZER = "head.safetensors", "heldout.safetensors", "tokenizer"
EXACT = Hidden("float32")
NOT_SETTINGS = ("bytes_per_position", "files", "tokenizer", "certificate", "seal")
"""Fields that the manifest has beside the settings of capture.json."""
MEANS = "teacher/texts"
"""Of a teacher that no hash of weights identifies: its mean log-probabilities of some texts, with spaces between."""
SAME_NATS = 0.02
"""What they may differ by: a server rounds in the order in which it happens to compute."""
Json = dict[str, Any]


def texts_gap(means: str, others: str) -> float:
    """The largest difference of two values of `MEANS`, in nats; infinite where they are not of the same texts."""
    try:
        pairs = zip(map(float, means.split()), map(float, others.split()), strict=True)
        return max((abs(a - b) for a, b in pairs), default=math.inf)
    except ValueError:
        return math.inf


def codec_of(settings: Json) -> Codec:
    """How the training rows are kept, by capture.json or the manifest."""
    kept, ids, temperature = settings["kind"], settings["vocabulary"]["ids"], settings["temperature"]
    match kept["name"]:
        case "hidden":
            return Hidden(kept["dtype"])
        case "sampled":
            return Sampled(kept["threshold"], ids, temperature)
        case _:
            return TopK(kept["k"], kept["dtype"], ids, temperature)


def heldout_codec_of(settings: Json) -> Codec:
    """How the held-out rows are kept: exactly, or as the ids that are known of each distribution."""
    kept = settings.get("heldout")
    return (
        EXACT
        if kept is None
        else TopK(kept["k"], kept["dtype"], settings["vocabulary"]["ids"], settings["temperature"])
    )


@dataclass(frozen=True)
class Files:
    """Paths of the files of a store."""

    path: Path

    def shard(self, number: int) -> Path:
        return self.path / f"{number:05}.safetensors"

    def record(self, file: Path) -> Path:
        return file.with_suffix(".json")

    def recorded(self, file: Path) -> FileRecord | None:
        """The record of a file; None where either is missing, so that the file counts as not written."""
        place = self.record(file)
        if not (place.exists() and file.exists()):
            return None
        return FileRecord.parse(read_object(place, AGAIN), place)


def seal(manifest: Json) -> str:
    """sha256 over the manifest without its seal: JSON with a flipped bit may still be sound JSON."""
    sealed = {name: value for name, value in manifest.items() if name != "seal"}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def as_json(tree: Json) -> bytes:
    """The bytes of a JSON file of a store: `verify` compares them, so they are a function of the tree."""
    return (json.dumps(tree, indent=1) + "\n").encode()
