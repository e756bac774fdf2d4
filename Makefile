# Two commands do everything, each with its own set-up: `make demo` and `make test`.
# PYTHON names the interpreter the environment is made from (3.10 or newer); VENV where it lives.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
JOBS ?= 2
# What `make test-builds` runs; continuous integration takes the part that its time allows.
BUILDS ?= tests/packaging tests/ops/test_basis_conv2d.py::test_any_geometry
# Tests that share a build run on one worker.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -q

.DEFAULT_GOAL := help
.PHONY: help demo test test-builds test-full lint format bench gpu-check gpu-bench gpu-probe build clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build  ## compress, fine-tune, save, reload and time a real network; writes out/demo/index.html
	$(BIN)/python -m basisconv_kernels demo --out out/demo

test: build lint  ## all tests of the ordinary run
	$(PYTEST)

test-builds: build  ## sanitizers, wheel, sdist, other compilers, every instruction set; 1e4 geometries
	$(PYTEST) --full --geometries 3400 $(BUILDS)

test-full: build lint  ## the long run: all of the above, 1e5 geometries, more networks
	$(PYTEST) --full

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff and clang-format lay the code out
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' '*.cu' 'tests/cuda_on_cpu/*.h' 'tests/cuda_on_cpu/*.cpp' | xargs clang-format -i

bench: build  ## the fused CPU kernel against ONNX Runtime, OpenVINO and torch
	$(PIP) install --quiet --constraint .ci/constraints.txt onnx onnxruntime openvino
	$(BIN)/python -m bench run --suite C1

# On a GPU: with the Python that is given, installing nothing; one archive in OUT, and a second run goes on.
# RESUME names the archive of a run on another machine. docs/gpu.md says what to do on such a day.
GPU = PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m bench.gpu $(1) --out "$(OUT)" $(if $(BUDGET),--budget $(BUDGET)) $(if $(RESUME),--resume "$(RESUME)")
OUT ?= out

gpu-check:  ## on a GPU: is everything right there; PYTHON=… BUDGET=seconds JOBS=processes ONLY=part
	$(call GPU,check) $(if $(JOBS),--jobs $(JOBS)) $(if $(ONLY),--only '$(ONLY)')

gpu-bench:  ## on a GPU: our kernels against cuDNN, by priority, within BUDGET=480 seconds
	$(call GPU,bench)

gpu-probe:  ## on a GPU: the rates and costs that kernels are designed by
	$(call GPU,probe)

build: $(READY)  ## compile the native library in place (ninja; only what changed)
	@mkdir -p build
	@$(BIN)/python setup.py --quiet build_ext --inplace >build/log.txt 2>&1 || { cat build/log.txt; exit 1; }
	@grep '^basisconv_kernels build:' build/log.txt

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint .ci/constraints.txt torch ninja setuptools wheel
	BASISCONV_BUILD=none $(PIP) install --quiet --constraint .ci/constraints.txt --no-build-isolation --editable '.[dev]'
	@# Third-party network definitions for the tests; without their dependencies, which would bring another torch.
	$(PIP) install --quiet --constraint .ci/constraints.txt --no-deps torchvision timm
	touch $@

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build out basisconv_kernels/_C*.so basisconv_kernels/core/_eager*.so *.egg-info
