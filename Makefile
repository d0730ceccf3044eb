# make repro       set up what is missing, then run what is stale, to the finished report
# make test        set up what is missing, then check the code's form and run the quick tests
# make test-slow   whole pipelines, many processes, real servers
# make soak        tests that take many minutes each: kills by the hundred, clusters, sweeps
# make lint        formatter, linter and type checker alone

PYTHON ?= python3
VENV := .venv
PYTEST := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro test test-slow soak lint setup install

repro: setup
	@echo "== dvc repro: running the stages that are stale"
	@dvc repro
	@echo "== done: report/report.md is the report; dvc metrics show prints the numbers, dvc plots show draws the curves"

test: lint
	@echo "== pytest: the quick tests; make test-slow runs the others"
	@$(PYTEST)
	@echo "== done: all quick tests passed"

test-slow: setup
	@echo "== pytest: the slow tests"
	@$(PYTEST) -m "slow and not soak"
	@echo "== done: all slow tests passed"

soak: setup
	@python -m pytest -m soak

lint: setup
	@echo "== ruff and mypy"
	@ruff format --check --quiet . || { echo "error: ruff format changes the files above; run it"; exit 1; }
	@ruff check --quiet .
	@mypy

setup: $(VENV)/.installed
	@$(VENV)/bin/python -m reprotune.compat.dvc
	@# next to what a user has set there, such as the URL and secrets of a remote
	@grep -qs 'html_template = ../$(VENV)/plots.html$$' .dvc/config.local || $(VENV)/bin/python -m dvc config --local plots.html_template ../$(VENV)/plots.html

# by content: a clock can be wrong, and a checkout makes files new that are as they were
$(VENV)/.installed: requirements.lock pyproject.toml
	@if cat $^ | cmp -s - $@; then touch $@; else $(MAKE) --no-print-directory install; fi

install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: found Python %d.%d, expected 3.11 or newer; set PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	@echo "== setting up $(VENV) with $$($(PYTHON) --version): a few minutes, several GB with CUDA"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements.lock
	@$(VENV)/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(VENV)/bin/python -m reprotune.report.plots_page $(VENV)/plots.html
	@cat requirements.lock pyproject.toml > $(VENV)/.installed
	@echo "== set up"
