# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two threads saturate the two cores CI has; more only fight for them.
export OMP_NUM_THREADS ?= 2

.PHONY: demo test docs serve figures house fast test-portable test-lowest test-newest test-minimal quality style bench cards install install-dev clean

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

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

demo: install  ## Immunize a small ResNet on handwritten digits; results in runs/demo/
	$(BIN)/hf-immunize demo --output-dir runs/demo

# Two processes of one thread each are faster than one of two: most tests are too small to share out.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: install  ## All tests and the docstrings' examples; their times in runs/tests.xml
	@mkdir -p runs
	$(PYTEST) --junitxml=runs/tests.xml

house: install  ## The size and shape of the project, and what exceeds its bound
	$(BIN)/python -m benchmarks.house

docs: $(VENV)/.installed-docs  ## The site, built strictly into runs/site; `make serve` shows it while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

serve: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

figures: install  ## The figures of the documents, drawn anew; that of the demo from runs/demo
	$(BIN)/python docs/figures/draw.py --demo runs/demo

fast: install  ## The tests that finish within seconds each
	$(PYTEST) -m 'not slow'

# Other processors, imitated: what the libraries of linear algebra choose by the processor, they choose by these instead.
PROCESSORS ?= ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx512 \
	ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_ENABLE_INSTRUCTIONS=AVX2
THREADS ?= 1 2

# Further seeds of the demo, minutes a processor, run with one thread alone; SEEDS=0 leaves them out.
SEEDS ?= 0 1 2 3 4

test-portable: install  ## The tests that assert what a training comes to, as other processors, of one and two threads
	@failed=; for threads in $(THREADS); do for processor in $(PROCESSORS); do \
		echo "== $$processor, threads: $$threads"; \
		test "$$threads/$(SEEDS)" = "1/0 1 2 3 4" && marked=outcome || marked='outcome and not portable'; \
		env $$processor OMP_NUM_THREADS=$$threads $(BIN)/python -m pytest -q -m "$$marked" -n $$((3 - threads)) \
			|| failed="$$failed $$processor/$$threads"; \
	done; done; test -z "$$failed" || { echo "Failed as:$$failed"; exit 1; }

# torch stays at the CPU build that constraints.txt names.
test-lowest:  ## The fast tests with the lowest versions that pyproject.toml admits, in .venv-lowest
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	grep '^torch==' constraints.txt > .venv-lowest/torch.txt
	.venv-lowest/bin/uv pip compile --quiet --python .venv-lowest/bin/python --resolution lowest-direct --extra test \
		--constraints .venv-lowest/torch.txt --output-file .venv-lowest/lowest.txt pyproject.toml
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/lowest.txt -e '.[test]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 --dist loadfile -m 'not slow'

test-newest:  ## All tests with the newest versions that pyproject.toml admits, in .venv-newest
	$(PYTHON) -m venv --clear .venv-newest
	grep '^torch==' constraints.txt > .venv-newest/torch.txt
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-newest/torch.txt -e '.[test]'
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist loadfile

# What needs no extra, where none is installed.
test-minimal:  ## Measuring, training and publishing without any extra, in .venv-minimal
	$(PYTHON) -m venv --clear .venv-minimal
	.venv-minimal/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . pytest pytest-timeout hypothesis
	.venv-minimal/bin/python -m pytest -m 'not slow' tests/spectra tests/metrics tests/training/test_step.py \
		tests/training/test_publishing.py tests/hub/test_push.py tests/hub/test_load.py tests/test_hub_commands.py

quality: install-dev  ## What CI asks of the code's form
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/zizmor --offline --quiet .github

style: install-dev  ## Put the code into that form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## All benchmarks; `make bench PARTS='regularizers streaming'` for some
	$(BIN)/python -m benchmarks $(PARTS)

cards: install  ## The committed cards, written anew from their records
	for folder in model_cards/*/; do $(BIN)/hf-immunize card $$folder || exit 1; done

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest .venv-minimal runs build dist
