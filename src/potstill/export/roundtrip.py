"""Does an exported model behave as the student does in the programs that people use? Three paths.

potstill and Transformers read the folder, potstill (through Transformers) and llama.cpp the GGUF files, each
in a process of its own and from a clean folder with nothing else in it. Each tokenises the same texts, gives
the next-token distribution after the same ids, and generates; ids and distributions are compared with those
of the student in the run directory. One row of ids is long: a rope that was not scaled and a window that was
left out show only there. A path that is not available is recorded as not run, with the reason; it never
counts as passed.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from potstill.errors import UserError, one_line
from potstill.export.dtype import rounded
from potstill.export.gguf_model import as_written
from potstill.export.gguf_tokenizer import texts_for
from potstill.export.roundtrip_reader import last_logits
from potstill.models.causal_lm import CausalLM

PATHS = ("potstill", "transformers", "llama.cpp")
MEAN_KL = {"hf": 1e-6, "f32": 1e-6, "f16": 1e-4, "bf16": 1e-3}
"""Nats: how far a path may be from the student's own next-token distribution, mean over the prompts."""
MEAN_KL_TO_WRITTEN = 2e-2
"""Nats, for coarser types: from the student with the file's own weights. llama.cpp adds the rounding of
activations, up to 0.004 on the demo's student; a tensor in the wrong order adds whole nats."""
EQUAL_TOP1 = ("hf", "f32")
"""Formats whose likeliest token must always be the student's."""
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
FAR, BEYOND, MOST = 320, 64, 1024
"""Tokens of the long row: at least FAR, and BEYOND more than a rope's original context or a window; at most
MOST, and what the model has positions for."""
FAR_KL = 5
"""How many times the limit of the mean the long row, a single one, may be off."""
PROMPT = "The quick brown fox"
DEADLINE_S = 1800
READER = Path(__file__).with_name("roundtrip_reader.py")
NO_LLAMA_CPP = "xllamacpp is not installed: pip install 'potstill[gguf]'"


@dataclass(frozen=True)
class Reference:
    """The inputs given to each path, and the student's own answers."""

    texts: list[str]
    tokens: list[list[int]]
    ids: list[list[int]]
    """The last is the long row."""
    logp_PV: torch.Tensor
    written_PV: torch.Tensor | None = None
    """The student's with the weights of a quantised file or of a folder in another dtype, activations unrounded."""
    table_PV: torch.Tensor | None = None
    """The same with GELU as llama.cpp computes it on a CPU; None for models without."""

    @classmethod
    def of(
        cls, model: CausalLM, tokenizer: Any, *, texts: int = TEXTS, prompts: Sequence[str] = PROMPTS
    ) -> Reference:
        """In float32 and one prompt at a time, as on each path."""
        probes = texts_for(tokenizer, texts)
        ids = [tokenizer(text)["input_ids"][:MAX_IDS] for text in prompts]
        ids.append(far_row(model.hf.config, [i for row in ids for i in row]))
        tokens = [tokenizer(text)["input_ids"] for text in probes]
        return cls(probes, tokens, ids, _logp(model.hf, ids))

    def of_written(self, model: CausalLM, file: Path, form: str, dtype: str = "float32") -> Reference:
        """With what the file's types, and llama.cpp's GELU, make of the answers; `dtype` is that of a folder."""
        hf = model.hf if form in MEAN_KL else as_written(model, file, form)
        if form == "hf" and dtype != "float32":
            hf = rounded(hf, dtype)
        written_PV = None if hf is model.hf else _logp(hf, self.ids)
        table_PV = None
        if form != "hf" and getattr(hf.config, "hidden_activation", None) == "gelu_pytorch_tanh":
            with gelu_by_table(hf):
                table_PV = _logp(hf, self.ids)
        return dataclasses.replace(self, written_PV=written_PV, table_PV=table_PV)


def far_row(config: Any, ids: list[int]) -> list[int]:
    """The ids repeated, as long as it takes to see what only far positions show."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    edges = [rope.get("full_attention", rope).get("original_max_position_embeddings")]
    edges.append(getattr(config, "sliding_window", None))
    length = min(MOST, max([FAR, *(edge + BEYOND for edge in edges if edge)]))
    length = min(length, (getattr(config, "max_position_embeddings", None) or MOST) - 1)  # llama.cpp adds one
    repeated: list[int] = ids * (length // len(ids) + 1)
    return repeated[:length]


class TableGelu(nn.Module):
    """Llama.cpp's on a CPU: between -10 and 10 it looks GELU up in a table of half-precision numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        looked_up = F.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, looked_up))


@contextmanager
def gelu_by_table(hf: Any) -> Iterator[None]:
    own = [(module, module.act_fn) for module in hf.modules() if hasattr(module, "act_fn")]
    try:
        for module, _ in own:
            module.act_fn = TableGelu()
        yield
    finally:
        for module, activation in own:
            module.act_fn = activation


def _logp(hf: Any, prompts: list[list[int]]) -> torch.Tensor:
    rows = [last_logits(hf, ids) for ids in prompts]
    return F.log_softmax(torch.stack(rows).double(), dim=-1)


def check_paths(
    form: str, file: Path, reference: Reference, note: Callable[[str], None] = lambda path: None
) -> dict[str, dict[str, Any]]:
    """The record of each path for the exported `file`, a folder or a GGUF; a missing path does not raise.

    Args:
        note: called before each path is tried, which takes seconds to minutes.
    """
    records = {}
    for path in PATHS:
        why = _why_not_run(path, form)
        if not why:
            note(f"{form}: reading it back in {path}")
        records[path] = {"status": "not run", "why": why} if why else _run(path, form, file, reference)
    return records


