# make setup   the virtual environment .venv alone
# make demo    the whole story on handwritten digits, no network needed after the installation
# make bench   how near both stages come to what their bare arithmetic allows; some fifteen minutes
# make gpu     on a machine with a GPU: is what it does right, and how fast is it? nine minutes at most; GPU="--device cpu" to see that it works
# make study CIFAR10=FOLDER   the paper's claims, tried on CIFAR-10; one to two hours on two cores
# make test    the tests        make lint    the linters        make format    lay the code out as the linters want it
# Each sets up .venv by itself: a minute or two and some 6 GB, since torch and DALI come with their CUDA libraries.

PYTHON ?= python3
BIN := .venv/bin
RUFF := $(BIN)/ruff

.PHONY: setup demo bench gpu study test lint format
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
	$(BIN)/python -m pytest

lint: .venv/installed
	$(RUFF) check .
	$(RUFF) format --check .

format: .venv/installed
	$(RUFF) check --fix .
	$(RUFF) format .

.venv/installed: setup.cfg
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
