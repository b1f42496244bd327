"""A run's folder: who has it, what run it holds, and which server of that run this is."""

from __future__ import annotations

import fcntl
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lte import config, durable
from lte.config import Recipe
from lte.errors import RunError
from lte.server import checkpoint
from lte.server.journal import GENERATION, read_generation
from lte.server.shards import SHARDS
from lte.track import METRICS, Records

LOCKS = ("lock", "starting")
"""Names of files: locked by the server that has the folder, and by the one that is starting on it."""
KEYS = "keys"
"""Name of the folder in a run's where a batch job keeps the keys of server and workers. It stays when
an earlier run is moved aside, as workers hold some of them."""
RUN_ID = "run_id"
"""Name of the file in a run's folder that names the run."""


def is_complete(recipe: Recipe) -> bool:
    """Whether the run in `run.dir` has all the recipe's rounds, so that resuming it has nothing to do.

    Raises:
        RunError: the folder holds a run with other settings.
    """
    folder = Path(recipe.run.dir)
    if recipe.run.resume == "never" or not checkpoint.versions(folder / "checkpoints"):
        return False
    _check_settings(folder, recipe)
    done = [line for line in Records.read(folder / METRICS) if line["kind"] == "done"]
    return bool(done) and bool(done[-1]["rounds"] >= recipe.train.rounds)


def _check_settings(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on with a run of other settings."""
    differences = config.differences(
        config.load(folder / "config.yaml"),
        recipe,
        ("model", "lora", "base", "train", "ddp", "run", "outer.when", "outer.combine", "server.shards"),
    )
    free = ("train.rounds", "run.resume", "run.dir")
    if fixed := sorted(line for line in differences if not line.startswith(free)):
        raise RunError(
            f"{folder}: holds a run with other settings ({'; '.join(fixed)}); choose another"
            " run.dir, or run.resume=never to move it aside"
        )


@dataclass(frozen=True)
class Claim:
    """A server's hold on a run folder, until it is closed. A context manager."""

    _lock: IO[str]
    _starting: IO[str]

    def started(self) -> None:
        """From here on another server may take the folder over: generation, records and journal are
        this one's, and tell it if one does."""
        self._starting.close()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a child must inherit to hold the folder as long as it lives."""
        return (self._lock.fileno(),)

    def close(self) -> None:
        self._starting.close()
        self._lock.close()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def claim(folder: Path, recipe: Recipe, *, take_over: bool) -> Claim:
    """Lock the run folder and decide, by `run.resume`, what becomes of a run that it holds.

    Args:
        take_over: also from a process that has it: its generation fences it then.

    Raises:
        RunError: another process has it or is just starting on it, nothing can be written there, or the
        run in it does not fit.
    """
    resume = recipe.run.resume
    held = lock(folder, take_over=take_over)
    try:
        claim = Claim(held, _lock_to_start(folder))
    except BaseException:
        held.close()
        raise
    try:
        holds_run = bool(checkpoint.versions(folder / "checkpoints"))
        if resume == "must" and not holds_run:
            raise RunError(f"{folder}: holds no run to resume (run.resume=must); use auto to start one")
        if resume == "never" or not holds_run:
            _move_aside(folder)
        else:
            _check_settings(folder, recipe)
    except BaseException:
        claim.close()
        raise
    return claim


def _move_aside(folder: Path) -> None:
    """Rename what an earlier run left, so that nothing is lost and nothing is mixed."""
    kept = [path for path in folder.iterdir() if path.name not in (*LOCKS, KEYS)]
    if not any(path.name in ("checkpoints", "metrics.jsonl", SHARDS) for path in kept):
        return
    n = 1
    while (old := folder.with_name(f"{folder.name}.old-{n}")).exists():
        n += 1
    old.mkdir()
    for path in kept:
        path.rename(old / path.name)


def lock(
    folder: Path,
    *,
    take_over: bool = False,
    cure: str = "choose another run.dir, or take it over from one that hangs (lte server --take-over)",
) -> IO[str]:
    """Claim a run folder for this process, until the returned file is closed.

    Args:
        take_over: also from a process that has it: its generation fences it then.
        cure: what to do about another process that has it.

    Raises:
        RunError: another process has it, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCKS[0]).open("w")
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be a run's folder ({error.strerror}); choose another run.dir"
        ) from None
    if _is_locked(handle) and not take_over:
        handle.close()
        raise RunError(f"{folder}: in use by another server; {cure}")
    return handle


def _lock_to_start(folder: Path) -> IO[str]:
    """Be the one server that starts on a run folder, taken over or not, until the file is closed."""
    handle = (folder / LOCKS[1]).open("w")
    if _is_locked(handle):
        handle.close()
        raise RunError(f"{folder}: another server is starting on it; wait for it, or end it")
    return handle


def _is_locked(handle: IO[str]) -> bool:
    """Whether another process has this file locked; else this one has, until it is closed.

    Raises:
        RunError: its file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        handle.close()
        raise RunError(
            f"{handle.name}: cannot be locked ({error.strerror}); choose a run.dir on a file system that has"
            " locks (Lustre: mounted with -o flock)"
        ) from None
    return False


def next_generation(folder: Path) -> int:
    """Raise the run's generation, durably: it rises with each start of its server."""
    path = folder / GENERATION
    generation = 1 + read_generation(path)
    durable.write(path, f"{generation}\n")
    return generation


def run_id(folder: Path) -> str:
    """The name of the run in a folder, made up when it has none."""
    path = folder / RUN_ID
    if not path.exists():
        durable.write(path, f"{secrets.token_hex(8)}\n")
    return path.read_text().strip()
