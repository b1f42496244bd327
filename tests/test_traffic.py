"""The bytes of the records against what TCP and the interface counted, in network namespaces."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import HUB_ADDRESS, Network, star

from lte.data import pack
from lte.track import METRICS, Records

WORKER = '''
"""A worker that prints what the kernel counted on its connection and interface before it leaves."""
import json, os, socket, stat, struct, sys
from pathlib import Path
from lte.transport.zmq import ZmqWorker

def is_socket(fd):
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:  # closed since: the listing's own
        return False

def counted():
    for fd in map(int, os.listdir("/proc/self/fd")):
        if not is_socket(fd):
            continue
        with socket.socket(fileno=os.dup(fd)) as connection:
            if connection.family == socket.AF_INET:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                (unacked,) = struct.unpack_from("=I", info, 24)  # tcpi_unacked, segments
                return unacked, struct.unpack_from("=QQ", info, 120)  # tcpi_bytes_acked, _received
    raise SystemExit("no connection is open")

close = ZmqWorker.close
def closing(self):
    while (count := counted())[0]:  # until all that was sent is acknowledged
        pass
    statistics = Path("/sys/class/net/eth0/statistics")
    device = [int((statistics / name).read_text()) for name in ("tx_bytes", "rx_bytes")]
    print(json.dumps({"tcp": count[1], "device": device}), flush=True)
    close(self)
ZmqWorker.close = closing
from lte import recipes
recipes.work(f"tcp://{sys.argv[1]}:5555", wait_s=60, say=lambda line: None)
'''


@pytest.fixture
def network() -> Iterator[Network]:
    """Two machines with a cable between them."""
    with star(num_leaves=1) as network:
        yield network


def test_recorded_bytes_are_what_tcp_and_the_interface_carried(network: Network, tmp_path: Path) -> None:
    """Within 2 % of TCP's bytes and 8 % of the interface's, each way."""
    (tmp_path / "text.txt").write_text("".join(f"{n} bottles of beer on the wall. " for n in range(900)))
    pack([tmp_path / "text.txt"], tmp_path / "shards", num_shards=1)
    settings = {
        "run.dir": tmp_path / "run",
        "data.shards": tmp_path / "shards",
        "model.num_layers": 1,
        "model.width": 256,
        "model.mlp_width": 1024,
        "model.context_tokens": 16,
        "train.workers": 1,
        "train.rounds": 8,
        "train.local_steps": 1,
        "train.batch_size": 1,
        "server.address": f"tcp://{HUB_ADDRESS}:5555",
        "server.insecure": True,
        "eval.every": 0,
        "eval.final_tokens": 512,
        "eval.sample_tokens": 0,
    }
    (tmp_path / "recipe.yaml").write_text("")
    overrides = [f"{key}={value}" for key, value in settings.items()]
    inside = ["ip", "netns", "exec"]
    server = subprocess.Popen(
        [*inside, network.hub, sys.executable, "-m", "lte", "server", tmp_path / "recipe.yaml", *overrides],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        worker = subprocess.run(
            [*inside, network.leaves[0], sys.executable, "-c", WORKER, HUB_ADDRESS],
            stdout=subprocess.PIPE,
            text=True,
            timeout=100,
            check=True,
        )
        said, _ = server.communicate(timeout=100)
    finally:
        server.kill()
        server.communicate()
    assert server.returncode == 0, said
    counted = json.loads(worker.stdout)
    (done,) = [line for line in Records.read(tmp_path / "run" / METRICS) if line["kind"] == "done"]
    payload = done["uplink_bytes"], done["downlink_bytes"]
    assert min(payload) > 300_000, "too little for a share to mean anything"
    for ours, tcps, devices in zip(payload, counted["tcp"], counted["device"], strict=True):
        assert ours == pytest.approx(tcps, rel=0.02)
        assert ours == pytest.approx(devices, rel=0.08)
