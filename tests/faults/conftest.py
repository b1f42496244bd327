"""Runs of a tiny recipe: an undisturbed one, and clusters to disturb."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import ROUNDS, TINY, Cluster, shards


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return TINY | {
        "data.shards": str(shards(tmp_path_factory.mktemp("data"))),
        "train.rounds": ROUNDS,
        "server.checkpoint_every": 2,
        "worker.heartbeat_s": 0.05,
    }


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> str:
    """Digest of the master that nothing happened to."""
    cluster = Cluster(tmp_path_factory.mktemp("undisturbed"), settings)
    try:
        cluster.serve()
        for name in ("a", "b"):
            cluster.work(name)
        cluster.all_ended()
        return cluster.master_digest()
    finally:
        cluster.close()


@pytest.fixture
def cluster(tmp_path: Path, settings: dict[str, Any]) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, settings)
    yield cluster
    cluster.close()
