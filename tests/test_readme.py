"""Every command and snippet of the README runs, in the order in which it stands there.

The runs are made small by overrides added to `lte train` and `lte server`, ports are free ones, and
runs go to a folder of the test. Nothing else is changed.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import Command, Family

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ADDRESS, ANY_PORT = "tcp://127.0.0.1:5555", "tcp://127.0.0.1:*"
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


@pytest.fixture
def family(folder: Path) -> Iterator[Family]:
    family = Family(folder)
    yield family
    family.close()


def run(command: str, family: Family, *more: str) -> str:
    """Run a command line of the README; returns what it printed."""
    started = start(command, family, *more)
    assert started.ended() == 0, started.err
    return started.out


def start(command: str, family: Family, *more: str) -> Command:
    tool, *words = shlex.split(command)
    assert tool == "lte"
    return family.start(*words, *more)


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
        ["lte", "convert"],
        ["lte", "data"],
        ["lte", "train"],
        ["lte", "report"],
        ["lte", "train"],
        ["lte", "train"],
        ["lte", "export"],
        ["lte", "export"],
        ["lte", "export"],
        ["lte", "train"],
        ["lte", "server"],
        ["lte", "worker"],
        ["lte", "keys"],
        ["lte", "keys"],
        ["echo", '"alice'],
        ["lte", "server"],
        ["lte", "worker"],
        ["lte", "plan"],
        ["lte", "plan"],
        ["lte", "simulate"],
    ]


def test_make_train_trains_the_quickstart(tmp_path: Path) -> None:
    """With this environment in place of .venv, shards of its own, and one worker of the four."""
    arguments = (
        f"{' '.join(SMALL)} train.workers=1 run.dir={tmp_path / 'run'} data.shards={tmp_path / 'shards'}"
    )
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


def test_own_text(folder: Path, family: Family) -> None:
    pack, train, generate, evaluate = blocks("sh")[2].splitlines()
    assert "training" in run(pack, family)
    assert "finished at round 2 of 2" in run(train, family, *SMALL)
    assert run(generate, family).startswith("Once upon a time")
    assert "validation loss" in run(evaluate, family)
    (tmp,) = (folder / "runs").iterdir()
    assert tmp.name == "book"


def test_other_models_and_images(folder: Path, family: Family) -> None:
    pytest.importorskip("transformers")
    convert, pack, train, report = blocks("sh")[3].splitlines()
    assert "model.layers.7.mlp.down_proj.weight" in run(convert, family)
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(40):
            pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    assert "2 classes" in run(pack, family)
    assert "accuracy" in run(train, family, *SMALL, "log.diagnostics_every=1")
    run(report, family)
    assert (folder / "heads.png").stat().st_size > 10_000


def test_other_methods_and_exports(folder: Path, family: Family) -> None:
    pytest.importorskip("peft")
    pack, train, _, _ = blocks("sh")[2].splitlines()
    run(pack, family)
    for method in blocks("sh")[4].splitlines():
        assert "finished at round 2 of 2" in run(method, family, *SMALL)
    run(train, family, *SMALL)
    *exports, again = blocks("sh")[5].splitlines()
    for export in exports:
        run(export, family)
    assert (folder / "exports" / "model" / "config.json").exists()
    assert len(list((folder / "exports" / "heads").glob("*-head-0"))) == 4
    assert "finished at round 2 of 2" in run(again, family, *SMALL)


def test_server_and_workers_by_hand(family: Family) -> None:
    run(blocks("sh")[2].splitlines()[0], family)
    server, worker = blocks("sh")[6].strip(), blocks("sh")[7].strip()
    serving = start(server.replace(ADDRESS, ANY_PORT), family, *SMALL, "data.shards=data/book")
    address = serving.until_said(r"tcp://127\.0\.0\.1:\d+")[0]
    workers = [start(worker.replace(ADDRESS, address), family) for _ in range(4)]
    assert [one.ended() for one in (*workers, serving)] == [0] * 5
    assert "finished at round 2 of 2" in serving.out


def test_keys(folder: Path, family: Family) -> None:
    """As alice's run alone, with a second worker whose key is not on the list."""
    run(blocks("sh")[2].splitlines()[0], family)
    new_server, new_alice, allow, server = blocks("sh")[8].splitlines()
    worker = blocks("sh")[9].strip()
    for command in (new_server, new_alice, new_alice.replace("alice", "mallory")):
        run(command, family)
    subprocess.run(allow, shell=True, cwd=folder, check=True)
    server = server.replace("tcp://*:5555", "tcp://*:*")
    serving = start(server, family, *SMALL, "data.shards=data/book", "train.workers=1")
    port = serving.until_said(r"tcp://[\d.]+:(\d+)")[1]
    worker = worker.replace("HOST:5555", f"127.0.0.1:{port}")
    refused = start(worker.replace("alice", "mallory"), family)
    assert refused.ended() == 2
    assert "does not admit this key" in refused.err
    assert "alice joined" in run(worker, family)
    assert serving.ended() == 0
    assert "finished at round 2 of 2" in serving.out


def test_plans(family: Family) -> None:
    for command in blocks("sh")[10].splitlines():
        planned = run(command, family)
        assert "DDP" in planned
        assert "DiLoCo" in planned


def test_a_simulation(family: Family) -> None:
    pytest.importorskip("simpy")
    told = run(blocks("sh")[11].strip(), family)
    assert "rounds/h" in told


def test_own_model(folder: Path, family: Family) -> None:
    """The Python snippet, as a file of its own: one server, two workers; it learns."""
    (script,) = blocks("python")
    (folder / "own.py").write_text(script)
    server = family.start_python("own.py", "server", ANY_PORT)
    address = server.until_said(r"tcp://127\.0\.0\.1:\d+")[0]
    workers = [family.start_python("own.py", "worker", address) for _ in range(2)]
    assert [one.ended() for one in (*workers, server)] == [0] * 3
    first, *_, last = re.findall(r"eval .*valid (\d\.\d+)", server.out)
    assert float(last) < 0.75 * float(first)


def test_the_files_that_the_readme_shows_are_there() -> None:
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    tree = README.split("## The tree")[1].split("```")[1]
    for name in re.findall(r"^(\w+)/ ", tree, flags=re.MULTILINE):
        assert (ROOT / name).is_dir(), name
    for name in re.findall(r"[a-z]+\.py", tree):
        assert (ROOT / "lte" / name).is_file(), name
