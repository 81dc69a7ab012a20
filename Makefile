# make setup   the virtual environment .venv alone
# make demo    the whole story on handwritten digits; no network after the installation
# make bench   how near both stages come to their bare arithmetic; some fifteen minutes
# make gpu     is what a GPU does right, and how fast is it? nine minutes at most;
#              GPU="--device cpu" to see on a CPU that it works
# make study CIFAR10=FOLDER   the paper's claims on CIFAR-10; one to two hours on two cores
# make test    the tests, on all cores
# make check   the quick tests, while writing
# make lint    the linters and the types
# make format  lay the code out as the linters want it
# Each sets up .venv by itself: some four minutes and 8 GB, since torch and DALI come
# with their CUDA libraries.

PYTHON ?= python3
BIN := .venv/bin
RUFF := $(BIN)/ruff
# A test a core, each with one thread: more would only wait for each other.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: setup demo bench gpu study test check lint format
setup: .venv/installed
demo: .venv/installed
	$(BIN)/python cli.py demo

bench: .venv/installed
	$(BIN)/python tests/bench/speed.py

gpu: .venv/installed
	$(BIN)/python tests/bench/gpu/prove.py $(GPU)

study: .venv/installed
	$(BIN)/python tests/bench/study/study.py $(if $(CIFAR10),--cifar10 $(CIFAR10)) $(if $(PHOTOGRAPHS),--photographs $(PHOTOGRAPHS) --weights $(WEIGHTS))

test: .venv/installed
	$(PARALLEL) -n auto --dist worksteal -m "not alone"
	$(BIN)/python -m pytest -m alone

check: .venv/installed
	$(PARALLEL) -n auto --dist worksteal -m "not alone and not slow"

lint: .venv/installed
	$(RUFF) check .
	$(RUFF) format --check .
	$(BIN)/mypy --strict --no-warn-return-any --strict-optional cache
	$(BIN)/mypy cache pipeline cli.py

format: .venv/installed
	$(RUFF) check --fix .
	$(RUFF) format .

.venv/installed: setup.cfg
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
