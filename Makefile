# What a person types. The first run sets up .venv (some minutes of downloads); later ones start at once.
#
#   make demo       a real ResNet quantized, compiled and run in int8      DEMO_ARGS="..."
#   make test       the test suite, on Relax                               PYTEST_ARGS="-k conv" JOBS=4
#   make test-arm   everything for ARM under qemu, of which `make test` runs a sample
#   make test-relay its Relay side, on TVM 0.17 (Linux x86-64)             PYTEST_ARGS="-m ''": all of it
#   make lint       ruff over everything
#   make bench      the per-layer benchmark                                BENCH_ARGS="..."
#   make onednn     oneDNN in build/onednn, the benchmark's optional rival on layers
#   make openvino   OpenVINO and onnxruntime in build/openvino, its optional rivals on networks
#   make clean      removes what was built and cached; distclean removes .venv too
#
# PYTHON=python3.12   the interpreter to set up with (3.11 or later)
# TORCH_ARGS="..."    further arguments to the install of torch. PyPI's Linux torch brings gigabytes of
#                     CUDA; name an index of CPU builds here (--index-url) if you have no use for it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
STAMP := $(VENV)/.installed
ONEDNN := build/onednn
OPENVINO := build/openvino
RELAY := build/relay
JOBS ?= 2
PYTHON ?=
TORCH_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?= conv --batch bench/shapes/resnet50_v1_5

# setup.py says which torch; it has to be installed by itself first, so that TORCH_ARGS reaches it alone.
TORCH = $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' setup.py)
PIP_INSTALL = python -m pip install --no-input --disable-pip-version-check

# Sets $$python to the first interpreter that is new enough and can make a virtual environment.
define find_python
	python=; \
	for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
		if $$candidate -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
			2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "no Python 3.11 or later that can make a virtual environment (on Debian: apt-get" \
			"install python3-venv); name one with PYTHON=..." >&2; exit 1; \
	fi
endef

.PHONY: help
help:
	@sed -n '/^$$/q; s/^# \{0,1\}//; p' Makefile

.PHONY: setup
setup: $(STAMP)

# Keyed on the files that say what to install, so that a second run does nothing.
$(STAMP): setup.py topi_int8/_requirements.py topi_int8/_version.py
	@echo "== setting up $(VENV): once, some minutes of downloads"
	@if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
		$(find_python); $$python -m venv --clear $(VENV); \
	fi
	$(VENV)/bin/$(PIP_INSTALL) $(TORCH_ARGS) "$(TORCH)"
	$(VENV)/bin/$(PIP_INSTALL) --editable ".[torch,onnx,bench,test]"
	@touch $@

.PHONY: demo
demo: $(STAMP)
	$(VENV)/bin/python -m bench.demo $(DEMO_ARGS)

.PHONY: test
test: $(STAMP)
	$(VENV)/bin/python -m pytest tests -n $(JOBS) --dist worksteal --durations 10 -p no:benchmark \
		$(PYTEST_ARGS)

# The script says what is missing, and so do the tests that are skipped then.
.PHONY: test-arm
test-arm: $(STAMP)
	tests/emulator/setup_arm.sh || true
	$(VENV)/bin/python -m pytest tests -m arm -n $(JOBS) --dist worksteal --durations 10 \
		-p no:benchmark $(PYTEST_ARGS)

# Status 3 is a platform that cannot have that TVM; the script has said why.
.PHONY: test-relay
test-relay: $(STAMP)
	@status=0; $(VENV)/bin/python tests/relay/setup_relay_tvm.py $(RELAY) || status=$$?; \
	if [ $$status -eq 3 ]; then echo "== test-relay is skipped"; exit 0; fi; \
	if [ $$status -ne 0 ]; then exit $$status; fi; \
	set -x; $(RELAY)/venv/bin/python -m pytest tests -n $(JOBS) --dist worksteal --durations 10 \
		$(PYTEST_ARGS)

.PHONY: lint
lint: $(STAMP)
	$(VENV)/bin/ruff check .

.PHONY: bench
bench: $(STAMP)
	$(VENV)/bin/python -m bench $(BENCH_ARGS)

.PHONY: onednn
onednn: $(ONEDNN)/.installed

# In a folder of its own: its libraries are found by path, and none of our dependencies changes.
$(ONEDNN)/.installed: $(STAMP)
	$(VENV)/bin/python -m bench.rivals.onednn
	@touch $@

.PHONY: openvino
openvino: $(OPENVINO)/.installed

# A virtual environment of its own: what OpenVINO and NNCF pull in would change our dependencies.
$(OPENVINO)/.installed: $(STAMP) bench/rivals/networks.py
	$(VENV)/bin/python -m bench.rivals.networks
	@touch $@

.PHONY: clean distclean
clean:
	rm -rf build .pytest_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	find topi_int8 intrinsics bench tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
