# make demo: watch a real language model and an image model read with sparse attention.
# make test: everything that needs no GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= passive

.PHONY: setup demo test lint bench clean

# An editable install knows the modules that existed when it was made: a new one needs a new install.
READY := $(VENV)/.ready-$(shell find src -name '*.py' | sort | cksum | cut -d' ' -f1)

setup: $(READY)

# torch first and pinned: a version range elsewhere would pull the CUDA build with gigabytes of packages.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	rm -f $(VENV)/.ready-*
	touch $@

demo: setup
	$(BIN)/tamis demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/tamis bench cpu

clean:
	rm -rf $(VENV) build dist
