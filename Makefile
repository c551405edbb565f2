# Everything a newcomer or a CI machine runs. Needs Python >= 3.11, make and git; installs the rest into .venv.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 3
PORT ?= 8765
DATA ?= ../shared/data
FACES ?= $(DATA)/faces_london

.PHONY: help install demo faces latents test suite test-cluster seeds quality lint types wheel-check image-check dashboards clean

help:
	@echo "make demo         train, calibrate, serve and score once, on handwritten digits (CHECK=1: stop, fail if short)"
	@echo "make faces        the lecture's exercise, about 20 minutes; FACES=DIR holds neutral/ and smiling/ (QUICK=1: a minute)"
	@echo "make latents      faces that smile by arithmetic, digits in 2 and 28 latents; about 10 minutes (DATA as for seeds)"
	@echo "make test         lint, types and the test suite"
	@echo "make test-cluster what wants a machine to itself: a Ray cluster whose workers and machines are killed"
	@echo "make wheel-check  install the built wheel into an empty environment and run the demo's check there"
	@echo "make image-check  carry out the Dockerfile's steps in an empty environment, and serve by its entry point"
	@echo "make dashboards   write deploy/grafana/dashboards/*.json from their code"
	@echo "make seeds        train every preset briefly on the real pictures in DATA, and print tables (QUICK=1: a few steps)"
	@echo "make quality      detection quality against baselines, into docs/quality.md; hours on a CPU (QUICK=1: minutes, into build/)"
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

faces: .venv/.installed
	$(BIN)/python benchmarks/faces.py $(FACES) --out build/faces $(if $(QUICK),--quick)

latents: .venv/.installed
	$(BIN)/python benchmarks/latents.py --faces $(FACES) --mnist $(DATA)/mnist --out build/latents $(ARGS)

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-dev
	$(BIN)/mypy

# Types are checked beside the suite: that takes one core for a minute, while tests often wait.
test: lint
	@$(MAKE) --no-print-directory -j 2 types suite

# Many tests start processes, each of which would compile all modules for itself if it might not keep them.
suite: .venv/.installed-dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# A real Ray cluster of three machines, whose processes want both cores to themselves.
test-cluster: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m cluster

# Outside the clone: what the wheel lacks is then missed.
wheel-check: .venv/.installed-dev
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m build --quiet --wheel --outdir build/wheel .
	$(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/pip install --quiet build/wheel/*.whl
	cd build/wheel && env/bin/anomaly-vae demo --check --folder demo

# The Dockerfile's steps in a clean environment, its entry point and health check; no container engine is needed.
image-check: .venv/.installed
	$(BIN)/python deploy/check.py --target cpu $(ARGS)

dashboards: .venv/.installed
	$(BIN)/python deploy/grafana/dashboards.py

seeds: .venv/.installed
	$(BIN)/python benchmarks/seeds.py --data $(DATA) --out build/seeds/seeds.json $(if $(QUICK),--quick) $(ARGS)

QUALITY ?= mnist-one-class mnist-leave-one-out piped faces contaminated few-normals known-anomalies
QUALITY_PAGE := $(if $(QUICK),build/quality/quick.md --quick,docs/quality.md)

quality: .venv/.installed
	set -e; for what in $(QUALITY); do \
	  $(BIN)/python benchmarks/quality.py $$what --data $(DATA) --out build/quality/quality.json $(if $(QUICK),--quick) $(ARGS); \
	done
	$(BIN)/python benchmarks/quality.py table --out build/quality/quality.json --page $(QUALITY_PAGE)

clean:
	rm -rf .venv .demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
