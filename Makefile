# `make demo` trains, `make test` proves; both create the virtual environment first if it is missing.
# PYTHON=python3.13 picks the interpreter, VENV=DIR another place, ARGS="--config.field=value" goes to the demo,
# TESTS=tests/... narrows the tests down, SERVICE=osv asks another database in `make audit`.

SHELL := /bin/bash
SUITABLE := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
  $$p -c '$(SUITABLE)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
RUN := $(VENV)/bin
AUDIT := $(VENV)-audit
# libtpu in the environment of everything else would look for a TPU at every start.
TPU := $(VENV)-tpu
GPU := $(VENV)-gpu
SERVICE ?= pypi
TESTS ?= tests
KILLS ?= 30
MUTATE ?= kepo_jax/objectives kepo_jax/models/scoring.py kepo_jax/sampling.py
KILLERS ?= tests/objectives tests/models/test_scoring.py tests/test_sampling.py
MUTANTS := .cache/mutants
# Compilation is one core's work: two processes use two cores.
WORKERS ?= 2
PYTEST := $(RUN)/python -m pytest -q
# Neighbours stay in one process, which then compiles what they share once.
SHARE := -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test lint format parity test-slow test-tpu test-gpu plan plan-gpu mutants kill-test audit install clean

help: ## this text
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/.runtime ## train a tiny Qwen3-VL with KEPO on drawn images, evaluate, export: minutes on a CPU
	$(RUN)/python -m experiments.kepo_medvqa $(ARGS)

test: $(VENV)/.runtime ## everything but the slow tests and the oracles; 8 virtual devices
	$(PYTEST) $(SHARE) -m "not slow and not parity and not tpu and not gpu" $(TESTS)

lint: $(VENV)/.dev ## formatting, lint, imports and types
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/lint-imports
	$(RUN)/mypy

format: $(VENV)/.dev ## rewrite the sources as lint wants them
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

parity: $(VENV)/.oracle ## install the oracles (torch, trl, peft) and compare with them live
	$(PYTEST) $(SHARE) -m parity $(TESTS)

test-slow: $(VENV)/.runtime ## the long tests: whole trainings, resumption, exports
	$(PYTEST) $(SHARE) -m slow $(TESTS)

test-tpu: $(TPU)/.ready ## compile for TPUs without a TPU (installs libtpu in an environment of its own)
	$(TPU)/bin/python -m pytest -q -m tpu tests/planning tests/models/qwen3_vl/test_attention.py

plan: $(TPU)/.ready ## plan a run for TPU slices that are not here: the table of docs/operations.md; ARGS="..." for another
	$(TPU)/bin/python -m experiments.plan $(or $(ARGS),--table)

plan-gpu: $(GPU)/.ready ## plan a run for GPUs that are not here; ARGS="--topology=H100:8 --config..." for another
	$(GPU)/bin/python -m experiments.plan $(or $(ARGS),--topology=H200 --config.batch.micro_batches=8)

test-gpu: $(GPU)/.ready ## compile for GPUs without a GPU (installs 3 GB in an environment of its own)
	$(GPU)/bin/python -m pytest -q -m gpu tests/planning

# On a copy, since a mutation is written into its file.
mutants: $(VENV)/.dev ## change MUTATE in one place after the other and list what KILLERS do not see: hours for all of it
	rm -rf $(MUTANTS) && mkdir -p $(MUTANTS)
	git ls-files -z kepo_jax experiments tests setup.cfg pyproject.toml | xargs -0 tar cf - | tar xf - -C $(MUTANTS)
	printf '[cosmic-ray]\nmodule-path = [%s]\ntimeout = 600.0\ntest-command = "%s"\ndistributor = { name = "local" }\n' \
	  "$$(printf '"%s", ' $(MUTATE))" "$(abspath $(RUN))/python -m pytest -q -x -p no:cacheprovider $(KILLERS)" \
	  > $(MUTANTS)/config.toml
	cd $(MUTANTS) && $(abspath $(RUN))/cosmic-ray init config.toml session.sqlite && \
	  $(abspath $(RUN))/cosmic-ray baseline config.toml && $(abspath $(RUN))/cosmic-ray exec config.toml session.sqlite
	$(RUN)/cr-report --surviving-only --show-diff $(MUTANTS)/session.sqlite

kill-test: $(VENV)/.runtime ## kill -9 a run KILLS times in all its phases, and compare what it becomes
	$(RUN)/python -m tests.training.kill --kills=$(KILLS)

# --strict, because pip-audit calls an environment clean of which its service knows nothing.
audit: $(VENV)/.runtime $(AUDIT)/.ready ## look up known vulnerabilities of what is installed; needs the network
	@$(RUN)/python -m pip freeze --all --exclude-editable > $(AUDIT)/installed.txt
	@said=$$($(AUDIT)/bin/pip-audit --strict --progress-spinner off --vulnerability-service $(SERVICE) \
	  --no-deps --disable-pip --requirement $(AUDIT)/installed.txt 2>&1); failed=$$?; \
	if [ $$failed = 0 ] || grep -q '^Found [0-9]* known' <<< "$$said"; then echo "$$said"; exit $$failed; fi; \
	echo "$$said" | tail -n 1 >&2; \
	echo "make audit: nothing was audited. $(SERVICE) could not be reached or does not know a package; try it from a" \
	  "network that reaches it, or SERVICE=osv." >&2; exit 1

install: $(VENV)/.runtime ## only create the virtual environment

clean: ## remove caches, not runs and not the virtual environment
	rm -rf .cache .pytest_cache .mypy_cache .ruff_cache build *.egg-info

$(RUN)/python:
	@test -n "$(PYTHON)" || { echo "kepo_jax needs Python 3.11 or newer; none was found as python3." \
	  "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c '$(SUITABLE)' || { echo "kepo_jax needs Python 3.11 or newer; PYTHON=$(PYTHON) is" \
	  "$$($(PYTHON) --version 2>&1 || echo missing)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make virtual environments; on Debian and" \
	  "Ubuntu install its python3-venv package." >&2; exit 1; }

# One stamp per set of packages: a repeated call installs nothing.
INSTALL := -m pip install -q --disable-pip-version-check
$(VENV)/.runtime: requirements.txt setup.cfg pyproject.toml | $(RUN)/python
	$(RUN)/python $(INSTALL) -e ".[studies,test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(RUN)/python $(INSTALL) -e ".[dev]"
	@touch $@

$(VENV)/.oracle: $(VENV)/.runtime
	$(RUN)/python $(INSTALL) -e ".[oracle]"
	@touch $@

$(TPU)/.ready: requirements.txt setup.cfg pyproject.toml | $(RUN)/python
	$(RUN)/python -m venv $(TPU)
	$(TPU)/bin/python $(INSTALL) -e ".[tpu,test]"
	@touch $@

$(GPU)/.ready: requirements.txt setup.cfg pyproject.toml | $(RUN)/python
	$(RUN)/python -m venv $(GPU)
	$(GPU)/bin/python $(INSTALL) -e ".[plan-gpu,test]"
	@touch $@

# Away from what it audits: its own dependencies are none of ours.
$(AUDIT)/.ready: | $(RUN)/python
	$(RUN)/python -m venv $(AUDIT)
	$(AUDIT)/bin/python $(INSTALL) "pip-audit>=2.10,<3"
	@touch $@
