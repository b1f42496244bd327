"""A real SLURM cluster on this machine, by the script that SLURM_UP names, and the batch files on it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
NUM_NODES = 4
DEADLINE_S = 300.0
"""For whatever must happen. A node that is cut off is given up after three quarters of a minute."""
_PREFIX = "lteslm"
"""Of network namespaces."""

Found = TypeVar("Found")


@dataclass
class Slurm:
    """A cluster of nodes node1, node2, ...; with `networked` each in a network namespace of its own."""

    folder: Path
    networked: bool

    def submit(self, file: str, *words: str | Path, options: str = "") -> str:
        """Submit a batch file as a user does, from the project's folder; returns the job's id."""
        output = f"--output={self.folder}/job-%j.out"
        command = ["sbatch", "--parsable", output, *shlex.split(options), f"slurm/{file}.sbatch"]
        return self._ask(*command, *map(str, words))

    def state(self, job: str) -> str:
        """Such as RUNNING or COMPLETED; of all elements of an array, or parts of a job, if they agree."""
        return "/".join(sorted({*self._fields(job, "JobState")}))

    def restarts(self, job: str) -> int:
        return max(map(int, self._fields(job, "Restarts")), default=0)

    def nodes(self, job: str) -> str:
        """The nodes of a job's first part, such as node[1-2]."""
        return next(iter(self._fields(job, "NodeList")), "")

    def tell(self, *words: str) -> None:
        """Run one of SLURM's commands."""
        self._ask(*words)

    def output(self) -> str:
        """What all jobs said."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("job-*.out")))

    def until(self, look: Callable[[], Found | None], what: str) -> Found:
        """Wait for a fact."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not (found := look()):
            assert time.monotonic() < deadline_s, f"no {what} in {DEADLINE_S:g} s:\n{self.output()}"
            time.sleep(0.05)
        return found

    def ended(self, job: str, state: str = "COMPLETED") -> None:
        """Wait for a job to end in this state."""
        over = re.compile(r"COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|OUT_OF_MEMORY")
        self.until(lambda: all(map(over.match, self._fields(job, "JobState"))), f"end of job {job}")
        assert self.state(job) == state, self.output()

    # Faults

    def cut(self, node: int) -> None:
        """Take a node off the network; what runs there goes on."""
        subprocess.run(["ip", "-n", f"{_PREFIX}{node}", "link", "set", "eth0", "down"], check=True)

    def mend(self, node: int) -> None:
        subprocess.run(["ip", "-n", f"{_PREFIX}{node}", "link", "set", "eth0", "up"], check=True)

    def crash(self, node: int) -> None:
        """End all that runs on a node, at once, as when its power is cut."""
        pid = int((self.folder / f"slurmd.node{node}.pid").read_text())
        place = os.readlink(f"/proc/{pid}/ns/uts")  # a node's hostname is its own
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdecimal() and os.readlink(entry / "ns" / "uts") == place:
                    os.kill(int(entry.name), signal.SIGKILL)

    def _ask(self, *command: str) -> str:
        inside = ["nsenter", f"--net=/run/netns/{_PREFIX}0", "--"] if self.networked else []
        environment = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "LTE_PYTHON": sys.executable,
        }
        done = subprocess.run(
            [*inside, *command],
            cwd=ROOT,
            env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def _fields(self, job: str, name: str) -> list[str]:
        return re.findall(rf"\b{name}=(\S+)", self._ask("scontrol", "show", "job", job))


@contextmanager
def started(folder: Path, *, networked: bool) -> Iterator[Slurm]:
    """A cluster until the end of the context, when nothing of it is left."""
    up = Path(os.environ["SLURM_UP"])
    settings = {"NODES": str(NUM_NODES), "NS_PREFIX": _PREFIX, "GPUS": "2"}
    network = {"MODE": "veth", "RATE_MBIT": "0", "DELAY_MS": "0"}
    slurm = Slurm(folder / "slurm", networked)
    environment = {**os.environ, **settings, "NET": "netns" if networked else "loopback"}
    try:
        if networked:
            subprocess.run(
                [up.with_name("netns_up.sh"), folder / "netns"], env={**environment, **network}, check=True
            )
        subprocess.run([up, slurm.folder], env=environment, check=True)
        yield slurm
    finally:
        subprocess.run([up.with_name("stop_slurm.sh"), slurm.folder], check=False)
        if networked:
            subprocess.run([up.with_name("netns_down.sh"), "--kill", folder / "netns"], check=False)


def processes(run: Path, *words: str) -> list[int]:
    """Process ids of `lte` commands of a run whose words hold these, ghosts among them."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if not entry.name.isdecimal():
                continue
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if command[1:3] == ["-m", "lte"] and {*words} <= {*command} and str(run) in "\0".join(command):
                found.append(int(entry.name))
    return sorted(found)
