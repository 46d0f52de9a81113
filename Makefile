# make demo | test | exactness | test-faults | check | format: everything runs in the virtual environment .venv, which is made when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process: torch's threads get into the way of the workers' and of each other on few cores.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test exactness test-faults check lint format clean

$(BIN)/activate:
	$(PYTHON) -m venv $(VENV)

# The stamps are older than setup.py when a dependency changed.
$(VENV)/.demo: setup.py | $(BIN)/activate
	$(BIN)/pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.dev: setup.py | $(BIN)/activate
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python tools/make_demo_data.py data/demo
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/local.sh 2 configs/demo.yaml
	$(BIN)/python tools/report.py runs/demo --require digits.top1=0.97 --require scenes_unseen.top1=0.50

# Two at a time: the distributed tests wait a lot for one another's ranks.
test: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist loadfile

# The full matrix, one to two hours on two cores; writes the tables of docs/comparison.md.
exactness: $(VENV)/.dev
	$(BIN)/python tools/make_demo_data.py data/demo
	EVACLIP_WRITE_TABLES=1 $(BIN)/pytest -m matrix

# All injected faults, half an hour on two cores; writes the tables and the picture of docs/reliability.md.
test-faults: $(VENV)/.dev
	EVACLIP_WRITE_TABLES=1 $(BIN)/pytest -m faults

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

check: lint test

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info
