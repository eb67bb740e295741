"""What a run is made of beside its recipe and its corpus: sha256 of every file that can change it unseen.

Weights are hashed as they were loaded. What no weight tells is hashed as a file: the config of a model, its
tokenizer and generation settings, a whole GGUF file, and the plug-ins of the recipe as they were imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from potstill.data import tokenizers
from potstill.io.hashing import file_sha256
from potstill.models import model_files
from potstill.models.load import local_copy
from potstill.recipe.load import Recipe
from potstill.recipe.plugins import plugin_sha256

SETTINGS = {
    *("config.json", "chat_template.jinja", "chat_template.json", "merges.txt"),
    *model_files.SETTINGS,
    *tokenizers.SETTINGS,
    *tokenizers.TOKENIZER_FILES,
}


def file_hashes(recipe: Recipe) -> dict[str, str]:
    """`ROLE/FILE` -> sha256, a role being teacher, student, tokenizer or plugins with their number.

    Raises:
        UserError: a file that cannot be read.
    """
    teacher = recipe.teacher
    roles = {
        "teacher": teacher.model if teacher.name in ("torch", "store") else None,
        "student": recipe.student.model if recipe.student.name in ("checkpoint", "config") else None,
        "tokenizer": recipe.corpus.tokenizer,
    }
    found = {}
    for role, source in roles.items():
        for path in _settings(local_copy(source)) if source is not None else ():
            found[f"{role}/{path.name}"] = file_sha256(path)
    if teacher.name == "store":
        found["teacher/manifest.json"] = file_sha256(Path(teacher.path) / "manifest.json")
    for number, plugin in enumerate(recipe.plugins):
        found[f"plugins/{number}/{Path(plugin).name}"] = plugin_sha256(Path(plugin))
    return found


def _settings(source: Path) -> list[Path]:
    if not os.path.isdir(source):
        return [source]
    return [source / name for name in sorted(SETTINGS) if os.path.lexists(source / name)]
