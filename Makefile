# The workshop. `make` alone lists what can be made.

PYTHON ?= python3
BIN := .venv/bin
# Of the tests; one more than the cores that continuous integration has, since many tests wait.
WORKERS ?= 3

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format types pytest bench soak nightly simulate fuzz archive clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/\1\t\2/' | expand -t 10

setup: ## virtual environment, packages, Azurite (PYTHON=python3.12 to choose one)
	@PYTHON="$(PYTHON)" setup/setup.sh

demo: setup ## the whole story on this machine, under two minutes
	@$(BIN)/replicar demo

test: lint types pytest ## what has to pass before a change is shown to anybody

lint: setup ## style and likely mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup ## every room under mypy, strict
	$(BIN)/mypy

pytest: setup ## the tests alone
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

bench: setup ## the benchmarks, one JSON object each
	$(BIN)/python -m bench limit --json
	$(BIN)/python -m bench datapath --json
	$(BIN)/python -m bench capture --json
	$(BIN)/python -m bench churn --json
	$(BIN)/python -m bench fleet --json
	$(BIN)/python -m bench recovery --json
	setup/azcopy.sh
	$(BIN)/python -m bench seed --json
	$(BIN)/pytest tests/bench/test_hot_path.py --benchmark-enable --benchmark-only

soak: setup ## the long tests
	$(BIN)/pytest -m soak -o session_timeout=86400 --timeout 3600

simulate: setup ## the parts under virtual time and faults (SEEDS=1000 FIRST_SEED=0)
	$(BIN)/python -m simulator.seeds --seeds $(or $(SEEDS),1000) --first-seed $(or $(FIRST_SEED),0)

fuzz: setup ## every parser under coverage-guided fuzzing (RUNS=100000)
	$(BIN)/python -m tests.fuzzing --keep --runs $(or $(RUNS),100000)

nightly: setup ## half an hour of bursts, and 200 deaths of the process server
	$(BIN)/pytest -m soak -o session_timeout=86400 --timeout 3600 tests/end_to_end/test_soak.py tests/process_server/faults

archive: setup ## the agent in one file, for machines with Python only (dist/)
	@$(BIN)/python setup/agent_archive.py

clean: ## remove everything that was made here
	rm -rf .venv .azurite .azcopy .guest .setup.lock .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
