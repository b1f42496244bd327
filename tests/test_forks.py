"""A forked Python finds what an executed one finds, and so do those that it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forks import fork_python
from processes import ctrl_c_arrives

SCRIPT = """
import gc, json, os, re, signal, subprocess, sys, threading

FDS = "/proc/self/fd"
ignored = int(re.search(r"SigIgn:\\s*(\\w+)", open("/proc/self/status").read())[1], 16)
found = {
    "name": __name__,
    "argv": sys.argv,
    "path": sys.path[0],
    "folder": os.getcwd(),
    "environment": {name: value for name, value in os.environ.items() if name != "LC_CTYPE"},
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
    "ignores": [ignored >> number - 1 & 1 for number in (signal.SIGPIPE, signal.SIGXFSZ)],
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "descriptors": sorted(int(fd) for fd in os.listdir(FDS) if os.path.exists(f"{FDS}/{fd}")),
    "collects": gc.isenabled(),
    "threads": threading.active_count(),
    "leads": os.getsid(0) == os.getpid(),
    "input": sys.stdin.read(),
}
print(json.dumps(found))
print("complaint", file=sys.stderr)
sys.stdout.flush()
if len(sys.argv) == 1:
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)  # a descriptor that is not passed on all the same
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)
    child = subprocess.Popen(
        [sys.executable, sys.argv[0], "child", str(writing)],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "ALSO": "1"},
        pass_fds=(writing,),
        start_new_session=True,
    )
    os.close(writing)
    with os.fdopen(reading) as pipe:
        print(pipe.read())
    print(child.wait())
else:
    os.write(int(sys.argv[2]), b"a word")
raise SystemExit(7)
"""


@pytest.mark.parametrize("forked", [False, True])
def test_a_fork_finds_what_an_executed_python_finds(tmp_path: Path, forked: bool) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    out, err = tmp_path / "out", tmp_path / "err"
    environment = {**os.environ, "GIVEN": "1"}
    if forked:
        process = fork_python(["script.py"], tmp_path, environment, out, err)
        process.join()
        code = process.exitcode
    else:
        with out.open("wb") as stdout, err.open("wb") as stderr, ctrl_c_arrives():
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
            words = [sys.executable, "script.py"]
            code = subprocess.run(words, cwd=tmp_path, env=environment, check=False, **streams).returncode
    parent, child, told, child_code = out.read_text().splitlines()
    assert (code, told, child_code, err.read_text()) == (7, "a word", "7", "complaint\n" * 2)
    found = {
        "name": "__main__",
        "argv": ["script.py"],
        "path": str(tmp_path),
        "folder": str(tmp_path),
        "environment": environment,
        "signals": ["<built-in function default_int_handler>", "0"],
        "ignores": [1, 1],
        "mask": [],
        "descriptors": [0, 1, 2],
        "collects": True,
        "threads": 1,
        "leads": False,
        "input": "",
    }
    assert json.loads(parent) == found
    writing = int(json.loads(child)["argv"][2])
    assert json.loads(child) == found | {
        "argv": ["script.py", "child", str(writing)],
        "environment": {**environment, "ALSO": "1"},
        "mask": [15],
        "descriptors": [0, 1, 2, writing],
        "leads": True,
    }
