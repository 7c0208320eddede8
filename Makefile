# Each target sets up what it needs: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
RUN    ?= runs/demo

.PHONY: demo test lab lint clean chromium

demo: $(READY)          ## the main job on the embedded digits, into runs/demo
	$(BIN)/vitlab demo --out $(RUN)

test: $(READY) chromium ## all tests
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

chromium:               ## for the test in a browser: Debian's, where it is missing and this is root; else that test is skipped
	@command -v chromium chromium-browser google-chrome >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null; } \
	  || echo "no chromium here: the browser test will be skipped"

lab: $(READY)           ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/08_tonight.ipynb

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
