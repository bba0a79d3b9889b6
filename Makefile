PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# uv doesn't read pip's settings: where pip has an index of its own, uv is given the same one.
UV = UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(PIP_INDEX))}}" uv
PIP_INDEX = python -m pip config get global.index-url 2> /dev/null
INSTALL = $(UV) pip install --quiet --require-hashes

.PHONY: help setup demo screenshots published demo-clean s3 doctor test test-slow test-all check audit-lock check-sky soak bench-train bench-data bench-dvc bench-gpu format lock

help:  ## this list
	@sed -nE 's/^([a-z0-9-]+):.*## /\1\t/p' Makefile | expand -t 12

setup: $(VENV)/.installed .dvc/plots.html  ## the exact, hashed packages of requirements.txt in .venv

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make $@ PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# pip takes minutes for all of them, so it installs uv only, as the lock has it, and uv the rest.
	@sed -n '/^uv==/,/# via/p' requirements.txt > $(VENV)/uv.txt
	python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt
	@$(INSTALL) --python $(VENV) -r requirements.txt
	@# For the commands of pyproject.toml; what builds it is in the lock, as is what it needs.
	@$(UV) pip install --quiet --python $(VENV) --no-build-isolation --no-deps --editable .
	@touch $@

.dvc/plots.html: $(VENV)/.installed tools/plots_page.py tools/plots_page.html
	python -m tools.plots_page

demo: setup  ## the whole pipeline on synthetic bins; minutes, no account, no GPU
	python -m tools.demo

screenshots: setup  ## the pictures in docs/images/, from what the demo has left; needs Chromium
	python -m tools.screenshots

published: setup  ## the published protocol, leaks and all, as an experiment; GPU and internet
	dvc exp run --name published -S subset.order=listing -S subset.bins=220000 \
		-S split.by=image -S split.train=188100 -S split.validation=9900 -S split.test=22000 \
		-S resize.quality=75 -S train.resnet34.accumulation=4 -S train.vit.keep=best

demo-clean:  ## stop the demo's S3 server, remove demo/
	@# In shell, since .venv may be gone by now. So may the server, and its number be another's.
	@pid=$$(cat demo/s3.pid 2>/dev/null) && \
		ps -ww -o args= -p "$$pid" | grep -q 'serve s3 .*/demo/s3 ' && kill "$$pid" || true
	rm -rf demo

s3: setup  ## an S3 server with two buckets in s3/, to try it all by hand; PORT=9000
	@python -m tools.s3 $(if $(PORT),--port $(PORT))

doctor:  ## what would fail on this machine, and how to fix it
	@# Without setup, which may be what fails.
	@$$(command -v python || command -v python3) -m tools.doctor

test: setup  ## the tests that take seconds each; 5 minutes on 2 cores
	python -m pytest -n 2 --no-loadscope-reorder -m "not slow"

test-slow: setup  ## the whole pipeline, kills, several processes, browsers, Ray, SageMaker, fuzzing; 22 minutes
	python -m pytest -n 2 --no-loadscope-reorder -m slow

test-all: test test-slow  ## all tests

check: setup  ## lint, format, types
	ruff check .
	ruff format --check .
	mypy

audit-lock: setup  ## known vulnerabilities of the packages in requirements.txt; needs the internet
	pip-audit --require-hashes --disable-pip --progress-spinner off -r requirements.txt

check-sky: setup .venv-sky/.installed  ## cloud/*.yaml against SkyPilot's own schema
	python -m pytest tests/test_sky.py

soak: setup  ## each stage and dvc repro killed and disturbed at random, bytes compared; an hour
	python -m tests.kills

bench-train: setup $(VENV)/.bench-installed  ## loading and training against peers on this CPU; 15 minutes, undisturbed
	python -m benchmarks.loader
	python -m benchmarks.train_cpu

bench-data: setup $(VENV)/.bench-installed .venv-img2dataset/.installed  ## fetch and resize against peers, all of the data at its true size, and memory; 40 minutes, undisturbed, 17 GB
	python -m benchmarks.fetching
	python -m benchmarks.data_path
	python -m benchmarks.memory

bench-dvc: setup  ## DVC's own time, with shards and with single files; 12 minutes, undisturbed
	python -m benchmarks.dvc_operations

bench-gpu:  ## training on this GPU, and what takes the time of a step; 14 minutes
	@# Without setup: benchmarks/README.md says what a GPU machine needs.
	@$$(command -v python || command -v python3) -m benchmarks.gpu

$(VENV)/.bench-installed: benchmarks/requirements.txt $(VENV)/.installed
	@$(INSTALL) --python $(VENV) -r $<
	@touch $@

.venv-img2dataset/.installed: benchmarks/requirements-img2dataset.txt $(VENV)/.installed
	$(PYTHON) -m venv .venv-img2dataset
	@# All that it needs is locked, except a backport for Python 3.6 that it names and that is gone.
	@$(INSTALL) --python .venv-img2dataset --no-deps -r $<
	@touch $@

.venv-sky/.installed: cloud/requirements.txt $(VENV)/.installed
	$(PYTHON) -m venv .venv-sky
	@$(INSTALL) --python .venv-sky -r $<
	@touch $@

format: setup  ## fixes what it can of what `check` finds
	ruff check --fix .
	ruff format .

COMPILE = $(UV) pip compile --universal --generate-hashes --no-emit-index-url --no-header --quiet

lock: setup  ## the requirements.txt files anew, from the ranges in pyproject.toml
	@$(COMPILE) pyproject.toml --extra ray --extra timm --group dev -o requirements.txt
	@$(COMPILE) --group bench -c requirements.txt -o benchmarks/requirements.txt
	@$(COMPILE) --group sky -o cloud/requirements.txt
