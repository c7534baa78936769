# `make demo` and `make test` need only Python and make.
# `make PYTHON=python3.12 test` selects the interpreter; .venv is rebuilt when it changes.
PYTHON ?= python3
VENV ?= .venv
export JAX_PLATFORMS ?= cpu
# lets the GPU compiler start without a GPU
export JAX_SKIP_CUDA_CONSTRAINTS_CHECK ?= 1
BIN = $(VENV)/bin
STAMP = $(VENV)/installed-$(shell $(PYTHON) -c 'import platform; print(platform.python_version())')

.PHONY: install demo test test-all lint types bench docs

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/python examples/train_gpt.py

test: lint
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-all: lint
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: install
	$(BIN)/python benchmarks/run.py | tee benchmarks/results.md

# docs/_build/index.html
docs: install
	$(BIN)/sphinx-build -W --keep-going -n -q -c docs . docs/_build
