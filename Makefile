# Two commands do everything on a fresh machine, from a clone: `make demo` and `make test`.
# The environment is made from requirements.lock; ENV and PYTHON can be set from outside.

PYTHON ?= python3
ENV ?= .venv
BIN := $(ENV)/bin
STAMP := $(ENV)/.fastgen-installed

.PHONY: demo test env check lock compiler clean

demo: env
	$(BIN)/python -m fastgen.train --cfg rcp/demo.yaml

test: env compiler check
	$(BIN)/python -m pytest

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

env: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(ENV)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# torch.compile on a CPU calls a C++ compiler, which needs Python's headers.
compiler: env
	@{ command -v g++ >/dev/null && test -f "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"; } || \
		{ apt-get update && apt-get install -y --no-install-recommends g++ python3-dev; }

# Resolves all versions anew, for every platform and Python that the project supports.
lock: env
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra demo --extra dev \
		--no-annotate --no-emit-index-url --custom-compile-command "make lock" --output-file requirements.lock

clean:
	rm -rf $(ENV) build *.egg-info
