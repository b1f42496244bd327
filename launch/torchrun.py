"""What torchrun starts: a worker on each rank, and the server beside the first.

    torchrun --nnodes 2 --nproc-per-node 2 --max-restarts 3 ... -m launch.torchrun CONFIG [key=value ...]

The server finds its workers through torchrun's store (server.address=collective://env) unless the recipe
or the command names another address. Where a rank fails, torchrun ends and starts all others as well, one
node after the other: each goes on from what it left in run.dir, which all nodes must see. Nobody counts
on the others being of the same attempt: workers look for the server wherever it is now, and the server
takes the run over from the one before.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from launch import children
from launch.arguments import Parser
from launch.exits import code_of
from launch.slurm import LOOPBACK
from lte import recipes, signals
from lte.config import Recipe
from lte.errors import AbsentError, UserError
from lte.server import folder
from lte.transport import meeting, posted

_WAIT_S = 600.0
"""How long a worker looks for its server: the other node may have to end before it is started again."""
_LOOK_S = 30.0
"""How often it looks meanwhile whether the run is finished, so that none will come."""
_LEAVE_S = 20.0
"""How long the server has to save and leave; torchrun kills all after 30 s."""


def main(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Be the rank that the environment says.

    Returns:
        The exit code: 0 if the run is finished, as for `lte worker` otherwise.
    """

    def act() -> int:
        signals.at_parents_death(signal.SIGTERM)
        return _run(_parser().parse_args(words), environment)

    return code_of(act)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="torchrun ... -m launch.torchrun",
        description="Be one rank of a run: a worker, and on rank 0 its server, too (server.place).",
        epilog="example: torchrun --nproc-per-node 4 -m launch.torchrun configs/quickstart.yaml",
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--first",
        type=int,
        default=0,
        metavar="K",
        help="number of this torchrun's first worker, where several of them work for one server elsewhere"
        " (default: 0)",
    )
    parser.add_argument(
        "--keys",
        type=Path,
        metavar="FOLDER",
        help="of NAME.secret of each worker, w0 and so on, and server.public: for a server that has keys",
    )
    return parser


def _run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    settings = with_address(arguments.config, arguments.overrides)
    recipe = recipes.load(arguments.config, settings)
    if recipe.train.method == "ddp":
        raise UserError("train.method: ddp has no server; torchrun starts it by '-m lte train CONFIG'")
    rank, size = place_of(environment)
    if fault := missing_workers(recipe, size):
        raise UserError(fault)
    if folder.is_complete(recipe):
        print(f"{recipe.run.dir}: finished already", flush=True)
        return 0
    number = rank + arguments.first - (recipe.server.place == "alone")
    local_number = _local_number(recipe, rank, environment)
    if rank or recipe.server.place == "elsewhere":
        return _work(recipe, f"w{number}", arguments.keys, local_number)
    with _Server([arguments.config, *settings], recipe) as server:
        if recipe.server.place == "beside":
            with server.missed():
                _work(recipe, f"w{number}", arguments.keys, local_number)
        return server.ended()


# What torchrun says


def place_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank of this process, and how many there are.

    Raises:
        UserError: torchrun has not started it.
    """
    try:
        return int(environment["RANK"]), int(environment["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise UserError(
            "RANK and WORLD_SIZE are not set: start this by 'torchrun --nproc-per-node N -m launch.torchrun"
            " CONFIG', or use 'lte train CONFIG' on one machine"
        ) from None


def _local_number(recipe: Recipe, rank: int, environment: Mapping[str, str]) -> int:
    """Number of this rank's worker among those of its node: a server alone on rank 0 needs no GPU."""
    local_rank = int(environment.get("LOCAL_RANK", 0))
    is_after_server = recipe.server.place == "alone" and rank == local_rank
    return max(local_rank - is_after_server, 0)


