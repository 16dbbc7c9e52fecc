# Every verb installs what it needs into .venv first; the second time that is instant.
#
#   ENGINE=cuda      use vLLM for CUDA instead of the CPU build
#   PYTHON=python3.12   the interpreter to make .venv with (3.11 or newer)
#   ARGS="..."       passed on, e.g. make test ARGS="-k store -x"
#   JOBS=2           processes that run the tests; 0 runs them in pytest's own, for a debugger

ENGINE ?= cpu
PYTHON ?=
ARGS ?=
BENCH ?= ttft
JOBS ?= 2

bin := .venv/bin
installed := .venv/.installed-$(ENGINE)

export VLLM_NO_USAGE_STATS ?= 1
export DO_NOT_TRACK ?= 1

.PHONY: help install fix lint test test-all test-gpu test-fleet mutants docs hooks demo serve bench clean

help:
	@echo "make install    .venv with everything in it (ENGINE=cpu|cuda, PYTHON=python3.12)"
	@echo "make demo       answer questions over documents, with and without CacheBlend"
	@echo "make serve      vLLM's server over the embedded model, with endpoints for ingestion (ARGS=\"--port 8001\")"
	@echo "make test       tests that need no GPU (JOBS=2, ARGS=\"-k store -x\")"
	@echo "make test-all   the slow ones as well"
	@echo "make test-gpu   tests that need a GPU"
	@echo "make test-fleet a Ray cluster on this machine: two workers ingest, two replicas serve (up to 15 min)"
	@echo "make lint       ruff and mypy"
	@echo "make fix        what ruff can repair and format; docs/reference.md and docs/prompt.svg anew"
	@echo "make docs       the documentation as a site in build/site, and how long its sentences are"
	@echo "make hooks      run ruff and file checks at each git commit (pre-commit)"
	@echo "make mutants    do the unit tests notice changes to the pure modules? (ARGS=<names of mutants>)"
	@echo "make bench      one benchmark (BENCH=<name in benchmarks/>, ARGS=\"...\")"
	@echo "make clean      remove .venv and all caches"

install: $(installed)

$(installed): pyproject.toml scripts/install.sh
	@PYTHON="$(PYTHON)" bash scripts/install.sh $(ENGINE)

fix: $(installed)
	$(bin)/python -m ruff check --fix .
	$(bin)/python -m ruff format .
	$(bin)/python scripts/reference.py
	$(bin)/python scripts/picture.py

lint: $(installed)
	$(bin)/python -m ruff check .
	$(bin)/python -m ruff format --check .
	$(bin)/python -m mypy

# Tests reach no network, and a CPU engine takes 1 GiB for its KV cache.
test test-all test-gpu: export HF_HUB_OFFLINE := 1
test test-all test-gpu: export VLLM_CPU_KVCACHE_SPACE ?= 1

# A file is one process's, which keeps its engine; files are handed out in the order of collection,
# so that those with engines come first and the quick ones fill what is left at the end.
spread := -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(installed)
	$(bin)/python -m pytest $(spread) -m "not gpu and not slow and not fleet" $(ARGS)

test-all: $(installed)
	$(bin)/python -m pytest $(spread) -m "not gpu and not fleet" $(ARGS)

test-gpu: $(installed)
	$(bin)/python -m pytest -m gpu $(ARGS)

# Ray and NIXL are extras that nothing else needs, so they are installed here. Engines share this machine.
test-fleet: export HF_HUB_OFFLINE := 1
test-fleet: export VLLM_CPU_KVCACHE_SPACE ?= 1
test-fleet: $(installed)
	@$(bin)/python -c "import ray.serve, nixl" 2>/dev/null || { echo "[test-fleet] installing Ray and NIXL" && \
	  PIP_QUIET=$${PIP_QUIET-2} $(bin)/python -m pip install --no-compile --no-warn-conflicts --editable ".[ray,nixl]"; }
	$(bin)/python -m pytest -m fleet $(ARGS)

# What is mutated, and by which tests it should be noticed: [tool.mutmut] in pyproject.toml.
mutants: $(installed)
	$(bin)/python -m pip install --quiet "mutmut>=3.8,<4"
	PYTHONPATH=kernels:integrations $(bin)/mutmut run --max-children $(JOBS) $(ARGS)
	$(bin)/mutmut results

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(installed)
	$(bin)/python scripts/reference.py --check
	$(bin)/python -m mkdocs build --strict --quiet
	@$(bin)/python scripts/sentences.py

hooks: $(installed)
	$(bin)/python -m pre_commit install

demo: $(installed)
	@$(bin)/cacheblend demo $(ARGS)

serve: $(installed)
	@$(bin)/cacheblend serve $(ARGS)

bench: $(installed)
	$(bin)/python benchmarks/$(BENCH).py $(ARGS)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist mutants
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
