# make quickstart: the main job on a real model.  make test: what every change must pass.  make help: the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip's resolver is told of torch first, so that a CPU build that is already at hand is not replaced by a larger one.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
ROUNDS ?= 5

.PHONY: help install quickstart quickstart-short test test-full audit check format docs docs-serve bench bench-speed bench-page bench-rest clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[demo,report]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

install: $(VENV)/.dev  ## everything for working on lingraft, into .venv

quickstart: $(VENV)/.demo  ## English labels in, adapters for three languages out
	$(BIN)/lingraft quickstart

quickstart-short: $(VENV)/.demo
	$(BIN)/lingraft quickstart --short --out runs/quickstart-short

check: $(VENV)/.dev  ## style, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

test: check  ## checks and tests
	$(BIN)/python -m pytest -m 'not full'

test-full: check audit  ## the tests that take long, too, and the audit
	$(BIN)/python -m pytest

audit: $(VENV)/.dev  ## known vulnerabilities of the installed packages; passes where their database cannot be reached
	$(BIN)/python tools/audit.py

format: $(VENV)/.dev  ## put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev  ## the documentation, as a site that needs no network: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo site/index.html

docs-serve: $(VENV)/.dev  ## the same on http://127.0.0.1:8000, made anew when a page changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: bench-speed bench-rest  ## measure all; DATA=folder of the data sets, ENCODER=folder of an encoder, ROUNDS=5, THREADS

# One question a script, ours and the peer in turn; the page is made of their results. Peers get environments of their own in .bench.
COMMON = --rounds $(ROUNDS) $(if $(THREADS),--threads $(THREADS))
REAL = $(if $(DATA),--data-dir $(DATA))
bench-speed: $(VENV)/.dev  ## speed beside the peers: benchmarks/results/speed.md
	$(BIN)/python benchmarks/limits.py $(COMMON)
	$(BIN)/python benchmarks/training.py $(COMMON) $(REAL) $(if $(ENCODER),--encoder $(ENCODER))
	$(BIN)/python benchmarks/training.py $(COMMON) --profile-only
	$(BIN)/python benchmarks/scoring.py $(COMMON) $(REAL)
	$(BIN)/python benchmarks/grid.py $(COMMON) $(REAL)
	$(BIN)/python benchmarks/growth.py $(if $(THREADS),--threads $(THREADS))
	$(BIN)/python benchmarks/startup.py $(COMMON)
	$(BIN)/python benchmarks/page.py

bench-page: $(VENV)/.dev  ## the page again, from the results that are there
	$(BIN)/python benchmarks/page.py

bench-rest: $(VENV)/.dev
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/fusion.py
	$(BIN)/python benchmarks/adapters.py
	$(BIN)/python benchmarks/selection.py

clean:
	rm -rf $(VENV) build dist site
