"""The verb `potstill chat`: talk to a student in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from potstill.errors import UserError
from potstill.io.terminal import Display

if TYPE_CHECKING:
    from potstill.models.dialogue import Dialogue

HELP = "/reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C ends an answer"


def add_flags(chat: argparse.ArgumentParser) -> None:
    chat.add_argument("model", metavar="RUN|MODEL", help="run directory, folder, GGUF file or hub id")
    chat.add_argument("--prompt", metavar="TEXT", help="print one answer and end")
    chat.add_argument("--system", metavar="TEXT", help="a system message before all turns")
    chat.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="of an answer; default 512"
    )
    chat.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="0: the likeliest token; default 0.7"
    )
    chat.add_argument("--top-p", type=float, default=0.95, metavar="P", help="default 0.95")
    chat.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    chat.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run_chat(options: argparse.Namespace, display: Display) -> int:
    """Exit code 2 where the model cannot be decoded."""
    for flag, sound, must in (
        ("max-new-tokens", options.max_new_tokens >= 1, "1 or more"),
        ("temperature", 0 <= options.temperature < float("inf"), "0 or more"),
        ("top-p", 0 < options.top_p <= 1, "above 0 and at most 1"),
    ):
        if not sound:
            raise UserError(f"--{flag}: {getattr(options, flag.replace('-', '_'))} must be {must}.")
    if options.json and options.prompt is None:
        raise UserError("--json: is of one answer. Add --prompt TEXT.")
    from potstill.models.decoding import InferenceFailed

    dialogue = _dialogue(options)
    try:
        if options.prompt is not None:
            answer = dialogue.reply(options.prompt, (lambda piece: None) if options.json else display.stream)
            if options.json:
                display.result(json.dumps({"prompt": options.prompt, **vars(answer)}, indent=2))
            else:
                display.result("")
            return 0
        display.note(
            f"{options.model}: {'its chat template' if dialogue.is_chat else 'plain continuation'}; {HELP}"
        )
        _talk(dialogue, display)
    except InferenceFailed as error:
        raise UserError(
            f"{options.model}: {error}. Look at the run's losses with `potstill show`."
        ) from error
    return 0


def _talk(dialogue: Dialogue, display: Display) -> None:
    for words in _lines():
        if words.strip() == "/exit":
            return
        if words.strip() == "/reset":
            dialogue.reset()
            display.note("forgotten")
        elif words.strip():
            answer = dialogue.reply(words, display.stream)
            display.result("")
            if answer.finish == "context":
                display.note("the model's context is full; /reset forgets what was said")


def _lines() -> Iterator[str]:
    """What a person types, or what is piped in, line by line."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return


def _dialogue(options: argparse.Namespace) -> Dialogue:
    import torch

    from potstill.cli.evaluate import source_and_folder
    from potstill.data.tokenizers import load_tokenizer
    from potstill.io.cpu_matmul import choose_product_dtype
    from potstill.models.dialogue import Dialogue
    from potstill.models.hub import local_copy
    from potstill.models.load import choose_device, load_causal_lm

    source, _ = source_and_folder(options.model, "chat")
    device = choose_device(options.device)
    dtype = getattr(torch, choose_product_dtype(device)[0]) if device.type == "cuda" else torch.float32
    model = load_causal_lm(source, device=device, dtype=dtype)
    tokenizer = load_tokenizer(local_copy(source))
    if options.system is not None and not tokenizer.chat_template:
        raise UserError(f"--system: {options.model} has no chat template. Write it into the prompt.")
    return Dialogue(
        model,
        tokenizer,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
