# Needs Python >= 3.11, make and git; everything else is installed into .venv from environment.yml.
#
#   PYTHON=/path/to/python3.11   interpreter that .venv is made from
#   PIP_ARGS="..."               options for pip install, e.g. an index of CPU-only wheels
#   JOBS=4                       test processes; default: one a core, at most 8

PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys' >/dev/null 2>&1 && echo $$p && exit; done)
PIP_ARGS ?=
JOBS ?= logical

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT := .out
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))

# One thread a test process, as many processes as cores; training in a notebook by itself uses all.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8
PAPERMILL := $(BIN)/python -m papermill -k python3 --cwd notebooks

# A forced backend would suppress the inline figures; a foreign path would shadow the environment.
unexport MPLBACKEND PYTHONPATH PYTHONHOME
# Else every kernel warns that it cannot debug the frozen modules of the standard library.
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.DEFAULT_GOAL := help
.PHONY: help env quickstart test lint unit nbval smoke figures notebooks clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env: $(STAMP)  ## make or update .venv from environment.yml

quickstart: $(STAMP)  ## run notebooks/00_quickstart.ipynb on this machine, minutes on two cores
	@rm -rf $(OUT)/00_quickstart && mkdir -p $(OUT)/00_quickstart
	$(PAPERMILL) notebooks/00_quickstart.ipynb $(OUT)/00_quickstart.ipynb \
		--no-progress-bar --stdout-file - -p budget cpu -p out ../$(OUT)/00_quickstart
	@echo "notebook: $(OUT)/00_quickstart.ipynb"
	@ls $(OUT)/00_quickstart/*.png $(OUT)/00_quickstart/*.pdf | sed 's/^/figure:   /'

test: lint unit nbval smoke  ## lint, unit tests, and every notebook: recorded and smoke budgets

lint: $(STAMP)  ## ruff: lint and format, notebooks included
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

unit: $(STAMP)  ## tests of the package, and of the notebooks as files
	$(PYTEST) tests

nbval: $(STAMP)  ## run every notebook as committed, from the records
	$(PYTEST) --dist loadscope --nbval-lax --nbval-current-env notebooks

smoke: $(STAMP)  ## run every notebook with budget=smoke: trains for real, a minute each
	$(PYTEST) -v -m smoke --durations 0 tests/test_notebooks.py

figures: $(STAMP)  ## draw every figure and table again from figures/records
	@mkdir -p $(OUT)
	@for notebook in $(NOTEBOOKS); do echo "$$notebook"; \
		$(PAPERMILL) "$$notebook" "$(OUT)/$$(basename "$$notebook")" \
			-p budget recorded -p out ../figures --no-progress-bar || exit 1; done

notebooks: $(STAMP)  ## execute every notebook in place, for committing
	$(BIN)/python -m jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False $(NOTEBOOKS)

clean:  ## remove the environment, outputs and caches
	rm -rf $(VENV) $(OUT) *.egg-info build dist .pytest_cache .ruff_cache
	find sigreg_lib tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) \
		-prune -exec rm -rf {} +

# The pip section of environment.yml is the list of what is installed. `-e .` is last in it.
$(STAMP): environment.yml pyproject.toml
	@python='$(PYTHON)'; "$${python:-false}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python >= 3.11 is needed; found: $${python:-none}" \
			"$$(test -z "$$python" || "$$python" --version 2>&1)"; \
		echo "name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; } >&2
	"$(PYTHON)" -m venv --clear $(VENV)
	awk '/^  - pip:/ {on = 1; next} on && sub(/^      - /, "")' environment.yml \
		> $(VENV)/requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -r $(VENV)/requirements.txt
	@touch $@
