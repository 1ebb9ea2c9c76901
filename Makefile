# make demo | make test | make bench | make lint: each sets up .venv itself.
#
#   PYTHON         the interpreter .venv is made from (>= 3.10)           make test PYTHON=python3.12
#   FASTCONV_CUDA  0: without the CUDA kernels, 1: insist on them         make demo FASTCONV_CUDA=0
#   ARGS           passed on to pytest, or to bench/all.py                make test ARGS="-k pooling"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py build_backend.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup demo test bench lint format clean

help:
	@sed -n 's/^# //p' Makefile | head -1

# The exact set of constraints.txt. pip keeps what is there, so this is quick when nothing changed.
$(VENV)/.packages: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastconv needs Python >= 3.10, got " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt "setuptools>=77" wheel ninja pybind11 torch torchvision \
	  numpy tqdm matplotlib scikit-learn tensorboard pytest expecttest hypothesis ruff clang-format
	touch $@

$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	$(PIP) install --quiet --no-build-isolation --no-deps -e .
	touch $@

setup: $(VENV)/.built

# Stock and fastconv ResNet50 trained side by side on real images; the report lands in out/demo.
demo: setup
	$(BIN)/python -m fastconv info
	$(BIN)/python bench/train_cifar10.py --recipe demo --backend compare --report out/demo

test: setup
	$(BIN)/python -m pytest $(ARGS)

# Every subject against every peer, in at most 15 minutes; tables and pictures land in bench/results/<device>.
bench: setup
	$(BIN)/python bench/all.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	! grep -rnE '#include *[<"](torch|ATen|c10)/' csrc/cuda/kernels csrc/cpu/kernels

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist out *.egg-info fastconv/_C*.so $(VENV)/.built
