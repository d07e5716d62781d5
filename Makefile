# Every target sets up what it needs: a fresh clone needs only git, make and Python 3.11 to 3.13.

ADDRESS ?= 127.0.0.1:8000
VENV := .venv
BIN := $(VENV)/bin
LIGHTHOUSE := tests/browser/node_modules/.installed

# The tests of the package, without those of its distribution and of the site.
OF_THE_PACKAGE = $(filter-out %/test_packaging.py %/test_built_code.py tests/test_docs_% tests/test_site_%,\
	$(wildcard tests/test_*.py))

# The first interpreter that is new enough and can make virtual environments.
CHECK := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c '$(CHECK)' 2>/dev/null && echo $$python && break; done)

# Material announces MkDocs 2 at every start.
export NO_MKDOCS_2_WARNING := 1
export TF_CPP_MIN_LOG_LEVEL ?= 3

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env serve build test versions lowest highest lint bench lock clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1:/p' $(firstword $(MAKEFILE_LIST)) | \
		while IFS=: read -r name text; do printf '  make %-8s %s\n' "$$name" "$$text"; done

env: $(VENV)/.installed ## Make the environment in .venv

serve: env ## Serve the documentation at 127.0.0.1:8000 and follow changes
	$(BIN)/mkdocs serve --no-strict --dev-addr $(ADDRESS)

build: env ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

test: env $(LIGHTHOUSE) ## Run the tests and report the coverage of xplique_flax
	$(BIN)/pytest -n 2 --cov --cov-report=term-missing $(ARGS)

versions: lowest highest ## Test the package with the lowest and the highest versions it accepts

lowest: export UV_RESOLUTION := lowest-direct
lowest: VERSION := 3.11
highest: VERSION := 3.13
lowest highest: env
	$(BIN)/uv venv --quiet --clear --python $(VERSION) $(VENV)-$@
	$(BIN)/uv pip compile --quiet --python $(VENV)-$@ --output-file $(VENV)-$@/versions.txt pyproject.toml
	UV_RESOLUTION=highest $(BIN)/uv pip install --quiet --python $(VENV)-$@ --group dev \
		--constraint $(VENV)-$@/versions.txt --editable .
	@$(VENV)-$@/bin/python --version && \
		grep -E '^(flax|jax|keras|numpy|tensorflow|xplique)==' $(VENV)-$@/versions.txt
	$(VENV)-$@/bin/pytest -n 2 $(OF_THE_PACKAGE) $(ARGS)

lint: env ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/zizmor --offline --pedantic --no-progress --quiet .github

bench: env ## Time Xplique with this and other wrappers; it takes long
	$(BIN)/python -m benchmarks $(ARGS)

lock: env ## Renew requirements-cpu.txt from pyproject.toml
	sed '/^$$/q' requirements-cpu.txt > requirements-cpu.new
	$(BIN)/uv pip compile --quiet --upgrade --universal --fork-strategy fewest \
		--python-version 3.11 --group dev --no-annotate --no-header \
		pyproject.toml >> requirements-cpu.new
	mv requirements-cpu.new requirements-cpu.txt

clean: ## Remove the environment and all that was built
	rm -rf $(VENV)* .cache .coverage* .mypy_cache .pytest_cache .ruff_cache site *.egg-info

# Lighthouse, where there is npm: without it, its tests are skipped.
$(LIGHTHOUSE): tests/browser/package-lock.json
	@if command -v npm >/dev/null; then npm ci --silent --no-fund --no-audit --prefix tests/browser && touch $@; fi

# New pins get a new environment. uv takes a third of pip's time, but does not read pip's
# configuration: where it finds no packages, pip does.
$(VENV)/.pinned: requirements-cpu.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 with venv and ensurepip was found:" \
		"install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c '$(CHECK)' || { echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13 with venv" >&2; exit 1; }
	@echo "Making $(VENV) with `$(PYTHON) --version`: this takes a minute or two, once."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install --quiet --no-deps "`grep '^uv==' $<`"
	@$(BIN)/uv pip install --quiet --no-deps --python $(BIN)/python -r $< || \
		$(BIN)/pip install --quiet --no-deps -r $<
	@touch $@

# The build backend is pinned with the rest, so nothing has to be fetched to install the package.
$(VENV)/.installed: $(VENV)/.pinned pyproject.toml
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
