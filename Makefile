PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help setup demo demo-clean test check format lock

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## /\1\t/p' Makefile | expand -t 12

setup: $(VENV)/.installed  ## the exact, hashed packages of requirements.txt in .venv

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make $@ PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	@touch $@

demo: setup  ## the whole pipeline on drawn bins; minutes, no account, no GPU
	python -m tools.demo

demo-clean:  ## stop the demo's S3 server, remove demo/
	$(if $(wildcard demo),python -m tools.demo --clean)

test: setup  ## all tests
	python -m pytest

check: setup  ## lint, format and types
	ruff check .
	ruff format --check .
	mypy

format: setup  ## what of `check` can be mended by itself
	ruff check --fix .
	ruff format .

lock: setup  ## requirements.txt anew, from the ranges in pyproject.toml
	uv pip compile pyproject.toml --group dev --universal --generate-hashes \
		--no-emit-index-url --no-header --quiet -o requirements.txt
