# From a fresh clone, with Python 3.11+ (and its headers), a C compiler and make:
#
#   make demo     see and measure a tunnel on this machine
#   make test     run the whole test suite; ARGS="-k half_close" picks
#   make bench    compare with other tunnels in half an hour; ARGS="--quick" takes two minutes
#   make check    format, lint, types, layers, hints of the native build
#   make clean    remove .venv and whatever was built
#
# Each makes .venv, builds the engine and installs what it needs; what is up to date is left alone.
# WORKERS=0 runs the tests in one process, one after another.
# PYTHON=python3.13 chooses the interpreter, NODEPASS_DEBUG=1 the build that counts everything.

# The first that is new enough, or python3 for the message that says why it is not.
PYTHON ?= $(or $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		&& echo $(name)))),python3)
VENV ?= .venv
# Test processes at once: most tests wait for something, so two cores bear three.
WORKERS ?= 3
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

NATIVE := $(wildcard src/nodepass/*.pyx src/nodepass/*.pxd src/nodepass/fastcopy/*)
SWITCHES := debug=$(NODEPASS_DEBUG) pure=$(NODEPASS_PURE) sanitize=$(NODEPASS_SANITIZE)
# What an extra names, one word each.
EXTRA = $$($(VENV)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", \
	"rb"))["project"]["optional-dependencies"]["$(1)"])')

.PHONY: demo test bench check clean always
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	@$(VENV)/bin/nodepass demo $(ARGS)

test: $(VENV)/.test
	@$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

bench: $(VENV)/.bench
	@$(VENV)/bin/python -m benchmarks.run $(ARGS)

check: $(VENV)/.dev
	@PATH="$(abspath $(VENV))/bin:$$PATH" scripts/check

clean:
	rm -rf $(VENV) build dist wheelhouse benchmarks/build src/*.egg-info .hypothesis .pytest_cache .mypy_cache \
		.ruff_cache
	rm -f src/nodepass/_fastcopy.c src/nodepass/*.so
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) scripts/preflight
	@$(PYTHON) -m venv $(VENV)

# Changes only when another kind of build is asked for.
$(VENV)/.switches: always | $(VENV)/bin/python
	@echo '$(SWITCHES)' | cmp -s - $@ || echo '$(SWITCHES)' >$@

# Editable: changed Python needs nothing, changed native sources come back here.
$(VENV)/.built: pyproject.toml setup.py $(NATIVE) $(VENV)/.switches
	@echo "building nodepass into $(VENV) ..."
	@rm -f src/nodepass/_fastcopy.c src/nodepass/*.so
	@NODEPASS_NATIVE=1 $(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.built
	@$(PIP) $(call EXTRA,test)
	@touch $@

# For the pictures alone; where it cannot be installed there are none.
$(VENV)/.bench: $(VENV)/.built
	@$(PIP) $(call EXTRA,bench) && touch $@ || echo "no matplotlib, so there will be no pictures"

$(VENV)/.dev: $(VENV)/.test
	@$(PIP) $(call EXTRA,dev)
	@touch $@
