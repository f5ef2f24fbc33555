# make demo        set up, build, and run examples/rollouts.py
# make test        set up, build, and test what needs no GPU
# make test-wheel  the same on the built wheel, without the checkout
# make lint        formatters, linters, types
# make bench       measure every suite, write bench/records, and from them the README's figures: [SUITES="combine gae"]
#                  [DEVICES="cpu cuda"]
# make bench-smoke ratios of a few cheap workloads against wide bounds
# make cuda-code   registers, spills and loads of the CUDA kernels on every architecture; needs nvcc, no GPU
# make gpu-check   on a machine with a CUDA device, with its own Python: [STAGES="build tests"] [OUT=folder] [COMMIT=...]

PYTHON ?= python3
OUT ?= bench/records
STAGES ?=
SUITES ?= combine groups gae min_norm loss scaling
DEVICES ?= cpu
COMMIT ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUILT := $(VENV)/.built
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: venv build demo test test-wheel lint bench bench-smoke cuda-code gpu-check clean
.DEFAULT_GOAL := build

venv: $(READY)
build: $(BUILT)

# torch comes first and is pinned in the requirements too: nothing after it can bring in another one.
$(READY): requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=...")'
	$(BIN)/python -m pip install $$(grep '^torch==' requirements-dev.txt)
	$(BIN)/python -m pip install -r requirements-dev.txt
	if $(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'; then \
	  $(BIN)/python -m pip install --no-deps $$(grep -o 'verl==[0-9.]*' requirements-dev.txt); fi
	$(BIN)/python -m pip install --no-deps $$(grep -o 'liger-kernel==[0-9.]*' requirements-dev.txt)
	touch $@

$(BUILT): $(READY) $(SOURCES)
	$(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	touch $@

demo: $(BUILT)
	$(BIN)/python examples/rollouts.py

test: $(BUILT)
	$(BIN)/python -m pytest -q

# The artefact instead of the checkout: the wheel, installed in a folder of its own, with no source of the package near.
# Without the tests of the benchmarks and of sources compiled for them on the host, which never see the wheel.
test-wheel: $(READY)
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	$(BIN)/python -m pip install -q --no-deps --target build/wheel/site build/wheel/*.whl
	cp -r tests csrc README.md CHANGELOG.md pyproject.toml build/wheel
	cd build/wheel && PYTHONPATH=site $(CURDIR)/$(BIN)/python -m pytest -q --ignore-glob='tests/test_bench*.py' --ignore-glob='tests/test_*on_host.py' --ignore=tests/test_example.py

lint: $(BUILT)
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

# A process for each suite: what one imports cannot slow another.
bench: $(BUILT)
	set -e; for device in $(DEVICES); do for suite in $(SUITES); do \
	  $(BIN)/python -m bench $$suite --device $$device; done; done
	$(BIN)/python -m bench.report

bench-smoke: $(BUILT)
	$(BIN)/python -m bench --smoke

cuda-code: $(READY)
	$(BIN)/python -m bench.cuda_code --out bench/records/cuda_code.json

gpu-check:
	$(PYTHON) -m bench.gpu_check --out $(OUT) $(if $(STAGES),--stages $(STAGES)) $(if $(COMMIT),--commit $(COMMIT))

clean:
	rm -rf build dist *.egg-info pama_ext/*.so $(BUILT) .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
