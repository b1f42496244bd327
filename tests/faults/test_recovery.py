"""What a server goes on from: the newest good checkpoint and a replay, and what it says of damage."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import Cluster, EveryCheckpoint, Fault

from lte import config, merge, recipes
from lte.errors import RunError
from lte.server import checkpoint, journal, recovery
from lte.server.master import Master

MERGED = 5
"""Versions in the journal of the run, the last of them not published; checkpoints are at 0, 2 and 4."""

Recover = Callable[..., tuple[recovery.Recovered, Master]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Iterator[Path]:
    """The folder of a run whose server was killed."""
    cluster = Cluster(tmp_path_factory.mktemp("killed"), settings)
    workers = [cluster.work(name) for name in ("a", "b")]
    kill = Fault("lte.server.publisher:Publisher.publish", call=MERGED)
    cluster.ended(cluster.serve(EveryCheckpoint(), kill), -signal.SIGKILL)
    for worker in workers:
        worker.kill()
    yield cluster.run
    cluster.close()


@pytest.fixture
def run(killed: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


@pytest.fixture
def recover(run: Path) -> Recover:
    def recover(**changed: object) -> tuple[recovery.Recovered, Master]:
        recipe = config.replace(config.load(run / "config.yaml"), **changed)
        master = Master(recipes.initial_model(recipe), recipe)
        return recovery.recover(run, master), master

    return recover


def flip(path: Path, place: float) -> None:
    """Damage one byte, so far into a file."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 64
    path.write_bytes(data)


def checkpoints(run: Path) -> list[Path]:
    return checkpoint.versions(run / "checkpoints")


def test_a_run_goes_on_from_the_last_version_that_the_journal_holds(recover: Recover) -> None:
    found, master = recover()
    progress = found.progress
    assert (progress.version, found.faults) == (MERGED, [])
    assert [line["version"] for line in found.rounds] == [MERGED], "one version came after the checkpoint"
    assert found.rounds[0]["num_merged"] == 2
    assert {member.worker_id for member in progress.members} == {"a", "b"}
    assert {member.slot for member in progress.known} == {0, 1}
    assert progress.next_incarnation == 3
    assert progress.merged_in.keys() == master.merged.keys() == {"a", "b"}
    assert {version for version, _ in progress.merged_in.values()} == {MERGED}


@pytest.mark.parametrize(
    "name", ["progress.json", "master.safetensors", "base.safetensors", "merged.safetensors"]
)
def test_a_damaged_checkpoint_is_said_and_a_longer_replay_gives_the_same(
    run: Path, recover: Recover, name: str
) -> None:
    digest = recover()[1].master_digest()
    flip(checkpoints(run)[-1] / name, 0.9)
    found, master = recover()
    assert master.master_digest() == digest
    assert len(found.rounds) == 3
    (fault,) = found.faults
    assert "version-00000004" in fault
    assert "the one before it is used" in fault


def test_no_good_checkpoint_is_an_error(run: Path, recover: Recover) -> None:
    for path in checkpoints(run):
        flip(path / "master.safetensors", 0.9)
    with pytest.raises(RunError, match="damaged"):
        recover()


def test_a_replay_goes_by_the_settings_of_then(run: Path, recover: Recover) -> None:
    digest = recover()[1].master_digest()
    _, master = recover(**{"outer.name": "sgd", "outer.lr": 0.5, "base.hysteresis": 0.0})
    assert master.master_digest() == digest
    assert master.recipe.outer.lr == 0.5, "from here on by those of now"


def test_a_torn_journal_goes_on_from_the_last_whole_version(run: Path, recover: Recover) -> None:
    segment = max((run / "journal").iterdir())
    with segment.open("ab") as file:
        file.truncate(segment.stat().st_size - 1)
    found, _ = recover()
    assert found.progress.version == MERGED - 1
    (fault,) = found.faults
    assert "torn at byte" in fault
    assert f"version {MERGED - 1} is the last" in fault


def test_damage_in_the_journal_is_said(run: Path, recover: Recover) -> None:
    for path in checkpoints(run)[1:]:
        shutil.rmtree(path)
    flip(sorted((run / "journal").iterdir())[0], 0.9)
    found, _ = recover()
    assert found.progress.version == 1
    (fault,) = found.faults
    assert "damaged at byte" in fault


def test_a_journal_of_another_checkpoint_is_not_used(run: Path, recover: Recover) -> None:
    for path in sorted((run / "journal").iterdir())[:-1]:
        path.unlink()
    for path in checkpoints(run)[1:]:
        shutil.rmtree(path)
    found, _ = recover()
    assert found.progress.version == 0
    assert "says nothing of version 0" in found.faults[0]


def test_a_checkpoint_alone_is_enough(run: Path, recover: Recover) -> None:
    shutil.rmtree(run / "journal")
    found, _ = recover()
    assert (found.progress.version, found.faults) == (4, [])
    assert journal.history(run) == []


def test_other_arithmetic_is_told_from_damage(recover: Recover, monkeypatch: pytest.MonkeyPatch) -> None:
    mean_delta = merge.mean_delta

    def another_machine(heads: Any) -> torch.Tensor:
        return mean_delta(heads) * (1 + 1e-6)

    monkeypatch.setattr(merge, "mean_delta", another_machine)
    with pytest.raises(
        RunError, match=r"journal: version 5: gives another master or base here than its digest"
    ):
        recover()
