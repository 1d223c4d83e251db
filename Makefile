# A virtual environment of its own, made on first use. On a machine without a GPU, TORCH may name a CPU build.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.11
TRANSFORMERS ?= transformers>=5.17
TESTS ?= tests
BIN := $(VENV)/bin

.PHONY: demo test check bench clean

demo: $(VENV)/.installed  ## quantise a small model, load it, compare, generate
	$(BIN)/polar demo

test: $(VENV)/.test-installed  ## all tests; on the GPU where there is one
	$(BIN)/python -m pytest -n auto $(TESTS)

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

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
