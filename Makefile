.PHONY: setup demo benchmark test test-slow test-modern test-gpu sweep sweep-compose lint

# The stack of all targets: official, in .venv, or modern, in .venv-modern (docs/stacks.md)
STACK ?= official
PYTHON_official := .venv/bin/python
PYTHON_modern := .venv-modern/bin/python
RUN := $(PYTHON_$(STACK))
# Quick tests for the modern stack
MODERN := tests/test_compat.py tests/test_stacks.py tests/models/losses \
	"tests/test_main_jobs.py::test_detector[amd]" "tests/test_main_jobs.py::test_classifier[sokd]"

setup:  ## installs the environment of the stack; resumes after an interruption
	@STACK=$(STACK) tools/dev/setup.sh

demo: setup  ## distils a small detector on a CPU and shows the gain
	$(RUN) -W ignore tools/demo.py

benchmark: setup  ## measures the gain of distillation on the data in docs/methodology.md; resumes after an interruption
	$(RUN) -W ignore tools/benchmarks/gain.py --tune
	$(RUN) -W ignore tools/benchmarks/gain.py
	$(RUN) -W ignore tools/benchmarks/report_gain.py

test: setup lint  ## runs the test suite without slow tests, on up to four cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4 --dist worksteal

test-slow: setup  ## runs the slow tests: every config for one step, killed runs, mutated configs
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4 --dist worksteal -m slow

test-modern:  ## tests the modern stack: import, registries, all losses, distils and exports a detector and a classifier
	$(MAKE) setup STACK=modern
	OMP_NUM_THREADS=1 $(PYTHON_modern) -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(MODERN)

test-gpu:  ## runs tests, jobs and benchmarks on an NVIDIA GPU in 8 minutes, with the environment's python, to work_dirs/gpu
	tools/benchmarks/gpu.sh

sweep: setup  ## trains, exports and loads every distillation config with the commands, on miniature data
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4 -m sweep tests/test_full_sweep.py

sweep-compose: setup  ## composes the pairs of the model zoos and writes docs/compose.md; resumes after an interruption
	OMP_NUM_THREADS=1 $(RUN) -W ignore tools/dev/compose_sweep.py

lint: setup
	$(RUN) -m ruff check .
