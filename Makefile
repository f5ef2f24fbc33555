# make demo    set up, build, and run examples/rollouts.py       make lint       formatters, linters, types
# make test    set up, build, and test what needs no GPU         make bench      cost of a call beside the alternatives
# make gpu-check [STAGES="build tests"] [OUT=folder]             on a machine with a CUDA device, with its own Python

PYTHON ?= python3
OUT ?= bench/records
STAGES ?=
COMMIT ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUILT := $(VENV)/.built
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: venv build demo test lint bench gpu-check clean
.DEFAULT_GOAL := build

venv: $(READY)
build: $(BUILT)

# torch comes first and is pinned in the requirements too: nothing after it can bring in another one.
$(READY): requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=...")'
	$(BIN)/python -m pip install $$(grep '^torch==' requirements-dev.txt)
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

$(BUILT): $(READY) $(SOURCES)
	$(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	touch $@

demo: $(BUILT)
	$(BIN)/python examples/rollouts.py

test: $(BUILT)
	$(BIN)/python -m pytest -q

lint: $(BUILT)
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

bench: $(BUILT)
	$(BIN)/python -m bench.latency --json bench/records/latency-cpu.json

gpu-check:
	$(PYTHON) -m bench.gpu_check --out $(OUT) $(if $(STAGES),--stages $(STAGES)) $(if $(COMMIT),--commit $(COMMIT))

clean:
	rm -rf build dist *.egg-info pama_ext/*.so $(BUILT) .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
