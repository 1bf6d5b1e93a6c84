PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.fastmim-installed
DEMO_STAMP := $(VENV)/.fastmim-demo
# Where torch comes from, for example https://download.pytorch.org/whl/cpu; empty: PyPI's, which brings CUDA on Linux.
TORCH_INDEX ?=
# Two processes use about 4 GiB; "-n 0" runs the tests one after the other.
TEST_JOBS ?= -n 2 --dist loadfile
INSTALL = $(BIN)/python -m pip install -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean

help:
	@echo "make setup   create $(VENV) and install fastmim with its test dependencies"
	@echo "make demo    pretrain a small SwinV2 on demo photographs, on the CPU"
	@echo "make test    run the tests"
	@echo "make lint    run ruff and mypy"
	@echo "             TORCH_INDEX=https://download.pytorch.org/whl/cpu: torch without CUDA, for any of these"
	@echo "make clean   remove the demo and the caches, keep $(VENV)"

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(INSTALL) torch torchvision --index-url $(TORCH_INDEX))

$(STAMP): pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	touch $@ $(DEMO_STAMP)

$(DEMO_STAMP): pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[demo]"
	touch $@

# What the tests need is more than the demo does: where it is there, nothing is installed.
demo: $(DEMO_STAMP)
	$(BIN)/fastmim data demo demo/data
	$(BIN)/fastmim pretrain configs/demo.yaml

# Triton's interpreter is switched on for a whole process: its tests run in processes of their own. A file's tests stay
# in one process, in which they share what they build.
test: setup
	$(BIN)/python -m pytest $(TEST_JOBS) --ignore=tests/kernels/triton
	$(BIN)/python -m pytest $(TEST_JOBS) tests/kernels/triton

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
