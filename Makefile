PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.fastmim-installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean

help:
	@echo "make setup   create $(VENV) and install fastmim with its test dependencies"
	@echo "make demo    pretrain a small SwinV2 on demo photographs, on the CPU"
	@echo "make test    run the tests"
	@echo "make lint    run ruff and mypy"
	@echo "make clean   remove the demo and the caches, keep $(VENV)"

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/fastmim data demo demo/data
	$(BIN)/fastmim pretrain configs/demo.yaml

# Triton's interpreter is switched on for a whole process: its tests run in one of their own.
test: setup
	$(BIN)/python -m pytest --ignore=tests/kernels/triton
	$(BIN)/python -m pytest tests/kernels/triton

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
