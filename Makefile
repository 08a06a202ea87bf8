# Everything is set up in .venv and build/; nothing is installed elsewhere, but for system packages where we are root.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
STORY ?= Once upon a time

.PHONY: demo test test-fast test-slow lint setup clean

demo: setup
	$(BIN)/python -m export.llama --max-seq-len 512 --output build/tiny.pte
	$(BIN)/python -m runtime.generate build/tiny.pte --prompt "$(STORY)" --max-new-tokens 150

test: setup lint
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

# torch comes first and by itself: on Linux the newest build drags in gigabytes of CUDA, and a pinned one need not.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $(READY)

clean:
	rm -rf .venv build
