# Each target sets up what it needs: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
RUN    ?= runs/demo

.PHONY: demo test lab lint clean

demo: $(READY)          ## the main job on the embedded digits, into runs/demo
	$(BIN)/vitlab demo --out $(RUN)

test: $(READY)          ## all tests
	$(BIN)/python -m pytest -q

lab: $(READY)           ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/08_tonight.ipynb

lint: $(READY)          ## ruff
	$(BIN)/ruff check .

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"vitlab needs Python 3.10 or newer; {sys.executable} is {sys.version.split()[0]}. Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:                  ## remove the environment (runs/ stays)
	rm -rf $(VENV)
