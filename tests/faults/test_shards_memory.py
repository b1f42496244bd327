"""What a divided master takes of the first of its processes, and of who reads it; measured in real ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from forks import fork

from lte import recipes
from lte.server.service import Server

LARGE: dict[str, Any] = {
    "model.num_layers": 4,
    "model.width": 384,
    "model.mlp_width": 1536,
    "train.workers": 1,
    "train.local_steps": 1,
    "train.rounds": 1,
}
MODEL_KB = 4 * (4 * 384**2 + 2 * 384 * 1536) * 4 / 1024
"""Of its weights in fp32, but for some per cent."""


def kilobytes(key: str) -> int:
    """What the system says of this process's memory."""
    found = re.search(key + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


class Peak:
    """The most memory of this process beyond what it has now."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self._before, self._before_of_files = kilobytes("VmRSS"), kilobytes("RssFile")

    def write(self, path: Path) -> None:
        """In sizes of the model, without what files are mapped, such as libraries."""
        of_files = kilobytes("RssFile") - self._before_of_files
        path.write_text(str((kilobytes("VmHWM") - self._before - of_files) / MODEL_KB))


@dataclass(frozen=True)
class Measured:
    """The first process of the server writes its peak, from before it builds the model to its last record."""

    found: Path

    def install(self) -> None:
        serve, peak = Server.serve, Peak()

        def serving(server: Server) -> bool:
            finished = serve(server)
            peak.write(self.found)
            return finished

        Server.serve = serving  # type: ignore[method-assign]


def load(run: Path, found: Path) -> None:
    peak = Peak()
    recipes.load_run(run, "master")
    peak.write(found)


@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_the_first_process_has_a_part_and_one_model(tmp_path: Path, settings: Any) -> None:
    """Whoever reads the run needs one shard's part at a time, too."""
    served, loaded = dict[int, float](), dict[int, float]()
    digests = set()
    for num in (1, 4):
        folder = tmp_path / str(num)
        folder.mkdir()
        cluster = Cluster(folder, settings | LARGE)
        try:
            server = cluster.serve(Measured(folder / "served"), server__shards=num)
            for process in (server, cluster.work("a")):
                cluster.ended(process, 0)
            reader = fork(load, cluster.run, folder / "loaded")
            cluster.processes.append(reader)
            cluster.ended(reader, 0)
            digests.add(cluster.master_digest())
        finally:
            cluster.close()
        served[num], loaded[num] = (float((folder / name).read_text()) for name in ("served", "loaded"))
    assert len(digests) == 1
    assert served[4] < 0.8 * served[1], served
    assert loaded[4] < 0.7 * loaded[1], loaded
