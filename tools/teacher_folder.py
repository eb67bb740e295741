"""A teacher as a folder that a server can load: `python tools/teacher_folder.py MODEL FOLDER`.

MODEL is what a recipe's `teacher.model` may be: a GGUF file, a hub id, `package:NAME/FILE`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from potstill import TorchTeacher
from potstill.recipe.paths import locate


def write(model: str, folder: Path) -> None:
    teacher = TorchTeacher.for_inference(locate(model, Path.cwd(), or_hub_id=True), device="cpu")
    teacher.model.save(folder)
    if teacher.tokenizer is not None:
        teacher.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write(sys.argv[1], Path(sys.argv[2]))
