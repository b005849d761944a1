# `make demo` sets everything up, builds an engine and asks it a question; `make serve` serves it; `make test` runs every
# check.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO_CLIP := engines/demo.mp4

.PHONY: demo serve test lint clean

demo: $(VENV)/.ready
	$(BIN)/python -m builder.build --ratio 0.3 --fp16
	$(BIN)/python -m runtime.clip $(DEMO_CLIP) --test-clip 3
	$(BIN)/python -m runtime.ask $(DEMO_CLIP) "Which digit is on the circle?"

serve: $(VENV)/.ready
	$(BIN)/python -m builder.build --ratio 0.3 --fp16
	$(BIN)/python -m runtime.serve engines

test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The versions that were tested. torch first and alone: its build for this machine (CPU or CUDA) is what pip finds.
# TensorRT's bindings last and alone: tests drive its plugin interface with them, and the libraries need not be there.
$(VENV)/.ready: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable ".[rtx,plugin,plot,serve,dev]"
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --no-deps tensorrt-cu13-bindings
	touch $@
