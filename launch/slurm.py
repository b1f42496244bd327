"""What the batch files of slurm/ start: the server of a recipe, and its workers, as SLURM places them.

    python -m launch.slurm keys CONFIG [key=value ...]       once, before the others
    python -m launch.slurm server CONFIG [key=value ...]
    python -m launch.slurm worker CONFIG [key=value ...]     by srun, a task each

All nodes must see run.dir: the server posts its address there, and the keys of all lie there. Each of
these ends in the `lte` command that does the work, in this process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.arguments import Parser
from launch.exits import code_of
from lte import recipes
from lte.config import Recipe
from lte.errors import UserError
from lte.server import folder
from lte.transport import keys, posted

_ANYWHERE = "tcp://*:*"
"""Other nodes must reach the server, and any port will do, as they read it in RUN/address."""
LOOPBACK = ("tcp://127.", "tcp://localhost:")
_GPUS = "CUDA_VISIBLE_DEVICES"
_SERVER, _ALLOWED = "server", "allow"
"""Names in the folder of keys, beside those of the workers."""
_WAIT_S = 600
"""How long a worker looks for its server: it may be queued still, or on its way to another node."""


def main(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Do what these words say, if `lte` is not to do it.

    Returns:
        The exit code.
    """
    return code_of(lambda: _become(_parser().parse_args(words), environment))


def _become(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Make the keys, or be the `lte` command of this role from here on."""
    settings = reachable(arguments.config, arguments.overrides)
    recipe = recipes.load(arguments.config, settings)
    if arguments.role == "keys":
        if needs_keys(recipe):
            make_keys(recipe, max(arguments.number, recipe.train.workers))
        return 0
    if arguments.role == "server":
        command = server_command(recipe, [arguments.config, *settings], environment)
    elif fault := misplaced(recipe, environment, arguments.first):
        raise UserError(fault)
    elif folder.is_complete(recipe):
        print(f"{recipe.run.dir}: finished already")
        return 0
    else:
        command = worker_command(recipe, worker_id(environment, arguments.first or 0))
    sys.stdout.flush()
    python = [sys.executable, "-m", "lte", *command]
    os.execve(python[0], python, {**environment, **own_gpus(environment, recipe.worker.processes)})


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m launch.slurm", description=__doc__.splitlines()[0])
    roles = parser.add_subparsers(dest="role", metavar="ROLE", required=True)
    for role, help in (
        ("keys", "make the run's keys, if it has none yet"),
        ("server", "serve the run; take it over from an earlier server, where SLURM started the job again"),
        ("worker", "work for it"),
    ):
        command = roles.add_parser(role, help=help)
        command.add_argument("config", metavar="CONFIG")
        command.add_argument("overrides", nargs="*", metavar="key=value")
        if role == "keys":
            command.add_argument(
                "--number", type=int, default=0, metavar="N", help="workers that may ever join, 0 to N - 1"
            )
        if role == "worker":
            command.add_argument(
                "--first",
                type=int,
                metavar="K",
                help="number of the worker that is this step's first task (default: 0, of the server's job)",
            )
    return parser


# What SLURM says


def worker_id(environment: Mapping[str, str], first: int) -> str:
    """Name of the worker that this task is: the same when its job is started again."""
    return f"w{first + int(environment.get('SLURM_PROCID', 0))}"


def misplaced(recipe: Recipe, environment: Mapping[str, str], first: int | None) -> str:
    """Why this step's tasks cannot be the workers that they would be, or "".

    Args:
        first: number of the first of them; None: they are those of the server's job.
    """
    if first is not None:
        if first >= (own := recipe.train.workers):
            return ""
        return (
            f"train.workers: {own}, so worker w{first} is the server's job's own; further ones are numbered"
            f" from there (sbatch --array={own}-{own + 3})"
        )
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", recipe.train.workers))
    if tasks >= recipe.train.workers:
        return ""
    return (
        f"train.workers: {recipe.train.workers}, but this job has {tasks} tasks for workers; set"
        f" train.workers={tasks}, or give it more (sbatch --ntasks={recipe.train.workers})"
    )


def own_gpus(environment: Mapping[str, str], processes: int) -> dict[str, str]:
    """Variables by which this task sees as many GPUs as it has processes, where SLURM shows it all that its
    node has for the step."""
    gpus = [gpu for gpu in environment.get(_GPUS, "").split(",") if gpu]
    if len(gpus) < 2:
        return {}
    first = int(environment.get("SLURM_LOCALID", 0)) * processes
    own = dict.fromkeys(gpus[(first + k) % len(gpus)] for k in range(processes))
    return {_GPUS: ",".join(own)}


def was_restarted(environment: Mapping[str, str]) -> bool:
    """Whether SLURM started this job before; what it was then may be alive still, cut off."""
    return int(environment.get("SLURM_RESTART_COUNT", 0)) > 0


# What is to be run


def reachable(recipe: str, overrides: Sequence[str]) -> list[str]:
    """Overrides by which other nodes reach the server, too: loopback is meant only where they say it.

    Raises:
        UserError: the recipe has faults.
    """
    said = any(override.startswith("server.address=") for override in overrides)
    if said or not recipes.load(recipe, overrides).server.address.startswith(LOOPBACK):
        return [*overrides]
    return [*overrides, f"server.address={_ANYWHERE}"]


def server_command(recipe: Recipe, arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Words for `lte`.

    Args:
        arguments: CONFIG and overrides.
    """
    command = ["server", *arguments]
    if needs_keys(recipe):
        where = _keys_of(recipe)
        command += [f"server.key={where / _SERVER}.secret", f"server.allow={where / _ALLOWED}"]
    if was_restarted(environment):
        command.append("--take-over")
        if recipe.run.resume == "never":  # that was said of the run before this job's
            command.append("run.resume=auto")
    return command


def worker_command(recipe: Recipe, name: str) -> list[str]:
    """Words for `lte`.

    Raises:
        UserError: there is no key of that name.
    """
    run = Path(recipe.run.dir)
    command = ["worker", "--server", f"{posted.SCHEME}{run / posted.NAME}", "--wait", str(_WAIT_S)]
    command += ["--id", name, "--state", str(run / "workers" / name)]
    if needs_keys(recipe):
        where = _keys_of(recipe)
        if not (key := where / f"{name}.secret").exists():
            raise UserError(
                f"{key}: no such key; the server's job makes them, as many as it is told to (its"
                " MOST_WORKERS), once: delete the folder for more, and start it again"
            )
        command += ["--key", str(key), "--server-key", f"{where / _SERVER}.public"]
    return command


# Keys


def needs_keys(recipe: Recipe) -> bool:
    """Whether keys of ours are wanted: other machines reach the server, and nobody gave it any."""
    server = recipe.server
    return server.address.startswith("tcp://") and server.key is None and not server.insecure


def make_keys(recipe: Recipe, number: int) -> None:
    """Make the keys of a run that has none: its server's, those of so many workers, and the list of these.

    Raises:
        KeysError: they cannot be written.
    """
    where = _keys_of(recipe)
    if where.exists():
        return
    partial = where.with_name(f".{where.name}-{os.getpid()}")
    keys.create(partial / _SERVER)
    pairs = {f"w{k}": keys.create(partial / f"w{k}") for k in range(number)}
    (partial / _ALLOWED).write_text("".join(f"{name} {pair.public}\n" for name, pair in pairs.items()))
    partial.rename(where)


def _keys_of(recipe: Recipe) -> Path:
    return Path(recipe.run.dir) / folder.KEYS


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], os.environ))
