# Every target works on a fresh machine: it makes .venv where no virtual environment is active.
.PHONY: help install quickstart federated federation test benchmark docs docs-site quality style

ifdef VIRTUAL_ENV
BIN := $(VIRTUAL_ENV)/bin
else
BIN := .venv/bin
endif
PYTHON ?= python3
INSTALLED := $(BIN)/.hf-devft-installed
TESTABLE := $(BIN)/.hf-devft-testable
SOURCES := src recipes tests examples benchmarks docs

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## Install the package, its test tools and pinned torch

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(BIN)/..
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The extras for the tests alone: where they are installed, they greet every run with lines of their own.
$(TESTABLE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,deepspeed,quantization,gguf,benchmarks,simulation,privacy]'
	@touch $@

quickstart: install  ## Run the main job: federated tuning in stages on the embedded base
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/devft.py

# Flower, which only a federation over a network needs. An environment of one's own stays as it is.
ifdef VIRTUAL_ENV
federated:
	@$(BIN)/python -c 'from importlib.util import find_spec as f; exit(not (f("hf_devft") and f("flwr")))' || \
		{ echo "This environment lacks Flower, or the package: pip install -c constraints.txt '.[flower]'"; exit 1; }
else
federated: $(BIN)/.hf-devft-federated
$(BIN)/.hf-devft-federated: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[flower]'
	@touch $@
endif

federation: federated  ## Run a federation over a network: four nodes with TLS, all on this machine
	$(BIN)/python examples/federation.py

# Each takes about 2 GB; many tests start two processes more, and those over a network wait for most of their time.
TEST_PROCESSES ?= 3
test: $(TESTABLE)  ## Run the tests
	@$(BIN)/python -m compileall -q src  # once, not by each of the processes that tests start
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

SHORT := outputs/benchmark
benchmark: install  ## Run a short version of every benchmark (benchmarks/results has the long ones)
	$(BIN)/python benchmarks/overhead.py --rounds 4 --bases quickstart --results $(SHORT)/overhead.md
	$(BIN)/python benchmarks/peers.py --rounds 3 --repeats 1 --bases quickstart --results $(SHORT)/peers.md
	$(BIN)/python benchmarks/clients_per_batch.py --rounds 2 --repeats 1 --results $(SHORT)/clients_per_batch.md
	$(BIN)/python benchmarks/scaling.py --rounds 2 --results $(SHORT)/scaling.md
	$(BIN)/python benchmarks/grouping.py --repeats 1 --results $(SHORT)/grouping.md
	$(BIN)/python benchmarks/to_target.py --seeds 0 --only "many rows: FedIT, 2e-3, 30 rounds" "12 + 4 + 6 rounds" --results $(SHORT)/to_target.jsonl

docs-site: install  ## Make the documentation as a site, in build/site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# The tables of results in the pages (cog): what makes them, see docs/results.py.
PAGES := README.md $(wildcard docs/*.md)
docs: install  ## Write anew what the pages have from the code and from benchmarks/results
	$(BIN)/python docs/make_configuration.py
	$(BIN)/cog -r -P -I docs -p "from results import pick, show" $(PAGES)

quality: install  ## Check style and types without changing anything
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/ruff format --check $(wildcard $(SOURCES))
	$(BIN)/mypy

style: install  ## Mend style
	$(BIN)/ruff check --fix $(wildcard $(SOURCES))
	$(BIN)/ruff format $(wildcard $(SOURCES))
