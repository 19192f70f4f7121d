# make demo | test | test-full | docs | lint | clean. Everything is installed into .venv; a second run installs nothing again.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml MANIFEST.in $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh)
CPP := $(wildcard $(foreach folder,csrc csrc/emulation tests/csrc,$(foreach kind,h cpp cu cuh,$(folder)/*.$(kind))))

.PHONY: help demo test test-full docs lint format clean
.DELETE_ON_ERROR:

help:
	@sed -n '1s/^# //p' Makefile

demo: $(VENV)/.installed-demo
	$(BIN)/python -m relprop.demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests -m "not full" $(PYTEST_ARGS)

test-full: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests $(PYTEST_ARGS)

# The site in docs/_build/html, its pictures and notebook made anew; then the examples of its pages and of docstrings.
docs: $(VENV)/.installed-test
	rm -rf docs/_build docs/_generated
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/python -m pytest docs $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy relprop
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "relprop: expected Python 3.10 or newer, got $$($(PYTHON) --version 2>&1) as $(PYTHON); choose one with make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "relprop: $(PYTHON) lacks the venv module; install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-demo: EXTRAS = demo,images
# The tools of lint and docs come along: installing them on their own would compile the kernels once more.
$(VENV)/.installed-test: EXTRAS = test,dev,docs
$(VENV)/.installed-%: $(VENV)/.created $(SOURCES)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable ".[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf $(VENV) build dist demo-output docs/_build docs/_generated .pytest_cache .mypy_cache .ruff_cache relprop.egg-info relprop/_C.*.so
