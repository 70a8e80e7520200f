# Everything that a fresh clone needs: `make demo`, `make test`. The virtual environment is made on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-quick test-slow dist lint format docs links julia bench clean

demo: .venv/plot
	$(BIN)/pyjlode demo

# Half of the tests for each of two processes; the one that is done first takes over from the other.
TWO := -n 2 --dist worksteal

# Some five minutes on two cores; the slow ones are left out.
test: .venv/dev
	$(BIN)/python -m pytest $(TWO) -m "not slow"

QUICK := $(addprefix tests/,test_errors.py test_solver.py test_options.py test_types.py test_data.py test_plot.py) \
	$(addprefix tests/native/,test_tableaus.py test_stiff_tableaus.py test_order.py) \
	$(addprefix tests/nn/,test_blocks.py test_neural_ode.py)

# Under a minute: the front door, every method's order, the errors.
test-quick: .venv/dev
	$(BIN)/python -m pytest $(TWO) -m "not slow" $(QUICK)

# What `make test` leaves out: the slow ones, and more random examples of the laws in test_properties.py.
test-slow: .venv/dev
	$(BIN)/python -m pytest $(TWO) -m slow
	$(BIN)/python -m pytest $(TWO) --hypothesis-profile many tests/test_properties.py

# What is published: built from the sdist, and checked.
dist: .venv/dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in site/. A warning (a link that leads nowhere, a name that does not exist) is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Asks every external link (the internet). Without --ask the program lists them.
links:
	$(PYTHON) .ci/links.py --ask

# The Julia engine: some minutes, about 5 GB, and the internet.
julia: .venv/dev
	$(BIN)/pyjlode setup

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
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
