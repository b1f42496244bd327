# make train   install, pack the text that ships with the project, train the quickstart recipe
# make test    install, run the tests: JOBS of them at a time (2)
# make setup   install alone;  make check: lint and types
# PYTHON=python3.12 chooses the interpreter, RECIPE=... what `make train` trains, ARGS="key=value ..."

PYTHON ?= python3
RECIPE ?= configs/quickstart.yaml
ARGS ?=
JOBS ?= 2
VENV := .venv
SHARDS ?= data/tinyshakespeare/shards

.PHONY: train test check setup clean

train: setup $(SHARDS)/index.json
	@$(VENV)/bin/lte train $(RECIPE) $(ARGS)

test: setup
	$(VENV)/bin/pytest -n $(JOBS) --dist worksteal

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

setup: $(VENV)/.installed

# Without pip of its own: Debian has what would copy it there in a package apart (python3-venv).
# The stamp is written last, so that an interrupted installation is taken up again.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(VENV)/bin/python --quiet --disable-pip-version-check install \
	  -c constraints.txt -e '.[dev]'
	@touch $@

$(SHARDS)/index.json: data/tinyshakespeare/input.txt.gz | setup
	@$(VENV)/bin/lte data pack $< --out $(SHARDS) --force

clean:
	rm -rf $(VENV) $(SHARDS) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
