# The entry points. `make help` lists them; CI calls nothing but these.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:

# Python of the virtual environment, used as `-m tool` so that a moved checkout still works.
RUN := .venv/bin/python -m
PATHS := cache_daemon sharding warmup benchmarks tests tools
NATIVE = $(shell find native -name '*.cpp' -o -name '*.hpp')
BENCH ?= all
ARGS ?=
KILLS ?= 1000
# Thread sanitizer wants a fixed address layout on kernels with much randomisation.
FIXED_LAYOUT := $(shell setarch -R true 2>/dev/null && echo setarch -R)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: system setup
system:
	@tools/system_packages.sh

setup: system ## system packages, virtual environment, native extension (all targets do this first)
	@tools/setup_venv.sh

.PHONY: demo
demo: setup ## a daemon serves ranking requests over a real data set, for about a minute
	@$(RUN) benchmarks.demo $(ARGS)

.PHONY: demo-sharded
demo-sharded: setup ## three leaves, a root and ZooKeeper; a leaf is killed under load (ARGS=--quick)
	@$(RUN) benchmarks.demo_sharded $(ARGS)

# pytest comes last: its summary is the closing line that CI reads.
.PHONY: test
test: ## everything: lint, native tests, sanitizers, then pytest
	@$(MAKE) --no-print-directory setup
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory native-test
	@$(MAKE) --no-print-directory asan
	@$(MAKE) --no-print-directory tsan
	@$(MAKE) --no-print-directory pytest

.PHONY: pytest
pytest: setup ## the Python tests: unit, integration, e2e (ARGS="-k name" for some)
	@$(RUN) pytest -n 2 --dist loadgroup $(ARGS)

.PHONY: torture
torture: setup ## kill daemons under load and look for what they lost (KILLS=1000 ARGS="--mode nvm")
	@$(RUN) tests.torture --kills $(KILLS) --json build/torture.json $(ARGS)

.PHONY: native-test asan tsan
native-test: system ## native tests, optimised, warnings are errors
	@tools/native_test.sh dev

asan: system ## native tests under the address and undefined-behaviour sanitizers
	@tools/native_test.sh asan

tsan: system ## native tests under the thread sanitizer
	@$(FIXED_LAYOUT) tools/native_test.sh tsan

.PHONY: coverage
coverage: setup ## line coverage of the native tests
	@tools/native_test.sh coverage
	@$(RUN) gcovr --root . --filter native/src --filter native/include --print-summary build/coverage

.PHONY: lint stub tidy check
lint: setup ## formatting, ruff, mypy strict, shell scripts
	@$(RUN) mypy
	@$(RUN) ruff check $(PATHS)
	@$(RUN) ruff format --check --quiet $(PATHS)
	@.venv/bin/clang-format --dry-run -Werror $(NATIVE)
	@.venv/bin/shellcheck tools/*.sh .ci/run

# Not part of lint: `make test` has it as a test, tests/unit/test_stub.py.
stub: setup
	@$(RUN) mypy.stubtest cache_daemon._native --concise --allowlist tools/stubtest_allowlist.txt

tidy: setup ## clang-tidy on the native sources that changed since they last passed
	@cmake --preset dev >/dev/null
	@cmake --build --preset dev
	@$(RUN) tools.clang_tidy --build build/dev

check: lint stub tidy ## lint, the stub of the extension and clang-tidy

.PHONY: format
format: setup ## rewrite the sources in house style
	@$(RUN) ruff check --fix $(PATHS)
	@$(RUN) ruff format $(PATHS)
	@.venv/bin/clang-format -i $(NATIVE)

.PHONY: bench figures
bench: setup release ## measured figures, beside their peers (BENCH=engine ARGS=--quick for a part)
	@$(RUN) benchmarks run $(BENCH) $(ARGS)

figures: setup release ## measure everything anew and write the tables of the documents
	@$(RUN) benchmarks run all --json | tee build/figures.jsonl
	@$(RUN) tools.update_figures build/figures.jsonl

.PHONY: release
release: system
	@cmake --preset release >/dev/null
	@cmake --build --preset release

.PHONY: ci
ci: ## what CI runs
	@.ci/run

.PHONY: clean
clean: ## remove all that was built (not the demo's data or downloads)
	@rm -rf build dist .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
