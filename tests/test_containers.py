"""What docker/ says is what the project has: no engine is needed to see that."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lte import config

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+) \S+$", dockerfile, re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == sources
    assert all((ROOT / source).exists() for source in sources)


def test_the_server_has_a_recipe_and_as_many_workers_as_it_wants() -> None:
    role, recipe, *overrides = COMPOSE["server"]["command"].split()
    assert role == "server"
    assert config.load(ROOT / recipe, overrides).train.workers == len(workers())


@pytest.mark.parametrize("name", ["worker-0", "worker-1"])
def test_a_worker_has_a_key_of_its_name_and_a_state(name: str) -> None:
    command, prepared = COMPOSE[name]["command"].split(), COMPOSE["prepare"]["command"][0]
    who = command[command.index("--id") + 1]
    assert re.search(rf"for name in (\w+ )*{who}\b.*echo", prepared)
    assert COMPOSE[name]["environment"]["LTE_KEY"] == f"/keys/{who}.secret"
    assert command[command.index("--state") + 1].endswith(f"/{who}")
    assert command[command.index("--server") + 1] == "tcp://server:5555"


def test_a_mistake_is_not_repeated_for_ever() -> None:
    """Nor is a worker that comes when the run is over."""
    policies = {name: service.get("restart", "no") for name, service in COMPOSE.items()}
    assert policies.pop("prepare") == "no"
    assert all(re.fullmatch(r"on-failure:\d", policy) for policy in policies.values()), policies


def test_every_worker_is_looked_at_here() -> None:
    assert workers() == ["worker-0", "worker-1"]


def workers() -> list[str]:
    return sorted(name for name in COMPOSE if name.startswith("worker"))
