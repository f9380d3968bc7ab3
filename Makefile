# make help lists the targets. Everything runs in a local virtual environment, which setup creates.
#
#   PYTHON=python3.12   interpreter of the virtual environment (3.10 or newer)
#   VENV=DIR            where the virtual environment is
#   CXX=clang++         C++17 compiler of the native module
#   TORCH_INDEX=URL     further package index, for a CPU build of torch (see CONTRIBUTING.md)
#                       PYTHON, CXX and TORCH_INDEX are remembered with the virtual environment; another
#                       PYTHON or TORCH_INDEX makes it anew, another CXX rebuilds the native module
#   TRTLLM_SOURCE=DIR   checkout of TensorRT-LLM, for test-trtllm
#   TRTLLM_VENV=DIR     where the virtual environment of test-trtllm is
#   PYTEST_ARGS='-k x'  more arguments for pytest
#   GPU_REPORT_ARGS=... more arguments for the GPU report, such as --output-dir DIR

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
RECORD := $(VENV)/.settings.mk
-include $(RECORD)
RECORDED_PYTHON ?= python3
RECORDED_TORCH_INDEX ?=
RECORDED_CXX ?=
PYTHON ?= $(RECORDED_PYTHON)
TORCH_INDEX ?= $(RECORDED_TORCH_INDEX)
TRTLLM_SOURCE ?=
TRTLLM_VENV ?= .venv-trtllm
PYTEST_ARGS ?=
GPU_REPORT_ARGS ?=
ifeq ($(origin CXX),default)
CXX := $(or $(RECORDED_CXX),$(firstword $(foreach name,g++ clang++ c++,$(shell command -v $(name))) g++))
endif
export CXX

# Empty unless the virtual environment was made with another interpreter or index: then its packages cannot stay.
MADE_OTHERWISE := $(if $(filter-out x$(RECORDED_PYTHON),x$(PYTHON))$(filter-out x$(RECORDED_TORCH_INDEX),x$(TORCH_INDEX)),yes)
# The same for the native module; nothing is known of one that was built before there was a record.
BUILT_OTHERWISE := $(if $(RECORDED_CXX),$(filter-out x$(RECORDED_CXX),x$(CXX)))
HASH := \#

PY := $(VENV)/bin/python
PIP_OPTIONS := --disable-pip-version-check --no-input install \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PIP := $(PY) -m pip $(PIP_OPTIONS) -c constraints.txt
# Of pip's output: one line per package that is downloaded or built. Errors go to stderr and stay.
PIP_LINES := sed -unE '/\.metadata/d; s/^ *(Downloading|Using cached|Building) /      \1 /p'

# The GPU report installs nothing: it takes the virtual environment if there is one, else PYTHON's own packages.
GPU_PY := $(if $(wildcard $(PY)),$(PY),$(PYTHON))

TRTLLM_PY := $(TRTLLM_VENV)/bin/python
TRTLLM_STAMP := $(TRTLLM_VENV)/.packages
PACKAGES_STAMP := $(VENV)/.packages
NATIVE_STAMP := $(VENV)/.native
NATIVE_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh')
CXX_FILES := find csrc tests/native tests/cuda -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh'

.PHONY: FORCE help setup toolchain demo test test-trtllm test-asan test-tsan lint format bench bench-serve gpu-report clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(PACKAGES_STAMP) ## create .venv, install pinned packages, build the native module
	@$(MAKE) --silent --no-print-directory $(NATIVE_STAMP)

toolchain:
	@command -v $(PYTHON) > /dev/null || { echo "error: $(PYTHON) is not there:" \
	  "install Python 3.10 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error:" \
	  "$$($(PYTHON) --version) is too old: name Python 3.10 or newer with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "error: $(PYTHON) cannot make" \
	  "virtual environments: install python3-venv (Debian, Ubuntu)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; \
	  sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "error:" \
	  "Python.h is missing: install python3-dev (Debian, Ubuntu) or python3-devel (Fedora)" >&2; exit 1; }
	@echo 'int main() { if constexpr (true) return 0; }' \
	  | $(CXX) -std=c++17 -x c++ -fsyntax-only - 2> /dev/null || { echo "error: $(CXX) is not a C++17" \
	  "compiler: install g++ (Debian, Ubuntu) or gcc-c++ (Fedora), or name one with CXX=..." >&2; exit 1; }

# dwdp/engines/tensorrt_llm/startup.py is copied to where packages are.
$(PACKAGES_STAMP): pyproject.toml setup.py constraints.txt dwdp/_version.py \
		dwdp/engines/tensorrt_llm/startup.py $(if $(MADE_OTHERWISE),FORCE)
	@$(MAKE) --no-print-directory toolchain
	@echo "[1/3] virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(if $(MADE_OTHERWISE),--clear) $(VENV)
	@$(if $(MADE_OTHERWISE),rm -rf $(TRTLLM_VENV)) # it has the same interpreter
	@echo "[2/3] build tools"
	@$(PIP) setuptools pybind11 | $(PIP_LINES)
	@echo "[3/3] packages, dwdp and its native module (several minutes the first time)"
	@$(PIP) --no-build-isolation -e '.[transformers,serve,dev]' | $(PIP_LINES)
	@$(WRITE_RECORD)
	@touch $(NATIVE_STAMP) $(PACKAGES_STAMP)
	@$(VENV)/bin/dwdp --version

