"""A Modelfile, with which Ollama takes a GGUF file as it is: `ollama create NAME -f Modelfile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potstill.io.safe_open import FETCH_AGAIN, read_object
from potstill.models.gguf_files import GGUFModel, check_gguf
from potstill.models.portable import GENERATION, ids_of

MODELFILE = "Modelfile"
ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def modelfile(file: Path, folder: Path) -> str:
    """Text of the Modelfile beside `file`; the format of prompts comes from the GGUF file.

    Ollama stops at texts that are named to it: one for each end that the file or the generation config in `folder`
    has, as a file has places for three.
    """
    info = check_gguf(file)
    ends = [info.metadata[key] for key in ENDS if key in info.metadata]
    if (folder / GENERATION).is_file():
        ends += ids_of(read_object(folder / GENERATION, FETCH_AGAIN).get("eos_token_id"))
    tokens = _tokens(file, info) if info.vocab_size else []
    stops = [tokens[end] for end in dict.fromkeys(ends) if isinstance(end, int) and 0 <= end < len(tokens)]
    stops = [stop for stop in stops if not {'"', "\n"} & set(stop)]  # a Modelfile knows no escapes
    template = "" if "tokenizer.chat_template" in info.metadata else "TEMPLATE {{ .Prompt }}\n"
    parameters = ["temperature 0", *(f'stop "{stop}"' for stop in stops)]
    return f"FROM ./{file.name}\n{template}" + "".join(f"PARAMETER {each}\n" for each in parameters)


def _tokens(file: Path, info: Any) -> list[str]:
    tokens: list[str] = GGUFModel(file, info).reader.get_field("tokenizer.ggml.tokens").contents()
    return tokens
