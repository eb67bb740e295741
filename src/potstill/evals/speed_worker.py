"""One measurement of a profile as a program of its own, so that its peak memory is that of its models alone.

    python -P -m potstill.evals.speed_worker transformers|llama.cpp|speculative

The first line on stdin is JSON: what to load. Each further line asks for one measurement, and an empty line or the end
of the input for the peak memory. Each is answered by a line of JSON on stdout.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TextIO

import torch
from transformers import GenerationConfig
from transformers.generation.candidate_generator import AssistedCandidateGenerator
from transformers.generation.streamers import BaseStreamer

from potstill.errors import UserError, one_line
from potstill.io.memory import forget_peak, peak_bytes

DRAFTED = 4
"""Tokens that the student drafts before the teacher reads them."""
Answer = dict[str, Any]


class Measured(Protocol):
    """What is loaded and asked."""

    device: torch.device

    def about(self) -> Answer: ...
    def measure(self) -> Answer: ...


class OnTransformers:
    """A causal LM in Transformers: one forward pass over the prompt, then a greedy `generate` behind it."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.device = torch.device(request["device"])
        self.hf = _load(request["model"], request["dtype"], self.device)
        self.ids_1T = torch.tensor([request["prompt"]], device=self.device)
        self.settings = _settings(request["new_tokens"], do_sample=False)
        accepted = inspect.signature(self.hf.forward).parameters
        self.last_alone = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def about(self) -> Answer:
        import transformers

        weights = sum(parameter.numel() for parameter in self.hf.parameters())
        return {"version": f"transformers {transformers.__version__}", "parameters": weights}

    @torch.no_grad()
    def measure(self) -> Answer:
        started_s = self._now()
        self.hf(input_ids=self.ids_1T, use_cache=True, **self.last_alone)
        prefill_s = self._now() - started_s
        clock = _Clock()
        started_s = self._now()
        mask_1T = torch.ones_like(self.ids_1T)
        self.hf.generate(self.ids_1T, attention_mask=mask_1T, generation_config=self.settings, streamer=clock)
        first_s, last_s = clock.at[1], clock.at[-1]  # the first entry is the prompt itself
        return {
            "prefill_tokens": self.ids_1T.shape[1],
            "prefill_s": prefill_s,
            "first_token_s": first_s - started_s,
            "decoded_tokens": len(clock.at) - 2,
            "decoding_s": last_s - first_s,
        }

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Clock(BaseStreamer):  # type: ignore[misc]  # Transformers is not typed
    """When each token was there; it is copied to the CPU before, so the device has computed it."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Any) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


class OnLlamaCpp:
    """A GGUF file in the server of xllamacpp's wheel, with llama.cpp's own settings; its clock, but for the wait for
    the first token.
    """

    device = torch.device("cpu")

    def __init__(self, request: Mapping[str, Any]) -> None:
        import xllamacpp

        self.version = f"xllamacpp {xllamacpp.__version__}"
        self.prompt, self.new_tokens = request["prompt"], request["new_tokens"]
        params = xllamacpp.CommonParams()
        params.model.path = os.fspath(request["model"])
        params.n_ctx, params.n_parallel = len(self.prompt) + self.new_tokens + 1, 1
        params.verbosity = -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
        self.server = xllamacpp.Server(params)

    def about(self) -> Answer:
        return {"version": self.version}

    def measure(self) -> Answer:
        asked = {"prompt": self.prompt, "n_predict": self.new_tokens, "temperature": 0}
        started_s = time.perf_counter()
        answer = self.server.handle_completions(asked | {"cache_prompt": False, "ignore_eos": True})
        whole_s = time.perf_counter() - started_s
        if "timings" not in answer:
            raise UserError(f"llama.cpp completes nothing: {answer!r:.200}")
        of = answer["timings"]
        # The first of the new tokens comes out of reading the prompt; those behind it are decoded.
        return {
            "prefill_tokens": of["prompt_n"],
            "prefill_s": of["prompt_ms"] / 1e3,
            "first_token_s": whole_s - of["predicted_ms"] / 1e3,
            "decoded_tokens": of["predicted_n"] - 1,
            "decoding_s": of["predicted_ms"] / 1e3,
        }


class Speculative:
    """A teacher that reads what a student drafts (Leviathan et al. 2023), and the same teacher alone; each call takes
    the next prompt, sampled at temperature 1.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.device = torch.device(request["device"])
        self.teacher, self.student = (
            _load(request[name], request["dtype"], self.device) for name in ("teacher", "student")
        )
        drafts = self.student.generation_config
        drafts.num_assistant_tokens, drafts.num_assistant_tokens_schedule = DRAFTED, "constant"
        drafts.assistant_confidence_threshold = 0.0  # drafts are not cut short where the student is unsure
        self.prompts, self.next = request["prompts"], 0
        self.settings = _settings(request["new_tokens"], do_sample=True)

    def about(self) -> Answer:
        return {"drafted_at_once": DRAFTED}

    def measure(self) -> Answer:
        ids_1T = torch.tensor([self.prompts[self.next % len(self.prompts)]], device=self.device)
        self.next += 1
        alone_s, _ = self._generate(ids_1T)
        with _counted() as counts:
            drafted_s, new_tokens = self._generate(ids_1T, assistant_model=self.student)
        return counts | {"new_tokens": new_tokens, "alone_s": alone_s, "drafted_s": drafted_s}

    def _generate(self, ids_1T: torch.Tensor, **more: Any) -> tuple[float, int]:
        torch.manual_seed(self.next)
        started_s = time.perf_counter()
        whole_1T = self.teacher.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=self.settings, **more
        )
        new_tokens = whole_1T.cpu().shape[1] - ids_1T.shape[1]  # the copy waits for the device
        return time.perf_counter() - started_s, new_tokens


