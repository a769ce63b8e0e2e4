# Two commands do everything on a fresh machine, from a clone: `make demo` and `make test`.
# The environment is made from requirements.lock, and for the tests from requirements-loaders.lock, which adds FFCV,
# DALI and timm; ENV and PYTHON can be set from outside.

PYTHON ?= python3
ENV ?= .venv
BIN := $(ENV)/bin
STAMP := $(ENV)/.fastgen-installed
LOADERS_STAMP := $(ENV)/.fastgen-loaders-installed
# OpenCV and libjpeg-turbo for FFCV and the native decoder; a compiler and Python's headers for these and torch.compile.
SYSTEM_PACKAGES := g++ python3-dev pkg-config libopencv-dev libturbojpeg0-dev libjpeg-dev

# For the test that opens the report in a browser; without one it is skipped.
BROWSER_PACKAGES := chromium fonts-dejavu-core

.PHONY: demo test soak env loaders check system browser lock clean

demo: env
	$(BIN)/python -m fastgen.train --cfg rcp/demo.yaml

test: loaders browser check
	$(BIN)/python -m pytest

# What is lost when things fail? Kills, stops, full disks and damage, for some 25 minutes of two cores. SOAK=--share=0.1 for less.
soak: env
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak $(SOAK)

check: loaders
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

env: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(ENV)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# FFCV is built from source against the system's libraries, on the machine that runs it.
loaders: system $(LOADERS_STAMP)

$(LOADERS_STAMP): requirements-loaders.lock $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -r requirements-loaders.lock
	touch $@

system: env
	@{ command -v g++ pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg && \
		test -f "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" && \
		printf '#include <stdio.h>\n#include <jpeglib.h>\n' | g++ -fsyntax-only -xc++ -; } 2>/dev/null || \
		{ apt-get update && apt-get install -y --no-install-recommends $(SYSTEM_PACKAGES); }

browser:
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || \
		{ apt-get update && apt-get install -y --no-install-recommends $(BROWSER_PACKAGES); } || \
		echo "no Chromium could be installed: the tests that open the report in a browser will be skipped"

# Resolves all versions anew, for every platform and Python that the project supports. Needs `make system` before.
lock: env
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra demo --extra dev \
		--no-annotate --no-emit-index-url --custom-compile-command "make lock" --output-file requirements.lock
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra demo --extra dev --extra loaders-dev \
		--constraint requirements.lock --no-build-isolation-package ffcv --python $(BIN)/python \
		--no-annotate --no-emit-index-url --custom-compile-command "make lock" --output-file requirements-loaders.lock

clean:
	rm -rf $(ENV) build *.egg-info
