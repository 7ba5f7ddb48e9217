# `make demo` runs the main job on the embedded data, `make test` the tests. Both set up $(VENV) first, once.
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,docs,tensorrt-rtx,openvino
DIST ?= worksteal
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# Named after the Python version, so that another interpreter gets an environment of its own.
READY := $(VENV)/ready-$(VERSION)

.DEFAULT_GOAL := help
.PHONY: help setup bindings demo test test-detection lint audit smoke docs reference catalogue format constraints clean

help:
	@echo "make demo         set up $(VENV) and run: upvits-deploy build --model pvtv2_b0 --ratio 0.5"
	@echo "make test         set up $(VENV) and run the tests"
	@echo "make bindings     NVIDIA's Python bindings of several TensorRT versions, for the tests; 'make test' does it"
	@echo "make test-detection  the same for detection, in an environment with mmdet"
	@echo "make lint         ruff and mypy"
	@echo "make audit        known vulnerabilities and licences of the pinned packages"
	@echo "make smoke        a short whole build on the oldest and the newest Python, in throwaway environments"
	@echo "make docs         build the documents as a site, in site/"
	@echo "make reference    write docs/cli.md and docs/recipe.md again, after options changed"
	@echo "make catalogue    count the parameters of timm's models again, after timm changed"
	@echo "make format       let ruff rewrite the sources"
	@echo "make constraints  resolve the newest versions into constraints.txt"
	@echo "make clean        remove $(VENV) and caches; runs stay"

setup: $(READY)

demo: $(READY)
	$(BIN)/upvits-deploy build --model pvtv2_b0 --ratio 0.5

test: $(READY) .bindings/ready-$(VERSION)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist $(DIST) $(TESTS)

bindings: .bindings/ready-$(VERSION)

# Packages of a few MB, each in a folder of its own. Where a Python has no wheel of one, the tests that need it skip.
.bindings/ready-$(VERSION): tests/deploy/runtimes/bindings.txt | $(READY)
	@rm -rf .bindings; $(FIND_UV); while read -r version package; do \
		$$uv pip install --quiet --no-deps --only-binary :all: --python $(BIN)/python --target ".bindings/$$version" "$$package" || true; \
	done < $<
	@mkdir -p .bindings; touch $@

# Detection has an environment of its own, so that the other tests prove that nothing else needs it.
test-detection:
	DETECTION=1 $(MAKE) test VENV=$(VENV)-detection EXTRAS=$(EXTRAS),detection TESTS=tests/detection DIST=loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In the environment that has every extra.
audit:
	$(MAKE) setup VENV=$(VENV)-detection EXTRAS=$(EXTRAS),detection
	.ci/audit $(VENV)-detection/bin

smoke:
	@$(FIND_UV); UV="$$(command -v $$uv || echo $$PWD/$$uv)" .ci/smoke 3.10 3.13

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

reference: $(READY)
	$(BIN)/python -m docs.reference

catalogue: $(READY)
	$(BIN)/python -m upvits.toolchain.networks.catalogue

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints:
	@$(FIND_UV); UV="$$uv" .ci/constraints

clean:
	rm -rf $(VENV) $(VENV)-detection .uv .bindings .pytest_cache .mypy_cache .ruff_cache .hypothesis dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# uv from the PATH, or a private copy next to the environment.
define FIND_UV
if uv --version >/dev/null 2>&1; then uv=uv; else \
	test -x .uv/bin/uv || { $(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet uv; }; uv=.uv/bin/uv; \
fi
endef

$(READY): pyproject.toml constraints.txt
	@case "$(VERSION)" in 3.10|3.11|3.12|3.13) ;; *) \
		echo "Python 3.10 to 3.13 is needed; $(PYTHON) is '$(VERSION)'. Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
		exit 2;; esac
	@set -e; $(FIND_UV); rm -rf $(VENV); \
	$$uv venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV); \
	$$uv pip install --python $(BIN)/python --compile-bytecode --constraint constraints.txt --build-constraint constraints.txt \
		--editable '.[$(EXTRAS)]'
	@touch $@
