# Each target sets up what it needs: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
RUN    ?= runs/demo
# threads that wait sleep: beside other work, spinning costs far more than it saves (vitlab/runtime/cores.py)
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-all test lab docs lint clean chromium

demo: $(READY)          ## the main story on the embedded digits, five to seven minutes: runs/demo
	$(BIN)/vitlab demo --out $(RUN)

demo-all: $(READY)      ## every notebook: runs/demo-all
	$(BIN)/vitlab demo --everything --out $(RUN)-all

test: $(READY) chromium ## all tests
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

chromium:               ## for the test in a browser: Debian's, where it is missing and this is root; else that test is skipped
	@command -v chromium chromium-browser google-chrome >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null; } \
	  || echo "no chromium here: the browser test will be skipped"

lab: $(READY)           ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_check_setup.ipynb

docs: $(READY)          ## the pages, the reference and the notebooks (as `make demo` ran them, where it did) as a site: site/
	@test -x $(BIN)/mkdocs || { echo "the documentation needs Python 3.11 or newer: skipped"; exit 0; } \
	  && NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(READY)          ## ruff, and the types of the public face (pyproject.toml says which files)
	$(BIN)/ruff check .
	$(BIN)/ty check --python $(VENV)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"vitlab needs Python 3.10 or newer; {sys.executable} is {sys.version.split()[0]}. Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:                  ## remove the environment (runs/ stays)
	rm -rf $(VENV)
