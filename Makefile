# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two threads saturate the two cores CI has; more only fight for them.
export OMP_NUM_THREADS ?= 2

.PHONY: demo test fast quality style bench install install-dev clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install  ## Immunize a small ViT on handwritten digits; results in runs/demo/
	$(BIN)/hf-immunize demo --output-dir runs/demo

# Two processes of one thread each are faster than one of two: most tests are too small to share out.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: install  ## All tests and the docstrings' examples
	$(PYTEST)

fast: install  ## The tests that finish within seconds each
	$(PYTEST) -m 'not slow'

quality: install-dev  ## What CI asks of the code's form
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: install-dev  ## Put the code into that form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## All benchmarks; `make bench PARTS='regularizers streaming'` for some
	$(BIN)/python -m benchmarks $(PARTS)

clean:
	rm -rf $(VENV) runs build dist
