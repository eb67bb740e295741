"""potstill distils a large causal language model (the teacher) into a small one (the student), and proves
that it did.

The names below are what a program may rely on. They are fetched on first use: `import potstill` does not
wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from potstill.registry import implementation

if TYPE_CHECKING:
    from potstill.data.collated import RowsDataset as RowsDataset
    from potstill.data.collated import to_batch as to_batch
    from potstill.errors import UserError as UserError
    from potstill.integrations.trainer import DistillTrainer as DistillTrainer
    from potstill.models.causal_lm import CausalLM as CausalLM
    from potstill.models.load import load_causal_lm as load_causal_lm
    from potstill.models.student import Student as Student
    from potstill.recipe.load import load as load_recipe
    from potstill.recipe.sections_data import CorpusConfig as CorpusConfig
    from potstill.recipe.sections_evaluation import EvaluationConfig as EvaluationConfig
    from potstill.recipe.sections_evaluation import SinkConfig as SinkConfig
    from potstill.recipe.sections_models import ServerTeacherConfig as ServerTeacherConfig
    from potstill.recipe.sections_models import TeacherConfig as TeacherConfig
    from potstill.recipe.sections_rollouts import RolloutsConfig as RolloutsConfig
    from potstill.registry import register as register
    from potstill.teachers.base import BaseTeacher as BaseTeacher
    from potstill.teachers.hf import CudaTrainerTeacher as CudaTrainerTeacher
    from potstill.teachers.hf import TorchTeacher as TorchTeacher
    from potstill.teachers.server import ServerTeacher as ServerTeacher
    from potstill.teachers.stored import StoredTeacher as StoredTeacher
    from potstill.teachers.toy import FixtureTeacher as FixtureTeacher
    from potstill.teachers.toy import TableTeacher as TableTeacher
    from potstill.training.batch_rollouts import BatchRollouts as BatchRollouts
    from potstill.types import Batch as Batch
    from potstill.types import Teacher as Teacher
    from potstill.types import answer as answer
    from potstill.workflows.compare import compare as compare
    from potstill.workflows.distill import distill as distill
    from potstill.workflows.distill import evaluate as evaluate
    from potstill.workflows.prepare import prepare as prepare

__version__ = "0.1.0"

_HOMES = {
    "BaseTeacher": "potstill.teachers.base",
    "Batch": "potstill.types",
    "BatchRollouts": "potstill.training.batch_rollouts",
    "CausalLM": "potstill.models.causal_lm",
    "CorpusConfig": "potstill.recipe.sections_data",
    "CudaTrainerTeacher": "potstill.teachers.hf",
    "DistillTrainer": "potstill.integrations.trainer",
    "EvaluationConfig": "potstill.recipe.sections_evaluation",
    "FixtureTeacher": "potstill.teachers.toy",
    "RolloutsConfig": "potstill.recipe.sections_rollouts",
    "RowsDataset": "potstill.data.collated",
    "ServerTeacher": "potstill.teachers.server",
    "SinkConfig": "potstill.recipe.sections_evaluation",
    "ServerTeacherConfig": "potstill.recipe.sections_models",
    "StoredTeacher": "potstill.teachers.stored",
    "Student": "potstill.models.student",
    "TableTeacher": "potstill.teachers.toy",
    "Teacher": "potstill.types",
    "TeacherConfig": "potstill.recipe.sections_models",
    "TorchTeacher": "potstill.teachers.hf",
    "UserError": "potstill.errors",
    "answer": "potstill.types",
    "compare": "potstill.workflows.compare",
    "distill": "potstill.workflows.distill",
    "evaluate": "potstill.workflows.distill",
    "load_causal_lm": "potstill.models.load",
    "load_recipe": "potstill.recipe.load",
    "prepare": "potstill.workflows.prepare",
    "register": "potstill.registry",
    "to_batch": "potstill.data.collated",
}
__all__ = [
    "BaseTeacher",
    "Batch",
    "BatchRollouts",
    "CausalLM",
    "CorpusConfig",
    "CudaTrainerTeacher",
    "DistillTrainer",
    "EvaluationConfig",
    "FixtureTeacher",
    "RolloutsConfig",
    "RowsDataset",
    "ServerTeacher",
    "ServerTeacherConfig",
    "SinkConfig",
    "StoredTeacher",
    "Student",
    "TableTeacher",
    "Teacher",
    "TeacherConfig",
    "TorchTeacher",
    "UserError",
    "answer",
    "compare",
    "distill",
    "evaluate",
    "load_causal_lm",
    "load_recipe",
    "prepare",
    "register",
    "to_batch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'potstill' has no attribute {name!r}")
    return implementation(f"{_HOMES[name]}:{'load' if name == 'load_recipe' else name}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
