"""One of four workers, a process of its own, sends what is meant to ruin the model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import ROUNDS, Cluster, audit

from lte import config, recipes
from lte.data import pack
from lte.server import checkpoint, recovery
from lte.server.master import Master
from lte.server.watch import TRIMS_IN_A_ROW
from lte.worker.trainer import Trainer

WORKERS = ("a", "b", "c", "d")


@dataclass(frozen=True)
class Poison:
    """What this worker has learnt, so many times."""

    factor: float

    def install(self) -> None:
        contribution, factor = Trainer.contribution, self.factor

        def poisoned(self: Trainer) -> Iterator[tuple[str, torch.Tensor]]:
            with torch.no_grad():
                for module in self.modules.values():
                    assert module.merged_B is not None
                    module.lora_B.copy_(module.merged_B + factor * (module.lora_B - module.merged_B))
                for name, parameter in self.dense.items():
                    known = self._published[name]
                    parameter.copy_(known + factor * (parameter - known))
            return contribution(self)

        Trainer.contribution = poisoned  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings for four workers, with robust merging."""
    folder = tmp_path_factory.mktemp("four")
    (folder / "text.txt").write_text("".join(f"{n} bottles of beer on the wall. " for n in range(900)))
    pack([folder / "text.txt"], folder / "shards", num_shards=4)
    return {
        "data__shards": str(folder / "shards"),
        "train__workers": 4,
        "compress__factors": "fp32",  # else what codecs leave out is owed, and poisoned once more
        "compress__dense": "fp32",
        "outer__bound_norm": 1.5,
        "outer__trim": 0.3,
        "server__silence_s": 60.0,
    }


@pytest.fixture(scope="module")
def poisoned(
    tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any], four: dict[str, Any]
) -> Iterator[Cluster]:
    """A finished run in which d sends a hundred times the opposite of what it has learnt."""
    cluster = Cluster(tmp_path_factory.mktemp("poisoned"), settings)
    server = cluster.serve(**four)
    workers = [*map(cluster.work, WORKERS[:3]), cluster.work("d", Poison(-100.0))]
    for process in (server, *workers):
        cluster.ended(process, 0)
    yield cluster
    cluster.close()


def test_it_moves_nothing_and_is_told_to_start_over(poisoned: Cluster) -> None:
    lines = poisoned.lines("round")
    assert [line["trimmed"] for line in lines] == [["d"]] * ROUNDS
    assert all(line["bounded"]["d"] < 0.1 for line in lines)
    assert all(line["num_merged"] == 4 and line["num_trimmed"] == 1 for line in lines)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert poisoned.events("trimmed") == ["d is left out: its contribution points elsewhere than the others'"]
    assert ROUNDS > TRIMS_IN_A_ROW
    assert poisoned.events("recalled") == ["d starts over from what was merged of it"]
    audit(poisoned.run, ROUNDS, set(WORKERS))


def test_a_replay_finds_the_same_weights(poisoned: Cluster, tmp_path: Path) -> None:
    """From the first checkpoint on; `recover` compares the digests of each version."""
    run = Path(shutil.copytree(poisoned.run, tmp_path / "run"))
    for path in checkpoint.versions(run / "checkpoints")[1:]:
        shutil.rmtree(path)
    recipe = config.load(run / "config.yaml")
    master = Master(recipes.initial_model(recipe), recipe)
    found = recovery.recover(run, master)
    assert (found.progress.version, found.faults) == (ROUNDS, [])
    assert master.master_digest() == poisoned.master_digest()
    assert [line["trimmed"] for line in found.rounds] == [("d",)] * ROUNDS
