# The two commands of a fresh machine are `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart test soak lint docs wheel-check clean

quickstart: $(READY)
	$(BIN)/python examples/quickstart.py

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile

# Kills and errors at every call that changes a file, 100,000 hostile files, 2,000 steps on end: 40 minutes.
soak: $(READY)
	$(BIN)/python benchmarks/robustness.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Any warning is an error.
docs: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

# A built wheel works in an empty environment, away from the repository.
wheel-check: $(READY)
	rm -rf build/wheel-check
	$(BIN)/python -m build --wheel --outdir build/wheel-check
	$(PYTHON) -m venv build/wheel-check/venv
	build/wheel-check/venv/bin/python -m pip install --quiet -c constraints.txt build/wheel-check/*.whl
	cd / && $(CURDIR)/build/wheel-check/venv/bin/python $(CURDIR)/tests/wheel_check.py
	rm -rf build/wheel-check

clean:
	rm -rf build $(VENV)

# Built when missing, and again when what it is built from has changed.
$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lasnn_sj needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
# The last NVRTC that knows sm_70, for a test; apart, or torch would load it in place of its own.
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/nvrtc12 nvidia-cuda-nvrtc-cu12==12.9.86
	touch $(READY)
