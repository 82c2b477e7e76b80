# Two commands do all the set-up on a fresh machine: `make run` and `make test`.
#   make run ARGS="rounds=5 mergesfl.tau=20"     overrides of the scenario
#   make test PYTEST_ARGS="-k local_grid"        part of the tests

PYTHON ?= python3
VENV := .venv
ARGS ?=
PYTEST_ARGS ?=

.PHONY: run test clean

run: $(VENV)/installed
	@$(VENV)/bin/python -m simulations $(ARGS)

# Two workers, a file each. More would pay, but a SuperLink that waits too long for a core loses the end of a run.
test: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# The stamps make the installation happen once, and again when pyproject.toml changes. pip, not uv: see README.
$(VENV)/installed: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
