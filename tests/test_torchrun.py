"""launch/torchrun.py by torchrun itself: on one node, and, by `make test-nodes`, two of two ranks that are
disturbed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cluster import TINY
from processes import Command, Family, done, lines, versions
from torch.distributed import TCPStore

from launch import torchrun
from lte import config
from lte.config import Recipe
from lte.transport import keys, meeting

SETTINGS: dict[str, Any] = TINY | {
    "train.workers": 4,
    "train.rounds": 12,
    "server.quorum": 4,  # so that no round closes without one that is on its way back
    "server.checkpoint_every": 3,
    "run.dir": "run",
}
RANKS = {b"launch.torchrun", b"lte"}
"""Modules that ranks run."""


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    monkeypatch.chdir(tmp_path)
    family = Family(tmp_path)
    yield family
    family.close()


@pytest.fixture
def store() -> TCPStore:
    """Where the nodes meet: here, so that no port need be guessed."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def write(folder: Path, shards: Path, name: str = "recipe.yaml", **settings: Any) -> Path:
    own = {key.replace("__", "."): value for key, value in settings.items()}
    recipe = config.replace(Recipe(), **(SETTINGS | {"data.shards": str(shards)} | own))
    (folder / name).write_text(config.to_yaml(recipe))
    return folder / name


def start_node(
    family: Family,
    store: TCPStore,
    *words: str | Path,
    nodes: str = "2",
    module: Sequence[str] = ("launch.torchrun",),
    **environment: str,
) -> Command:
    """One node's torchrun with two ranks; all nodes of a test meet. Nothing is forked: a fork of torchrun
    would inherit what its threads were at."""
    return family.execute_python(
        *("-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", "2"),
        *("--max-restarts", "3", "--rdzv-id", "test", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"127.0.0.1:{store.port}", "--rdzv-conf", "is_host=0,last_call_timeout=8"),
        *("-m", *module, *words),
        env={**os.environ, **environment},
    )


def start_alone(family: Family, num_ranks: int, *words: str | Path) -> Command:
    """A torchrun of one node, forked, as are its ranks."""
    return family.start_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "--no-python"),
        *(sys.executable, "-m", "launch.torchrun", *words),
    )


