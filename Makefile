# Set-up, demo, tests and linters of a clone. Needs Python 3.11 or newer, pip and GNU make 3.81 or newer.
PYTHON ?= python3
BIN := .venv/bin

# The interpreter of .venv if that folder exists, even if it lacks pip, else the one that will create it.
FOLDER := $(wildcard $(BIN))
USED := $(strip $(if $(FOLDER),$(BIN)/python,$(PYTHON)))
AGAIN := $(if $(FOLDER),rm -r .venv && )make $(or $(MAKECMDGOALS),demo) PYTHON=python3.11
ifeq ($(USED),)
$(error PYTHON is empty, tnnlm needs Python 3.11 or newer: $(AGAIN))
endif
# Must also run in Python 2, so that an old interpreter is reported by its version.
FOUND := $(shell $(USED) -c 'import sys; v = sys.version_info[:3]; \
	print("%d.%d.%d %s" % (v + ("supported" if v >= (3, 11) else "old",)))' 2>/dev/null)
ifeq ($(FOUND),)
$(error $(USED) is missing or does not run, tnnlm needs Python 3.11 or newer: $(AGAIN))
endif
ifneq ($(word 2,$(FOUND)),supported)
$(error tnnlm needs Python 3.11 or newer, $(USED) is $(firstword $(FOUND)): $(AGAIN))
endif

.PHONY: demo test nightly lint docs

demo: .venv/installed
	$(BIN)/python train.py
	$(BIN)/python convert.py --verify
	$(BIN)/python generate.py --prompt "def "

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# 2,000 random conversions, a million steps, 8,000 damaged caches, and every other kind of file damaged in
# about 270 ways. The steps of the Dockerfile install the server in an empty environment.
# `make test` runs a few of each that are always the same.
nightly: .venv/installed
	TNNLM_NIGHTLY=1 $(BIN)/python -m pytest tests/conversion/test_certificates.py tests/conversion/test_long_run.py \
		tests/security tests/test_container.py
	$(BIN)/python -m tests.support.fuzz

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy tnnlm tools *.py
	$(BIN)/python tools/lint_prose.py

# The site of the documentation in site/, without network.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/installed: pyproject.toml constraints.txt
	[ -e $(BIN)/pip ] || $(USED) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
