# `make demo` pre-trains a small SwinV2 on real photographs; `make test` runs the tests. Both make their own environment.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
DEMO ?= demo
# Ranks of the demo: every GPU there is, or two processes on the CPU.
RANKS ?= $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)")
# Test files that run side by side, a thread each: three keep two cores busy, as many tests wait for ranks to start. In the order of their names: by
# number of tests, as is the default, those with few and long tests would come last and run alone.
TEST_WORKERS ?= 3

.PHONY: demo test lint clean

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.made setup.cfg
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.made setup.cfg
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python shards/solar_cells.py $(DEMO)/photographs
	$(BIN)/python shards/build.py build --source $(DEMO)/photographs/train --val $(DEMO)/photographs/val \
		--out $(DEMO)/shards --samples-per-shard 64
	$(BIN)/python shards/build.py list $(DEMO)/shards
	PATH=$(BIN):$$PATH deepspeed --num_accelerators $(RANKS) launchers/pretrain.py \
		--deepspeed_config ds_configs/cpu.json --recipe launchers/recipes/demo.yaml \
		--output $(DEMO)/run data.shards=$(DEMO)/shards

test: $(VENV)/.test
	PATH=$(BIN):$$PATH OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO)
