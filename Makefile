# Every target makes what it needs. A second run finds the stamps in .venv and starts at once.
#   make demo       rewrite a Hugging Face model and a hand-written GPT, proofs included
#   make test       the tests, without the slow ones; make test-all runs every test
#   make check      format, lint, types, layers
#   make bench      the benchmarks; make gpu the tests that need a GPU
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEV := hatchling pytest pytest-xdist pytest-timeout ruff pyright
# More packages for the tests, such as timm: make test-all EXTRA_PACKAGES=timm
EXTRA_PACKAGES ?=
# One thread a worker: threads that wait for each other's cores make the tests five times slower
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: demo test test-all check bench gpu clean

demo: $(VENV)/.demo
	@mkdir -p out
	$(BIN)/attnres-rewrite rewrite examples/qwen3_small -o out/qwen3_small.attnres --force
	@echo
	$(BIN)/attnres-rewrite rewrite examples/gpt.py --blocks 4 -o out/gpt.attnres --force

test: $(VENV)/.dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.dev
	$(PYTEST)

check: $(VENV)/.dev
	./check

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/passes.py

gpu: $(VENV)/.dev
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then $(BIN)/python -m pytest tests/kernels; \
	else echo "no GPU here: torch.cuda.is_available() is False, so nothing was run"; fi

clean:
	rm -rf $(VENV)/.demo $(VENV)/.dev out

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	|| { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: it is the largest by far, and the rest resolves against it
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e ".[hf]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) $(DEV) $(EXTRA_PACKAGES)
	@touch $@
