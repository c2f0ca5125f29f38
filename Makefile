# Align-Pro. Every target sets up what it needs; `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=

# The device to install for: cuda or rocm if its driver responds, else cpu.
ifndef DEVICE
DEVICE := $(shell if nvidia-smi >/dev/null 2>&1 || [ -e /dev/nvidia0 ]; then echo cuda; \
	elif rocm-smi >/dev/null 2>&1; then echo rocm; else echo cpu; fi)
endif

# Test processes: one per core, each with one thread; at most eight, since more only use more memory.
ifndef JOBS
JOBS := $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); [ "$$n" -le 8 ] && echo "$$n" || echo 8)
endif

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(DEVICE)
# No test needs the network: HF_HUB_OFFLINE keeps libraries from waiting for it. Tests start many processes: without
# bytecode each would compile the whole package again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-gpu test-oldest test-endpoint gpu gpu-wheels lint format types ci doctor demo-weights miniature laboratory real bench-kernels bench-engine bench-training bench-distributed bench-estimators bench-estimators-real bench-endpoints bench-serving bench-coverage bench-demo bench-step-size clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' Makefile
	@echo "  variables: PYTHON=$(PYTHON) DEVICE=$(DEVICE) JOBS=$(JOBS) VENV=$(VENV) OUT DATA ARGS TORCH_INDEX"

setup: $(STAMP) ## create the virtual environment, with pinned packages (CPU) or the GPU build of torch

$(STAMP): requirements/install.sh requirements/cpu.txt requirements/gpu.txt requirements/dev.txt requirements/oldest.txt pyproject.toml
	PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' sh requirements/install.sh '$(VENV)' '$(DEVICE)'
	@touch $@

demo: OUT ?= runs/demo
demo: $(STAMP) ## train on the built-in toy task, compare, and write OUT/report.html (minutes on two cores)
	$(BIN)/alignpro demo --out '$(OUT)'

test: $(STAMP) ## run the tests, without those marked slow
	$(PYTEST) -m "not slow"

test-all: $(STAMP) ## run all tests
	$(PYTEST)

test-gpu: $(STAMP) ## run the tests that need a GPU, in one process
	$(BIN)/python -m pytest -m gpu

test-oldest: ## run the tests on a CPU with the oldest supported torch, Triton and transformers, in .venv-oldest
	$(MAKE) --no-print-directory test VENV=.venv-oldest DEVICE=oldest

test-endpoint: export SMOLLM2 ?= $(CURDIR)/runs/smollm2
test-endpoint: $(STAMP) ## run the tests against real servers: VLLM=…/bin/python, LLAMA_SERVER=…/llama-server and TRANSFORMERS=…/bin/transformers, or their URLs; OPENAI_EXAMPLES=…/examples of the openai package's sources; fetches SmolLM2
	[ -e '$(SMOLLM2)' ] || $(BIN)/alignpro model get smollm2 --out '$(SMOLLM2)'
	VLLM='$(VLLM)' LLAMA_SERVER='$(LLAMA_SERVER)' TRANSFORMERS='$(TRANSFORMERS)' OPENAI_EXAMPLES='$(OPENAI_EXAMPLES)' \
		$(BIN)/python -m pytest -m server tests/endpoints tests/serving

gpu: $(STAMP) ## run smoke checks, the GPU tests and the GPU benchmarks, with an archive in OUT; ARGS: which parts
	OUT='$(or $(OUT),runs/gpu)' PYTHON='$(BIN)/python' .ci/gpu $(ARGS)

gpu-wheels: $(STAMP) ## gather in .wheels what a GPU machine without a network lacks; ARGS: see requirements/gather_wheels.py
	$(BIN)/python requirements/gather_wheels.py $(ARGS)

lint: $(STAMP) ## check rules and format with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## check types with mypy
	$(BIN)/mypy

ci: ## run the checks of every change: lint, types and tests
	.ci/run

doctor: $(STAMP) ## show what is installed, which backends run, and why others do not
	$(BIN)/alignpro doctor

