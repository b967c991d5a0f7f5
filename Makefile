# Two commands for users: `make demo` and `make test`. Each does its own set-up on a bare machine.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests start a hundred processes; each would compile all of raymix again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo demo-cluster docs test test-unit test-integration test-ray test-ray-next test-gpu gpu-day test-slow lint lock clean \
        bench-stream bench-prepare bench-loop bench-merge

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(STAMP)  ## Make .venv with the locked versions, and nothing else

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "raymix needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "installing into $(VENV) (some minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: install  ## Prepare, plan, train and report on a small real corpus (about 5 minutes)
	@$(BIN)/raymix prepare pipelines/quickstart.yaml
	@$(BIN)/raymix plan pipelines/quickstart.yaml
	@$(BIN)/raymix train pipelines/quickstart.yaml

demo-cluster: install  ## Submit a run to a real two-node cluster on this machine (about 4 minutes)
	@$(BIN)/python -m tests.support.demo_cluster

test: install  ## All tests but gpu and slow
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/unit
	@$(MAKE) --no-print-directory test-integration test-ray lint

test-integration: install  ## Tests of several processes and of whole commands, without Ray
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not ray" tests/integration tests/e2e

test-ray: install  ## Tests that share one Ray cluster
	@$(BIN)/python -m pytest -q -m "not slow and ray" tests/integration/ray tests/e2e/ray

# An environment of its own on top of the locked one: only Ray is another. RAY=ray==X.Y.Z takes another.
RAY ?= ray
SITE := -c 'import site; print(site.getsitepackages()[0])'

test-ray-next: install  ## Tests of Ray's private API and of training with the newest Ray of the registry
	@rm -rf .venv-ray-next && $(BIN)/python -m venv .venv-ray-next
	@$(BIN)/python $(SITE) > "$$(.venv-ray-next/bin/python $(SITE))/locked.pth"
	@.venv-ray-next/bin/python -m pip install --quiet --upgrade $(RAY)
	@.venv-ray-next/bin/python -c 'import ray, torch; print("ray", ray.__version__, "torch", torch.__version__)'
	@PYTHONPATH=$(CURDIR) .venv-ray-next/bin/python -m pytest -q tests/unit/repository/test_compat.py \
	  tests/integration/ray/test_actor_restarts.py tests/integration/ray/test_training.py

test-unit: install  ## Tests without Ray, about 90 seconds on 2 cores
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/unit

test-gpu: install  ## Tests that need a CUDA device (skipped without one)
	@$(BIN)/python -m pytest -q tests/gpu

gpu-day: install  ## All GPU tests and benchmarks, in at most 25 minutes of one GPU (ARGS=--dry-run: on a CPU)
	@$(BIN)/python -m tests.benchmarks.gpu_day $(ARGS)

test-slow: install  ## Tests that take minutes, and laws by a thousand examples each
	@$(BIN)/python -m pytest -q -m slow
	@$(BIN)/python -m pytest -q -n 2 --hypothesis-profile thorough tests/unit

lint: install  ## Style, types, and the import rules of the house
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/pyrefly check

bench-%: install  ## Print one table and write bench-results/NAME.json (see README, "Measured")
	@$(BIN)/python -m tests.benchmarks.$*

.venv-mergekit:  ## mergekit in an environment of its own, for its comparison test and bench-merge
	@$(PYTHON) -m venv $@.new
	@$@.new/bin/python -m pip install --quiet mergekit==0.1.5 peft \
	  "$$(grep -E '^torch==' requirements.lock | sed 's/+.*//')"
	@mv $@.new $@

# Their own requirements contradict each other; what they need to write and read tokens does not.
.venv-formats:  ## Libraries that own token file formats, for the tests that read what they write
	@$(PYTHON) -m venv $@.new
	@$@.new/bin/python -m pip install --quiet numpy==2.2.6 \
	  "$$(grep -E '^torch==' requirements.lock | sed 's/+.*//')"
	@$@.new/bin/python -m pip install --quiet --no-deps megatron-core==0.16.1 ai2-olmo-core==3.0.0 \
	  dolma==1.2.1 datatrove==0.10.1 mosaicml-streaming==0.13.0 litdata==0.2.76 datasets==5.2.0
	@$@.new/bin/python -m pip install --quiet --requirement tests/support/token_file_libraries.txt
	@mv $@.new $@

.venv-torchtitan: install  ## torchtitan in a folder of its own (its dependencies are not ours), for its test
	@$(BIN)/python -m pip install --quiet --no-deps --target $@.new torchtitan==0.3.0 torchdata==0.11.0 \
	  torch_checkpointing spmd_types==0.2.3 tyro docstring-parser typeguard shtab einops
	@mv $@.new $@

.venv-trackers: install  ## Experiment trackers in a folder of its own, for their test
	@$(BIN)/python -m pip install --quiet --target $@.new wandb==0.31.0 mlflow-skinny==3.17.2 sqlalchemy alembic \
	  trackio==0.43.0
	@mv $@.new $@

docs: install  ## Build the documentation into docs/_build, warnings being errors
	@$(BIN)/python -m sphinx --fail-on-warning --keep-going -q docs docs/_build
	@echo "docs/_build/index.html"

lock:  ## Resolve the ranges of pyproject.toml afresh into requirements.lock
	@rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python -m pip install --quiet --upgrade pip
	@.venv-lock/bin/python -m pip install --quiet torch==2.13.0
	@.venv-lock/bin/python -m pip install --quiet --editable '.[cluster,plots,tensorboard]' \
	  --group test --group lint --group docs hatchling editables
	@{ echo '# Made by `make lock`; install with `pip install -r requirements.lock`.'; \
	   .venv-lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock && rm -rf .venv-lock

clean:  ## Remove what the tests and benchmarks leave behind (not .venv, runs or corpora)
	@rm -rf .pytest_cache .ruff_cache .hypothesis bench-results tests/.cache build dist docs/_build