@contextlib.contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Of a `generate` inside: the rounds, what was drafted, judged and accepted in them. A draft behind the first that
    is refused is not judged.
    """
    counts = {"rounds": 0, "drafted": 0, "judged": 0, "accepted": 0}
    own = AssistedCandidateGenerator.update_candidate_strategy

    def count(self: Any, input_ids: Any, scores: torch.Tensor, num_matches: int) -> None:
        drafted, accepted = scores.shape[1] - 1, int(num_matches)
        counts["rounds"] += 1
        counts["drafted"] += drafted
        counts["judged"] += min(accepted + 1, drafted)
        counts["accepted"] += accepted
        own(self, input_ids, scores, num_matches)

    AssistedCandidateGenerator.update_candidate_strategy = count
    try:
        yield counts
    finally:
        AssistedCandidateGenerator.update_candidate_strategy = own


def _load(model: str, dtype: str, device: torch.device) -> Any:
    """Without settings of its own for `generate`: no penalty, and no end before the last of the new tokens."""
    from potstill.models.load import choose_dtype, load_causal_lm

    hf = load_causal_lm(model, device=device, dtype=choose_dtype(dtype)).hf
    hf.generation_config = GenerationConfig(pad_token_id=0)
    return hf


def _settings(new_tokens: int, *, do_sample: bool) -> GenerationConfig:
    whole = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} if do_sample else {}
    return GenerationConfig(max_new_tokens=new_tokens, do_sample=do_sample, pad_token_id=0, **whole)


KINDS: dict[str, Callable[[Mapping[str, Any]], Measured]] = {
    "transformers": OnTransformers,
    "llama.cpp": OnLlamaCpp,
    "speculative": Speculative,
}


def main(kind: str, asked: TextIO, answers: TextIO) -> None:
    request = json.loads(asked.readline())
    torch.set_num_threads(request["threads"])
    measured = KINDS[kind](request)

    def answer(value: Answer) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer(measured.about())
    is_reset = forget_peak(measured.device)
    while asked.readline().strip():
        answer(measured.measure())
    answer({"peak_memory_bytes": peak_bytes(measured.device), "with_loading": not is_reset})


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer
    try:
        main(sys.argv[1], sys.stdin, answers)
    except Exception as error:  # a library may raise anything; the last line on stderr is what the user reads
        print(one_line(error), file=sys.stderr)
        sys.exit(1)
