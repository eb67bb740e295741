"""potstill distils a large causal language model (the teacher) into a small one (the student), and proves
that it did.

The names below are what a program may rely on. They are fetched on first use: `import potstill` does not
wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.errors import UserError as UserError
    from potstill.models.load import load_causal_lm as load_causal_lm
    from potstill.recipe.load import load as load_recipe
    from potstill.recipe.sections_data import CorpusConfig as CorpusConfig
    from potstill.recipe.sections_evaluation import EvaluationConfig as EvaluationConfig
    from potstill.recipe.sections_evaluation import SinkConfig as SinkConfig
    from potstill.recipe.sections_models import TeacherConfig as TeacherConfig
    from potstill.registry import register as register
    from potstill.teachers.base import BaseTeacher as BaseTeacher
    from potstill.teachers.hf import CudaTrainerTeacher as CudaTrainerTeacher
    from potstill.teachers.hf import TorchTeacher as TorchTeacher
    from potstill.teachers.toy import FixtureTeacher as FixtureTeacher
    from potstill.teachers.toy import TableTeacher as TableTeacher
    from potstill.workflows.compare import compare as compare
    from potstill.workflows.distill import distill as distill
    from potstill.workflows.distill import evaluate as evaluate

__version__ = "0.1.0"

_HOMES = {
    "BaseTeacher": "potstill.teachers.base",
    "CorpusConfig": "potstill.recipe.sections_data",
    "CudaTrainerTeacher": "potstill.teachers.hf",
    "EvaluationConfig": "potstill.recipe.sections_evaluation",
    "FixtureTeacher": "potstill.teachers.toy",
    "SinkConfig": "potstill.recipe.sections_evaluation",
    "TableTeacher": "potstill.teachers.toy",
    "TeacherConfig": "potstill.recipe.sections_models",
    "TorchTeacher": "potstill.teachers.hf",
    "UserError": "potstill.errors",
    "compare": "potstill.workflows.compare",
    "distill": "potstill.workflows.distill",
    "evaluate": "potstill.workflows.distill",
    "load_causal_lm": "potstill.models.load",
    "load_recipe": "potstill.recipe.load",
    "register": "potstill.registry",
}
__all__ = [
    "BaseTeacher",
    "CorpusConfig",
    "CudaTrainerTeacher",
    "EvaluationConfig",
    "FixtureTeacher",
    "SinkConfig",
    "TableTeacher",
    "TeacherConfig",
    "TorchTeacher",
    "UserError",
    "compare",
    "distill",
    "evaluate",
    "load_causal_lm",
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
