.PHONY: setup demo test lint

setup:  ## .venv with the official stack; continues after an interruption
	@tools/setup.sh

demo: setup  ## distils a small detector on a CPU and shows what it gained
	.venv/bin/python -W ignore tools/demo.py

test: setup lint  ## the whole suite, on up to four cores
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

lint: setup
	.venv/bin/ruff check .
