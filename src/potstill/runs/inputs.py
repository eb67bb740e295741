"""sha256 of every file, beside recipe and corpus, that could change a run unnoticed.

Weights are hashed in memory, as loaded. What they do not cover is hashed as a file: a model's config, tokenizer
and generation settings, a whole GGUF file, and the recipe's plug-ins as they were imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from potstill.data import tokenizers
from potstill.io.hashing import file_sha256
from potstill.models import model_files
from potstill.recipe.plugins import plugin_sha256

SETTINGS = {
    *("config.json", "chat_template.jinja", "chat_template.json", "merges.txt"),
    *model_files.SETTINGS,
    *tokenizers.SETTINGS,
    *tokenizers.TOKENIZER_FILES,
}


def file_hashes(inputs: Mapping[str, Path], plugins: Sequence[str]) -> dict[str, str]:
    """sha256 by `ROLE/FILE`. A plain role such as `teacher` maps to a model's folder, whose settings files are hashed;
    a role with a slash already names a single file. Plug-ins are numbered: two may have the same file name.

    Raises:
        UserError: a file cannot be read.
    """
    hashes = {}
    for role, path in inputs.items():
        if "/" in role:
            hashes[role] = file_sha256(path)
        else:
            hashes |= {f"{role}/{file.name}": file_sha256(file) for file in _settings(path)}
    for number, plugin in enumerate(plugins):
        hashes[f"plugins/{number}/{Path(plugin).name}"] = plugin_sha256(Path(plugin))
    return hashes


def _settings(source: Path) -> list[Path]:
    if not os.path.isdir(source):
        return [source]
    return [source / name for name in sorted(SETTINGS) if os.path.lexists(source / name)]
