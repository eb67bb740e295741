"""The other end of `engines.VllmEngine`: a program of its own, run by a Python that has vLLM and maybe no potstill.

It reads one JSON object a line from stdin and answers each with one on stdout: first what to load, then prompts to
complete, each time after the weights in the folder were replaced. It ends when stdin does.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from typing import Any


class Repacking:
    """A part of vLLM's own worker, which it mixes in by name."""

    def pack_again(self) -> None:
        """On a CPU, products of a tied embedding are with a packed copy of it, which reloading leaves as it was."""
        from vllm.model_executor.layers.utils import (  # type: ignore[import-not-found]
            dispatch_cpu_unquantized_gemm,
        )
        from vllm.platforms import current_platform  # type: ignore[import-not-found]

        model: Any = self.get_model()  # type: ignore[attr-defined]
        for module in model.modules() if current_platform.is_cpu() else ():
            if hasattr(module, "cpu_linear") and module.weight.numel():
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints to stdout

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    order = json.loads(sys.stdin.readline())
    try:
        import vllm  # type: ignore[import-not-found]  # of another environment
    except ImportError as error:
        answer(missing=str(error))
        return
    engine = vllm.LLM(
        model=order["folder"],
        dtype=order["dtype"],
        max_model_len=order["tokens"],
        max_num_seqs=order["rows"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,  # what it would keep is of other weights
        generation_config="vllm",  # not the model's own
        worker_extension_cls="vllm_worker.Repacking",
        logprobs_mode="raw_logprobs",  # of the model, whatever the sampling cuts off
    )
    answer(ready=vllm.__version__)
    for line in sys.stdin:
        order = json.loads(line)
        engine.collective_rpc("reload_weights")
        engine.collective_rpc("pack_again")
        rows = [
            vllm.SamplingParams(
                temperature=order["temperature"],
                top_p=order["top_p"],
                top_k=order["top_k"] or -1,
                max_tokens=order["max_new_tokens"],
                stop_token_ids=order["ends"],
                ignore_eos=True,
                allowed_token_ids=None if order["known"] is None else list(range(order["known"])),
                seed=int.from_bytes(hashlib.sha256(f"{order['seed']} {name}".encode()).digest()[:4], "big"),
                logprobs=0,
                detokenize=False,
            )
            for name in order["names"]
        ]
        prompts = [{"prompt_token_ids": ids} for ids in order["prompts"]]
        written = engine.generate(prompts, rows, use_tqdm=False)
        outputs = [each.outputs[0] for each in written]
        answer(
            new=[list(each.token_ids) for each in outputs],
            logps=[
                [float(of[token].logprob) for of, token in zip(each.logprobs, each.token_ids, strict=True)]
                for each in outputs
            ],
        )


if __name__ == "__main__":
    main()
