# make repro    set up what is missing, then run what is stale (DVC decides), to the finished report
# make test     set up what is missing, then run the tests
# make soak     the tests that take minutes by their nature

PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro test soak setup

repro: setup
	@echo "== dvc repro: running the stages that are stale"
	@dvc repro
	@echo "== done: report/report.md is the report; dvc metrics show prints the numbers, dvc plots show draws the curves"

test: setup
	@echo "== pytest: the tests; the end-to-end one takes a few minutes"
	@python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	@echo "== done: all tests passed"

soak: setup
	@python -m pytest -m soak

setup: $(VENV)/.installed
	@install -d -m 700 .dvc/site
	@# beside what a user has set there, such as the URL and secrets of a remote
	@grep -qs 'site_cache_dir = $(CURDIR)/.dvc/site$$' .dvc/config.local || dvc config --local core.site_cache_dir '$(CURDIR)/.dvc/site'
	@grep -qs 'html_template = $(CURDIR)/$(VENV)/plots.html$$' .dvc/config.local || dvc config --local plots.html_template '$(CURDIR)/$(VENV)/plots.html'

$(VENV)/.installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: found Python %d.%d, expected 3.11 or newer; set PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	@echo "== setting up $(VENV) with $$($(PYTHON) --version): a few minutes, several GB with CUDA"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements.lock
	@$(VENV)/bin/python -m stages.plots_page $(VENV)/plots.html
	@touch $@
	@echo "== set up"
