"""One path to an exported model, as a program of its own: load, tokenise, next-token distributions, generate.

    python -P roundtrip_reader.py potstill|transformers|llama.cpp MODEL REQUEST ANSWER

REQUEST is JSON: texts to tokenise, ids to predict the next token after, a prompt to continue, and the width
of the distributions. ANSWER is a safetensors file. Only numpy, safetensors and the library of the path are
imported, potstill on its own path alone, so that any version of the others can be tried.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import save_file

GENERATED = 16
"""Tokens that each path decodes greedily after the prompt."""
CONTEXT = 512
"""Tokens that llama.cpp is started for, until a longer row comes."""


class Reader(Protocol):
    version: str

    def tokenise(self, text: str) -> list[int]: ...
    def logits(self, ids: list[int]) -> Any: ...
    def generate(self, prompt: str) -> str: ...


def last_logits(hf: Any, ids: list[int]) -> Any:
    """logits_V after the last of `ids`; those of the others are not computed where the model allows it."""
    import torch

    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(hf.forward).parameters else {}
    with torch.no_grad():
        return hf(input_ids=torch.tensor([ids]), use_cache=False, **keep).logits[0, -1]


class TransformersReader:
    def __init__(self, model: Path) -> None:
        import torch
        import transformers

        self.version = f"transformers {transformers.__version__}"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        # What is compared are the file's numbers, not the rounding of activations in their dtype.
        version = tuple(map(int, transformers.__version__.split(".")[:2]))
        of_weights = "dtype" if version >= (4, 56) else "torch_dtype"
        self.hf = transformers.AutoModelForCausalLM.from_pretrained(
            model, trust_remote_code=False, **{of_weights: torch.float32}
        )
        self.hf.eval()

    def tokenise(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def logits(self, ids: list[int]) -> Any:
        return last_logits(self.hf, ids).float().numpy()

    def generate(self, prompt: str) -> str:
        import torch

        ids = torch.tensor([self.tokenise(prompt)])
        ends = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        pad = next((i for i in ends if i is not None), 0)
        mask = torch.ones_like(ids)
        whole = self.hf.generate(
            ids, attention_mask=mask, max_new_tokens=GENERATED, do_sample=False, pad_token_id=pad
        )
        return str(self.tokenizer.decode(whole[0, ids.shape[1] :]))


class PotstillReader(TransformersReader):
    def __init__(self, model: Path) -> None:
        import potstill
        from potstill.data.tokenizers import load_tokenizer
        from potstill.models.load import load_causal_lm

        self.version = f"potstill {potstill.__version__}"
        self.tokenizer = load_tokenizer(model)
        self.model = load_causal_lm(model)
        self.hf = self.model.hf

    def logits(self, ids: list[int]) -> Any:
        import torch

        with torch.no_grad():
            hidden_TD = self.model.hidden(torch.tensor([ids]))[0]
            return self.model.logits(hidden_TD[-1:])[0].numpy()


class LlamaCppReader:
    """The server inside xllamacpp's wheel, on the loopback interface; keys and values in float32."""

    def __init__(self, model: Path, width: int) -> None:
        import xllamacpp

        self.version = f"xllamacpp {xllamacpp.__version__}"
        self.model, self.width = model, width
        self.start(CONTEXT)
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self.sampled = self.tokenise("a", special=False)[0]

    def start(self, context: int) -> None:
        """For rows of so many tokens: a longrope takes its long factors in a context beyond the original."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = os.fspath(self.model)
        params.n_ctx, params.n_parallel = context, 1
        params.verbosity, params.warmup = -1, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
        self.context, self.server = context, xllamacpp.Server(params)

    def tokenise(self, text: str, special: bool = True) -> list[int]:
        body = {"content": text, "add_special": special, "parse_special": special}
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with self.open(request, timeout=60) as answer:
            ids: list[int] = json.load(answer)["tokens"]
        return ids

    def logits(self, ids: list[int]) -> Any:
        """Log-probabilities: logits up to a constant.

        They are the model's own, whatever token is sampled. The server returns none with a token that ends
        the text or is part of a character, so a bias makes it sample an `a`.
        """
        if len(ids) >= self.context:
            self.start(len(ids) + 1)
        first = self._complete(ids, 1, n_probs=self.width, logit_bias=[[self.sampled, 1e9]])
        logp_V = np.full(self.width, -np.inf, dtype=np.float32)
        for token in first["logprobs"]["content"][0]["top_logprobs"]:
            logp_V[token["id"]] = token["logprob"]
        return logp_V

    def generate(self, prompt: str) -> str:
        return str(self._complete(prompt, GENERATED)["text"])

    def _complete(self, prompt: Any, tokens: int, **more: Any) -> Any:
        request = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False, **more}
        answer = self.server.handle_completions(request)
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp completes nothing: {answer}")
        return answer["choices"][0]


def main(path: str, model: Path, request: Path, answer: Path) -> None:
    inputs = json.loads(request.read_text(encoding="utf-8"))
    reader: Reader
    if path == "llama.cpp":
        reader = LlamaCppReader(model, inputs["width"])
    else:
        reader = {"potstill": PotstillReader, "transformers": TransformersReader}[path](model)
    found = {
        "version": reader.version,
        "tokens": [reader.tokenise(text) for text in inputs["texts"]],
        "generated": reader.generate(inputs["prompt"]),
    }
    logits_PV = np.stack([reader.logits(ids) for ids in inputs["ids"]])
    save_file({"logits": logits_PV}, answer, metadata={"answer": json.dumps(found)})


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
