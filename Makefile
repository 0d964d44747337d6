# Two commands do everything on a fresh machine:  make demo  and  make test.  The rest is comfort.
#
#   make demo    virtual environment, install, then fine-tune the embedded model with QLoRA (CPU or GPU)
#   make test    virtual environment, build (C++, and CUDA where nvcc is), every test but the slow ones
#   make slow    the slow ones: compilers, kills, large traces
#   make lint    ruff, clang-format, mypy
#   make docs    regenerate the figures and tables of docs/
#   make bench   benchmark of the kernels on this machine
#   make gpu     everything a machine with an NVIDIA GPU should run; needs no virtual environment
#
# PYTHON=python3.12 picks the interpreter; TORCH="torch==2.13.0" picks another torch (2.10 or newer), for example the CPU
# wheel of your index, which is ten times smaller than the default CUDA one.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# the demo compiles CUDA kernels only where a GPU is there to run them; `make test` compiles them wherever nvcc is
NVCC := $(shell command -v nvcc 2>/dev/null || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
PRESET ?= $(if $(NVCC),cuda,cpu)
PYTEST_ARGS ?= -m "not slow"
SOURCES := $(wildcard src/cpp/* src/cuda/*) CMakeLists.txt CMakePresets.json

.PHONY: demo test slow build lint format docs bench gpu clean

$(VENV)/.core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install "$(TORCH)" "numpy>=1.26" "scipy>=1.11" tabulate "pybind11>=2.13" "cmake>=3.22" ninja
	@touch $@

$(VENV)/.demo: $(VENV)/.core $(SOURCES) $(shell find python/qlora_ref -name '*.py' -not -path '*/__pycache__/*')
	$(PIP) install ".[hf]" $(if $(shell command -v nvidia-smi),,-C cmake.define.QLORA_CUDA=OFF)
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) install scikit-build-core $$($(BIN)/python tools/extras.py hf test)
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) install $$($(BIN)/python tools/extras.py dev)
	@touch $@

demo: $(VENV)/.demo
	cd /tmp && "$(abspath $(BIN))/qlora-ref" demo --output "$(abspath runs)/demo-$$(date +%Y%m%d-%H%M%S)" $(DEMO_ARGS)

build: $(VENV)/.core
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset $(PRESET) -DPython_EXECUTABLE="$(abspath $(BIN))/python"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset $(PRESET)

test: $(VENV)/.test build
	QLORA_REQUIRE=cpu $(BIN)/python -m pytest $(PYTEST_ARGS)

slow: $(VENV)/.test build
	QLORA_REQUIRE=cpu $(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check python tests tools docs
	$(BIN)/ruff format --check python tests tools docs
	$(BIN)/clang-format --dry-run -Werror $(filter-out src/cpp/CMakeLists.txt,$(wildcard src/cpp/*.cpp src/cpp/*.h src/cuda/*.cu src/cuda/*.cuh))
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix python tests tools docs
	$(BIN)/ruff format python tests tools docs
	$(BIN)/clang-format -i $(wildcard src/cpp/*.cpp src/cpp/*.h src/cuda/*.cu src/cuda/*.cuh)

docs: $(VENV)/.test
	PYTHONPATH=python $(BIN)/python tools/plot_figures.py

bench: $(VENV)/.test build
	PYTHONPATH=python $(BIN)/python tools/bench.py $(BENCH_ARGS)

gpu:
	$(PYTHON) tools/check_gpu.py $(GPU_ARGS)

clean:
	rm -rf build python/qlora_ref/_C*.so $(VENV)/.core $(VENV)/.demo $(VENV)/.test $(VENV)/.dev
