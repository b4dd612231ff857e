# `make quickstart` and `make test` need nothing but python3 (3.11 or 3.12) and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where the index serves torch with CUDA by default and there is no GPU, name one with the CPU build:
# make test TORCH_INDEX=URL (torch alone is taken from there).
TORCH_INDEX ?=
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX))

.PHONY: quickstart benchmark test coverage test-faults lint clean

PYTEST := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder --max-worker-restart=0 --maxfail=8 --durations=25

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit("$(PYTHON) is Python %d.%d, \
	and this needs 3.11 or 3.12; name one, as in: make $(or $(MAKECMDGOALS),quickstart) PYTHON=python3.11" % v)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/supmer quickstart --overwrite

# Our meta-step beside a sequential baseline: minutes. More: .venv/bin/python -m supmer_ray.benchmark --help
benchmark: $(VENV)/installed
	$(BIN)/python -m supmer_ray.benchmark --out runs/benchmark.json

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST)

# Which lines the tests run through, which makes those that compute much take twice as long.
coverage: $(VENV)/installed
	$(PYTEST) --cov --cov-report=term

# Kills, full disks, nodes that leave, long sweeps, and the loggers that are extras: an hour on two cores.
test-faults: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[mlflow,wandb]"
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=2700

clean:
	rm -rf $(VENV) build dist *.egg-info
