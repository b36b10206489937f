# `make demo` and `make test` need Python 3.11, make and a package index; everything else is installed here.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= tests/model

.PHONY: help venv system demo test check format bench clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

venv: $(VENV)/.complete ## Build .venv with everything, vLLM for the CPU included

# torch first: any later and pip takes another build of it. torchvision, torchaudio and torchcodec come as CUDA builds
# that cannot be imported without a GPU, and transformers imports them when they are there.
$(VENV)/.complete: pyproject.toml requirements-engine.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $$(grep '^torch==' requirements-engine.txt)
	$(BIN)/pip install --quiet -r requirements-engine.txt
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/python -c 'import vllm, transformers, cachetier, cachetier_connector, cachetier_blend'
	touch $@

# Mooncake links these; pip does not bring them. The remote tier's tests also make network namespaces, with `ip`.
system: venv
	@{ $(BIN)/python -c 'import mooncake.store' && command -v ip; } >/dev/null 2>&1 \
	    || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq -y libibverbs1 libnuma1 libcurl4 iproute2; } \
	    || echo "Tests of the remote tier will be skipped. Run as root: apt-get install libibverbs1 libnuma1 libcurl4 iproute2"

demo: venv ## Show hits from memory and from disk on a real vLLM (MODEL=any Hugging Face name or folder)
	$(BIN)/python bench/demo.py --model $(MODEL)

# Three at once, even on two cores, for tests also wait; a thread each, for torch's own would get in one another's way.
check: venv system ## Lint, types and the tests that need no engine (under 3 minutes)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 -rs -m 'not engine and not slow and not gpu'

test: check ## Everything: check, then the slow tests and those with real engines (under 60 minutes)
	$(BIN)/python -m pytest -m 'engine or slow or gpu' -rs --durations=15

format: venv ## Format and sort imports
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: venv ## Run the CPU benchmarks and write bench/RESULTS.md
	for question in match match_documents scheduler_thread segments promotion index_scale prefill; do $(BIN)/python bench/$$question.py || exit 1; done
	$(BIN)/python bench/report.py

clean: ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis build *.egg-info