demo-weights: $(STAMP) ## retrain the two starting models of the toy task
	$(BIN)/python -m alignpro.demo.build

miniature: OUT ?= runs/miniature
miniature: $(STAMP) ## run the whole pipeline on the real prompts in DATA, with models small enough for a CPU
	DATA='$(DATA)' OUT='$(OUT)' PYTHON='$(BIN)/python' bash launch/presets/miniature/run.sh

laboratory: OUT ?= runs/laboratory
laboratory: $(STAMP) ## run the laboratory's methods on the toy task with three seeds: some 80 minutes on a busy core, resumable
	OUT='$(OUT)' PYTHON='$(BIN)/python' bash launch/presets/laboratory/run.sh

real: OUT ?= runs/real
real: export MODEL ?= runs/smollm2
real: $(STAMP) ## train and compare on one task of the real prompts in DATA, with a real model: three quarters of an hour on two cores, resumable
	@[ -n '$(DATA)' ] || { echo 'make real DATA=DIR: name the directory with the prompts (launch/presets/real/README.md)' >&2; exit 2; }
	[ -e '$(MODEL)' ] || $(BIN)/alignpro model get smollm2 --out '$(MODEL)'
	DATA='$(DATA)' OUT='$(OUT)' $(BIN)/alignpro experiment launch/presets/real/kinds.yaml $(ARGS)

bench-kernels: $(STAMP) ## compare the head's operators with bare matrix products and other implementations; ARGS: see --help
	$(BIN)/python -m benchmarks.kernels $(ARGS)

bench-engine: $(STAMP) ## compare generation with other engines and with the least possible work; ARGS: see --help
	$(BIN)/python -m benchmarks.engine $(ARGS)

bench-training: $(STAMP) ## compare training steps with TRL's GRPO with the target in its reward; ARGS: see --help
	$(BIN)/python -m benchmarks.training $(ARGS)

bench-distributed: $(STAMP) ## compare DeepSpeed training with one process, and its memory with the plan; ARGS: see --help
	$(BIN)/python -m benchmarks.distributed $(ARGS)

bench-estimators: $(STAMP) ## compare bias, variance and samples of the gradient's estimators where all rewrites are enumerated; ARGS: see --help
	$(BIN)/python -m benchmarks.estimators $(ARGS)

bench-estimators-real: OUT ?= runs/estimators
bench-estimators-real: export MODEL ?= runs/smollm2
bench-estimators-real: $(STAMP) ## compare what the gradient's estimators reach at equal KL on a real model and the real prompts in DATA: days on a CPU, resumable
	@[ -n '$(DATA)' ] || { echo 'make bench-estimators-real DATA=DIR: name the directory with the prompts (launch/presets/real/README.md)' >&2; exit 2; }
	[ -e '$(MODEL)' ] || $(BIN)/alignpro model get smollm2 --out '$(MODEL)'
	DATA='$(DATA)' OUT='$(OUT)' $(BIN)/python -m benchmarks.estimators_real $(ARGS)

bench-endpoints: $(STAMP) ## measure the client of servers: answers a second on one core, memory, time of rollouts and steps; ARGS: see --help
	$(BIN)/python -m benchmarks.endpoints $(ARGS)

bench-serving: $(STAMP) ## measure what the proxy adds to a request, its memory under streams and disconnects; ARGS: see --help
	$(BIN)/python -m benchmarks.serving $(ARGS)

bench-coverage: $(STAMP) ## simulate how often the intervals hold the truth; ARGS: see --help
	$(BIN)/python -m benchmarks.coverage $(ARGS)

bench-demo: $(STAMP) ## run the demo with five seeds, for README.md's table; ARGS: see --help
	$(BIN)/python -m benchmarks.demo $(ARGS)

bench-step-size: $(STAMP) ## train at learning rates over decades, with the limit on a step's KL and without; ARGS: see --help
	$(BIN)/python -m benchmarks.step_size $(ARGS)

clean: ## remove caches and build products (not VENV, not runs/)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find alignpro kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
