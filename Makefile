.PHONY: setup demo benchmark test test-slow test-modern test-gpu sweep sweep-compose lint

# The stack of all that follows: official, in .venv, or modern, in .venv-modern (docs/stacks.md)
STACK ?= official
PYTHON_official := .venv/bin/python
PYTHON_modern := .venv-modern/bin/python
RUN := $(PYTHON_$(STACK))
# What the newer stack is tested with in little time
MODERN := tests/test_compat.py tests/test_stacks.py tests/models/losses \
	"tests/test_main_jobs.py::test_detector[amd]" "tests/test_main_jobs.py::test_classifier[sokd]"

setup:  ## the environment of the stack; continues after an interruption
	@STACK=$(STACK) tools/dev/setup.sh

demo: setup  ## distils a small detector on a CPU and shows what it gained
	$(RUN) -W ignore tools/demo.py

benchmark: setup  ## what distillation gains, on data that docs/methodology.md names; continues after an interruption
	$(RUN) -W ignore tools/benchmarks/gain.py --tune
	$(RUN) -W ignore tools/benchmarks/gain.py
	$(RUN) -W ignore tools/benchmarks/report_gain.py

test: setup lint  ## the suite without its slow tests, on up to four cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4 --dist worksteal

test-slow: setup  ## the tests that take long: every config for one step, killed runs, mutated configs
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4 --dist worksteal -m slow

test-modern:  ## on the newer stack: import, registries, every loss, a detector and a classifier distilled and exported
	$(MAKE) setup STACK=modern
	OMP_NUM_THREADS=1 $(PYTHON_modern) -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(MODERN)

test-gpu:  ## on an NVIDIA GPU, in 8 minutes, with the environment's own python: tests, jobs and benchmarks, to work_dirs/gpu
	tools/benchmarks/gpu.sh

sweep: setup  ## every distillation config trained, exported and loaded through the commands, on miniature data
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4 -m sweep tests/test_full_sweep.py

sweep-compose: setup  ## composes the pairs of the zoos; resumes, and writes docs/compose.md
	OMP_NUM_THREADS=1 $(RUN) -W ignore tools/dev/compose_sweep.py

lint: setup
	$(RUN) -m ruff check .
