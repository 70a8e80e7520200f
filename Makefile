# Everything that a fresh clone needs: `make demo`, `make test`. The virtual environment is made on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format bench clean

demo: .venv/plot
	$(BIN)/pyjlode demo

test: .venv/dev
	$(BIN)/python -m pytest -n 2

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/bench
	$(BIN)/python benchmarks/nonstiff.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/stiff.py
	$(BIN)/python benchmarks/stiff.py --steps --batch
	$(BIN)/python benchmarks/import_cost.py

# One marker file for each set of extras that is installed.
.venv/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
