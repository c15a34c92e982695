# `make run` and `make test` work on a fresh clone with Python 3.11 or newer, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
# commands of dvc.yaml say `python`
export PATH := $(BIN):$(PATH)

.PHONY: run test slow lint format install clean
.DEFAULT_GOAL := run

run: install            ## bring the pipeline up to date, promote, write reports/review.html
	@$(BIN)/peftcore run

# one thread a test process: several on a core wait for one another at every operation
test: export OMP_NUM_THREADS ?= 1
test: install           ## quick tests, on all cores
	@$(BIN)/pytest --numprocesses auto --dist worksteal

slow: install           ## whole-pipeline tests
	@$(BIN)/pytest -m slow

lint: install           ## format, lint, types, floors
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is older or absent; use make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:                  ## forget outputs and checkpoints; DVC's cache, the registry and .venv stay
	rm -rf artifacts checkpoints reports wandb .prefect build .pytest_cache .ruff_cache .import_linter_cache
