"""Runs of a tiny recipe: an undisturbed one, and clusters to disturb."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import ROUNDS, Cluster, shards


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "data.shards": str(shards(tmp_path_factory.mktemp("data"))),
        "model.num_layers": 1,
        "model.width": 32,
        "model.num_attention_heads": 2,
        "model.mlp_width": 64,
        "model.context_tokens": 16,
        "base.quant": "int8",
        "lora.rank": 4,
        "lora.merge": "reset-less",
        "train.rounds": ROUNDS,
        "train.local_steps": 2,
        "train.workers": 2,
        "train.batch_size": 4,
        "optimizer.name": "adamw",
        "schedule.warmup_steps": 2,
        "server.checkpoint_every": 2,
        "server.keep_checkpoints": 1000,  # and with them the whole journal, for the audit
        "worker.heartbeat_s": 0.05,
        "eval.every": 0,
        "eval.final_tokens": 64,
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
