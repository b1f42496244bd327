# make train   install, pack the text that ships with the project, train the quickstart recipe
# make test    install, run the tests: JOBS of them at a time (2)
# make test-nodes    torchrun on two nodes, of which ranks die and that come later: minutes of waiting
# make test-slurm    the batch files on a real SLURM cluster of this machine; make can-test-slurm says what that needs;
#                    ONLY="..." those that pytest's -k names so
# make setup   install alone;  make check: lint and types
# PYTHON=python3.12 chooses the interpreter, RECIPE=... what `make train` trains, ARGS="key=value ..."

PYTHON ?= python3
RECIPE ?= configs/quickstart.yaml
ARGS ?=
JOBS ?= 2
VENV := .venv
ONLY ?=
SLURM_UP ?= ../shared/infra/start_slurm.sh
SHARDS ?= data/tinyshakespeare/shards

.PHONY: train test test-nodes test-slurm can-test-slurm check setup clean

train: setup $(SHARDS)/index.json
	@$(VENV)/bin/lte train $(RECIPE) $(ARGS)

test: setup
	$(VENV)/bin/pytest -n $(JOBS) --dist worksteal

test-nodes: setup
	$(VENV)/bin/pytest -m nodes -n $(JOBS)

test-slurm: can-test-slurm setup
	@which slurmctld slurmd sbatch munged ip >/dev/null || { apt-get update -qq && \
	  apt-get install -qq -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2; }
	SLURM_UP=$(abspath $(SLURM_UP)) $(VENV)/bin/pytest -m slurm -s tests/slurm -k "$(ONLY)"

can-test-slurm:
	@test -x $(SLURM_UP) -a "$$(id -u)" = 0 || { echo "make test-slurm: needs root on Debian, and in SLURM_UP the path" \
	  "of a script that starts a SLURM cluster, stop_slurm.sh and netns_up.sh beside it; not $(SLURM_UP)" >&2; exit 2; }

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck -x slurm/*.sbatch slurm/job.sh
	$(VENV)/bin/hadolint docker/Dockerfile

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
