"""A run goes back to an earlier version, and on from there; nothing of what came after is lost or goes on."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import ROUNDS, Cluster, EveryCheckpoint, Fault, audit

from lte import config, recipes
from lte.cli import main
from lte.errors import RunError
from lte.server import checkpoint, journal, recovery, rollback
from lte.server.folder import lock
from lte.server.master import Master
from lte.track import METRICS, Records

EXACT: dict[str, Any] = {
    # A worker that starts over from what is merged of it lacks nothing: no moments, nothing owed.
    "optimizer__name": "sgd",
    "optimizer__lr": 0.1,
    "lora__merge": "reset-b",
    "lora__A": "frozen",
    "compress__factors": "fp32",
    "compress__dense": "fp32",
    "schedule__join_warmup_steps": 0,
}


def train(cluster: Cluster, **settings: Any) -> None:
    for process in (
        cluster.serve(EveryCheckpoint(), **settings),
        *(cluster.work(name) for name in ("a", "b")),
    ):
        cluster.ended(process, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Iterator[Cluster]:
    """A finished run, with checkpoints at 0, 2, 4 and 6."""
    cluster = Cluster(tmp_path_factory.mktemp("finished"), settings)
    train(cluster, **EXACT)
    yield cluster
    cluster.close()


@pytest.fixture
def copied(finished: Cluster, cluster: Cluster) -> Cluster:
    """A copy of it with its workers' states, to go back with."""
    ignored = shutil.ignore_patterns("socket*")
    shutil.copytree(finished.folder, cluster.folder, ignore=ignored, dirs_exist_ok=True)
    return cluster


def merged_digests(run: Path) -> dict[int, str]:
    return {
        record.version: record.master_digest
        for segment in journal.history(run)
        for record in segment
        if isinstance(record, journal.Merged)
    }


def rounds(cluster: Cluster) -> list[int]:
    return [line["version"] for line in cluster.lines("round")]


@pytest.mark.parametrize("version", [0, 3])
def test_a_run_that_went_back_and_on_is_the_undisturbed_one(
    copied: Cluster, finished: Cluster, version: int
) -> None:
    """Bit for bit, where workers keep nothing of their own; the workers' old states are not gone on from."""
    run, digests = copied.run, merged_digests(copied.run)
    done = recipes.roll_back(run, version)
    assert (done.version, done.last) == (version, ROUNDS)
    progress, _ = checkpoint.load(checkpoint.newest(run))
    assert (progress.version, progress.members) == (version, ())
    assert merged_digests(run) == {v: digest for v, digest in digests.items() if v <= version}
    if version:
        assert progress.master_digest == digests[version]
    assert rounds(copied) == list(range(1, version + 1))
    assert copied.lines("done") == []
    assert copied.events("rolled-back") == [
        f"back at version {version}; what came after, up to version {ROUNDS}, is in {done.aside}"
    ]
    train(copied, **EXACT)
    assert copied.master_digest() == finished.master_digest()
    assert rounds(copied) == list(range(1, ROUNDS + 1))
    audit(run, ROUNDS, {"a", "b"})
    assert sorted(copied.events("joined")) == ["a joined"] * 2 + ["b joined"] * 2


def test_nothing_is_deleted(copied: Cluster) -> None:
    run, before = copied.run, contents(copied.run)
    aside = recipes.roll_back(run, 3).aside
    now = contents(run)
    moved = {name.removeprefix(f"{aside.name}/"): data for name, data in now.items()}
    for name, data in before.items():
        if name != "generation":
            assert data in (now.get(name), moved.get(name)), name
    assert [path.name for path in checkpoint.versions(aside / "checkpoints")] == [
        "version-00000004",
        "version-00000006",
    ]
    assert contents(aside)[METRICS] == before[METRICS]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_can_go_on_with_other_settings_and_back_again(copied: Cluster) -> None:
    recipes.roll_back(copied.run, 3)
    assert rollback.versions(copied.run) == [0, 1, 2, 3]
    train(copied, **EXACT | {"optimizer__lr": 0.05})
    digests = merged_digests(copied.run)
    assert rollback.versions(copied.run) == list(range(ROUNDS + 1))
    assert recipes.roll_back(copied.run, 5).aside.name == "rolled-back-2"
    progress, _ = checkpoint.load(checkpoint.newest(copied.run))
    assert progress.master_digest == digests[5], "of the branch that counts, not of the one before"


