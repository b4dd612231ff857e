# `make quickstart` and `make test` need nothing but python3 (3.11 or 3.12) and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where the index serves torch with CUDA by default and there is no GPU, name one with the CPU build:
# make test TORCH_INDEX=URL
TORCH_INDEX ?=
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: quickstart test lint clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/supmer quickstart --overwrite

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --cov --cov-report=term

clean:
	rm -rf $(VENV) runs build dist *.egg-info
