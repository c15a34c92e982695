# `make run` and `make test` work on a fresh clone with Python 3.11 or newer, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
# versions that the tests are known to pass with; empty installs the newest
CONSTRAINTS ?= .ci/constraints.txt
# the commands in dvc.yaml call `python`
export PATH := $(BIN):$(PATH)
# images often set it, but then each of hundreds of processes would compile the same files again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run check test slow proof faults lint format install clean audit fuzz dist docs
.DEFAULT_GOAL := help

help:                   ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

run: install            ## run the stages that changed, promote, write reports/review.html
	@$(BIN)/peftcore run

check: export OMP_NUM_THREADS ?= 1
check: install          ## within a minute: lint, types and tests of what changed since the main branch; BASE=COMMIT names another start
	@$(BIN)/python .ci/check.py $(BASE)

# one thread per test process: more threads than cores slow every operation down
test slow: export OMP_NUM_THREADS ?= 1
# the tests write thousands of small files and flush each one; a file system in memory makes that free, if it has 6 GB
ifeq ($(shell df -Pm /dev/shm 2>/dev/null | awk 'NR == 2 && $$4 >= 6144 { print "roomy" }'),roomy)
test slow: export PYTEST_DEBUG_TEMPROOT ?= /dev/shm
endif
test: install           ## quick tests, on all cores; ORDER=random shuffles them and prints the seed
	@$(BIN)/pytest --numprocesses auto --dist worksteal $(if $(filter random,$(ORDER)),-p randomly)

faults: export OMP_NUM_THREADS ?= 1
faults: install         ## fault tests (kill -9, full disk, damaged files, ...) and their table; PEFTCORE_FAULTS=N repeats the random ones N times
	@$(BIN)/pytest tests/faults tests/flows tests/peftcore/train tests/peftcore/storage/test_checkpoint.py -m faults

# these tests often wait for processes that they have started, so one test process more than there are cores keeps all cores busy
slow: export PYTEST_XDIST_AUTO_NUM_WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
# a file's tests share what they set up; tests/conftest.py starts the longest files first
slow: install           ## tests of whole pipelines, real processes and every model type
	@$(BIN)/pytest -m slow --numprocesses auto --dist loadfile --no-loadscope-reorder

proof: export OMP_NUM_THREADS ?= 1
proof: install          ## longest tests: faults, work pool with PostgreSQL, sweeps, nodes, benchmarks; PEFTCORE_LONG=1 adds those that wait for minutes
	@$(BIN)/pytest -m proof

lint: install           ## check format, lint, types, import layers and declared dependencies
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports
	.ci/imports

# --strict: a package that cannot be audited is an error
audit: install          ## look for known vulnerabilities of installed packages (asks PyPI)
	@$(BIN)/python -m pip list --format=freeze --exclude-editable --disable-pip-version-check | sed 's/+[a-z0-9.]*$$//' > $(VENV)/audited.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement $(VENV)/audited.txt

fuzz: export PEFTCORE_FUZZ ?= 100000
fuzz: export OMP_NUM_THREADS ?= 1
fuzz: install           ## fuzz the loaders with PEFTCORE_FUZZ hostile inputs (7 minutes on one core)
	@$(BIN)/pytest tests/security/test_fuzz.py --hypothesis-show-statistics --timeout 7200

format: install         ## format the code and fix lint errors
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

install: $(STAMP)       ## create .venv with everything

# A newer pip than Python's own resolves versions in a third of the time. pip compiles one file after the other, so all
# cores do that here, without the packages' tests and transformers' models, most of which nobody imports. `|| true`:
# some packages hold files for other versions of Python, which do not compile.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is older or absent; use make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(addprefix --constraint=,$(CONSTRAINTS)) --editable '.[dev]'
	@$(BIN)/python -m compileall -q -j 0 -x '/(tests|transformers/models)/' $(VENV)/lib >/dev/null || true
	@touch $@

docs: export NO_MKDOCS_2_WARNING = 1
docs: install           ## build the documentation; open site/index.html
	$(BIN)/python -m mkdocs build --strict --quiet

dist: install           ## build dist/*.whl and dist/*.tar.gz, and check that PyPI would take them
	rm -rf dist build
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*

clean:                  ## delete outputs, checkpoints and builds; keep DVC's cache, the registry and .venv
	rm -rf artifacts checkpoints reports wandb .prefect build dist site .pytest_cache .ruff_cache .import_linter_cache
