# Every target makes what it needs. A second run finds the stamps in .venv and starts at once.
#   make demo       rewrite a Hugging Face model and a hand-written GPT, proofs included
#   make test       the tests, without the slow ones; make test-all runs every test
#   make test-browser  the tests of the HTML report, in Chromium without a window
#   make check      format, lint, types, layers
#   make bench      the benchmarks of the passes, the operations and a training step, on a CPU
#   make docs       the documentation site, into site/; a warning is an error
#   make gpu        the tests of what runs on a GPU, and the benchmarks, there; without one it says so.
#                   GPU_PARTS="tests reads" runs these alone, GPU_SECONDS=500 gives each more time; GPU_PARTS=backend
#                   times the step of an attached model, and compiling, which take minutes of their own
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DOCS := mkdocs-material "mkdocstrings[python]" ruff
DEV := hatchling pytest pytest-xdist pytest-timeout ruff pyright accelerate peft matplotlib
# More packages for the tests, such as timm: make test-all EXTRA_PACKAGES=timm
EXTRA_PACKAGES ?=
# One thread a worker: threads that wait for each other's cores make the tests five times slower
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: demo test test-all test-browser check bench docs gpu gpu-run clean

demo: $(VENV)/.demo
	@mkdir -p out
	$(BIN)/attnres-rewrite rewrite examples/qwen3_small -o out/qwen3_small.attnres --force
	@echo
	$(BIN)/attnres-rewrite rewrite examples/gpt.py --blocks 4 -o out/gpt.attnres --force

test: $(VENV)/.dev
	$(PYTEST) -m "not slow and not browser"

test-all: $(VENV)/.dev
	$(PYTEST) -m "not browser"

test-browser: $(VENV)/.browser
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null \
	|| { echo "no Chromium here: install it (Debian: apt-get install chromium chromium-driver)"; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/browser

check: $(VENV)/.dev
	./check

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/passes.py
	$(BIN)/python benchmarks/reads.py --tokens 2048 --width 1024 --queries 6
	$(BIN)/python benchmarks/block.py --sources 4 --sublayers 3 --tokens 1024 --width 768
	$(BIN)/python benchmarks/step.py

# not --quiet, with which --strict counts no warning; the variable takes off a notice that is not about these pages
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# what has torch and CUDA here already: an environment made by this file would bring the CPU build
GPU_PYTHON ?= python3
# the tests compile some hundred kernels, each worker its own
GPU_WORKERS ?= 8
# what is run, the seconds after which a part is ended, and the folder that results are written to as they come
GPU_PARTS ?= tests reads block block-4096 step
GPU_SECONDS ?= 200
GPU_RESULTS ?= benchmarks/results
gpu:
	@if $(GPU_PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then $(MAKE) --no-print-directory gpu-run; \
	else echo "no GPU here: torch.cuda.is_available() is False for $(GPU_PYTHON), so nothing was run"; fi

# a warning of that environment's versions is shown, and ends no test; a GPU may be lent for minutes, so what fails is
# told at the end and keeps nothing else from running, and what hangs is interrupted
gpu-run:
	@mkdir -p $(GPU_RESULTS)
	@failed=; export PYTHONPATH=.; workers=$$($(GPU_PYTHON) -c "import xdist" 2>/dev/null && echo "-n $(GPU_WORKERS)"); \
	part() { \
	  name=$$1; shift; case " $(GPU_PARTS) " in *" $$name "*) ;; *) return 0;; esac; \
	  echo "$$name: $$*"; timeout --signal=INT --kill-after=15 $(GPU_SECONDS) "$$@" || failed="$$failed $$name"; \
	}; \
	part tests $(GPU_PYTHON) -m pytest -q tests/kernels tests/test_on_gpu.py -m "not slow" -p no:cacheprovider -W default $$workers; \
	part reads $(GPU_PYTHON) benchmarks/reads.py --device cuda --json $(GPU_RESULTS)/reads_cuda.json; \
	part block $(GPU_PYTHON) benchmarks/block.py --device cuda --json $(GPU_RESULTS)/block_cuda.json; \
	part block-4096 $(GPU_PYTHON) benchmarks/block.py --device cuda --width 4096 --variants flash-attn-res \
	  --json $(GPU_RESULTS)/block_cuda_4096.json; \
	part step $(GPU_PYTHON) benchmarks/step.py --device cuda --layers 24 --width 2048 --tokens 4096 --eager \
	  --variants original auto naive --no-compile-times --json $(GPU_RESULTS)/step_cuda.json; \
	part backend $(GPU_PYTHON) benchmarks/step.py --device cuda --layers 12 --width 2048 --tokens 4096 \
	  --variants original backend --json $(GPU_RESULTS)/step_cuda_backend.json; \
	[ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

clean:
	rm -rf $(VENV)/.demo $(VENV)/.dev $(VENV)/.browser $(VENV)/.docs out site

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

$(VENV)/.docs: $(VENV)/.demo
	$(INSTALL) $(DOCS)
	@touch $@

$(VENV)/.browser: $(VENV)/.dev
	$(INSTALL) selenium
	@touch $@
