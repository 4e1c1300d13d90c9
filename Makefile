# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt

.PHONY: demo test test-slow lint format docs tables clean

demo: $(VENV)/.installed
	$(BIN)/retour demo

# A file's tests stay together, since they share what they build.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The theme advertises its successor at every build.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict --quiet
	@echo "The site is in site/index.html"

# Hours. Stopped, it goes on where it was; some of them: ARGUMENTS="--only inverters-alone".
tables: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/tables.py $(ARGUMENTS)

clean:
	rm -rf $(VENV) build dist site src/retour.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

define TOO_OLD
sys.version_info < (3, 10) and "retour needs Python 3.10 or newer: set PYTHON=..."
endef

# The argument is the list of extras in brackets, or nothing.
define install
	@$(PYTHON) -c 'import sys; sys.exit($(TOO_OLD))'
	@echo "Installing retour$(1) into $(VENV); the first time takes a few minutes ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.$(1)'
endef

# The stamps are written only after a complete install, so that an interrupted one is taken up again.
$(VENV)/.installed: $(SOURCES)
	$(call install)
	@touch $@

$(VENV)/.installed-test: $(SOURCES)
	$(call install,[test])
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(SOURCES)
	$(call install,[docs])
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(SOURCES)
	$(call install,[dev])
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-docs
