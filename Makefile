# make demo: a sentence for each sample photograph. make test: checks and tests. Both prepare what they need.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint backbones clean

demo: backbones
	$(BIN)/python examples/describe.py --model examples/tiny/checkpoint/stage1 examples/tiny/photographs/*.jpg

test: lint backbones
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Takes a fraction of a second where they are built already.
backbones: .venv/.installed
	$(BIN)/python examples/tiny/build_backbones.py

.venv/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
