# `make test` and `make quickstart` set everything up by themselves, in .venv.

SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Stamps: a second run installs nothing unless the requirements changed.
RUNTIME := $(VENV)/.tuner-runtime
DEV := $(VENV)/.tuner-dev
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

# What needs a GPU: make gpu PART=ceilings|1.3b|14b|memory|encode, each under eight minutes on an H100; figures go to
# pages in this folder. GPU_FLAGS: of benchmarks/gpu_part.py, such as --smoke (tiny sizes, any machine) or --only.
GPU_PYTHON ?= $(BIN)/python
GPU_PAGES ?= docs/benchmarks
GPU_PARTS := ceilings 1.3b 14b memory encode
PART ?=
GPU_FLAGS ?=
GPU_PAGE := $(GPU_PYTHON) benchmarks/gpu_page.py
GPU_MEMORY := $(addprefix gpu-memory-,1.3b 1.3b-short 14b-resident 14b-streamed 14b-small-card image-small-card)

.PHONY: docs test triton-tests lint quickstart help bench gpu gpu-setup gpu-tests gpu-tread gpu-memory $(GPU_MEMORY)
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo "make test        lint, types, the site of docs/ and tests"
	@echo "make docs        the site of docs/, in output/site; fails where a link leads nowhere"
	@echo "make triton-tests  the Triton kernels, in Triton's interpreter"
	@echo "make quickstart  the whole job on a tiny model; results in output/quickstart"
	@echo "make bench       counts and ratios on the CPU beside their goals; figures in docs/benchmarks/cpu.md"
	@echo "make gpu         tests and benchmarks that need a GPU; PART=ceilings|1.3b|14b|memory|encode for one of them"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The kernels in Triton's interpreter; its package is large, and beside the environment of the tests.
triton-tests: $(DEV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $(VENV)/triton triton
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest tests/kernels -k triton

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(SITE)

docs: $(DEV)
	$(SITE)
	@echo "output/site/index.html"

quickstart: $(RUNTIME)
	$(BIN)/python examples/quickstart/prepare.py
	$(BIN)/tuner run --plugins wan,tread --config examples/quickstart/config.json
	@printf '%s\n' '' \
	    'The real Wan 2.1 1.3B, on a GPU: put clips, each with its caption beside it (clip.mp4, clip.txt), into' \
	    'datasets/my-videos, then:' \
	    '  for each in config multidatabackend user_prompt_library; do cp -n config/$$each.json.example config/$$each.json; done' \
	    '  $(BIN)/tuner run'

# Under ten minutes on two cores.
bench: $(DEV)
	$(BIN)/python benchmarks/bench.py

# One part, or all of them after the tests; a part with a row that failed does not keep the others from their turn.
gpu: $(if $(PART),,gpu-tests gpu-tread)
	@status=0; for part in $(or $(PART),$(GPU_PARTS)); do \
	    $(GPU_PYTHON) benchmarks/gpu_part.py $$part --pages $(GPU_PAGES) $(GPU_FLAGS) || status=1; \
	done; exit $$status

# What the benchmarks need beside torch and numpy, from a folder of wheels, on a machine without a network.
gpu-setup:
	benchmarks/gpu/setup.sh $(WHEELS)

gpu-tests:
	$(GPU_PAGE) $(GPU_PAGES)/gpu-tests.md 'Tests that need a GPU' -- $(GPU_PYTHON) -m pytest -m gpu -rs --durations 10

gpu-tread:
	$(GPU_PAGE) $(GPU_PAGES)/gpu-tread.md 'TREAD: measured step, FLOP model' -- \
	    $(GPU_PYTHON) benchmarks/tread.py --device cuda --full

gpu-memory: $(GPU_MEMORY)

$(GPU_MEMORY): gpu-memory-%:
	$(GPU_PYTHON) benchmarks/gpu_memory.py $* --pages $(GPU_PAGES)

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
