# Align-Pro. Every target sets up what it needs; `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=

# What to install for: cuda, rocm or cpu. A driver that answers decides.
ifndef DEVICE
DEVICE := $(shell if nvidia-smi >/dev/null 2>&1 || [ -e /dev/nvidia0 ]; then echo cuda; \
	elif rocm-smi >/dev/null 2>&1; then echo rocm; else echo cpu; fi)
endif

# Test processes: one a core, each with one thread; more than eight only fill the memory.
ifndef JOBS
JOBS := $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); [ "$$n" -le 8 ] && echo "$$n" || echo 8)
endif

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(DEVICE)
# Nothing in the tests needs the network, so nothing may wait for it.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-gpu gpu lint format types ci doctor demo-weights miniature bench-kernels bench-engine bench-training bench-distributed bench-demo clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' Makefile
	@echo "  variables: PYTHON=$(PYTHON) DEVICE=$(DEVICE) JOBS=$(JOBS) VENV=$(VENV) OUT DATA ARGS TORCH_INDEX"

setup: $(STAMP) ## the virtual environment, with pinned packages (CPU) or the GPU build

$(STAMP): requirements/install.sh requirements/cpu.txt requirements/gpu.txt requirements/dev.txt pyproject.toml
	PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' sh requirements/install.sh '$(VENV)' '$(DEVICE)'
	@touch $@

demo: OUT ?= runs/demo
demo: $(STAMP) ## train in the embedded world, compare, and write OUT/report.html (five minutes on two cores)
	$(BIN)/alignpro demo --out '$(OUT)'

test: $(STAMP) ## the tests, without those that take minutes
	$(PYTEST) -m "not slow"

test-all: $(STAMP) ## all tests
	$(PYTEST)

test-gpu: $(STAMP) ## the tests that need a GPU, one after another
	$(BIN)/python -m pytest -m gpu

gpu: $(STAMP) ## what only a GPU can show: doctor, the tests that need one and benchmarks, into OUT; ARGS: parts of it
	OUT='$(or $(OUT),runs/gpu)' PYTHON='$(BIN)/python' .ci/gpu $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy
	$(BIN)/mypy

ci: ## what runs on every change: lint, types and tests
	.ci/run

doctor: $(STAMP) ## what is installed, which backends run, and why others do not
	$(BIN)/alignpro doctor

demo-weights: $(STAMP) ## train the embedded world's models again
	$(BIN)/python -m alignpro.demo.build

miniature: OUT ?= runs/miniature
miniature: $(STAMP) ## the whole pipeline on the real prompts in DATA, with models small enough for a CPU
	DATA='$(DATA)' OUT='$(OUT)' PYTHON='$(BIN)/python' bash launch/presets/miniature/run.sh

bench-kernels: $(STAMP) ## the head's operators against bare matrix products and other implementations; ARGS: see --help
	$(BIN)/python -m benchmarks.kernels $(ARGS)

bench-engine: $(STAMP) ## generation alone, beside other engines and the least that must be computed; ARGS: see --help
	$(BIN)/python -m benchmarks.engine $(ARGS)

bench-training: $(STAMP) ## whole training steps, beside TRL's GRPO with the target in its reward; ARGS: see --help
	$(BIN)/python -m benchmarks.training $(ARGS)

bench-distributed: $(STAMP) ## training steps by DeepSpeed beside one process, and memory beside the plan; ARGS: see --help
	$(BIN)/python -m benchmarks.distributed $(ARGS)

bench-demo: $(STAMP) ## the demo with five seeds, for README.md's table; ARGS: see --help
	$(BIN)/python -m benchmarks.demo $(ARGS)

clean: ## remove caches and build products (not VENV, not runs/)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find alignpro kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
