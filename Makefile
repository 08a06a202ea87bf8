# Everything is set up in .venv and build/; nothing is installed elsewhere.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STORY ?= Once upon a time

.PHONY: demo test test-slow lint clean

demo: .venv/.ready
	$(BIN)/python -m export.llama --max-seq-len 512 --output build/tiny.pte
	$(BIN)/python -m runtime.generate build/tiny.pte --prompt "$(STORY)" --max-new-tokens 150

test: lint
	$(BIN)/python -m pytest

test-slow: .venv/.ready-test
	$(BIN)/python -m pytest -m slow

lint: .venv/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and by itself: on Linux the newest build drags in gigabytes of CUDA, and a pinned one need not.
.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) must be 3.10 or newer, with venv (Debian: apt-get install python3-venv)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

.venv/.ready-test: .venv/.ready
	$(PIP) --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build
