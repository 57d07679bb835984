# make demo    installs into .venv and runs the demonstration
# make test    installs into .venv and runs all tests that this machine can run
# make lint    style, types, spelling
# make unit    the quick tests only

PYTHON ?= python3.11
# Threads that wait must not burn what other processes compute on.
export OMP_WAIT_POLICY := PASSIVE

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The CPU build of torch, wherever pip finds it: PyPI's Linux build brings several GB of CUDA libraries along.
TORCH := torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: demo test unit lint clean

demo: $(INSTALLED)
	$(BIN)/python recipes/quickstart/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

unit: $(INSTALLED)
	$(BIN)/python -m pytest tests/unit tests/numerics

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# torch first: asked for by verl's requirements it would come with CUDA. The package is installed in place.
$(INSTALLED): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch (CPU build) ..."
	$(BIN)/python -m pip install -q --no-index --no-deps $(TORCH) 2>/dev/null \
	  || $(BIN)/python -m pip install -q --index-url $(TORCH_INDEX) $(TORCH) \
	  || $(BIN)/python -m pip install -q $(TORCH)
	@echo "installing verl and verl-gradalign ..."
	$(BIN)/python -m pip install -q -e ".[cpu,test]"
	@touch $@
	@echo "installed into $(VENV)"

clean:
	rm -rf $(VENV) outputs build *.egg-info
