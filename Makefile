# make demo: everything, from nothing to a finished search. make test: the tests. make check: format, lint, types.
# All of it goes into a virtual environment, $(VENV); nothing else on the machine is touched.

PYTHON ?= python3
VENV ?= .venv
# More arguments for pip install, e.g. --extra-index-url, for a build of torch without CUDA.
PIP_ARGS ?=

# The demo's budget: about ten minutes on two cores without a GPU.
DEMO_TRIALS ?= 2
DEMO_EPOCHS ?= 2
DEMO_ARGS ?= --confirm-seeds 2

# The test files of which test-faults runs the tests; empty: all, and ten times the malformed input.
FAULTS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
INSTALLED_DEV := $(VENV)/installed-dev
INSTALLED_BROWSER := $(VENV)/installed-browser

.DEFAULT_GOAL := help
.PHONY: help demo test test-robustness test-faults test-browser chromium postgresql dashboards check format clean

help:
	@echo "make demo    set up, then search activation on resnet20 and sparse on resnet50 with the embedded digits"
	@echo "make test    set up, then run the tests"
	@echo "make test-robustness   set up, then hostile input, object stores, torn files, who can reach a server"
	@echo "make test-faults   set up, then the tests that kill processes, servers and disks (more than half an hour)"
	@echo "make test-browser  set up, Chromium too, then look at every kind of page in it"
	@echo "make dashboards  the pages of results/published again"
	@echo "make check   formatter, linter, type checker, import rules"
	@echo "make format  reformat"
	@echo "make clean   remove the virtual environment and the caches (never results)"

demo: $(INSTALLED)
	$(BIN)/bench search --rule activation --arch resnet20 --trials 4 --epochs 10 $(DEMO_ARGS)
	$(BIN)/bench search --rule sparse --arch resnet50 --trials $(DEMO_TRIALS) --epochs $(DEMO_EPOCHS) --set train_examples=720 $(DEMO_ARGS)

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -rs -n auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

# By itself: a process that has joined a cluster cannot start a Ray with a token of its own any more.
CLUSTER := tests/robustness/test_cluster.py

test-robustness: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -rs tests/robustness --ignore=$(CLUSTER)
	$(BIN)/python -m pytest -rs $(CLUSTER)

test-faults: $(INSTALLED_DEV) postgresql
	$(BIN)/python -m pytest -m faults -rs $(or $(FAULTS),tests)
	$(if $(FAULTS),,BENCH_TIMES=10 $(BIN)/python -m pytest tests/robustness/test_malformed_*.py)

test-browser: $(INSTALLED_BROWSER) chromium
	$(BIN)/python -m pytest -m browser -rs tests/robustness

# Debian's; elsewhere install any Chromium by hand. Without one, the tests are skipped and say so.
chromium:
	@command -v chromium >/dev/null || apt-get install -y chromium || \
	{ apt-get update && apt-get install -y chromium; } || echo "no Chromium, and it could not be installed" >&2

# The same; the server is started by the tests, in a folder of their own.
postgresql:
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || \
	apt-get install -y postgresql || { apt-get update && apt-get install -y postgresql; } || \
	echo "no PostgreSQL, and it could not be installed" >&2

PUBLISHED := results/published
dashboards: $(INSTALLED)
	$(BIN)/bench report --out dashboards/published $(filter-out $(PUBLISHED)/controls.jsonl,$(wildcard $(PUBLISHED)/*.jsonl)) \
	$(wildcard $(PUBLISHED)/*/robustness-*) $(wildcard $(PUBLISHED)/*/transfer-*) $(wildcard $(PUBLISHED)/*/matrix-*)

check: $(INSTALLED_DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED_DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(INSTALLED_DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev,postgresql]'
	@touch $(INSTALLED) $@

$(INSTALLED_BROWSER): $(INSTALLED_DEV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev,postgresql,browser]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
	{ echo "bench needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is none; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "$(PYTHON) cannot make virtual environments; install its venv package (Debian: python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
