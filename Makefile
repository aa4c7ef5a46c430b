# make demo: watch a real language model and an image model read with sparse attention.
# make test: everything that needs no GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= passive

.PHONY: setup demo test test-cpu test-triton test-triton-own test-triton-shared ci test-gpu gpu-static test-native test-arm tsan lint bench bench-check sanitize wheel clean

# An editable install knows the modules that existed when it was made: a new one needs a new install.
READY := $(VENV)/.ready-$(shell find src -name '*.py' | sort | cksum | cut -d' ' -f1)

setup: $(READY)

# torch first and pinned: a version range elsewhere would pull the CUDA build with gigabytes of packages.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,dev,triton,ray,diffusers]"
	rm -f $(VENV)/.ready-*
	touch $@

demo: setup
	$(BIN)/tamis demo

test: test-cpu test-triton

test-cpu: setup
	$(BIN)/python -m pytest

# The GPU's kernels in Triton's interpreter, on CPU tensors: their own tests whole, and of each test that all backends
# share a sample, for the interpreter is slow.
SHARED := attend masks stage2 int8 poison properties select predictors varlen pack decode sparse_attention defects regressions compensate
test-triton:
	$(MAKE) --jobs=2 --output-sync=target test-triton-own test-triton-shared

test-triton-own: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_triton.py tests/test_triton_real.py tests/test_traffic.py

test-triton-shared: setup
	TRITON_INTERPRET=1 TAMIS_TEST_SAMPLE=1 $(BIN)/python -m pytest $(SHARED:%=tests/test_%.py)

# Every kernel compiled for every architecture and its machine code judged, on a machine that has none of them.
gpu-static: setup
	$(BIN)/tamis bench gpu-static

# On a machine with a GPU, torch, triton and pytest, from the source tree; nothing is installed or built.
test-gpu:
	PYTHONPATH=src $(PYTHON) tests/on_gpu.py

# The C ABI against an oracle in C++, with no Python: here, as a 64-bit ARM program in an emulator, and watched for
# races.
CMAKE := $(firstword $(wildcard $(BIN)/cmake) cmake)
NATIVE := $(CMAKE) -S . -DTAMIS_TESTS=ON -DCMAKE_BUILD_TYPE=Release
SECONDS_OF_RANDOM ?= 20

test-native:
	$(NATIVE) -B build/native
	$(CMAKE) --build build/native --parallel
	build/native/tamis_check --seconds $(SECONDS_OF_RANDOM)

# Needs g++-aarch64-linux-gnu and qemu-user. The second processor has no dot product: there only baseline may run.
QEMU := qemu-aarch64 -L /usr/aarch64-linux-gnu
test-arm:
	$(NATIVE) -B build/arm -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
	$(CMAKE) --build build/arm --parallel
	$(QEMU) -cpu max build/arm/tamis_check --expect "neon_dot baseline"
	$(QEMU) -cpu cortex-a53 build/arm/tamis_check --expect baseline

# Needs clang-14, libclang-rt-14-dev and libomp-14-dev. GCC's OpenMP library is a blank to the thread sanitizer: every
# barrier of it is missed, and all that a team wrote is reported. LLVM's tells its tool Archer, and that the sanitizer.
LLVM := /usr/lib/llvm-14
FIXED_ADDRESSES := $(shell setarch -R true 2>/dev/null && echo setarch -R)
tsan:
	$(NATIVE) -B build/tsan -DCMAKE_CXX_COMPILER=$(LLVM)/bin/clang++ -DCMAKE_CXX_FLAGS="-fsanitize=thread -g"
	$(CMAKE) --build build/tsan --parallel
	OMP_TOOL_LIBRARIES=$(LLVM)/lib/libarcher.so TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" \
	  $(FIXED_ADDRESSES) build/tsan/tamis_check --seconds $(SECONDS_OF_RANDOM)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/tamis bench cpu

# The same machine, or one like it, must not have become slower against torch: prints what moved by more than 10%.
bench-check: setup
	$(BIN)/tamis bench cpu --quick --compare benchmarks/results

# Random calls and the tests of odd places, on a library that reports every access out of bounds and all undefined
# behaviour. -O1 leaves more accesses to look at than -O3, and compiles in a quarter of the time.
SANITIZED := build/sanitize/libtamis_cpu.so
sanitize: setup
	$(BIN)/cmake -S . -B build/sanitize -DCMAKE_BUILD_TYPE=Release -DTAMIS_OPTIMIZE=-O1 -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g"
	$(BIN)/cmake --build build/sanitize --parallel
	export TAMIS_CPU_LIBRARY=$(CURDIR)/$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)"; \
	$(BIN)/python tests/fuzz.py --seconds 60 && \
	$(BIN)/python -m pytest -q tests/test_poison.py tests/test_layout.py tests/test_pack.py tests/test_decode.py

# One wheel for every Python; torch brings the OpenMP library, which must not come twice.
wheel: setup
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/tamis-*.whl
	$(BIN)/python tests/wheel.py dist/tamis-*.whl

# All of it, on a machine that has everything (.ci/run sees to that): the longest first, and as many at a time as there
# are processors, for the tests use one each. What a part says comes when it is done.
ci: setup
	$(MAKE) --jobs=$$(nproc) --output-sync=target --no-print-directory \
	  gpu-static test-cpu test-triton-shared test-arm test-triton-own sanitize lint tsan test-native wheel

clean:
	rm -rf $(VENV) build dist
