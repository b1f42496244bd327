"""Every command and snippet of the README runs, in the order in which it stands there.

The runs are made small by overrides added to `lte train` and `lte server`, ports are free ones, and
runs go to a folder of the test. Nothing else is changed.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = [
    "train.rounds=2",
    "train.local_steps=2",
    "train.batch_size=2",
    "schedule.warmup_steps=0",
    "eval.tokens=256",
    "eval.final_tokens=256",
    "eval.sample_tokens=20",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout as the reader has it: the recipes, and a text of their own."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "book.txt").write_text("Once upon a time there was a book. " * 2000)
    return tmp_path


def run(command: str, folder: Path, *more: str) -> str:
    """Run a command line of the README; returns what it printed."""
    words = [sys.executable, "-m", *shlex.split(command), *more]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_shell_blocks_are_the_ones_tested_here() -> None:
    """A block added to the README must be given to a test."""
    commands = [line.split()[:2] for block in blocks("sh") for line in block.splitlines()]
    assert commands == [
        ["make", "train"],
        ["make", "test"],
        ["lte", "data"],
        ["lte", "train"],
        ["lte", "generate"],
        ["lte", "eval"],
        ["lte", "server"],
        ["lte", "worker"],
        ["lte", "keys"],
        ["lte", "keys"],
        ["echo", '"alice'],
        ["lte", "server"],
        ["lte", "worker"],
        ["lte", "plan"],
        ["lte", "plan"],
    ]


def test_make_train_trains_the_quickstart(tmp_path: Path) -> None:
    """With this environment in place of .venv, and shards of its own."""
    arguments = f"{' '.join(SMALL)} run.dir={tmp_path / 'run'} data.shards={tmp_path / 'shards'}"
    installed = Path(sys.prefix) / ".installed"
    command = ["make", "train", f"VENV={sys.prefix}", f"SHARDS={tmp_path / 'shards'}", f"ARGS={arguments}"]
    command += ["-o", str(installed)]  # already installed
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "finished at round 2 of 2" in done.stdout
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000


def test_make_test_runs_these_tests() -> None:
    planned = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "bin/pytest" in planned.stdout


def test_own_text(folder: Path) -> None:
    pack, train, generate, evaluate = blocks("sh")[2].splitlines()
    assert "training" in run(pack, folder)
    assert "finished at round 2 of 2" in run(train, folder, *SMALL)
    assert run(generate, folder).startswith("Once upon a time")
    assert "validation loss" in run(evaluate, folder)
    (tmp,) = (folder / "runs").iterdir()
    assert tmp.name == "book"


def test_server_and_workers_by_hand(folder: Path) -> None:
    run(blocks("sh")[2].splitlines()[0], folder)
    server, worker = blocks("sh")[3].strip(), blocks("sh")[4].strip()
    server = server.replace("tcp://127.0.0.1:5555", "tcp://127.0.0.1:*")
    words = [sys.executable, "-m", *shlex.split(server), *SMALL, "data.shards=data/book"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True, env=plain()) as process:
        assert process.stdout is not None
        address = next(
            match[0] for line in process.stdout if (match := re.search(r"tcp://127\.0\.0\.1:\d+", line))
        )
        join = [sys.executable, "-m", *shlex.split(worker.replace("tcp://127.0.0.1:5555", address))]
        workers = [subprocess.Popen(join, cwd=folder, stdout=subprocess.DEVNULL) for _ in range(4)]
        rest = process.stdout.read()
        codes = [one.wait(timeout=60) for one in workers]
    assert codes == [0] * 4
    assert process.returncode == 0
    assert "finished at round 2 of 2" in rest


def test_keys(folder: Path) -> None:
    """As alice's run alone, with a second worker whose key is not on the list."""
    run(blocks("sh")[2].splitlines()[0], folder)
    new_server, new_alice, allow, server = blocks("sh")[5].splitlines()
    worker = blocks("sh")[6].strip()
    for command in (new_server, new_alice, new_alice.replace("alice", "mallory")):
        run(command, folder)
    subprocess.run(allow, shell=True, cwd=folder, check=True)
    server = server.replace("tcp://*:5555", "tcp://*:*")
    words = [sys.executable, "-m", *shlex.split(server), *SMALL, "data.shards=data/book", "train.workers=1"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True, env=plain()) as process:
        assert process.stdout is not None
        port = next(match[1] for line in process.stdout if (match := re.search(r"tcp://[\d.]+:(\d+)", line)))
        worker = worker.replace("HOST:5555", f"127.0.0.1:{port}")
        stranger = [sys.executable, "-m", *shlex.split(worker.replace("alice", "mallory"))]
        refused = subprocess.run(stranger, cwd=folder, capture_output=True, text=True, timeout=60)
        joined = run(worker, folder)
        rest = process.stdout.read()
    assert (refused.returncode, process.returncode) == (2, 0)
    assert "does not admit this key" in refused.stderr
    assert "alice joined" in joined
    assert "finished at round 2 of 2" in rest


def test_plans(folder: Path) -> None:
    for command in blocks("sh")[7].splitlines():
        planned = run(command, folder)
        assert "DDP" in planned
        assert "DiLoCo" in planned


def test_own_model(folder: Path) -> None:
    """The Python snippet, as a file of its own: one server, two workers; it learns."""
    (script,) = blocks("python")
    (folder / "own.py").write_text(script)
    command = [sys.executable, "own.py"]
    server = subprocess.Popen(
        [*command, "server", "tcp://127.0.0.1:*"], cwd=folder, stdout=subprocess.PIPE, text=True, env=plain()
    )
    with server:
        assert server.stdout is not None
        address = next(
            match[0] for line in server.stdout if (match := re.search(r"tcp://127\.0\.0\.1:\d+", line))
        )
        workers = [subprocess.Popen([*command, "worker", address], cwd=folder) for _ in range(2)]
        rest = server.stdout.read()
        codes = [one.wait(timeout=60) for one in workers]
    assert codes == [0, 0]
    assert server.returncode == 0
    first, *_, last = re.findall(r"eval .*valid (\d\.\d+)", rest)
    assert float(last) < 0.75 * float(first)


def plain() -> dict[str, str]:
    """Output as into a pipe, line by line."""
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def test_the_files_that_the_readme_shows_are_there() -> None:
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    tree = README.split("## The tree")[1].split("```")[1]
    for name in re.findall(r"^(\w+)/ ", tree, flags=re.MULTILINE):
        assert (ROOT / name).is_dir(), name
    for name in re.findall(r"[a-z]+\.py", tree):
        assert (ROOT / "lte" / name).is_file(), name
