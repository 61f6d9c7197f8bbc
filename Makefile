# make demo · make reproduce · make cones2 · make test · make test-gpu · make bench · make lint: each sets up .venv first and needs nothing done by hand.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
RESULTS ?= out/benchmarks
# The CUDA kernels take minutes to compile: only where a GPU is visible, or when asked.
export CUSTOMDIFF_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),AUTO,OFF)
INSTALLED := $(VENV)/installed-cuda-$(CUSTOMDIFF_CUDA)

.PHONY: demo reproduce cones2 test test-slow test-gpu bench lint format clean

demo: $(INSTALLED)
	$(BIN)/python -m customdiff.demo --out out/demo

# The paper's tables, about an hour and a half on two cores. It goes on where it stopped.
reproduce: $(INSTALLED)
	$(BIN)/python -m customdiff.reproduce --out out/reproduce --report docs/results

# Cones 2 beside Custom Diffusion, one to six subjects: about forty minutes.
cones2: $(INSTALLED)
	$(BIN)/python -m customdiff.reproduce cones2 --out out/cones2 --report docs/results

# One worker a core, one thread each: more would wait for one another.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "slow or not slow"

# The same tests on the GPU, every kernel under compute-sanitizer, and the benchmarks (benchmarks/gpu.sh).
test-gpu: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash benchmarks/gpu.sh test sanitize

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks/ --benchmark --out $(RESULTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

# torch first and pinned. Where there is no GPU its CPU build, from PyTorch's own index: PyPI's comes with
# gigabytes of CUDA. An index that cannot be reached is passed over.
TORCH_OPTIONS := $(if $(shell command -v nvidia-smi),,\
    --retries 1 --timeout 20 --extra-index-url https://download.pytorch.org/whl/cpu)
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH_OPTIONS) "$(TORCH)"
	touch $@

$(INSTALLED): $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install -q -e ".[all,dev]"
	rm -f $(VENV)/installed*
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info python/*.egg-info customdiff_kernels/_C*.so
