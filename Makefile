# Two commands: `make run` and `make test`. Both set everything up first, in .venv, and again only when the
# requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
TEST := $(BIN)/python -m pytest --jaxtyping-packages=CMHA,TransformerBlock,GPT2Model,beartype.beartype

.PHONY: help run smoke test test-slow lint format lab notebooks student-bundle clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: $(VENV)/.made-run  ## set up, then the main job: assemble GPT-2, prove the toggle, train a nano model, let it write
	$(BIN)/python orchestrator/orchestration.py --train $(ARGS)

smoke: $(VENV)/.made-run  ## the smoke tests alone, about 30 seconds
	$(BIN)/python orchestrator/orchestration.py $(ARGS)

test: $(VENV)/.made-dev  ## set up, then all tests but the long grids
	$(TEST) -n 2 --dist worksteal $(ARGS)

test-slow: $(VENV)/.made-dev  ## the long grids
	$(TEST) -n 2 -m slow $(ARGS)

lint: $(VENV)/.made-dev  ## ruff, and no outputs in notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb

format: $(VENV)/.made-dev  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout notebooks/*.ipynb

lab: $(VENV)/.made-run  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks/llm.ipynb

notebooks: $(VENV)/.made-dev  ## execute the notebooks into docs/executed/*.html, to look at on the web
	$(BIN)/python notebooks/to_html.py $(ARGS)

student-bundle: $(VENV)/.made-run  ## pack the project without the solutions into dist/student-bundle.zip
	$(BIN)/python -m orchestrator.learning.student_bundle $(ARGS)

clean:  ## remove what make has made, except runs/
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache build dist *.egg-info

$(VENV)/.made-venv:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.made-run: $(VENV)/.made-venv requirements.txt constraints.txt pyproject.toml
	@echo "setting up $(VENV): a minute or two the first time"
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/.made-dev: $(VENV)/.made-run requirements-dev.txt requirements-hub.txt requirements-train.txt requirements-transformers.txt
	$(PIP) -r requirements.txt -r requirements-dev.txt -r requirements-hub.txt -r requirements-train.txt -r requirements-transformers.txt
	@touch $@
