"""What programs other than Transformers 5 look for in a saved folder: ends, the chat template, a dtype."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.io.safe_open import FETCH_AGAIN, read_object

GENERATION = "generation_config.json"
TOKENIZER, TEMPLATE, MORE_TEMPLATES = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
DEFAULT = "default"
"""Name of the template that is used where none is named."""


def write_generation_config(config: Any, folder: Path) -> None:
    """A `transformers.GenerationConfig`, with every flag as it is.

    Its own `save_pretrained` raises over flags that have no effect together (a temperature without sampling), which
    many published models have.
    """
    settings = json.loads(config.to_json_string(use_diff=True))
    settings.pop("compile_config", None)
    write_json(folder / GENERATION, settings)


def add_ends(folder: Path, ends: Sequence[int]) -> None:
    """Let the generation config of a saved model list these ids, behind those that it has."""
    place = folder / GENERATION
    settings = read_object(place, FETCH_AGAIN)
    listed = ids_of(settings.get("eos_token_id"))
    if new := [end for end in ends if end not in listed]:
        write_json(place, settings | {"eos_token_id": [*listed, *new]})


def ids_of(value: Any) -> list[int]:
    """Of a field that may be one id, a list of ids, or None."""
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def write_portable_config(folder: Path) -> None:
    """Let Transformers 4 read a config and a tokenizer that Transformers 5 wrote, and every program the template.

    It ignores rope_parameters: without a top-level rope_theta it assumes 10,000, without rope_scaling an
    unscaled rope; of Gemma 3, which has a rope for each kind of layer, 1,000,000 and 10,000. It refuses a
    tokenizer class that only 5 has, and a list of extra special tokens.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in (rope.get("sliding_attention") or {}):
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    rope = rope.get("full_attention") or rope
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        write_json(path, config)
    path = folder / TOKENIZER
    if not path.exists():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in 4, which 5 knows too
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if templates := _templates(folder, config):
        config["chat_template"] = _write_templates(folder, templates)
    write_json(path, config)


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The chat templates by name, from the files and from the tokenizer's config; a file takes precedence."""
    there = config.get("chat_template") or {}
    if isinstance(there, str):
        there = {DEFAULT: there}
    elif isinstance(there, list):
        there = {each["name"]: each["template"] for each in there}
    files = {DEFAULT: folder / TEMPLATE} if (folder / TEMPLATE).is_file() else {}
    files |= {file.stem: file for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    return there | {name: file.read_bytes().decode("utf-8") for name, file in files.items()}


def _write_templates(folder: Path, templates: dict[str, str]) -> str | list[dict[str, str]]:
    """A single one in its file, as some programs read the file alone, and others the config alone. Several in the
    config alone, which both Transformers read: beside a file of the default they would be ignored, and the folder of
    files that Transformers 5 writes is not in sums, receipts and uploads, which are of files.

    Returns:
        What the tokenizer's config has.
    """
    if list(templates) == [DEFAULT]:
        (folder / TEMPLATE).write_bytes(templates[DEFAULT].encode("utf-8"))
        return templates[DEFAULT]
    (folder / TEMPLATE).unlink(missing_ok=True)
    shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)
    return [{"name": name, "template": template} for name, template in templates.items()]


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
