"""Does an exported model run as the student does, where people run models? Three paths, three processes.

potstill and Transformers read the folder, llama.cpp reads the GGUF files, from a clean folder that holds
nothing else. Each tokenises the same texts, gives its distribution of the next token after the same ids, and
generates; ids and distributions are compared with those of the student in the run directory. A path that is
not there is recorded as not run, with the reason; it never counts as passed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional as F

from potstill.errors import UserError, one_line
from potstill.export.gguf_model import as_written
from potstill.export.gguf_tokenizer import probe_texts, special_tokens
from potstill.models.causal_lm import CausalLM

PATHS = ("potstill", "transformers", "llama.cpp")
MEAN_KL = {"hf": 1e-6, "f32": 1e-6, "f16": 1e-4, "bf16": 1e-3}
"""Nats: how far a path may be from the student's own next-token distribution, mean over the prompts."""
OF_WRITTEN = 2e-2
"""Nats, for forms that round more: from the student with the file's own numbers. What llama.cpp adds is the
rounding of activations, up to 0.004 on the demo's student; a tensor in the wrong order adds whole nats."""
EQUAL_TOP1 = ("hf", "f32")
"""Forms whose likeliest token is always the student's."""
TEXTS = 200
PROMPTS = (
    "The quick brown fox jumps over the",
    "In 1969, two astronauts walked on the surface of",
    "Water boils at 100 degrees Celsius, which is",
    "She opened the letter, read it twice, and then",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of thermodynamics are:\n1.",
    "Q: What is the capital of France?\nA:",
    "Le chat est assis sur",
    "Die Würde des Menschen ist",
    "Быстрая лиса прыгает через",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "import os\nimport sys\n\n\ndef main() -> None:\n    ",
    "for (int i = 0; i < n; i++) {\n\tsum +=",
    "SELECT name, count(*) FROM users WHERE",
    "# Installation\n\n```\npip install",
    '{"name": "potstill", "version": "',
)
MAX_IDS = 64
PROMPT = "The quick brown fox"
DEADLINE_S = 1800
READER = Path(__file__).with_name("roundtrip_reader.py")
NO_LLAMA_CPP = "xllamacpp is not installed: pip install 'potstill[gguf]'"


@dataclass(frozen=True)
class Reference:
    """What the student itself says, and what each path is asked."""

    texts: list[str]
    tokens: list[list[int]]
    ids: list[list[int]]
    logp_PV: torch.Tensor
    written_PV: torch.Tensor | None = None
    """What the numbers of a quantised file give, without any rounding of activations."""

    @classmethod
    def of(
        cls, model: CausalLM, tokenizer: Any, *, texts: int = TEXTS, prompts: Sequence[str] = PROMPTS
    ) -> Reference:
        """Float32 and one prompt at a time, as each path will do it."""
        asked = probe_texts(texts, special_tokens(tokenizer))
        ids = [tokenizer(text)["input_ids"][:MAX_IDS] for text in prompts]
        tokens = [tokenizer(text)["input_ids"] for text in asked]
        return cls(asked, tokens, ids, _logp(model.hf, ids))

    def of_written(self, model: CausalLM, file: Path, form: str) -> Reference:
        if form in MEAN_KL:
            return self
        return dataclasses.replace(self, written_PV=_logp(as_written(model, file, form), self.ids))


