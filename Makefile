# Two commands set everything up on a fresh machine with Python 3.11 and g++:
#   make demo   installs, then asks the demo model about one picture, several pictures and a video
#   make test   installs what the tests need, then runs them
# PYTHON picks another interpreter; TORCH another torch (any from 2.6 on; empty leaves an installed one alone).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0$(if $(filter Linux,$(shell uname -s)),+cpu)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check format kernels emulate sanitize clean
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

# On every instruction set there is.
KERNEL_TESTS := tests/kernels/test_cpu_linear.py tests/kernels/test_cpu_ops.py tests/kernels/test_ordered.py \
	tests/kernels/test_cpu_pack.py

# The kernels of all instruction sets on any x86 processor with AVX2: software does what it lacks (csrc/emulated.h).
emulate: $(VENV)/.test
	command -v $(CMAKE) > /dev/null || $(PIP) cmake ninja
	$(CMAKE) -S saccade/kernels/csrc -B build/emulate -D SACCADE_EMULATE=ON -D SACCADE_OUTPUT=$(CURDIR)/build/emulate
	$(CMAKE) --build build/emulate --parallel $$(nproc)
	SACCADE_LIBRARY=build/emulate/_saccade_cpu.so $(BIN)/python -m pytest -q -n auto $(KERNEL_TESTS) \
	tests/kernels/test_decoder.py tests/engine/test_speculation.py::test_a_row_has_the_bits_it_has_alone

# The same under AddressSanitizer and UndefinedBehaviorSanitizer: the tests must run without a report.
sanitize: $(VENV)/.test
	command -v $(CMAKE) > /dev/null || $(PIP) cmake ninja
	$(CMAKE) -S saccade/kernels/csrc -B build/sanitize -D SACCADE_SANITIZE=ON -D SACCADE_EMULATE=ON \
	-D SACCADE_OUTPUT=$(CURDIR)/build/sanitize
	$(CMAKE) --build build/sanitize --parallel $$(nproc)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 SACCADE_LIBRARY=build/sanitize/_saccade_cpu.so \
	$(BIN)/python -m pytest -q -x $(KERNEL_TESTS)

clean:
	git clean -fdXq saccade/kernels
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output
