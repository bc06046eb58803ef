# Two commands: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/demo

.PHONY: setup demo test test-slow lint docs build-files clean

setup: $(VENV)/.done

$(VENV)/.done: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Expected Python >= 3.11; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# Federated averaging on scikit-learn's digits over 100 Dirichlet clients.
demo: setup
	$(RUN) -m experiments.fed_avg.run --workdir=$(WORKDIR) \
	  --flagfile=experiments/fed_avg/flags/digits.flags

# The default suite, two processes; arguments: make test ARGS='tests/core -q'
test: setup
	$(RUN) -m pytest -n 2 $(ARGS)

test-slow: setup
	$(RUN) -m pytest -n 2 -m slow $(ARGS)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The documentation as a site, in site/; any warning is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

build-files: setup
	$(RUN) -m tools.build_files

clean:
	rm -rf $(VENV)
