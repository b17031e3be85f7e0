# `make demo` and `make test` work from a fresh clone: each makes .venv and installs into it first.
# The small CPU build of torch:  make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints/cpu.txt $(PIP_ARGS)
INPUTS := setup.py version.py constraints/cpu.txt

# One thread per process keeps sums in one order; the safe path keeps the root's folders (kernels, ...)
# from shadowing public packages of the same name.
test lint: export OMP_NUM_THREADS := 1
test lint: export OPENBLAS_NUM_THREADS := 1
test lint: export PYTHONSAFEPATH := 1

.PHONY: help demo test lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    install, then write outputs/demo.mp4, a walk through the small world"
	@echo "make test    install with [dev], then lint and run the tests"
	@echo "make lint    ruff, and mypy on an installed copy"
	@echo "make clean   remove .venv, outputs and build leftovers"
	@echo "variables:   PYTHON=$(PYTHON)  PIP_ARGS=\"$(PIP_ARGS)\""

demo: .venv/.base
	mkdir -p outputs
	$(BIN)/inferix generate --out outputs/demo.mp4

test: lint
	$(BIN)/pytest tests

# mypy does not see an editable install, so it reads a copy; a stale build/ would put deleted files into it.
lint: .venv/.dev
	$(BIN)/ruff check .
	rm -rf build .venv/mypy-copy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--target .venv/mypy-copy .
	MYPYPATH=.venv/mypy-copy $(BIN)/mypy .venv/mypy-copy/inferix tools

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.base: $(INPUTS) | .venv/bin/python
	$(INSTALL) -e .
	touch $@

.venv/.dev: $(INPUTS) | .venv/bin/python
	$(INSTALL) -e ".[dev]"
	touch $@ .venv/.base

clean:
	rm -rf .venv outputs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache tests/.pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
