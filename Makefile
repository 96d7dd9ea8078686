# Set-up and checks. A machine needs git, make and Python 3.11 or newer; another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt
# An editable package is not compiled by pip: without this a command's first start, or each one, takes twice as long.
COMPILE := $(BIN)/python -m compileall -q snpbook

.PHONY: lab test test-all bench clean
.DELETE_ON_ERROR:

lab: $(VENV)/.installed-lab
	@$(BIN)/snpbook lab $(ARGS)

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

test-all: export SNPBOOK_TESTS := all
test-all: test

bench: $(VENV)/.installed-lab
	@$(BIN)/python -m snpbook.tools.bench $(ARGS)

clean:
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find snpbook tests -name __pycache__ -type d -prune -exec rm -rf {} +
	find notebooks -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +

$(VENV)/.installed-lab: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(PIP) --editable .
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(PIP) --editable '.[test]'
	@$(COMPILE)
	@touch $(VENV)/.installed-lab $@

$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) > /dev/null || { echo "snpbook needs Python 3.11 or newer, and there is no $(PYTHON). On Debian: apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "snpbook needs Python 3.11 or newer, and this is $$($(PYTHON) --version 2>&1). Name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "This Python cannot make virtual environments. On Debian: apt install python3-venv (or python3.12-venv, for another Python)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
