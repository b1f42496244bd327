"""Python processes that are forked from one that has torch and its like loaded.

To start Python and to load those takes 3 s of a core; a fork takes some milliseconds. A fork runs the
same code from `lte/__main__.py` on, with arguments, environment, folder, standard streams, signals
and descriptors as a new process has them. What it shares with its brothers: the seed of its hashes, and
all that modules do when they are loaded. So some tests of every kind still execute Python.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["__main__", "preload", "forks"])


@cache
def start_server() -> None:
    """Start the process that forks. Before any thread that trusts the working folder to stay."""
    # It outlives the test that needs it first, so it must not stand in that test's folder. It looks
    # for what it loads where this process does.
    with (
        contextlib.chdir(Path(__file__).parent),
        mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
    ):
        forkserver.ensure_running()


def fork(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process that calls this function."""
    start_server()
    process = _CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def fork_python(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], stdout: Path, stderr: Path
) -> BaseProcess:
    """Start `python WORDS` in a folder, with output to files and no input."""
    return fork(_python_in, tuple(words), folder, dict(environment), stdout, stderr)


def _python_in(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], stdout: Path, stderr: Path
) -> NoReturn:
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    _be_python(words, environment, keep=())


class _ForkedPopen(subprocess.Popen[bytes]):
    """A `python WORDS` of this process, forked from it."""

    def __init__(
        self, args: Sequence[str], *, env: Mapping[str, str], pass_fds: Sequence[int] = (), **options: Any
    ) -> None:
        assert args[0] == sys.executable
        # Popen calls this where it would execute Python next, with streams, session and mask as ordered.
        options["preexec_fn"] = lambda: _be_python(args[1:], env, keep=pass_fds)
        super().__init__(args, env=env, pass_fds=pass_fds, **options)


def _be_python(words: Sequence[str], environment: Mapping[str, str], keep: Sequence[int]) -> NoReturn:
    """Be `python WORDS`, from the start to the end of the process."""
    code = 1
    try:
        _forget(keep)
        os.environ.clear()
        os.environ.update(environment)
        subprocess.Popen = _ForkedPopen  # type: ignore[misc]
        code = _run(list(words))
    except BaseException:
        traceback.print_exc()
    finally:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def _forget(keep: Sequence[int]) -> None:
    """Undo what only a fork inherits: descriptors, streams, signal handlers, Popen's pause of `gc`."""
    for descriptor in range(3, 1 + max(map(int, os.listdir("/proc/self/fd")))):
        if descriptor not in keep:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as Python has them when it starts
        signal.signal(number, signal.SIG_IGN)
    gc.enable()


def _run(words: list[str]) -> int:
    """Run a module (-m NAME) or a script; returns the exit code."""
    of_module = words[0] == "-m"
    name, *arguments = words[1:] if of_module else words
    sys.argv = [name, *arguments]
    sys.path.insert(0, os.getcwd() if of_module else str(Path(name).parent.resolve()))
    # As `top` shows it, and Family finds it: what was executed here stands in the command line.
    Path("/proc/self/comm").write_text(" ".join([name, *arguments][:2])[:15])
    try:
        if of_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        return 1 if isinstance(end.code, str) else end.code or 0
    return 0
