# make quickstart   install into .venv and watch a small mixture of experts learn by GMPO
# make test         install into .venv and run the whole default test suite, two files at a time
# make test-fast    the unit tests that start no process
# make test-slow    the tests that the default suite leaves out; hours
# make test-next    layouts, checkpoints, numbers and weight syncs with the Megatron-Core of the CUDA lock
# make lint         ruff, pyright, codespell
# make docs         build the documentation into site/; open site/index.html
# make contracts    hold calls into vLLM and Transformer Engine against their newest sources (0.4 GB)
# make install-cuda install the CUDA stack into .venv-cuda: Python 3.12, CUDA 13 and its compiler
# make dist         build the wheel into dist/
# make clean        remove the environments, outputs and what was built

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CUDA_PYTHON ?= python3.12
CUDA_VENV := .venv-cuda
CUDA_BIN := $(CUDA_VENV)/bin
STAMP := $(VENV)/.installed
# Settings of the quickstart: make quickstart ARGS="actor.policy_loss.loss_mode=vanilla"
OUT ?= outputs/quickstart
ARGS ?=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# Tests that start no process have nothing that the tests of a file would have to share.
PYTEST_FAST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: quickstart test test-fast test-slow test-next lint docs contracts install-cuda dist clean

quickstart: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" OUT="$(OUT)" examples/quickstart/run.sh $(ARGS)

test: $(STAMP)
	$(PYTEST)

test-fast: $(STAMP)
	$(PYTEST_FAST) tests/unit -m "not slow and not starts_processes"

# One after the other: kills and restarts have deadlines.
test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# Its Python part serves every Python that the tests run on. One test loads what 0.16 writes.
test-next: $(STAMP)
	$(BIN)/pip install --no-deps --ignore-requires-python --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 --upgrade --target .next $$(grep ^megatron-core requirements/cuda.lock)
	PYTHONPATH=.:.next:$$PYTHONPATH $(PYTEST) tests/unit/megatron tests/parity tests/distributed tests/e2e/test_e2e_agreement.py -k "not what_megatron_saved"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/codespell

# The variable turns off an advertisement of the theme.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

contracts: $(STAMP)
	$(BIN)/pip install --no-deps --ignore-requires-python --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 --upgrade --target .contracts -r requirements/contracts.lock
	$(PYTEST) tests/unit/contracts

# Transformer Engine's extension is compiled against the torch that is there, so it comes second.
install-cuda:
	$(CUDA_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12) and "the CUDA lock is for Python 3.12: make install-cuda CUDA_PYTHON=python3.12")'
	$(CUDA_PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/pip install --no-deps -r requirements/cuda.lock
	$(CUDA_BIN)/pip install --no-deps --no-build-isolation -r requirements/cuda-compiled.lock
	$(CUDA_BIN)/pip install --no-deps --no-build-isolation -e .

# setuptools packs whatever an earlier build left in build/.
dist: $(STAMP)
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

# The stamp is newer than what was installed from, so this runs once.
$(STAMP): requirements/cpu.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "the CPU lock is for Python 3.11: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(CUDA_VENV) .contracts .next outputs build dist site
