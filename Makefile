# Targets for people and for CI; `make help` lists them. None needs a terminal or input.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
export VENV
PY := $(VENV)/bin/python
TOY := build/toy
# Folders of tests in the order they run: the quickest to fail first.
TESTS := $(wildcard tests/unit tests/docs tests/distributed tests/e2e tests/slurm tests/gpu)
CSRC := $(shell find csrc tests/csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: help install test lint format docs toy demo bench benchplan benchfused benchrollout benchdispatch picture clean

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install: ## make .venv with the pinned packages (PYTHON=... to choose the Python); once
	@scripts/install.sh

test: install lint toy ## set up, lint, then all tests
	$(PY) -m pytest $(TESTS) --durations=15

lint: install ## ruff, mypy and, where there is C++, clang-format: changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(if $(CSRC),$(VENV)/bin/clang-format --dry-run --Werror $(CSRC))

format: install ## let ruff and clang-format rewrite what they can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(if $(CSRC),$(VENV)/bin/clang-format -i $(CSRC))

docs: install ## the documentation as a site in build/docs; fails on a dead link
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --clean
	@echo "open build/docs/index.html; its search needs a server: python -m http.server -d build/docs"

toy: $(TOY)/.complete ## make the toy models and prompts in build/toy; once

# The marker is written last: an interrupted run leaves none, and the next one starts over.
$(TOY)/.complete: scripts/make_toy_models.py $(wildcard scripts/toy/*.py) | install
	rm -rf $(TOY)
	$(PY) scripts/make_toy_models.py --output $(TOY)
	touch $@

demo: install toy ## PPO on the toy models with two vLLM engines; ends with its rewards and times
	scripts/demo.sh

bench: install toy ## seconds per stage of an iteration, as one JSON line (ARGS="--iterations 5")
	$(PY) benchmarks/iteration.py $(ARGS)

benchplan: install ## plan the published instances, a JSON line each (ARGS="--seconds 5")
	$(PY) benchmarks/plan.py $(ARGS)

benchfused: install ## fused plans against what they took, as one JSON line (ARGS="--real")
	$(PY) benchmarks/fused_pipeline.py $(or $(ARGS),--emulate)

benchrollout: install toy ## generation and inference, serial and fused, as one JSON line (ARGS="--pace 0")
	$(PY) benchmarks/rollout.py $(ARGS)

benchdispatch: install ## samples dealt out and laid out, as one JSON line (ARGS="--steps 0")
	$(PY) benchmarks/dispatch.py $(ARGS)

picture: install toy ## the README's pictures: a fused plan, a run's timeline
	$(VENV)/bin/rlhfuse plan examples/problems/published-05.json --iterations 5000 \
	    --png docs/images/fusion.png
	$(VENV)/bin/rlhfuse simulate --rollout examples/rollouts/two_cores.json \
	    --png docs/images/rollout.png
	rm -rf runs/picture
	$(PY) benchmarks/iteration.py --iterations 3 --run-dir runs/picture
	$(VENV)/bin/rlhfuse report runs/picture
	cp runs/picture/plots/timeline.png docs/images/timeline.png

clean: ## remove what was built and cached; keeps .venv and runs/
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
