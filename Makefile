# make run | make test | make lint | make check | make bench | make gpu-check | make setup | make which-python | make clean
# Each sets up first what is missing: a virtual environment, its packages, the compiled extension.

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/$(shell date +%Y-%m-%d-%H%M%S)
ARGS ?=
export PYTHON VENV

# the checkout comes first on the path, also where the chosen Python has another autoflip installed
INTERPRETER = "$$(sed -n 1p .python)"
ENV = PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" PATH="$$(dirname $(INTERPRETER)):$$PATH"
PY = $(ENV) $(INTERPRETER)
CXX_FILES = $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup run test lint check format bench gpu-check which-python clean
help:
	@echo "make run            set up, then train: AutoFLIP against dense FedAvg on scikit-learn's digits"
	@echo "                    ARGS='--dataset mnist --data-root DIR' and so on; OUT=DIR names the run folder"
	@echo "make test           set up, then run the tests (ARGS='tests/test_codec.py -k delta')"
	@echo "make lint           ruff, clang-format, mypy"
	@echo "make check          lint, then the tests"
	@echo "make format         reformat Python and C++"
	@echo "make bench          run the benchmarks"
	@echo "make gpu-check      on a GPU machine: build with CUDA, GPU tests, memory checker, benchmarks"
	@echo "make setup          only set up; make which-python prints the interpreter that was chosen"
	@echo "make clean          remove what was built and installed here; runs stay"
	@echo
	@echo "PYTHON=python3      the Python to start from, 3.10 or newer"
	@echo "VENV=.venv          the environment to make; VENV= uses PYTHON as it is; an active environment is used as it is"

setup:
	@sh tools/setup.sh

which-python: setup
	@sed -n 1p .python

run: setup
	$(PY) -m autoflip run --out "$(OUT)" $(ARGS)

# one worker a core, as far as the plugin is there
WORKERS = $$($(INTERPRETER) -c 'import xdist' 2>/dev/null && echo --numprocesses auto --maxprocesses 8 --dist worksteal)
test: setup
	$(PY) -m pytest $(WORKERS) $(ARGS)

lint:
	@sh tools/setup.sh lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(ENV) clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

check: lint test

format:
	@sh tools/setup.sh lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(ENV) clang-format -i $(CXX_FILES)

BENCH = -o python_files='bench_*.py' -o python_functions='test_* bench_*' --benchmark-enable
bench: setup
	$(PY) -m pytest bench $(BENCH) $(ARGS)

# a GPU check must not pass by skipping, nor with a build that left the CUDA part out
gpu-check: export AUTOFLIP_REQUIRE_GPU = 1
gpu-check: export AUTOFLIP_CUDA = 1
gpu-check:
	@sh tools/setup.sh
	$(PY) -m pytest -m gpu $(ARGS)
	if command -v compute-sanitizer >/dev/null; then \
	    $(ENV) compute-sanitizer --error-exitcode 1 $(INTERPRETER) -m pytest -m 'gpu and not slow' -x $(ARGS); \
	else echo "no compute-sanitizer here: memory was not checked" >&2; fi
	mkdir -p bench/results
	$(PY) -m pytest bench $(BENCH) --benchmark-json bench/results/gpu-$$(date +%Y-%m-%d).json
	$(PY) bench/bench_masked_gpu.py

clean:
	rm -rf build dist .python *.egg-info autoflip/*.so autoflip/_build.txt .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -path './.?*' -prune -o -name __pycache__ -prune -exec rm -rf {} +
	@if [ -n "$(VENV)" ] && [ -f "$(VENV)/.autoflip" ]; then echo rm -rf "$(VENV)"; rm -rf "$(VENV)"; fi
