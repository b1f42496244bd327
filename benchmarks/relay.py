"""Bytes on the slow link of a site, with and without a relay: real processes, and a TCP proxy that counts.

    python benchmarks/relay.py [--workers 1,2,4,8] [--rounds 10] [--config CONFIG] [key=value ...]

The proxy stands for the link: all connections of the site to the server pass it. Counted is what TCP carries
of them, envelopes and all, from the first Hello to the last Leave: the model is in it once for each worker
that joins, or once. "Downloads" are these bytes down over those of one worker without a relay in a run of
as many: 1 is the least there can be. The master must come out the same, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from runs import header, records, row, shards_of

RUNS = Path("runs/relay")
RECIPE = "configs/quickstart.yaml"
TEXT = "data/tinyshakespeare/input.txt.gz"
SETTINGS = [
    "train.local_steps=1",
    "train.batch_size=2",
    "eval.every=0",
    "eval.final_tokens=2000",
    "eval.sample_tokens=0",
    "log.diagnostics_every=0",
    "server.silence_s=120",
    "run.resume=never",
]
"""Of all runs: little arithmetic, as it is bytes that count."""


class Meter:
    """A TCP proxy before a server that counts what passes.

    Attributes:
        port: where it listens. up_bytes, down_bytes: to the server and from it, so far.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.up_bytes = self.down_bytes = 0
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="meter", daemon=True)
        self._thread.start()

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wake.close()
        self._thread.join()
        self._woken.close()
        self._listener.close()

    def _serve(self) -> None:
        ways: dict[socket.socket, tuple[socket.socket, bool]] = {}  # source -> (target, whether it is upward)
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as open_:
            for each in (self._listener, self._woken):
                selector.register(each, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    source = key.fileobj
                    assert isinstance(source, socket.socket)
                    if source is self._woken:
                        return
                    if source is self._listener:
                        for one, other, is_up in self._accepted():
                            open_.enter_context(one)
                            ways[one] = other, is_up
                            selector.register(one, selectors.EVENT_READ)
                    elif source in ways and not self._pass(source, *ways[source]):
                        for end in (source, ways[source][0]):
                            selector.unregister(end)
                            del ways[end]
                            end.close()

    def _accepted(self) -> Iterator[tuple[socket.socket, socket.socket, bool]]:
        below, _ = self._listener.accept()
        try:
            above = socket.create_connection(("127.0.0.1", self._server_port))
        except ConnectionRefusedError:  # it is not there yet: whoever came tries again
            below.close()
            return
        yield below, above, True
        yield above, below, False

    def _pass(self, source: socket.socket, target: socket.socket, is_up: bool) -> bool:
        """Pass on what has come; False at the end."""
        try:
            chunk = source.recv(1 << 16)
            target.sendall(chunk)
        except OSError:
            return False
        self.up_bytes += len(chunk) * is_up
        self.down_bytes += len(chunk) * (not is_up)
        return bool(chunk)


@dataclass(frozen=True)
class Figures:
    """What a run came to: bytes on the link, those that its records tell, and its master."""

    up_bytes: int
    down_bytes: int
    recorded_up_bytes: int
    recorded_down_bytes: int
    master_digest: str


def main() -> None:
    parser = argparse.ArgumentParser(description="Count bytes on a site's link, with and without a relay.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe")
    parser.add_argument("--config", default=RECIPE, help=f"default: {RECIPE}")
    parser.add_argument("--workers", default="1,2,4,8", help="default: 1,2,4,8")
    parser.add_argument("--rounds", type=int, default=10, help="of each run (default: 10)")
    parser.add_argument("--text", default=TEXT, metavar="FILE", help=f"default: {TEXT}")
    arguments = parser.parse_args()
    own = [*SETTINGS, f"data.shards={shards_of(arguments.text, RUNS)}", f"train.rounds={arguments.rounds}"]
    titles = ["down, MB", "down by relay, MB", "downloads", "up, MB", "up by relay, MB"]
    header(["workers", *titles])
    for workers in map(int, arguments.workers.split(",")):
        settings = [*own, *arguments.overrides, f"train.workers={workers}"]
        direct, relayed = (measured(arguments.config, settings, workers, by_relay=by) for by in (False, True))
        assert direct.master_digest == relayed.master_digest, "a relay changed the master"
        row([workers, *cells(direct, relayed, workers)])


def cells(direct: Figures, relayed: Figures, workers: int) -> list[str]:
    """A row's figures, behind the number of workers."""
    bytes_ = [direct.down_bytes, relayed.down_bytes, direct.up_bytes, relayed.up_bytes]
    found = [f"{n / 1e6:.2f}" for n in bytes_]
    return [*found[:2], f"{downloads(direct, relayed, workers):.3f}", *found[2:]]


def downloads(direct: Figures, relayed: Figures, workers: int) -> float:
    """How often the relay's link carries what one worker without it is sent."""
    return relayed.down_bytes / (direct.down_bytes / workers)


def measured(config: str, settings: Sequence[str], workers: int, *, by_relay: bool) -> Figures:
    """Run a recipe with its workers at one site."""
    run = RUNS / f"{workers}-{'relay' if by_relay else 'direct'}"
    address = [f"run.dir={run}", "server.address=tcp://127.0.0.1:*"]
    with contextlib.ExitStack() as ended:
        server = started(ended, "server", config, *settings, *address)
        assert server.stdout is not None
        meter = ended.enter_context(Meter(port_in(server)))
        site = meter.port
        if by_relay:
            listen = ("--listen", "tcp://127.0.0.1:*")
            relay = started(ended, "relay", "--server", f"tcp://127.0.0.1:{site}", *listen)
            site = port_in(relay)
        names = [f"w{n}" for n in range(workers)]
        where = ("worker", "--server", f"tcp://127.0.0.1:{site}", "--wait", "300", "--id")
        for worker in [started(ended, *where, name) for name in names]:
            worker.communicate()
            assert worker.returncode == 0
        server.communicate()
        assert server.returncode == 0
        done = records(run)[-1]
        recorded = done["uplink_bytes"], done["downlink_bytes"]
        return Figures(meter.up_bytes, meter.down_bytes, *recorded, done["master_digest"])


def started(ended: contextlib.ExitStack, *arguments: str) -> subprocess.Popen[str]:
    """An `lte` command that is ended in the end."""
    command = [sys.executable, "-m", "lte", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def end() -> None:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()

    ended.callback(end)
    return process


def port_in(process: subprocess.Popen[str]) -> int:
    """The port in the first line of a command that says how to join."""
    assert process.stdout is not None
    for line in process.stdout:
        if "lte worker --server tcp://127.0.0.1:" in line:
            return int(line.rpartition("lte worker --server tcp://127.0.0.1:")[2].split()[0])
    raise SystemExit(f"it ended with code {process.wait()}")


if __name__ == "__main__":
    main()
