# make demo · make test · make bench · make lint: each sets up .venv first and needs nothing done by hand.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
RESULTS ?= out/benchmarks

.PHONY: demo test test-slow bench lint format clean

demo: $(VENV)/installed
	$(BIN)/python -m customdiff.demo --out out/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m "slow or not slow"

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks/ --benchmark --out $(RESULTS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h')
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests -name '*.cpp' -o -name '*.h')

# torch first and pinned. Where there is no GPU its CPU build, from PyTorch's own index: PyPI's comes with
# gigabytes of CUDA. An index that cannot be reached is passed over.
TORCH_OPTIONS := $(if $(shell command -v nvidia-smi),,\
    --retries 1 --timeout 20 --extra-index-url https://download.pytorch.org/whl/cpu)
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH_OPTIONS) "$(TORCH)"
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install -q -e ".[all,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info python/*.egg-info customdiff_kernels/_C*.so
