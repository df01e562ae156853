# Two commands: `make run` and `make test`. Both set everything up first, in .venv, and again only when the
# requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# bytecode and caches stay out of the way; two processes of tests, one thread each
TEST := $(BIN)/python -m pytest --jaxtyping-packages=CMHA,TransformerBlock,GPT2Model,beartype.beartype

.PHONY: help run smoke test test-slow lint format lab notebooks clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: .stamps/run  ## set up, then the main job: assemble GPT-2, prove the toggle, train a nano model, let it write
	$(BIN)/python orchestrator/orchestration.py --train $(ARGS)

smoke: .stamps/run  ## the smoke tests alone, about 30 seconds
	$(BIN)/python orchestrator/orchestration.py $(ARGS)

test: .stamps/dev  ## set up, then all tests but the long grids
	$(TEST) -n 2 --dist worksteal $(ARGS)

test-slow: .stamps/dev  ## the long grids
	$(TEST) -n 2 -m slow $(ARGS)

lint: .stamps/dev  ## ruff, and no outputs in notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb

format: .stamps/dev  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout notebooks/*.ipynb

lab: .stamps/run  ## open the notebook in JupyterLab
	$(BIN)/jupyter lab notebooks/llm.ipynb

notebooks: .stamps/dev  ## execute the notebooks into docs/executed/*.html, to look at on the web
	mkdir -p docs/executed
	$(BIN)/jupyter nbconvert --to html --execute --embed-images --output-dir docs/executed notebooks/*.ipynb

clean:  ## remove what make has made, except runs/
	rm -rf $(VENV) .stamps .pytest_cache .hypothesis .ruff_cache build *.egg-info

.stamps/venv:
	$(PYTHON) -m venv $(VENV)
	@mkdir -p .stamps && touch $@

.stamps/run: .stamps/venv requirements.txt constraints.txt pyproject.toml
	@echo "setting up $(VENV): a minute or two the first time"
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	@touch $@

.stamps/dev: .stamps/run requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@
