# Everything a developer does, with nothing installed but python3 (3.11 or newer) and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CODE := src tests examples benchmarks

.PHONY: help demo test test-slow lint format typecheck docs-cli docs-recipes clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: $(STAMP) ## mini captions, answers, matches and finds real photographs
	@$(BIN)/python examples/demo.py

test: $(STAMP) ## the tests, a few minutes
	@$(BIN)/python -m pytest -q

test-slow: $(STAMP) ## full-size and long checks
	@$(BIN)/python -m pytest -q -m slow

lint: $(STAMP) ## style and common mistakes
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)

format: $(STAMP) ## rewrite the code in the one style
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

typecheck: $(STAMP) ## pyright, strict, on the package
	@$(BIN)/pyright

docs-cli: $(STAMP) ## write docs/cli.md from the commands themselves
	@$(BIN)/python -m typer blip2.cli utils docs --name blip2 --title "The command line" --output docs/cli.md

docs-recipes: $(STAMP) ## write docs/recipes.md from the recipe's own fields
	@$(BIN)/python -m blip2.train.reference > docs/recipes.md

clean: ## remove what make and the tests wrote, the environment and the runs of training aside
	@rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis runs/demo
	@find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "blip2 needs Python 3.11 or newer: make PYTHON=python3.11")'
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing blip2 and its development tools into .venv (minutes, the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
