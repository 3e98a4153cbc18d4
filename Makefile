# `make help` says what there is. Variables, given as `make reproduce NAME=value`:
#   MNIST_DIR  a folder with the four MNIST files, gzipped or not
#   DATASET    auto (default): MNIST, else the stand-in; mnist: never the stand-in; digits
#   PYTHON     the Python 3.11 to 3.13 that makes the environment (default: python3)
#   PY         an environment's Python that has everything: none is made (only `make … PY=`)
#   JOBS       runs at a time (default: as many as cores and memory allow; only `make … JOBS=`)
#   RUN        a command put before every run, as RUN="srun -n1 --gres=gpu:1" (only `make … RUN=`)
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

ifeq ($(wildcard notebooks/support/runs.py),)
$(error run make in the project's own folder, or name it: make -C FOLDER)
endif
ifneq ($(findstring :,$(CURDIR)),)
$(error Python cannot work in a folder with a colon in its path, $(CURDIR): rename or move it)
endif

DATASET ?= auto
PYTHON ?= python3
ifdef MNIST_DIR
# Absolute, for notebooks run in their own folder; one that does not exist is named as given.
override MNIST_DIR := $(shell CDPATH= cd -- "$(MNIST_DIR)" 2>/dev/null && pwd || echo "$(MNIST_DIR)")
export MNIST_DIR
endif
export PYTHONPATH := $(CURDIR):$(CURDIR)/notebooks:$(CURDIR)/book/_ext
export PYTHONUNBUFFERED := 1
export MPLBACKEND := agg

# PY is taken from the command line only: a variable of this name may be around by accident.
ifeq ($(origin PY),command line)
ENV :=
else
PY := $(CURDIR)/.venv/bin/python
ENV := .venv/.finished
endif

ifneq ($(origin RUN),command line)
RUN :=
endif
ifneq ($(origin JOBS),command line)
JOBS :=
endif
ifneq ($(origin NAME),command line)
NAME :=
endif
FROM ?= mnist
export PARAMS RUN

# Everything is the same at smoke size, in a folder of its own: `make smoke` sets SMOKE=1.
RESULTS := results$(if $(SMOKE),/smoke)
SIZE := $(if $(SMOKE),--smoke)
BOOK_OUTPUT := $(if $(SMOKE),$(RESULTS),book)
# The data set whose results are meant: the one that is named, else the last one chosen.
CHOICE := $(RESULTS)/.dataset
CHOSEN = $(or $(filter mnist digits,$(DATASET)),$$(cat "$(CHOICE)" 2>/dev/null || echo mnist))
RUNS = $(RESULTS)/$(CHOSEN)
REPRODUCE = "$(PY)" -m support.reproduce $(SIZE) --dataset "$(DATASET)" --results "$(RESULTS)" \
  --run "$$RUN" $(if $(JOBS),--jobs "$(JOBS)")

.PHONY: help env data quote experiments report book pdf reproduce smoke fork run reference launch lint test test-fast test-full test-book mutants bench gpu-check clean

help: ## show this list
	@echo "Two commands: make reproduce, make test. All targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@sed -nE '2,7s/^# +/  /p' $(MAKEFILE_LIST)

env: $(ENV) ## make the environment in .venv (once; 2 GB, on Linux with CUDA 5.5 GB)

.venv/.finished: requirements.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: $(PYTHON) is not Python 3.11 to 3.13: make PYTHON=python3.12 …" >&2; exit 1; }
	@echo "making the environment in .venv (a minute or two; 2 GB, on Linux with CUDA 5.5 GB) …"
	@test -w . || { echo "error: this folder is read-only: make it writable, or copy it" >&2; exit 1; }
	@"$(PYTHON)" -m venv .venv || \
	  { echo "error: no virtual environment could be made; is python3-venv installed?" >&2; exit 1; }
	@.venv/bin/python -m pip install --disable-pip-version-check -q -r requirements.txt -e . || \
	  { echo "error: the packages could not be installed (see above). Check the network and the" \
	    "free disk space, and run the same command again." >&2; exit 1; }
	@touch $@

data: $(ENV) ## find or download MNIST, or fall back to the stand-in
	@mkdir -p "$(RESULTS)"
	@"$(PY)" -m support.data --dataset "$(DATASET)" --print-choice-to "$(CHOICE)"

experiments: $(ENV) ## make all runs that are not finished yet, and no book
	@$(REPRODUCE) --runs-only

quote: $(ENV) ## say what `make reproduce` will take here, and what is done; runs nothing
	@"$(PY)" -m support.quote $(SIZE) --dataset "$(CHOSEN)" --results "$(RUNS)"

book: $(ENV) ## build the book: from results on the last data set chosen, else data/reference
	@"$(PY)" -m support.book $(SIZE) --results "$(RUNS)" --output "$(BOOK_OUTPUT)"

pdf: book ## print the book into book/_build/fimlib-book.pdf; needs Chromium (CHROMIUM=/path/to/it)
	@"$(PY)" -m support.pdf --built "$(BOOK_OUTPUT)/_build/html" --output "$(BOOK_OUTPUT)/_build/fimlib-book.pdf"

report: $(ENV) ## print what the runs on the last data set chosen say of the paper's statements
	@"$(PY)" -m support.report $(SIZE) --results "$(RUNS)"

reproduce: $(ENV) ## the main command: data, runs, book, and what reproduced
	@$(REPRODUCE) --output "$(BOOK_OUTPUT)"

smoke: ## the whole path at a tiny size, in some minutes; it judges nothing
	@$(MAKE) reproduce SMOKE=1

fork: $(ENV) ## copy a notebook, to change it: make fork NAME=mynet FROM=mnist
	@"$(PY)" -m support.forks new "$(NAME)" --source "$(FROM)"

run: $(ENV) ## run a fork, or a run: make run NAME=mynet PARAMS="activation=tanh epochs=5"
	@$(REPRODUCE) --output "$(BOOK_OUTPUT)" --name "$(NAME)" --parameters "$$PARAMS"

reference: $(ENV) ## replace data/reference by the results made here (real MNIST only)
	@"$(PY)" -m support.reference --results "$(RESULTS)/mnist"

launch: $(ENV) ## let the notebooks open in the browser, from the address in book/_config.yml
	@"$(PY)" -m support.launch

lint: $(ENV) ## ruff (notebooks too), mypy, and the direction of imports
	@echo "ruff …" && "$(PY)" -m ruff check . && "$(PY)" -m ruff format --check .
	@echo "mypy …" && "$(PY)" -m mypy
	@echo "imports …" && "$(PY)" -c 'from importlinter.cli import lint_imports_command as c; c()' \
	  --no-cache --no-logo

# Two processes, file by file in the order of tests/conftest.py.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

test: lint ## lint, types, tests and doctests
	@echo "pytest …"
	@"$(PY)" -m pytest $(TWO) -m "not full" --durations=25

test-fast: $(ENV) ## the library's own tests, but for the longest (three minutes on two cores)
	@"$(PY)" -m pytest $(TWO) -m "not full and not long" tests/fimlib fimlib

test-full: lint ## the same with the long loops
	@"$(PY)" -m pytest

test-book: $(ENV) ## open every page of the book in Chromium and see that it is right (some minutes)
	@"$(PY)" -m pytest -m browser -rs tests/book/test_book_browser.py

mutants: $(ENV) ## change fimlib's formulas one by one and see the tests notice (an hour)
	@"$(PY)" tests/tools/mutants.py

bench: $(ENV) ## measure the cost beside other libraries, in about an hour (NETWORKS="mlp lenet": a part; TODAY=1: networks of today; TORTURE=1: hard ones; QUICK=1: try it out)
	@"$(PY)" -m $(if $(TORTURE),support.torture,support.bench) $(if $(QUICK),--quick) $(if $(TODAY),--today) $(if $(NETWORKS),--networks $(NETWORKS))

gpu-check: $(ENV) ## compare results of CPU and GPU where there is a GPU
	@"$(PY)" -m support.gpu_check

clean: ## remove what was built; results, data and .venv stay
	rm -rf book/_build book/_generated book/.build.lock results/smoke mutants .pytest_cache .mypy_cache .ruff_cache
