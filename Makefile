# Each target sets up .venv first, from the pinned requirements.txt; PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH :=
export MLFLOW_DISABLE_TELEMETRY := true
INSTALLED := .venv/installed
# Two processes with one torch thread each take a file of tests at a time.
TEST := OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup repro test test-slow coverage mutants docs check format lock ui space preset bench tuning screenshots soak soak-space sweep ladder sync report plots

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## make .venv and install the pinned packages
$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	@# Debian's and Colab's Python may lack what venv needs
	$(PYTHON) -m venv .venv || { $(PYTHON) -m pip install --quiet virtualenv && $(PYTHON) -m virtualenv --quiet --clear .venv; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

repro: setup ## run the pipeline: fetch, tokenize, train, evaluate, export-to-space
	@find data/linked -xtype l -delete  # links to texts that are gone: DVC fails on them
	dvc repro

test: setup ## run the tests
	$(TEST) -m "not slow"

test-slow: setup ## run the tests that take minutes
	$(TEST) -m slow

coverage: setup ## run the tests with branch coverage, and write docs/coverage.md
	$(TEST) -m "not slow" --cov --cov-report=json:.coverage.json --cov-report=term:skip-covered
	python -m tools.coverage

mutants: setup ## change the code in small ways, and list the changes that no test notices
	rm -rf mutants  # a mutant that survived is not tested again otherwise
	OMP_NUM_THREADS=1 mutmut run --max-children 2
	mutmut results

docs: setup ## build the documentation site in site/
	mkdocs build --strict --quiet

soak: setup ## inject faults for half an hour, and print a table (docs/reliability.md)
	python -m tests.faults.soak

soak-space: setup ## load-test a Space of GPT-2 124M, for a quarter of an hour
	python -m tests.space.soak

check: setup ## format, lint, types and known vulnerabilities, without changing anything
	ruff format --check .
	ruff check .
	mypy
	python -m tools.lint
	python -m tools.audit

format: setup ## format, and apply the linter's fixes
	ruff format .
	ruff check --fix .

ui: setup ## MLflow's page on http://127.0.0.1:5000, with a link to the runs, best first
	python -m experiments.ui

sync: setup ## deliver records that MLflow does not have yet
	python -m stages.sync

space: setup ## serve dist/space on http://127.0.0.1:7860
	@test -f dist/space/app.py || { echo "There is no dist/space yet: make repro"; exit 2; }
	cd dist/space && GRADIO_SERVER_NAME=127.0.0.1 GRADIO_SERVER_PORT=7860 GRADIO_ANALYTICS_ENABLED=False PYTHONDONTWRITEBYTECODE=1 $(CURDIR)/$(BIN)/python app.py

ifeq ($(NAME),auto)
preset: setup
	python -m gpt2 preset auto $(if $(MINUTES),--minutes "$(MINUTES)") $(if $(SOURCE),--source "$(SOURCE)")
else
preset: ## params.yaml becomes presets/NAME.yaml: make preset NAME=seed; or for your text and time: NAME=auto MINUTES=10
	@test -f "presets/$(NAME).yaml" || { echo "There is no preset '$(NAME)'; there are:" $(notdir $(basename $(wildcard presets/*.yaml))) auto; exit 2; }
	cp "presets/$(NAME).yaml" params.yaml
endif

bench: setup ## measure speed and learning beside other implementations and other work (over an hour)
	python -m benchmarks.train
	python -m benchmarks.roofline
	python -m benchmarks.generate
	python -m benchmarks.drafts
	python -m benchmarks.learning
	python -m benchmarks.ablations
	python -m benchmarks.automatic
	python -m benchmarks.compare
	python -m benchmarks.concurrency --busy --experiments
	python -m benchmarks.communication
	python -m benchmarks.tokenizing
	python -m benchmarks.distributed
	python -m benchmarks.published
	python -m benchmarks.report
	python -m benchmarks.sweep --search --overhead

report: setup ## compare all experiments on one page, reports/experiments.html
	python -m gpt2 report

plots: setup ## DVC's page of curves and pictures, which draws without a network
	python -m gpt2 report --dvc-plots
	dvc plots show

sweep: setup ## search the params that sweep.yaml names; each trial is an experiment
	python -m gpt2 sweep

ladder: setup ## train several sizes, and predict the loss and the cost of a larger run
	python -m gpt2 ladder

tuning: setup ## reports/tuning.md from MLflow's records of the experiments tune-...
	python -m tools.tuning

screenshots: setup ## redraw the architecture; retake the pictures of the last run (needs a Chromium)
	python -m tools.screenshots

lock: setup ## compile requirements.txt from pyproject.toml
	python -m pip install --quiet pip-tools==7.6.2
	tools/lock
