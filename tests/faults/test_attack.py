"""Strangers send random, mutated and repeated frames to a server while two workers train. The attacks
are those of `benchmarks/fuzz.py`, with fewer frames."""

from __future__ import annotations

import random
from pathlib import Path

import fuzz
from cluster import ROUNDS, Cluster, audit
from watched import Watched

from lte.track import METRICS

NUM_FRAMES = 600
"""Before the first round, and again while rounds are merged."""


def test_strangers_change_no_bit_and_are_answered(cluster: Cluster, tmp_path: Path) -> None:
    cluster.settings |= {"compress.part_bytes": 16384, "server.max_message_bytes": fuzz.MAX_MESSAGE_BYTES}
    recorded = fuzz.record(cluster.settings, tmp_path / "recorded")
    server = cluster.serve(server__silence_s=30.0)
    cluster.work("w0")
    cluster.until(lambda: any("w0" in event for event in cluster.events("joined")), "w0 that joined")
    attacker = fuzz.Attacker(cluster.address)
    watched = Watched(server.pid or 0)
    try:
        sending = fuzz.strangers(attacker, recorded, random.Random(0))
        for _ in range(NUM_FRAMES // 200):
            for _ in range(200):
                next(sending)
            attacker.ask()
        cluster.work("w1")
        for _ in range(NUM_FRAMES):
            if not server.is_alive():
                break
            next(sending)
        cluster.ended(server, 0)
    finally:
        attacker.close()
        watched.close()
    assert cluster.master_digest() == recorded.digest
    audit(cluster.run, ROUNDS, {"w0", "w1"})
    assert len(attacker.answers_s) == NUM_FRAMES // 200
    assert (cluster.run / METRICS).stat().st_size < 200_000
    assert watched.peak_bytes < watched.samples[0][1] + (256 << 20)