def rank_pid(family: Family, rank: int) -> int | None:
    """Process id of a rank that is alive."""
    for pid in family.members():
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            said = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            is_rank = RANKS & {*words} and b"torch.distributed.run" not in words
            if is_rank and b"RANK=%d" % rank in said:
                return pid
    return None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> str:
    """Digest of a run by `lte train` and zmq, which nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    family = Family(folder)
    try:
        recipe = write(folder, shards, server__address="tcp://127.0.0.1:*")
        command = family.start("train", recipe)
        assert command.ended() == 0, command.err
        return str(done(folder / "run")["master_digest"])
    finally:
        family.close()


def ended(*nodes: Command) -> None:
    for node in nodes:
        assert node.ended() == 0, "\n".join(each.out + each.err for each in nodes)


@pytest.mark.nodes
@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", [0, 3])
def test_a_rank_that_is_killed_changes_no_bit(
    family: Family, store: TCPStore, shards: Path, tmp_path: Path, undisturbed: str, killed: int
) -> None:
    """Rank 0 has the server beside it. torchrun starts all four ranks again, and the server."""
    recipe = write(tmp_path, shards)
    nodes = [start_node(family, store, recipe) for _ in range(2)]
    nodes[0].until_round(tmp_path / "run", 3)
    pid = rank_pid(family, killed)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    ended(*nodes)
    assert done(tmp_path / "run")["master_digest"] == undisturbed
    assert versions(tmp_path / "run") == list(range(1, 13))
    starts = [line for line in lines(tmp_path / "run", "event") if line["what"] == "started"]
    assert len(starts) > 1, "it was killed too late"


@pytest.mark.nodes
@pytest.mark.timeout(300)
def test_a_rank_of_data_parallel_training_is_killed(
    family: Family, store: TCPStore, shards: Path, tmp_path: Path
) -> None:
    """The node that it was on counts a restart, the other one does not: they meet all the same."""
    of_method: dict[str, Any] = {"train__method": "ddp", "train__rounds": 6, "train__local_steps": 20}
    recipe = write(tmp_path, shards, **of_method)
    start = {"module": ("lte", "train"), "GLOO_SOCKET_IFNAME": "lo"}
    nodes = [start_node(family, store, recipe, **start) for _ in range(2)]
    nodes[0].until_round(tmp_path / "run", 3)
    pid = rank_pid(family, 3)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    ended(*nodes)
    whole = write(tmp_path, shards, "whole.yaml", **of_method, run__dir="whole")
    ended(family.start("train", whole))
    assert done(tmp_path / "run")["master_digest"] == done(tmp_path / "whole")["master_digest"]


@pytest.mark.nodes
@pytest.mark.timeout(300)
def test_nodes_may_join_a_run_that_goes(
    family: Family, store: TCPStore, shards: Path, tmp_path: Path
) -> None:
    """--nnodes 1:2: the first node's two begin alone. When the second node comes torchrun starts all anew,
    and the others join. Meanwhile the run is held up: a worker of its quorum is stopped.

    With torch 2.13 no node can come later while torchrun shares its store: the first node tells its address
    in the first round only, and whoever comes in another waits for it in vain."""
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    quick = {"train__rounds": 30, "server__checkpoint_every": 10}
    recipe = write(tmp_path, shards, **(TWO | quick))
    first = start_node(family, store, recipe, nodes="1:2", **apart)
    first.until_round(tmp_path / "run", 2)
    pid = rank_pid(family, 1)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    second = start_node(family, store, recipe, nodes="1:2", **apart)
    first.until(lambda: "closing signal SIGTERM" in first.err or None, "restart")
    os.kill(pid, signal.SIGCONT)
    first.until_round(tmp_path / "run", 4)
    ended(first, second)
    assert versions(tmp_path / "run") == list(range(1, 31))
    joined = {line["worker_id"] for line in lines(tmp_path / "run", "event") if line["what"] == "joined"}
    assert joined > {"w0", "w1"}


# Where the server is


def two_workers(family: Family, shards: Path, tmp_path: Path) -> str:
    """Digest of a run of two workers by `lte train`."""
    recipe = write(tmp_path, shards, "two.yaml", **TWO, run__dir="two", server__address="tcp://127.0.0.1:*")
    command = family.start("train", recipe)
    assert command.ended() == 0, command.err
    return str(done(tmp_path / "two")["master_digest"])


TWO: dict[str, Any] = {"train__workers": 2, "server__quorum": 2, "train__rounds": 4}


def test_the_server_may_have_a_rank_of_its_own(family: Family, shards: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, shards, **TWO, server__place="alone")
    ended(start_alone(family, 3, recipe))
    assert done(tmp_path / "run")["master_digest"] == two_workers(family, shards, tmp_path)
    ended(start_alone(family, 3, recipe))  # finished already


def test_torchruns_may_work_for_a_server_that_they_reach_by_zmq(
    family: Family, shards: Path, tmp_path: Path
) -> None:
    """Between nodes zmq, with keys; each node is a torchrun of its own, here of one rank."""
    folder = tmp_path / "keys"
    pairs = {name: keys.create(folder / name) for name in ("server", "w0", "w1")}
    (folder / "allow").write_text("".join(f"w{k} {pairs[f'w{k}'].public}\n" for k in range(2)))
    ours = {"server__key": str(folder / "server.secret"), "server__allow": str(folder / "allow")}
    recipe = write(tmp_path, shards, **TWO, **ours, server__address="tcp://127.0.0.1:*")
    server = family.start("server", recipe)
    address = server.until_said(r"tcp://127\.0\.0\.1:\d+")[0]
    words = [recipe, f"server.address={address}", "server.place=elsewhere", "--keys", folder]
    nodes = [start_alone(family, 1, *words, "--first", str(k)) for k in range(2)]
    ended(server, *nodes)
    assert done(tmp_path / "run")["master_digest"] == two_workers(family, shards, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], meeting.ENV),
        (["server.address=tcp://127.0.0.1:7"], "tcp://127.0.0.1:7"),
        (["server.address=tcp://*:*", "server.insecure=true"], "file://run/address"),
        (["server.place=elsewhere"], "tcp://127.0.0.1:5555"),
    ],
)
def test_workers_look_where_the_server_is_said_to_be(
    tmp_path: Path, shards: Path, overrides: list[str], expected: str
) -> None:
    recipe = str(write(tmp_path, shards))
    settings = torchrun.with_address(recipe, overrides)
    assert torchrun.address_of(config.load(recipe, settings)) == expected


# Mistakes


@pytest.mark.parametrize(
    ("overrides", "environment", "line"),
    [
        ([], {}, "RANK and WORLD_SIZE are not set: start this by 'torchrun"),
        (
            [],
            {"RANK": "1", "WORLD_SIZE": "2"},
            "train.workers: 4, but torchrun started 2 processes; set train.workers=2",
        ),
        (
            ["server.place=alone"],
            {"RANK": "1", "WORLD_SIZE": "4"},
            "train.workers: 4, but torchrun started 3 processes beside the server's; set train.workers=3",
        ),
        ([], {"RANK": "0", "WORLD_SIZE": "4"}, "MASTER_ADDR and MASTER_PORT are not set"),
        (
            ["run.resume=never"],
            {"RANK": "0", "WORLD_SIZE": "4"},
            "run.resume=never: nothing tells this torchrun's first start from a later",
        ),
        (["train.method=ddp"], {"RANK": "0", "WORLD_SIZE": "4"}, "train.method: ddp has no server"),
        (["train.wrkers=3"], {}, "train.workers"),
        (["--wrong"], {}, "--wrong"),
        (
            ["server.place=elsewhere", "server.address=tcp://127.0.0.1"],
            {"RANK": "1", "WORLD_SIZE": "4"},
            "tcp://127.0.0.1",
        ),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path,
    shards: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    environment: dict[str, str],
    line: str,
) -> None:
    for variable in ("MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("lte.signals.at_parents_death", lambda number: None)
    recipe = str(write(tmp_path, shards, run__dir=str(tmp_path / "run")))
    assert torchrun.main([recipe, *overrides], environment) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("lte: ")
    assert line in said


def test_a_server_that_cannot_start_ends_its_rank(
    family: Family, store: TCPStore, shards: Path, tmp_path: Path
) -> None:
    """With the reason, and the code of a mistake, while the worker beside it looks for it."""
    recipe = write(tmp_path, shards, **TWO, data__shards="nowhere")
    said = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    at_store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    command = family.start_python("-m", "launch.torchrun", recipe, **said, **at_store)
    assert command.ended() == 2
    assert command.err_lines[0].startswith("lte: nowhere: ")
