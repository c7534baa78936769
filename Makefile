# make demo, make test: on a fresh machine with Python and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
export JAX_PLATFORMS ?= cpu
BIN = $(VENV)/bin

.PHONY: demo test test-all lint types bench install

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
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
	$(BIN)/python benchmarks/run.py
