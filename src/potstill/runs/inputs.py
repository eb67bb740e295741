"""What a run is made of beside its recipe and its corpus: sha256 of every file that can change it unseen.

Weights are hashed as they were loaded. What no weight tells is hashed as a file: the config of a model, its
tokenizer and generation settings, a whole GGUF file, and the plug-ins of the recipe as they were imported.
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
    """`ROLE/FILE` -> sha256. A role with a model's folder stands for the files beside its weights; one that names its
    file stands for that file; `plugins` are numbered.

    Raises:
        UserError: a file that cannot be read.
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
