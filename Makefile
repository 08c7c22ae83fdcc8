# `make demo` and `make test` set everything up themselves in a fresh clone; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format type unit bench bench-table wheel clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Some package indexes make pip warn about every single package; errors still come through.
QUIETLY = 2> >(grep -v "WARNING: Location .* is ignored" >&2)
NAME ?=
ARGS ?=

help:  ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | column -t -s "$$(printf '\t')"

setup:  ## Create .venv and install everything; does nothing while pyproject.toml and constraints.txt are unchanged.
	@wanted=$$(cat pyproject.toml constraints.txt | sha256sum)
	[[ "$$(cat $(STAMP) 2>/dev/null)" == "$$wanted" ]] && exit 0
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
	    echo "robot_rl needs Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	[[ -x $(BIN)/python ]] || $(PYTHON) -m venv $(VENV)
	echo "Setting up $(VENV) (once; a few minutes)"
	$(PIP) -e '.[all,test]' $(QUIETLY)
	$(BIN)/python -c 'import hardware.safety.chain, hardware.safety.kinematics'  # compiled here, not in a test's time
	echo "$$wanted" > $(STAMP)

demo: setup  ## Demonstrations -> policy -> fine-tuning -> deployment -> runs/demo/report.html, in ten minutes.
	@$(BIN)/robot-rl demo $(ARGS)

test: setup  ## Lint, types, import arrows and all tests: what continuous integration runs.
	@$(MAKE) --no-print-directory --keep-going lint type unit

lint: setup  ## Style and import arrows.
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet . || { echo "Run 'make format'." >&2; exit 1; }
	arrows=$$($(BIN)/lint-imports --no-cache) || { echo "$$arrows" >&2; exit 1; }
	echo "Import arrows: kept."

type: setup  ## Types of the rooms where a wrong one is dangerous.
	@$(BIN)/mypy

unit: setup  ## The tests alone; ARGS="tests/core -k spec" narrows them.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

format: setup  ## Format and mend what can be mended.
	@$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format --quiet .

bench: setup  ## One benchmark: make bench NAME=train_step.
	@[[ -f "benchmarks/$(NAME).py" ]] || {
	    echo "make bench NAME=<$$(ls benchmarks | sed -n 's/\.py$$//p' | grep -vE '^(common|table|picture|fault_parts)$$' | paste -sd '|')>" >&2; exit 2; }
	$(BIN)/python -c 'import envpool, stable_baselines3' 2> /dev/null || $(PIP) -e '.[bench]' $(QUIETLY) || \
	    echo "Some peers could not be installed; a benchmark that needs them says so." >&2
	$(BIN)/python -m benchmarks.$(NAME) $(ARGS)
	$(BIN)/python -m benchmarks.table

bench-table: setup  ## Rewrite the table of docs/benchmarks.md from the kept results.
	@$(BIN)/python -m benchmarks.table

wheel: setup  ## Build dist/*.whl.
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	ls dist/*.whl

clean:  ## Remove what builds and tests leave behind; runs/ and .venv stay.
	@rm -rf dist build .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
