# Two commands set everything up on a fresh machine with Python 3.11 and g++:
#   make demo   installs, then asks the demo model about one picture, several pictures and a video
#   make test   installs what the tests need, then runs them
# PYTHON picks another interpreter; TORCH another torch (any from 2.6 on; empty leaves an installed one alone).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0$(if $(filter Linux,$(shell uname -s)),+cpu)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check format kernels sanitize clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/saccade demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto

check: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py

format: $(VENV)/.check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch's own index holds its CPU builds; everything else comes from the default one.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(PIP) --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "$(TORCH)")
	touch $@

# Each install compiles the kernels, so each brings all that the lesser ones would.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[test]"
	touch $(VENV)/.installed $@

$(VENV)/.check: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[test,check]"
	touch $(VENV)/.installed $(VENV)/.test $@

# The C++ kernels of this working tree; an editable install has built them already.
CMAKE := $(shell command -v cmake || echo $(BIN)/cmake)
kernels:
	command -v $(CMAKE) > /dev/null || $(PIP) cmake ninja
	$(CMAKE) -S saccade/kernels/csrc -B build/kernels
	$(CMAKE) --build build/kernels --parallel $$(nproc)

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: their tests must run without a report.
sanitize: $(VENV)/.test
	command -v $(CMAKE) > /dev/null || $(PIP) cmake ninja
	$(CMAKE) -S saccade/kernels/csrc -B build/sanitize -D SACCADE_SANITIZE=ON -D SACCADE_OUTPUT=$(CURDIR)/build/sanitize
	$(CMAKE) --build build/sanitize --parallel $$(nproc)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 SACCADE_LIBRARY=build/sanitize/_saccade_cpu.so \
	$(BIN)/python -m pytest -q -x tests/kernels/test_cpu_linear.py tests/kernels/test_cpu_ops.py

clean:
	git clean -fdXq saccade/kernels
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output
