# Everything that people and CI run. Needs Python >= 3.10, a C++ compiler and make; all else goes into .venv.
#   PYTHON=python3.12 make test     another interpreter (when .venv does not exist yet)
#   make validate ARGS="--full"     arguments for the script behind validate, bench or pytest
# pip reads its usual PIP_* variables, CXX and MAX_JOBS reach the compiler (see setup.py).

PYTHON ?= python3
TEST_JOBS ?= 2
GPU_JOBS ?= 8
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
LIBRARY := flash_attn/_C.abi3.so
CPP_SOURCES := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))
PY_SOURCES := $(shell find flash_attn -name '*.py') flash_attn_2_cuda.py

# Stamps: what has been done, so that a second run installs and compiles nothing.
RUN_TOOLS := .venv/.run-tools
DEV_TOOLS := .venv/.dev-tools
INSTALLED := .venv/.installed
WHEEL := dist/.wheel

.PHONY: help validate test build wheel lint format bench gpu-test gpu-bench gpu-sanitize clean
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two pips in one .venv disturb each other; ninja compiles in parallel anyway

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  */\1\t/p' $(MAKEFILE_LIST) | expand -t 12

validate: build  ## see the guarantee proven on this machine: python validate_determinism.py $(ARGS)
	$(BIN)/python validate_determinism.py $(ARGS)

test: lint build $(WHEEL)  ## lint, then every test; what CI runs
	$(BIN)/python -m pytest --numprocesses $(TEST_JOBS) $(ARGS)

build: $(LIBRARY) $(INSTALLED)  ## the native library, and an editable install in .venv

wheel: $(WHEEL)  ## one wheel in dist/ for every Python >= 3.10 and torch >= 2.10
	@ls dist/*.whl

lint: $(DEV_TOOLS)  ## ruff, clang-format, mypy; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(BIN)/mypy

format: $(DEV_TOOLS)  ## rewrite sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

bench: build  ## speed against PyTorch's attention: python -m benchmarks.bench_attention $(ARGS)
	$(BIN)/python -m benchmarks.bench_attention $(ARGS)
	$(BIN)/python -m benchmarks.host_time

gpu-test: build  ## every test, with its tensors on a GPU, into results/<gpu>/; minutes
	$(BIN)/python -m benchmarks.gpu_suite --processes $(GPU_JOBS) $(ARGS)

gpu-bench: build  ## speed and memory against PyTorch's attention on a GPU, into results/<gpu>/
	$(BIN)/python -m benchmarks.bench_gpu $(ARGS)
	$(BIN)/python -m benchmarks.host_time --device cuda

gpu-sanitize: build  ## compute-sanitizer's four tools over a small call of every kind of kernel
	$(BIN)/python -m benchmarks.sanitize $(ARGS)

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info $(LIBRARY) $(INSTALLED) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "flash_attn needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv

# torch is asked for by its exact version: a range may bring a much larger build of a newer release.
$(RUN_TOOLS): requirements-dev.txt | $(BIN)/python
	@echo "installing torch and the build tools into .venv"
	@$(PIP) install --constraint requirements-dev.txt \
	  $$(grep '^torch==' requirements-dev.txt) einops setuptools ninja tqdm matplotlib
	@touch $@

$(DEV_TOOLS): requirements-dev.txt $(RUN_TOOLS)
	@echo "installing the test tools into .venv"
	@$(PIP) install --requirement requirements-dev.txt
	@touch $@

$(LIBRARY): $(RUN_TOOLS) setup.py $(CPP_SOURCES) csrc/instantiations/spills.json
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(INSTALLED): $(RUN_TOOLS) setup.py pyproject.toml | $(LIBRARY)
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

# build/lib would hand modules that no longer exist to the wheel.
$(WHEEL): $(LIBRARY) pyproject.toml $(PY_SOURCES)
	@rm -rf build/lib* build/bdist* dist
	@$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@touch $@
