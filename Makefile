# Two commands from a bare clone: `make run` and `make test`. Both build .venv first; nothing needs
# to be activated. `make PYTHON=/path/to/python3.12 test` chooses the interpreter.

PYTHON ?=
ARGS   ?=
BIN    := .venv/bin
READY  := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help env run test docs format clean

help:
	@echo "make run      build the environment, then recover planted Gabor parameters and train a"
	@echo "              small network, Gabor beside free (the main jobs); opens with runs/index.html"
	@echo "make test     build the environment, then run every check; ARGS='-k name' goes to pytest"
	@echo "make env      build the environment in .venv, or finish a build that was interrupted"
	@echo "make docs     build the environment, then the documentation in docs/_build/html"
	@echo "make format   format the code and apply the linter's safe fixes"
	@echo "make clean    remove .venv, caches and build products"
	@echo
	@echo "PYTHON=...    the interpreter to build .venv with (Python >= 3.10)"

env: $(READY)

# The first interpreter that can do the whole job wins. If none can, one that cannot runs the
# script all the same, because the script says what is missing.
$(READY): pyproject.toml constraints.txt tools/bootstrap.py
	@if [ -n "$(PYTHON)" ]; then \
	    command -v "$(PYTHON)" >/dev/null || { echo "There is no interpreter $(PYTHON)." >&2; exit 1; }; \
	    exec "$(PYTHON)" tools/bootstrap.py; \
	fi; \
	recent='import sys; assert sys.version_info >= (3, 10)'; \
	for need in "$$recent; import ensurepip, venv" "$$recent" "import sys; assert sys.version_info >= (3, 6)"; do \
	    for name in python3.13 python3.12 python3.11 python3.10 python3 python; do \
	        if "$$name" -c "$$need" 2>/dev/null; then exec "$$name" tools/bootstrap.py; fi; \
	    done; \
	done; \
	echo "Gaborium needs Python >= 3.10, and none was found. Install it, or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1

run: $(READY)
	$(BIN)/gaborium recover --overwrite
	$(BIN)/gaborium train examples/textures.toml --overwrite

# One process per core, but not more than four: each imports torch and computes with one thread.
test: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

# A warning is an error: a link that leads nowhere should not wait for a reader to find it.
docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going docs docs/_build/html

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
