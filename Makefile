# Everything runs in .venv; set-up happens once and again only when what it installs has changed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OLDEST := 3.6.0
TRITON := .venv/triton-$(OLDEST)

.PHONY: demo test check gate format setup clean

demo: $(READY)
	@$(BIN)/sda-fast demo --out out/demo

test: $(READY)
	@$(BIN)/python -m pytest -n 2 --dist loadfile tests

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyrefly check --summary=none
	@$(BIN)/lint-imports

# every tile for sm_90a, on the oldest Triton and on the installed one; needs no GPU
gate: $(READY) $(TRITON)
	@$(BIN)/python -m bench gate --oldest $(TRITON)

$(TRITON): $(READY)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $@.tmp triton==$(OLDEST)
	@rm -rf $@ && mv $@.tmp $@

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || { echo "make: needs Python 3.11 or newer with venv (Debian: apt install python3-venv), found $$($(PYTHON) --version); use PYTHON=..." >&2; exit 1; }
	@echo "Setting up .venv (once)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

clean:
	rm -rf .venv out build *.egg-info
