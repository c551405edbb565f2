# Everything a newcomer or a CI machine runs. Needs Python >= 3.11, make and git; installs the rest into .venv.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
PORT ?= 8765

.PHONY: help install demo test lint types wheel-check clean

help:
	@echo "make demo         train, calibrate, serve and score once, on handwritten digits (CHECK=1: stop, fail if short)"
	@echo "make test         lint, types and the whole test suite"
	@echo "make wheel-check  install the built wheel into an empty environment and run the demo's check there"
	@echo "make clean        remove what these made"

install: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

demo: .venv/.installed
	$(BIN)/anomaly-vae demo --folder .demo --port $(PORT) $(if $(CHECK),--check)

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-dev
	$(BIN)/mypy

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile

# Outside the clone: what the wheel lacks is then missed.
wheel-check: .venv/.installed-dev
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m build --quiet --wheel --outdir build/wheel .
	$(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/pip install --quiet build/wheel/*.whl
	cd build/wheel && env/bin/anomaly-vae demo --check --folder demo

clean:
	rm -rf .venv .demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