def test_no_incarnation_is_handed_out_twice(copied: Cluster) -> None:
    last, _ = checkpoint.load(checkpoint.newest(copied.run))
    generation = journal.read_generation(copied.run / journal.GENERATION)
    recipes.roll_back(copied.run, 0)
    progress, _ = checkpoint.load(checkpoint.newest(copied.run))
    assert progress.next_incarnation == last.next_incarnation == 3
    assert {worker.worker_id for worker in progress.known} == {"a", "b"}
    assert journal.read_generation(copied.run / journal.GENERATION) > generation


class Killed(BaseException):
    """What a kill amounts to, for what is on disk."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name"), [(checkpoint, "save"), (Path, "rename"), (shutil, "copy2"), (journal.Journal, "begin")]
)
def test_a_rollback_that_is_interrupted_leaves_one_of_both_versions(
    copied: Cluster, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool
) -> None:
    """The run is as far as it was, or back, and its master is the one that the journal tells of."""
    digests, original = merged_digests(copied.run), getattr(owner, name)

    def killed(*arguments: Any, **named: Any) -> None:
        if after:
            original(*arguments, **named)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            recipes.roll_back(copied.run, 3)
    assert recovered(copied.run) in [(v, digests[v]) for v in (3, ROUNDS)]
    if recovered(copied.run)[0] != 3:
        recipes.roll_back(copied.run, 3)
    assert recovered(copied.run) == (3, digests[3])


def recovered(run: Path) -> tuple[int, str]:
    """The version that the next server would go on from, and its master's digest."""
    recipe = config.load(run / "config.yaml")
    master = Master(recipes.initial_model(recipe), recipe)
    return recovery.recover(run, master).progress.version, master.master_digest()


def test_workers_that_still_run_join_the_run_that_went_back_anew(cluster: Cluster) -> None:
    """Its server is killed and the run goes back; the worker meets the next server at the same address."""
    kill = Fault("lte.server.publisher:Publisher.publish", call=5)
    workers = [cluster.work(name) for name in ("a", "b")]
    cluster.ended(cluster.serve(kill, **EXACT), -signal.SIGKILL)
    recipes.roll_back(cluster.run, 3)
    server = cluster.serve(**EXACT)
    for process in (server, *workers):
        cluster.ended(process, 0)
    for name in ("a", "b"):
        said = (cluster.folder / f"{name}.log").read_text()
        assert "gone back to an earlier version, or serves another run now; joining anew" in said
    audit(cluster.run, ROUNDS, {"a", "b"})


def test_mistakes_get_one_line(copied: Cluster, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = copied.run
    shutil.rmtree(run / "checkpoints" / "version-00000000")
    shutil.rmtree(run / "checkpoints" / "version-00000002")
    before = contents(run)

    def said(*arguments: object) -> str:
        assert main(["rollback", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert said(run, "--version", 2) == f"lte: {run}: cannot go back to version 2; it can to 4 to 5"
    assert said(run, "--version", 7).endswith("cannot go back to version 7; it can to 4 to 5")
    assert said(run, "--version", 6).endswith("is at version 6 already")
    assert "not a run folder" in said(tmp_path / "nothing", "--version", 1)
    assert not (tmp_path / "nothing").exists()
    with lock(run):
        assert said(run, "--version", 4).endswith("in use by another server; stop it first")
    assert contents(run) == before


def test_it_tells_what_there_is_and_does_it(copied: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied.run
    assert main(["rollback", str(run)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["version", "train", "loss", "valid", "loss"]
    assert [row[0] for row in table[1:]] == ["0", "1", "2", "3", "4", "5", "6"]
    assert table[-1][1] == f"{copied.lines('round')[-1]['train_loss']:.3f}"
    assert main(["rollback", str(run), "--version", "5"]) == 0
    assert "back at version 5" in capsys.readouterr().out
    assert [line["version"] for line in Records.read(run / METRICS) if line["kind"] == "round"][-1] == 5


def test_a_version_that_cannot_be_made_again_changes_nothing(copied: Cluster) -> None:
    """The checkpoint before it is damaged, and there is none before that."""
    run = copied.run
    for name in ("version-00000000", "version-00000002"):
        shutil.rmtree(run / "checkpoints" / name)
    path = run / "checkpoints" / "version-00000004" / "master.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = contents(run)
    with pytest.raises(RunError, match="damaged"):
        recipes.roll_back(run, 5)
    assert contents(run) == before


def test_versions_in_words() -> None:
    assert rollback.ranges([3]) == "3"
    assert rollback.ranges([0, 1, 2, 10, 12, 13]) == "0 to 2, 10, 12 to 13"
