"""A Modelfile, with which Ollama takes a GGUF file as it is: `ollama create NAME -f Modelfile`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.io.safe_open import FETCH_AGAIN, read_object
from potstill.models.gguf_files import GGUFModel, check_gguf
from potstill.models.portable import GENERATION, ids_of

MODELFILE = "Modelfile"
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Field of a generation config -> Ollama's parameter."""
ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def modelfile(files: Sequence[Path], folder: Path) -> str:
    """Text of the Modelfile beside `files`: of the smallest, which is what Ollama is for, with the others' lines as
    comments. The format of prompts comes from the GGUF file.

    Ollama stops at texts that are named to it: one for each end that the file or the generation config in `folder`
    has, as a file has places for three. It samples as that config says, and by its own defaults where that says
    nothing.
    """
    file, *others = sorted(files, key=lambda each: each.stat().st_size)
    info = check_gguf(file)
    ends = [info.metadata[key] for key in ENDS if key in info.metadata]
    generation = {}
    if (folder / GENERATION).is_file():
        generation = read_object(folder / GENERATION, FETCH_AGAIN)
        ends += ids_of(generation.get("eos_token_id"))
    tokens = _tokens(file, info) if info.vocab_size else []
    stops = [tokens[end] for end in dict.fromkeys(ends) if isinstance(end, int) and 0 <= end < len(tokens)]
    stops = [stop for stop in stops if not {'"', "\n"} & set(stop)]  # a Modelfile knows no escapes
    template = "" if "tokenizer.chat_template" in info.metadata else "TEMPLATE {{ .Prompt }}\n"
    parameters = [*_sampling(generation), *(f'stop "{stop}"' for stop in stops)]
    commented = "".join(f"# FROM ./{other.name}\n" for other in others)
    return f"FROM ./{file.name}\n{commented}{template}" + "".join(
        f"PARAMETER {each}\n" for each in parameters
    )


def _sampling(generation: Mapping[str, Any]) -> Iterator[str]:
    if generation.get("do_sample") is True:
        for name, parameter in SAMPLING.items():
            if type(value := generation.get(name)) in (int, float):
                yield f"{parameter} {value}"


def _tokens(file: Path, info: Any) -> list[str]:
    tokens: list[str] = GGUFModel(file, info).reader.get_field("tokenizer.ggml.tokens").contents()
    return tokens
