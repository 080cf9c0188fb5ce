# make demo       install, then the whole job on data that ships with the package
# make test       lint, types, import rule and all tests
# make format     rewrite the code in the one style
# make docs       the documentation, into docs/_build/html
# make bench      short benchmarks
# make clean      remove what the above made
#
# PYTHON=python3.12 chooses the interpreter; TORCH_INDEX=URL another build of torch (see README.md).

PYTHON ?= python3
TORCH_INDEX ?=

BIN := .venv/bin
TORCH := $(shell grep '^torch==' constraints.txt)
INSTALL := $(BIN)/pip install --disable-pip-version-check --quiet
BENCHMARKS := benchmarks/pack/run.py benchmarks/speed/run.py

.PHONY: demo test format docs bench clean

demo: .venv/.installed
	$(BIN)/transfermium demo

test: export OMP_NUM_THREADS = 1
test: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy src
	$(BIN)/pytest -n 2 --durations=10

format: .venv/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/.installed-docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

bench: .venv/.installed
	@set -e; for benchmark in $(BENCHMARKS); do echo $$benchmark; $(BIN)/python $$benchmark --quick; done

clean:
	rm -rf .venv build dist docs/_build src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks recipes datasets docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp is newer than what it was made from, so that nothing is installed twice.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python %d.%d is too old: transfermium needs 3.11 or newer; choose one with make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

# torch first: it is by far the largest, and its build is the user's choice.
.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(INSTALL) -c constraints.txt -e .
	@touch $@

.venv/.installed-%: .venv/.installed
	$(INSTALL) -c constraints.txt -e '.[$*]'
	@touch $@
