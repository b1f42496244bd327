"""The `lte` command in processes of its own, and waiting for facts about them: a line of output, a
line of metrics.jsonl, an end. Every wait has a deadline and fails at once where its fact cannot come."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from forks import fork_python, start_server

from lte.track import METRICS, Records

DEADLINE_S = 100.0
"""For whatever must happen; generous, as other jobs may share the machine."""
_LOOK_EVERY_S = 0.01

Line = dict[str, Any]
Found = TypeVar("Found")


class Command:
    """A running command. Its output goes to files in a folder of the test's."""

    def __init__(
        self, pid: int, code_within: Callable[[float], int | None], stdout: Path, stderr: Path
    ) -> None:
        self.pid, self._code_within = pid, code_within
        self.stdout, self.stderr = stdout, stderr

    @property
    def out(self) -> str:
        return self.stdout.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.stderr.read_text(errors="replace")

    @property
    def err_lines(self) -> list[str]:
        return self.err.splitlines()

    def signal(self, number: int) -> None:
        if self._code_within(0) is None:
            os.kill(self.pid, number)

    def until(self, look: Callable[[], Found | None], what: str) -> Found:
        """Wait until `look` finds something, for as long as the command runs."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            code = self._code_within(_LOOK_EVERY_S)
            if (found := look()) is not None:
                return found
            assert code is None, f"ended before {what}:\n{self.out}\n{self.err}"
            assert time.monotonic() < deadline, f"no {what} in {DEADLINE_S:g} s:\n{self.out}\n{self.err}"

    def until_said(self, pattern: str) -> re.Match[str]:
        """Wait for standard output to hold this."""
        return self.until(lambda: re.search(pattern, self.out), repr(pattern))

    def until_round(self, run: Path, version: int) -> None:
        """Wait for a run's records to hold a version's round."""
        self.until(lambda: (versions(run) or [0])[-1] >= version or None, f"round {version} of {run.name}")

    def ended(self, within_s: float = DEADLINE_S) -> int:
        """Wait for the end; returns the exit code."""
        code = self._code_within(within_s)
        assert code is not None, f"still runs after {within_s:g} s:\n{self.out}\n{self.err}"
        return code


class Family:
    """All commands that a test starts in a folder, and all that these start: found by where they stand."""

    def __init__(self, folder: Path) -> None:
        start_server()
        self.folder = folder
        self._commands: list[Command] = []

    def start(self, *arguments: str | Path, **environment: str) -> Command:
        """Start `lte ARGUMENTS`, forked, as are the commands that it starts; with more environment."""
        return self.start_python("-m", "lte", *arguments, **environment)

    def start_python(self, *words: str | Path, **environment: str) -> Command:
        """Start `python WORDS`, forked."""
        given, files = [str(word) for word in words], self._output()
        process = fork_python(given, self.folder, {**os.environ, **environment}, *files)

        def code_within(seconds: float) -> int | None:
            process.join(seconds)
            return process.exitcode

        assert process.pid is not None
        return self._add(Command(process.pid, code_within, *files))

    def execute(self, *arguments: str | Path, before: Sequence[str] = (), **options: Any) -> Command:
        """Start `lte ARGUMENTS` as a user does, by a new Python; options are Popen's, and `before`: words
        before python. For claims about what precedes `main`, or about what a process inherits."""
        return self.execute_python("-m", "lte", *arguments, before=before, **options)

    def execute_python(self, *words: str | Path, before: Sequence[str] = (), **options: Any) -> Command:
        """The same for `python WORDS`."""
        stdout, stderr = files = self._output()
        with stdout.open("wb") as out, stderr.open("wb") as err, ctrl_c_arrives():
            process: subprocess.Popen[bytes] = subprocess.Popen(
                [*before, sys.executable, *map(str, words)],
                cwd=self.folder,
                **{"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, **options},
            )

        def code_within(seconds: float) -> int | None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            return process.returncode

        return self._add(Command(process.pid, code_within, *files))

    def _output(self) -> tuple[Path, Path]:
        name = uuid.uuid4().hex[:6]
        files = self.folder / f"{name}.out", self.folder / f"{name}.err"
        for path in files:
            path.touch()
        return files

    def _add(self, command: Command) -> Command:
        self._commands.append(command)
        return command

    def members(self, role: str = "") -> list[int]:
        """Process ids of those alive whose `lte` command is `role`; without one, of all."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # it has ended, or is another user's
                if not entry.name.isdecimal() or not (entry / "cwd").samefile(self.folder):
                    continue
                words, name = (entry / "cmdline").read_bytes().split(b"\0"), (entry / "comm").read_text()
                if not role or words[2:4] == [b"lte", role.encode()] or name == f"lte {role}\n":
                    found.append(int(entry.name))
        return sorted(set(found) - {os.getpid()})

    def members_of(self, module: str) -> list[int]:
        """Those who are `python -m MODULE`, forked ones, too."""
        found = []
        for pid in self.members():
            with suppress(OSError):  # it has ended
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                name = Path(f"/proc/{pid}/comm").read_text()
                if module.encode() in words or name.startswith(f"{module} "):
                    found.append(pid)
        return found

    def kill(self, *pids: int) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def until_all_ended(self, within_s: float) -> None:
        """Wait until nobody of the family is alive."""
        deadline = time.monotonic() + within_s
        for pid in self.members():
            with suppress(ProcessLookupError), _watched(pid) as end:
                assert select.select([end], [], [], max(0.0, deadline - time.monotonic()))[0], (
                    f"process {pid} is left: {Path(f'/proc/{pid}/cmdline').read_bytes()!r}"
                )
        assert self.members() == []

    def close(self) -> None:
        """See that nobody was left behind and nobody wrote a traceback."""
        left = self.members()
        self.kill(*left)
        for command in self._commands:
            command.signal(signal.SIGKILL)  # one that was still on its way into the folder
            command.ended()
        assert left == []
        for path in [*self.folder.rglob("*.log"), *self.folder.rglob("*.out"), *self.folder.rglob("*.err")]:
            assert "Traceback" not in path.read_text(errors="replace"), path.read_text(errors="replace")


@contextmanager
def _watched(pid: int) -> Iterator[int]:
    """A descriptor that becomes readable when the process ends, whoever its parent is."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def ctrl_c_arrives() -> Iterator[None]:
    """Children ignore SIGINT if this process does, as in the background of a script."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# Records


def lines(run: Path, kind: str) -> list[Line]:
    """A run's lines of one kind."""
    return [line for line in Records.read(run / METRICS) if line["kind"] == kind]


def versions(run: Path) -> list[int]:
    """Versions of a run's `round` lines."""
    return [line["version"] for line in lines(run, "round")]


def done(run: Path) -> Line:
    """A run's `done` line, which must be its last."""
    last = Records.read(run / METRICS)[-1]
    assert last["kind"] == "done"
    return last


def saved_versions(run: Path) -> list[int]:
    """Versions of a run's checkpoints."""
    return [int(path.name.removeprefix("version-")) for path in sorted(run.glob("checkpoints/version-*"))]