def not_run(why: str) -> dict[str, dict[str, Any]]:
    return {path: {"status": "not run", "why": why} for path in PATHS}


def _why_not_run(path: str, form: str) -> str:
    if path == "llama.cpp":
        if form == "hf":
            return "llama.cpp reads GGUF, not a folder"
        return NO_LLAMA_CPP if importlib.util.find_spec("xllamacpp") is None else ""
    if path == "transformers" and form != "hf":
        return "reads the folder (--format hf); potstill reads this file through it"
    return ""


def _run(path: str, form: str, file: Path, reference: Reference) -> dict[str, Any]:
    try:
        logits_PV, answer = ask(path, file, reference)
    except UserError as error:
        return {"status": "failed", "why": str(error)}
    return compare(path, form, logits_PV, answer, reference)


def ask(
    path: str, file: Path, reference: Reference, environment: dict[str, str] | None = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """logits_PV (or log-probabilities) and the rest of the answer, from a process and a folder of its own.

    Raises:
        UserError: the process failed; with its last line.
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
        inputs = {
            "texts": reference.texts,
            "ids": reference.ids,
            "prompt": PROMPT,
            "width": reference.logp_PV.shape[1],
        }
        request.write_text(json.dumps(inputs), encoding="utf-8")
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
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{path}: ended with code {done.returncode}: {one_line(RuntimeError(last))}")
        with safe_open(answer, framework="pt") as tensors:
            return tensors.get_tensor("logits"), json.loads(tensors.metadata()["answer"])


def compare(
    path: str, form: str, logits_PV: torch.Tensor, answer: dict[str, Any], reference: Reference
) -> dict[str, Any]:
    """The path's record. It passed if every text has the student's ids and KL(student‖path) is in bounds.

    The ids that Transformers makes of a GGUF file's tokenizer are counted, not judged: it does not know every
    pre-tokenizer that the file may name.
    """
    logp_PV = F.log_softmax(logits_PV.double(), dim=-1)
    kl_P = _kl(reference.logp_PV, logp_PV)
    judged_P, limit = kl_P, MEAN_KL.get(form, MEAN_KL_TO_WRITTEN)
    if reference.written_PV is not None:
        judged_P = _kl(reference.written_PV, logp_PV)
    elif form not in MEAN_KL:
        raise ValueError(f"{form}: needs a reference with the weights as written: Reference.of_written")
    if path == "llama.cpp" and reference.table_PV is not None:  # unless it is built to compute GELU
        # Numbers that differ in their last bits fall into other entries here and there: what that costs, and no more
        # than half of what the table does, is the reader's and not the file's.
        of_table = float(_kl(reference.logp_PV, reference.table_PV)[:-1].mean())
        judged_P = min(judged_P, _kl(reference.table_PV, logp_PV), key=lambda kl_P: float(kl_P.mean()))
        limit = max(limit, of_table / 2)
    own_PV = reference.logp_PV
    if form in EQUAL_TOP1 and reference.written_PV is not None:
        own_PV = reference.written_PV
    same_top = int((logp_PV.argmax(-1) == own_PV.argmax(-1)).sum())
    pairs = list(zip(answer["tokens"], reference.tokens, strict=True))
    first = next((i for i, (path_ids, own_ids) in enumerate(pairs) if path_ids != own_ids), None)
    mean_kl, far_kl, prompts = float(judged_P[:-1].mean()), float(judged_P[-1]), len(reference.ids)
    faults = []
    if first is not None and (form == "hf" or path == "llama.cpp"):
        faults.append(
            f"other tokens for {reference.texts[first]!r:.60}: {pairs[first][0]} and not {pairs[first][1]}"
        )
    if not mean_kl <= limit:
        of = "the student" if reference.written_PV is None else "the file's own weights"
        faults.append(f"mean KL to {of} {mean_kl:.3g} nats, above {limit:.0e}")
    if not far_kl <= FAR_KL * limit:
        faults.append(
            f"KL {far_kl:.3g} nats after {len(reference.ids[-1])} tokens, above {FAR_KL * limit:.0e}: far"
            " positions differ, as where a rope's scaling or a window is lost"
        )
    if form in EQUAL_TOP1 and same_top < prompts:
        faults.append(f"another likeliest token after {prompts - same_top} of {prompts} prompts")
    return {
        "status": "failed" if faults else "passed",
        **({"why": "; ".join(faults)} if faults else {}),
        "version": answer["version"],
        "texts": len(pairs),
        "tokens_equal": sum(path_ids == own_ids for path_ids, own_ids in pairs),
        "prompts": prompts,
        "top1_equal": same_top,
        "mean_kl": _finite(mean_kl),
        "max_kl": _finite(float(judged_P.max())),
        "mean_kl_limit": limit,
        "far_tokens": len(reference.ids[-1]),
        "far_kl": _finite(far_kl),
        "mean_kl_to_student": _finite(float(kl_P[:-1].mean())),
        "prompt": PROMPT,
        "generated": answer["generated"],
    }


def _kl(logp_PV: torch.Tensor, other_PV: torch.Tensor) -> torch.Tensor:
    """KL(first‖second) of each prompt in nats; infinite where the second is 0 and the first is not."""
    return F.kl_div(other_PV, logp_PV, reduction="none", log_target=True).sum(-1)


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(file, to)
