# Every target does its own set-up: a virtual environment with the compiled package in it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(shell find csrc tests/host_cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# What is imported is compiled to byte code once, whatever the environment says: tests start many
# processes. Kept out of the sources.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/build/pycache
# Tests run in two processes of one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# A copy of the package whose kernels check addresses and undefined behaviour.
CHECKED := build/checked
# All kernels, forward and backward, on maps with odd sides; and the baseline's results, which no
# processor of these days gets otherwise.
CHECKED_SAMPLE := tests/ops tests/test_recording.py -k 'programs or (bits and train and None) or \
	(default and oracle and (batch or groups or shared or head or resample or conv_transpose))'
SANITIZERS := $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)

# Of make gpu: all, check, verify, sanitize, ceilings, passes, operators, networks or memory.
STAGE ?= all

.PHONY: help setup demo test test-all sanitize kernels lint format bench gpu clean

help:
	@echo "make demo      train the plain U-Net and FastUNet side by side on real MR images"
	@echo "make test      the test suite"
	@echo "make test-all  the same with every combination, for some hours"
	@echo "make sanitize  the operators' tests with AddressSanitizer and UBSan in the kernels"
	@echo "make kernels   what each GPU kernel compiles to: registers, spills, shared memory"
	@echo "make bench     measure against PyTorch and other engines; write benchmarks/results"
	@echo "make gpu       on an NVIDIA GPU: test and measure everything; STAGE=check for a part of it"
	@echo "make lint      ruff, clang-format and mypy"
	@echo "make format    let ruff and clang-format write"

setup: $(READY)

$(READY): pyproject.toml setup.py requirements/cpu.txt tools/setup.sh $(SOURCES)
	tools/setup.sh $(PYTHON) $(VENV)
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(PYTEST)
	$(if $(wildcard $(SANITIZERS)),FASTUNET_BUILDS=default $(MAKE) sanitize TESTS="$(CHECKED_SAMPLE)",\
		@echo "$(CXX) has no sanitizers: the tests with them, of the baseline, are left out")

test-all: $(READY)
	FASTUNET_CPU=1 FASTUNET_HOST_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace
	$(PYTEST) -m "not gpu"

sanitize: $(READY)
	FASTUNET_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(CHECKED)
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(CHECKED) \
		$(BIN)/python -m pytest -n 2 --ignore tests/ops/test_triton.py $(or $(TESTS),tests/ops)

kernels: $(READY)
	$(BIN)/python tools/kernels.py
	$(BIN)/python tools/cuda_kernels.py

# What cannot be installed is named, and not measured.
bench: $(READY)
	-$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/peers.txt
	$(BIN)/python -m benchmarks.run --peers --compile

gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu --stage $(STAGE) $(if $(OUT),--out $(OUT))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf build $(VENV) src/*.egg-info src/fastunet/*.so
