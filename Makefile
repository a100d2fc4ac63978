# Everything here needs only make and a Python from 3.10 to 3.13; the rest goes into .venv.
#   make test ARGS="-k memory"     hands arguments on (test, bench, speed, compile, demo, gpu)
#   make setup PYTHON=python3.12   chooses the Python that .venv is made with
#   make compile TRITON=3.6.0      compiles the kernels by another Triton than that of .venv

PYTHON ?= python3
ARGS ?=
TRITON ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OTHER_TRITON := $(if $(TRITON),build/triton-$(TRITON))
SOURCES := conftest.py squid_fast kernels reference bench tests

.DEFAULT_GOAL := help
.PHONY: help setup demo test avx2 lint format types compile bench speed gpu rehearsal clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## Build .venv from constraints.txt (done by the others when needed)

demo: $(READY)  ## Synthesise, train, evaluate and screen: the whole method in minutes
	@$(BIN)/squid-fast demo $(ARGS)

test: $(READY)  ## Run the tests, on all cores
	@$(BIN)/python -m pytest -q -n auto --dist worksteal --benchmark-disable $(ARGS)

# PyTorch and oneDNN leave out what comes with AVX-512, and so does squid_fast.utils.devices.
avx2: $(READY)  ## Run the tests of every precision and of scoring as on a processor without AVX-512
	@ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -q -n auto \
	  tests/cli/test_precisions.py tests/training/test_distributed.py tests/inference $(ARGS)

lint: $(READY)  ## Check style and formatting
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)

format: $(READY)  ## Put formatting right, and what the linter can mend by itself
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

# mypy reads packages from folders of their installed name. The links are made anew each time, so
# that files that came or went are seen.
types: $(READY)  ## Check types
	@rm -rf build/types && mkdir -p build/types/squid_fast
	@cd build/types/squid_fast && ln -s ../../../squid_fast/* ../../../kernels ../../../reference .
	@$(BIN)/mypy

compile: $(READY) $(OTHER_TRITON)  ## Compile every kernel for A100, H100 and MI300X, and look for spills
	@$(if $(TRITON),PYTHONPATH=$(OTHER_TRITON)) $(BIN)/python -m bench machine-code --brief $(ARGS)

# Beside the one in .venv and without what it asks for. Compiling needs no PyTorch that fits it.
build/triton-%: | $(READY)
	@$(BIN)/pip install --quiet --no-deps --target $@ triton==$*

bench: $(READY)  ## Time every operation beside the reference, eager and compiled
	@$(BIN)/python -m pytest --benchmark --bench-results=bench/results $(ARGS)

speed: $(READY)  ## Time training and scoring beside the published way
	@$(BIN)/python -m bench speed $(ARGS)

gpu: $(READY)  ## Test and measure everything on a machine with a GPU
	@$(BIN)/python -m bench gpu $(ARGS)

rehearsal: $(READY)  ## Rehearse `make gpu` without a GPU, at tiny sizes
	@$(BIN)/python -m bench gpu --device cpu --output build/gpu

clean:  ## Remove what make has made: .venv, build folders, caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and by itself, so that nothing that depends on it chooses the build.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "squid-fast needs Python 3.10 to 3.13, but there is no $(PYTHON)." \
	       "Name one that is there: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "squid-fast needs Python 3.10 to 3.13, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) could not make a virtual environment in $(VENV)." \
	       "On Debian and Ubuntu its venv module is a package of its own: python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV); this takes minutes where the GPU build of torch is fetched."
	@$(BIN)/pip install --quiet -c constraints.txt torch
	@$(BIN)/pip install --quiet -c constraints.txt -e ".[train,screen,ray,export,dev]"
	@touch $@
