"""potstill distils a large causal language model (the teacher) into a small one (the student), and proves
that it did.

The names below are what a program may rely on. They are fetched on first use: `import potstill` does not
wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.comparing import compare as compare
    from potstill.errors import UserError as UserError
    from potstill.line import distill as distill
    from potstill.line import evaluate as evaluate
    from potstill.recipe import load as load_recipe
    from potstill.registry import register as register
    from potstill.teachers.fixture import FixtureTeacher as FixtureTeacher
    from potstill.teachers.fixture import TableTeacher as TableTeacher
    from potstill.teachers.torch_teacher import CudaTrainerTeacher as CudaTrainerTeacher
    from potstill.teachers.torch_teacher import TorchTeacher as TorchTeacher

__version__ = "0.1.0"

_HOMES = {
    "CudaTrainerTeacher": "potstill.teachers.torch_teacher",
    "FixtureTeacher": "potstill.teachers.fixture",
    "TableTeacher": "potstill.teachers.fixture",
    "TorchTeacher": "potstill.teachers.torch_teacher",
    "UserError": "potstill.errors",
    "compare": "potstill.comparing",
    "distill": "potstill.line",
    "evaluate": "potstill.line",
    "load_recipe": "potstill.recipe",
    "register": "potstill.registry",
}
__all__ = [
    "CudaTrainerTeacher",
    "FixtureTeacher",
    "TableTeacher",
    "TorchTeacher",
    "UserError",
    "compare",
    "distill",
    "evaluate",
    "load_recipe",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'potstill' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return getattr(module, "load" if name == "load_recipe" else name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
