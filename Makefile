# Everything a developer or a new user runs; `make` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(PATH):/usr/sbin:/sbin
export PYTHON
COMPILED := build/compiled
RIVALS := .bench
ON_COMPILED := PYTHONPATH=$(CURDIR)/$(COMPILED) PYTHONSAFEPATH=1
COMPILED_PATH := -o "pythonpath=$(COMPILED) . tests netns-tests"
SOURCES := $(shell find conntrack firewall l7proxy lab policytest -name '*.py')

.DEFAULT_GOAL := help
.PHONY: help setup demo test check unit-test netns-test fuzz compiled test-compiled test-path bench docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp ## Install system packages (apt) and the virtual environment

$(VENV)/.stamp: pyproject.toml .ci/packages
	@./.ci/packages
	@echo "Making the virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup ## Play every chapter of the demo in throw-away namespaces
	@$(BIN)/bartizan demo all

test: unit-test netns-test ## Run every test

unit-test: setup ## Run the tests that need no kernel feature
	$(BIN)/pytest tests -n auto --dist worksteal

netns-test: setup ## Run the tests with real packets, in namespaces of their own
	$(BIN)/pytest netns-tests -n auto --dist loadscope --no-loadscope-reorder

fuzz: setup ## Attack the proxy, through its cores, then for FUZZ_SECONDS (600) behind TPROXY
	FUZZ_SEED=$${FUZZ_SEED:-$$(date +%s)00000} FUZZ_CASES=$${FUZZ_CASES:-100000} \
		$(BIN)/pytest --timeout 0 -n auto --dist worksteal tests/l7proxy/test_*_fuzz.py
	FUZZ_SECONDS=$${FUZZ_SECONDS:-600} \
		$(BIN)/python -m lab.enclosure -- $(BIN)/pytest -n auto -rP netns-tests/test_l7proxy_*fuzz.py

check: setup ## Check format, lint, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

compiled: $(COMPILED)/.stamp ## Build the packaged tree with the packet path compiled by mypyc, into build/compiled

# From nothing: objects of modules that are no longer compiled together do not fit each other.
$(COMPILED)/.stamp: setup.py $(SOURCES) | setup
	@rm -rf $(COMPILED) build/temp
	BARTIZAN_COMPILED=1 $(BIN)/python setup.py --quiet build --build-temp build/temp --build-lib $(COMPILED)
	@touch $@

# Processes that tests start must not find the source before the compiled tree: hence SAFEPATH.
test-compiled: compiled ## Run every test on the compiled packet path
	$(ON_COMPILED) $(BIN)/pytest $(COMPILED_PATH) tests -n auto --dist worksteal
	$(ON_COMPILED) $(BIN)/pytest $(COMPILED_PATH) netns-tests -n auto --dist loadscope --no-loadscope-reorder

test-path: compiled ## Run on the compiled packet path the unit tests that go through it
	$(ON_COMPILED) $(BIN)/pytest $(COMPILED_PATH) tests/conntrack tests/datapath tests/replay -n auto --dist worksteal

$(RIVALS)/.stamp:
	@$(PYTHON) -m venv $(RIVALS)
	@$(RIVALS)/bin/python -m pip install --quiet --disable-pip-version-check mitmproxy proxy.py \
		&& touch $@ || echo "mitmproxy and proxy.py cannot be installed: measuring without them"

bench: setup $(RIVALS)/.stamp ## Measure, each figure as a ratio to its baseline in the same run, on both builds
	@$(MAKE) --no-print-directory compiled || echo "cannot compile: measuring pure Python alone"
	@./.ci/packages iperf3 haproxy wrk nginx dnsmasq-base
	$(BIN)/python -m lab.enclosure -- $(BIN)/python -m bench --plot docs/figures.svg

docs: setup ## Write the pages that are generated from the source
	$(BIN)/python -m docs.generate

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(RIVALS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