$(NATIVE_STAMP): $(NATIVE_SOURCES) $(if $(BUILT_OTHERWISE),FORCE)
	@echo "native module: $(if $(BUILT_OTHERWISE),another compiler,$(words $?) source file(s) changed)"
	@$(PY) setup.py --quiet build_ext --inplace
	@$(WRITE_RECORD)
	@touch $@

# Once what it says is there, so that what is interrupted begins again. An index's address may hold a password.
WRITE_RECORD = umask 077; printf 'RECORDED_%s := %s\n' PYTHON '$(PYTHON)' \
	TORCH_INDEX '$(subst $(HASH),\$(HASH),$(TORCH_INDEX))' CXX '$(CXX)' > $(RECORD)

demo: setup ## run the small trained model on 4 ranks, staged and direct
	@$(PY) examples/demo.py

test: setup ## run the tests
	@$(PY) -m pytest -q $(PYTEST_ARGS)

test-trtllm: setup ## run the tests of the TensorRT-LLM plugin on a checkout: TRTLLM_SOURCE=DIR
	@test -f '$(TRTLLM_SOURCE)/tensorrt_llm/__init__.py' || { echo "error: name a checkout of TensorRT-LLM," \
	  "the folder that holds tensorrt_llm/, with TRTLLM_SOURCE=DIR" >&2; exit 2; }
	@$(MAKE) --silent --no-print-directory $(TRTLLM_STAMP)
	@TRTLLM_SOURCE='$(abspath $(TRTLLM_SOURCE))' PYTHONPATH='$(CURDIR)' \
	  $(TRTLLM_PY) -m pytest -q --disable-warnings tests/tensorrt_llm $(PYTEST_ARGS)

# The interpreter is that of .venv, so its native module serves here as well.
$(TRTLLM_STAMP): tests/tensorrt_llm/requirements.txt setup.py dwdp/engines/tensorrt_llm/startup.py
	@command -v mpirun > /dev/null || { echo "error: mpi4py needs Open MPI: install openmpi-bin and" \
	  "libopenmpi-dev (Debian, Ubuntu) or openmpi-devel (Fedora)" >&2; exit 1; }
	@echo "[1/2] virtual environment in $(TRTLLM_VENV)"
	@$(PY) -m venv $(TRTLLM_VENV)
	@echo "[2/2] the packages that TensorRT-LLM imports (several minutes the first time)"
	@$(TRTLLM_PY) -m pip $(PIP_OPTIONS) -r tests/tensorrt_llm/requirements.txt | $(PIP_LINES)
	@$(PY) setup.py --quiet build_startup_file --build-lib \
	  "$$($(TRTLLM_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $(TRTLLM_STAMP)

test-asan: ## run the native tests under the address and undefined-behaviour sanitizers
	@$(MAKE) --no-print-directory -C tests/native asan

test-tsan: ## run the native tests under the thread sanitizer
	@$(MAKE) --no-print-directory -C tests/native tsan

lint: setup ## check style and types: ruff, mypy, clang-format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(CXX_FILES) | xargs --no-run-if-empty $(VENV)/bin/clang-format --dry-run -Werror

format: setup ## rewrite the sources in the project's format
	@$(PY) -m ruff check --fix-only --quiet .
	@$(PY) -m ruff format .
	@$(CXX_FILES) | xargs --no-run-if-empty $(VENV)/bin/clang-format -i

bench: setup ## run the CPU benchmarks
	@$(PY) benchmarks/transformers_cpu.py
	@$(PY) benchmarks/loading_memory.py

bench-serve: setup ## measure dwdp serve against its limits: survival, throughput, latency, memory (20 minutes)
	@$(PY) benchmarks/serving.py

gpu-report: ## on a GPU: build, run the GPU tests and benchmarks, write benchmarks/results/ (9 minutes)
	@$(GPU_PY) benchmarks/gpu/report.py $(GPU_REPORT_ARGS)

clean: ## remove build outputs and caches
	@rm -rf build dist *.egg-info dwdp/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(TRTLLM_VENV)/*' -prune -exec rm -rf {} +
	@rm -f $(NATIVE_STAMP)
	@$(MAKE) --silent -C tests/native clean
	@$(MAKE) --silent -C tests/cuda/standin clean

distclean: clean ## remove the virtual environment as well
	@rm -rf $(VENV) $(TRTLLM_VENV)
