# make demo: a sentence for each sample photograph. make test: checks and tests. Both prepare what they need.

PYTHON ?= python3
BIN := .venv/bin
SLOW_REQUIREMENTS := parameterized==0.9.0 torchao==0.18.0
# As `setup.py` has it.
OLDEST_TRANSFORMERS := 5.19.0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-oldest lint backbones clean

demo: backbones
	$(BIN)/python examples/describe.py --model examples/tiny/checkpoint/stage1 examples/tiny/photographs/*.jpg

test: lint backbones
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# transformers' own common tests, and quantization. What only these need lies in an environment on top of the other.
test-slow: backbones .venv-slow/.installed
	.venv-slow/bin/python -m pytest --override-ini addopts=--import-mode=importlib -rs \
		-W ignore::pytest.PytestUnknownMarkWarning tests/slow

# The fast tests with the oldest transformers that setup.py allows.
test-oldest: backbones .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest

# Takes a fraction of a second where they are built already.
backbones: .venv/.installed
	$(BIN)/python examples/tiny/build_backbones.py

.venv/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# A layer on top of .venv: what is installed here comes first, everything else is found there.
.venv-slow/.installed: .venv/.installed
	$(call layer,.venv-slow,$(SLOW_REQUIREMENTS))
	touch $@

.venv-oldest/.installed: .venv/.installed
	$(call layer,.venv-oldest,transformers==$(OLDEST_TRANSFORMERS))
	touch $@

define layer
	$(BIN)/python -m venv $(1)
	$(BIN)/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" > \
		$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth
	$(1)/bin/pip install --quiet --no-deps $(2)
endef

clean:
	rm -rf .venv .venv-slow .venv-oldest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
