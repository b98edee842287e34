# The front door. Everything runs in .venv, which the first target makes; nothing else has to be installed beforehand
# but Python 3.10 or newer with venv, and a C++17 compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test bench lint clean

help:
	@echo "make demo    encode, decode and score a bundled clip (about one minute on two cores)"
	@echo "make test    run the tests"
	@echo "make bench   run the CPU benchmarks and write bench/results"
	@echo "make lint    ruff and mypy"

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/flags.mk csrc/core/* csrc/cuda/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	HFLFNERV_REQUIRE_EXT=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint]"
	touch $@

demo: $(READY)
	$(BIN)/hflfnerv demo

test: $(READY)
	$(BIN)/python -m pytest -n auto

bench: $(READY)
	$(BIN)/python -m bench.run

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info hflfnerv/_C*.so hflfnerv/_build.json
