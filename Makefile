# `make demo` and `make test` work from a fresh clone: each makes .venv and installs into it first.
# On Linux cpu.txt needs the CPU build of torch, since torch 2.13.0 of the package index requires another triton:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# A machine with an NVIDIA GPU:  make demo CONSTRAINTS=constraints/gpu.txt

PYTHON ?= python3
PIP_ARGS ?=
CONSTRAINTS ?= constraints/cpu.txt
MINUTES ?= 10
SEED ?= 0
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) $(PIP_ARGS)
INPUTS := setup.py version.py $(CONSTRAINTS)

# One thread per process keeps sums in one order; the safe path keeps the root's folders (kernels, ...)
# from shadowing public packages of the same name.
test test-all quick lint fuzz kills soak runner runner-all: export OMP_NUM_THREADS := 1
test test-all quick lint fuzz kills soak runner runner-all: export OPENBLAS_NUM_THREADS := 1
test test-all quick lint fuzz kills soak runner runner-all: export PYTHONSAFEPATH := 1
# Bytecode is written even where the environment forbids it: both processes would else rewrite the asserts of all tests.
test test-all quick: export PYTHONDONTWRITEBYTECODE :=
# Tests with two threads wait asleep: two processes that spin on two cores slow each other.
test test-all quick: export OMP_WAIT_POLICY := PASSIVE

KILLS ?= 200

.PHONY: help demo test test-all chromium nginx ray quick lint fuzz kills soak runner runner-all docs copy sizes clean FORCE
.DEFAULT_GOAL := help

help:
	@echo "make demo    install, then write outputs/demo.mp4, a walk through the small world"
	@echo "make test    install with [dev], then lint, build the C++ runner, and run its tests and all others"
	@echo "make test-all  the same, with the tests that take minutes (marked slow); root gets chromium and nginx from apt, and ray is installed"
	@echo "make quick   install with [dev], then the tests that look at the whole engine in under a minute"
	@echo "make lint    ruff, hadolint on the Dockerfiles, and mypy on an installed copy"
	@echo "make fuzz    damaged files for every reader of user files; MINUTES=10 SEED=0; failures in outputs/fuzz"
	@echo "make kills   writers of files killed at random moments; KILLS=200 SEED=0"
	@echo "make soak    one engine driven from many threads; MINUTES=10 SEED=0"
	@echo "make runner  inferix-runner in C++ into outputs/runner, and its quick tests by ctest"
	@echo "make runner-all  the same and the ops, with libtorch, into outputs/runner-all, and the tests that take minutes"
	@echo "make docs    the documentation as pages, outputs/docs/index.html"
	@echo "make sizes   files and lines by folder, and the longest files"
	@echo "make clean   remove .venv, outputs and build leftovers"
	@echo "on Linux without a GPU:  PIP_ARGS=\"--extra-index-url https://download.pytorch.org/whl/cpu\""
	@echo "variables:   PYTHON=$(PYTHON)  CONSTRAINTS=$(CONSTRAINTS)  PIP_ARGS=\"$(PIP_ARGS)\""

demo: .venv/.base
	mkdir -p outputs
	$(BIN)/inferix generate --out outputs/demo.mp4

# Two processes: each begins with half of the tests in order; an idle one takes over half of what the other has left.
test: lint runner
	$(BIN)/pytest tests -n 2 --dist worksteal -m "not slow"

test-all: lint chromium nginx ray runner-all
	$(BIN)/pytest tests -n 2 --dist worksteal

# The tests of the page of inferix serve drive a browser, and are skipped where there is none.
chromium:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
		|| echo "no chromium: the tests of the page are skipped"

# A server that sessions are pushed to by RTMP.
nginx:
	@test -e /usr/lib/nginx/modules/ngx_rtmp_module.so || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nginx-light \
		libnginx-mod-rtmp; } || echo "no nginx with RTMP: its test is skipped"

# 340 MB, for one test.
ray: .venv/.dev
	@$(BIN)/python -c "import ray" 2>/dev/null || $(INSTALL) -e ".[dev,ray]"

quick: .venv/.dev
	$(BIN)/pytest -x tests/test_tiny.py tests/test_layout.py tests/test_api.py tests/test_errors.py tests/runtime/test_page_pool.py \
		tests/runtime/test_scheduler.py

fuzz: .venv/.dev
	$(BIN)/python tests/fuzz/run.py --minutes $(MINUTES) --seed $(SEED)

kills: .venv/.dev
	$(BIN)/python tests/endurance/kills.py --kills $(KILLS) --seed $(SEED)

soak: .venv/.dev
	$(BIN)/python tests/endurance/soak.py --minutes $(MINUTES) --seed $(SEED)

# The build for `make test` leaves out what needs the headers of libtorch, half of the time of the compiler; the one for
# `make test-all` has all that cmake finds. With onnxruntime_c_api.h, a test compares the places of its functions:
#   make runner CMAKE_ARGS=-DONNXRUNTIME_INCLUDE_DIR=/path
CMAKE_ARGS ?=

runner: .venv/.dev
	@command -v c++ >/dev/null || { echo "no C++ compiler (c++): inferix-runner is not built, and ctest does not run" >&2; \
		[ -z "$$CI" ]; }
	@! command -v c++ >/dev/null || $(MAKE) --no-print-directory outputs/runner CTEST_ARGS="-LE slow" \
		CMAKE_ARGS="-DINFERIX_TORCH=OFF -DINFERIX_OPS=OFF $(CMAKE_ARGS)"

runner-all: .venv/.dev
	$(MAKE) --no-print-directory outputs/runner-all

outputs/runner outputs/runner-all: FORCE
	$(BIN)/cmake -S . -B $@ -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python $(CMAKE_ARGS)
	$(BIN)/cmake --build $@ --parallel 2
	$(BIN)/ctest --test-dir $@ --output-on-failure --no-tests=error $(CTEST_ARGS)

FORCE:

sizes:
	@$(PYTHON) tools/sizes.py

lint: copy
	$(BIN)/ruff check .
	$(BIN)/hadolint docker/*.Dockerfile
	cp -R tools .venv/copy/
	cd .venv/copy && ../bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache inferix tools

docs: copy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "outputs/docs/index.html"

# mypy and the docs do not see an editable install, so they read a copy; a stale build/ would put deleted files into it.
copy: .venv/.dev
	rm -rf build .venv/copy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--target .venv/copy .

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