def _logp(hf: Any, prompts: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        rows = [hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in prompts]
    return F.log_softmax(torch.stack(rows).double(), dim=-1)


def check_paths(form: str, file: Path, reference: Reference) -> dict[str, dict[str, Any]]:
    """What each path found in the exported `file`, a folder or a GGUF; no path that is missing raises."""
    found = {}
    for path in PATHS:
        why = _why_not(path, form)
        found[path] = {"status": "not run", "why": why} if why else _run(path, form, file, reference)
    return found


def not_run(why: str) -> dict[str, dict[str, Any]]:
    return {path: {"status": "not run", "why": why} for path in PATHS}


def _why_not(path: str, form: str) -> str:
    if path == "llama.cpp":
        if form == "hf":
            return "llama.cpp reads GGUF, not a folder"
        return NO_LLAMA_CPP if importlib.util.find_spec("xllamacpp") is None else ""
    return "" if form == "hf" else "reads the folder: --format hf"


def _run(path: str, form: str, file: Path, reference: Reference) -> dict[str, Any]:
    try:
        logits_PV, told = ask(path, file, reference)
    except UserError as error:
        return {"status": "failed", "why": str(error)}
    return compare(form, logits_PV, told, reference)


def ask(
    path: str, file: Path, reference: Reference, environment: dict[str, str] | None = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """logits_PV (or log-probabilities) and what else the path said, from a process and a folder of its own.

    Raises:
        UserError: the process failed; its last line says how.
    """
    with tempfile.TemporaryDirectory(prefix="potstill-path-") as folder:
        clean = Path(folder) / file.name
        if file.is_dir():
            clean.mkdir()
            for each in sorted(file.iterdir()):
                _link(each, clean / each.name)
        else:
            _link(file, clean)
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.safetensors"
        asked = {
            "texts": reference.texts,
            "ids": reference.ids,
            "prompt": PROMPT,
            "width": reference.logp_PV.shape[1],
        }
        request.write_text(json.dumps(asked), encoding="utf-8")
        command = [sys.executable, "-P", str(READER), path, str(clean), str(request), str(answer)]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | (environment or {}),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=DEADLINE_S,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{path}: no answer within {DEADLINE_S} s.") from error
        if done.returncode or not answer.exists():
            last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
            raise UserError(f"{path}: ended with code {done.returncode}: {one_line(RuntimeError(last))}")
        with safe_open(answer, framework="pt") as found:
            return found.get_tensor("logits"), json.loads(found.metadata()["told"])


def compare(form: str, logits_PV: torch.Tensor, told: dict[str, Any], reference: Reference) -> dict[str, Any]:
    """The path's record. It passed if every text has the student's ids and KL(student‖path) is in bounds."""
    logp_PV = F.log_softmax(logits_PV.double(), dim=-1)
    kl_P = _kl(reference.logp_PV, logp_PV)
    own, limit = kl_P, MEAN_KL.get(form, OF_WRITTEN)
    if form not in MEAN_KL:
        if reference.written_PV is None:
            raise ValueError(f"{form}: a reference of the file as it was written is needed")
        own = _kl(reference.written_PV, logp_PV)
    same_top = int((logp_PV.argmax(-1) == reference.logp_PV.argmax(-1)).sum())
    pairs = list(zip(told["tokens"], reference.tokens, strict=True))
    odd = next((i for i, (theirs, ours) in enumerate(pairs) if theirs != ours), None)
    judged, prompts = float(own.mean()), len(reference.ids)
    faults = []
    if odd is not None:
        faults.append(
            f"other tokens for {reference.texts[odd]!r:.60}: {pairs[odd][0]} and not {pairs[odd][1]}"
        )
    if not judged <= limit:
        of = "the student" if form in MEAN_KL else "the file's own numbers"
        faults.append(f"mean KL to {of} {judged:.3g} nats, above {limit:.0e}")
    if form in EQUAL_TOP1 and same_top < prompts:
        faults.append(f"another likeliest token after {prompts - same_top} of {prompts} prompts")
    return {
        "status": "failed" if faults else "passed",
        **({"why": "; ".join(faults)} if faults else {}),
        "version": told["version"],
        "texts": len(pairs),
        "tokens_equal": sum(theirs == ours for theirs, ours in pairs),
        "prompts": prompts,
        "top1_equal": same_top,
        "mean_kl": _finite(judged),
        "max_kl": _finite(float(own.max())),
        "mean_kl_limit": limit,
        "mean_kl_to_student": _finite(float(kl_P.mean())),
        "prompt": PROMPT,
        "generated": told["generated"],
    }


def _kl(logp_PV: torch.Tensor, other_PV: torch.Tensor) -> torch.Tensor:
    """KL(first‖second) of each prompt in nats; infinite where the second leaves out what the first has."""
    return F.kl_div(other_PV, logp_PV, reduction="none", log_target=True).sum(-1)


def _finite(value: float) -> float | None:
    """JSON has no word for what is not."""
    return value if math.isfinite(value) else None


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(file, to)
