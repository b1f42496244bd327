"""The server is started again on another machine, so to say: at another address, which it posts."""

from __future__ import annotations

import signal

import pytest
from cluster import ROUNDS, Cluster, Fault, audit

MERGED = "lte.server.master:Master.requantize"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1], ids=["killed", "preempted"])
def test_workers_follow_a_server_that_moves_and_change_no_bit(
    cluster: Cluster, undisturbed: str, number: int
) -> None:
    address = f"file://{cluster.run}/address"
    workers = [cluster.work(name, address=address) for name in ("a", "b")]  # before there is a server
    code = 3 if number == signal.SIGUSR1 else -number
    cluster.ended(cluster.serve(Fault(MERGED, call=3, number=number)), code)
    server = cluster.serve(server__address=f"ipc://{cluster.folder}/elsewhere")
    for process in (server, *workers):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    audit(cluster.run, ROUNDS, {"a", "b"})
    assert cluster.events("refused") == cluster.events("recalled") == []
