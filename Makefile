# Everything runs in .venv, which the first command makes; `make help` lists the commands.

# Interpreter of a new .venv: set PYTHON, or the first of these that is 3.11 or newer and can make one.
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python)

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install -qq --disable-pip-version-check
PRODUCT := lm2_jax sharding configs $(wildcard *.py)

# Tests of one file run on one worker, because they share compiled programs; a worker may take 4 GB.
WORKERS ?= auto
PYTEST := $(RUN) -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --durations=10

FAST := not slow and not long and not tpu_backend and not gpu
SLOW := slow and not long and not tpu_backend and not gpu
TPU := tpu_backend and not long

.DEFAULT_GOAL := help
.PHONY: help quickstart demo test test-all test-long test-tpu test-lowest test-latest campaign lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.requirements ## train a small LM2 and a baseline without memory on the CPU, and show what each remembers
	$(RUN) -m lm2_jax.quickstart

demo: $(VENV)/.requirements ## read a long text once, save the memory, answer ten questions from the file
	$(RUN) -m lm2_jax.demo

# Tests and lint both run even if one fails, so that one call reports everything.
test: $(VENV)/.requirements-dev ## fast tests, ruff and pyright
	@status=0; \
	$(PYTEST) -m "$(FAST)" || status=1; \
	$(MAKE) --no-print-directory lint || status=1; \
	exit $$status

# pytest exits with 5 if no test is selected.
test-all: test ## the same, then the slow tests
	@$(PYTEST) -m "$(SLOW)" || { status=$$?; [ $$status -eq 5 ] || exit $$status; }

test-long: $(VENV)/.requirements-dev ## every join in every contract test, every preset on every mesh: takes hours
	$(PYTEST) -m "long"

test-tpu: $(VENV)/.requirements-dev ## compiles for TPU slices, without TPUs; installs libtpu
	$(PIP) -r requirements-tpu.txt
	$(PYTEST) -m "$(TPU)"

campaign: $(VENV)/.requirements-dev ## tries to break runs: kills, signals, damage, full disks; for hours, see docs/reliability.md
	$(RUN) -m tests.campaign $(CAMPAIGN)

lint: $(VENV)/.requirements-dev ## ruff and pyright
	@status=0; \
	$(VENV)/bin/ruff check . || status=1; \
	$(VENV)/bin/ruff format --check . || status=1; \
	$(VENV)/bin/pyright --pythonpath $(RUN) || status=1; \
	exit $$status

format: $(VENV)/.requirements-dev ## put files into ruff's format
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .

.PHONY: docs
docs: $(VENV)/bin/python ## build the documentation as a site in build/site
	@$(PIP) -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --site-dir build/site

# A full run of the fast tests on another interpreter: make test-latest PYTHON=/path/to/python3.13
test-latest: ## fast tests on the newest Python found, with the newest packages
	@$(MAKE) --no-print-directory VENV=.venv-latest .venv-latest/.requirements-dev
	.venv-latest/bin/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile -m "$(FAST)"

test-lowest: ## fast tests with the lowest versions that requirements.txt allows
	@$(MAKE) --no-print-directory VENV=.venv-lowest .venv-lowest/.lowest
	.venv-lowest/bin/python -m pytest -m "$(FAST)"

clean: ## remove environments and caches, not runs/
	rm -rf .venv .venv-lowest .venv-latest .pytest_cache .ruff_cache build *.egg-info
	find $(PRODUCT) tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@for python in $(CANDIDATES); do \
	  if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$($$python --version)"; exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "No Python 3.11 or newer that can make a virtual environment; tried: $(CANDIDATES)." >&2; \
	echo "Install one (on Debian and Ubuntu: python3 and python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2; \
	exit 1

# Stamps: an environment is installed into again only when its list changes.
$(VENV)/.requirements: requirements.txt | $(VENV)/bin/python
	@echo "Installing $< into $(VENV)"
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(RUN) -m ensurepip # where making .venv was interrupted
	@$(PIP) -r $<
	@touch $@

$(VENV)/.requirements-dev: requirements-dev.txt $(VENV)/.requirements
	@echo "Installing $< into $(VENV)"
	@$(PIP) -r $<
	@touch $@

$(VENV)/.lowest: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	@sed 's/>=/==/' requirements.txt > $(VENV)/lowest.txt
	@$(PIP) -r $(VENV)/lowest.txt -r requirements-dev.txt
	@touch $@
