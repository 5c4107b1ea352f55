# `make test` and `make quickstart` set everything up by themselves, in .venv.

SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Stamps: a second run installs nothing unless the requirements changed.
RUNTIME := $(VENV)/.tuner-runtime
DEV := $(VENV)/.tuner-dev
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.PHONY: test lint quickstart help
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo "make test        lint, types and tests"
	@echo "make quickstart  the whole job on a tiny model; results in output/quickstart"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

quickstart: $(RUNTIME)
	$(BIN)/python examples/quickstart/prepare.py
	$(BIN)/tuner run --plugins wan,tread --config examples/quickstart/config.json
	@printf '%s\n' '' \
	    'The real Wan 2.1 1.3B, on a GPU: put clips, each with its caption beside it (clip.mp4, clip.txt), into' \
	    'datasets/my-videos, then:' \
	    '  for each in config multidatabackend user_prompt_library; do cp -n config/$$each.json.example config/$$each.json; done' \
	    '  $(BIN)/tuner run'

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@touch $(RUNTIME) $(DEV)

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $(RUNTIME)

# PYTHON may name the interpreter; otherwise the first of these that is of a supported version.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    if $$python -c '$(SUPPORTED)' 2>/dev/null; then \
	        echo "making $(VENV) with $$($$python --version)"; \
	        exec $$python -m venv $(VENV); \
	    fi; \
	done; \
	echo "tuner needs Python 3.11, 3.12 or 3.13, and $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>&1):" \
	    "install one, or name it with PYTHON=/path/to/python3.12" >&2; \
	exit 1