def missing_workers(recipe: Recipe, size: int) -> str:
    """Why the first round could not begin with so many ranks, or ""."""
    is_alone = recipe.server.place == "alone"
    found = size - is_alone
    if recipe.server.place == "elsewhere" or found >= recipe.train.workers:
        return ""
    rest = " beside the server's" if is_alone else ""
    return (
        f"train.workers: {recipe.train.workers}, but torchrun started {found} processes{rest}; set"
        f" train.workers={max(found, 1)}, with --nnodes MIN:MAX for the least number of nodes, or start more"
    )


# What is to be run


def with_address(recipe: str, overrides: Sequence[str]) -> list[str]:
    """Overrides by which all ranks reach the server: loopback's TCP is meant only where they say it.

    Raises:
        UserError: the recipe has faults.
    """
    said = any(override.startswith("server.address=") for override in overrides)
    server = recipes.load(recipe, overrides).server
    if said or server.place == "elsewhere" or not server.address.startswith(LOOPBACK):
        return [*overrides]
    return [*overrides, f"server.address={meeting.ENV}"]


def address_of(recipe: Recipe) -> str:
    """Where workers look for the server: in the run's folder if its address is not known before."""
    address = recipe.server.address
    if address == meeting.ENV or "*" not in address:
        return address
    return f"{posted.SCHEME}{Path(recipe.run.dir) / posted.NAME}"


def _work(recipe: Recipe, name: str, keys: Path | None, local_number: int) -> int:
    """Be a worker until the run is finished. One that is started again may find the others done.

    Raises:
        ConnectError, RunEnded: as `recipes.work`, or no server came within `_WAIT_S`.
    """
    until_s = time.monotonic() + _WAIT_S
    while not folder.is_complete(recipe):
        try:
            recipes.work(
                address_of(recipe),
                worker_id=name,
                folder=Path(recipe.run.dir) / "workers" / name,
                wait_s=_LOOK_S,
                key=keys and keys / f"{name}.secret",
                server_key=keys and keys / "server.public",
                local_number=local_number,
                say=lambda line: print(line, flush=True),
            )
            break
        except AbsentError:
            if time.monotonic() > until_s:
                raise
    return 0


class _Server:
    """The server's process. It does not outlive this one: whoever is started again must find nobody."""

    def __init__(self, arguments: Sequence[str], recipe: Recipe) -> None:
        """Start it.

        Args:
            arguments: CONFIG and overrides.

        Raises:
            UserError: it is to begin anew, at each start. ConnectError: torchrun is gone.
        """
        if recipe.run.resume == "never" and not meeting.has_agent():
            raise UserError(
                "run.resume=never: nothing tells this torchrun's first start from a later one, which is to go"
                " on; unset TORCH_DISABLE_SHARE_RDZV_TCP_STORE, or move the folder aside yourself"
            )
        words = ["server", *arguments]
        if meeting.num_starts():  # what it was before may be alive still, cut off
            if recipe.run.resume == "never":  # that was said of the run before this torchrun's
                words.append("run.resume=auto")
            words.append("--take-over")
        dies_too = {children.DEATH_VARIABLE: str(int(signal.SIGKILL))}
        self._child = children.spawn(words, dies_too)
        self._has_failed = self._is_watched = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child.poll() is not None:
            return
        # Whatever else happened torchrun starts it again: workers are told to wait for it.
        is_over = isinstance(error, signals.Ended) and error.number == signal.SIGINT
        children.send(self._child, signal.SIGINT if is_over else signal.SIGUSR1)
        for left in children.ended([self._child], _LEAVE_S):
            left.kill()
            left.wait()

    @contextmanager
    def missed(self) -> Iterator[None]:
        """Within this, a server that fails ends what this process does, too."""
        self._is_watched = True
        threading.Thread(target=self._watch, name="lte-server", daemon=True).start()
        try:
            yield
        except signals.Ended:
            if not self._has_failed:
                raise
        finally:
            self._is_watched = False

    def ended(self) -> int:
        """Wait for its end. Returns its exit code."""
        code = self._child.wait()
        return code if code >= 0 else 128 - code

    def _watch(self) -> None:
        if self._child.wait() and self._is_watched:
            self._has_failed = True
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], os.environ))
