PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help dev demo test test-gpu compile-all bench lint format clean
help:  ## what a developer does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "nsa-dist needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One virtual environment; each stamp is made again when what it installs changes.
$(VENV)/run.stamp: $(BIN)/python pyproject.toml constraints.txt
	rm -rf build
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[report]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	rm -rf build
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

dev: $(VENV)/dev.stamp  ## the virtual environment with everything a developer needs

demo: $(VENV)/run.stamp  ## trains configs/cpu-demo.yaml on two local workers and prints what was sent
	$(BIN)/nsa-dist train configs/cpu-demo.yaml
	$(BIN)/nsa-dist report runs/cpu-demo

lint: dev  ## format check, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: dev  ## formats and mends what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint  ## lint, types and every test that needs no GPU
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-gpu: dev  ## what needs a GPU
	$(BIN)/python -m pytest tests/gpu -s

compile-all: dev  ## every kernel configuration for every target (long; cached)
	$(BIN)/python -m nsa_dist.kernels.aot --all

bench: dev  ## kernels against their rivals, on a machine with a GPU
	$(BIN)/nsa-dist bench kernels --parts --rows bench-kernels.jsonl --chart bench-kernels.png

clean:  ## removes what was built, not the runs
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
