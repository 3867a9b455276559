PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo docs test test-all test-parity test-peers test-targets lint format requirements tag clean

$(VENV)/core.stamp: requirements/core.txt pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/core.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/dev.stamp: requirements/dev.txt $(VENV)/core.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	touch $@

# other people's tools, beside ours, in an environment of their own; TORCH_INDEX=URL takes torch from another index,
# such as one of CPU builds
PEERS := .venv-peers
TORCH_INDEX ?=

$(PEERS)/peers.stamp: requirements/peers.txt requirements/core.txt pyproject.toml setup.py
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/core.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
		$$(grep '^torch==' requirements/peers.txt)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/peers.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# the compilers of TPUs and GPUs, for hardware that is not here, in an environment of their own (5.4 GB)
TARGETS := .venv-targets

$(TARGETS)/targets.stamp: requirements/targets.txt requirements/core.txt pyproject.toml setup.py
	test -x $(TARGETS)/bin/python || $(PYTHON) -m venv $(TARGETS)
	$(TARGETS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/core.txt
	$(TARGETS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/targets.txt
	$(TARGETS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: $(VENV)/core.stamp
	$(BIN)/gen demo

# the site, build/site/index.html, with executed notebooks; its tools in an environment of their own
DOCS := .venv-docs
NOTEBOOKS := $(patsubst notebooks/%.py,build/notebooks/%.md,$(wildcard notebooks/*.py))

$(DOCS)/docs.stamp: requirements/docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	touch $@

build/notebooks/%.md: notebooks/%.py scripts/notebook.py $(VENV)/core.stamp
	$(BIN)/python -m scripts.notebook $< build/notebooks

docs: $(DOCS)/docs.stamp $(NOTEBOOKS)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

# most of a test's time is compilation; what is compared here does not need the compiler's best code, parity has it:
# no optimisation, fusions emitted without MLIR (half the time), one module a program
QUICK := JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
	XLA_FLAGS="--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 $$XLA_FLAGS"
test: $(VENV)/dev.stamp
	$(QUICK) $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" --ignore=tests/parity

# a slow test may take longer than the ten minutes after which one of the others counts as hung
SLOW := -o faulthandler_timeout=7200
test-all: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n auto --dist worksteal $(SLOW)
	$(MAKE) test-targets

test-parity: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n auto --dist worksteal tests/parity

test-peers: $(PEERS)/peers.stamp
	$(PEERS)/bin/python -m pytest $(SLOW) tests/peers

# compiles presets for a TPU slice and an H200: minutes each; those that tests/targets/recorded.json holds
test-targets: $(TARGETS)/targets.stamp
	$(TARGETS)/bin/python -m pytest $(SLOW) tests/targets

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

requirements: $(VENV)/dev.stamp
	uv pip compile -q --universal --generate-hashes --python-version 3.11 --no-header --no-emit-index-url \
		pyproject.toml requirements/build.in -o requirements/core.txt
	uv pip compile -q --universal --generate-hashes --python-version 3.11 --no-header --no-emit-index-url \
		--extra dev -c requirements/core.txt pyproject.toml requirements/build.in -o requirements/dev.txt

# a release: a clean commit, named after the version that pyproject.toml and the changelog give it
tag:
	git diff --quiet HEAD
	git tag -a "v$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" -m "$$(sed -n 's/^version = //p' pyproject.toml)"

clean:
	rm -rf $(VENV) $(PEERS) $(TARGETS) $(DOCS) build *.egg-info
