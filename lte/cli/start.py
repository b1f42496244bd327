"""What runs: `lte train`, `server`, `worker`, `relay`."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launch import data_parallel, local
from lte import ddp, recipes, relay, report, signals
from lte.cli import pieces
from lte.config import Recipe
from lte.config import Server as ServerSettings
from lte.ddp.place import MEETING
from lte.errors import UserError
from lte.server.folder import is_complete
from lte.tasks import Text, task_of


def add(commands: pieces.Commands) -> None:
    """Add these commands."""
    _add_train(commands)
    _add_server(commands)
    _add_worker(commands)
    _add_relay(commands)


def _add_train(commands: pieces.Commands) -> None:
    command = pieces.command(
        commands,
        "train",
        "run a recipe with one server and its workers on this machine",
        "examples:\n"
        "  lte train configs/quickstart.yaml\n"
        "  lte train configs/quickstart.yaml train.rounds=20 lora.rank=16 run.dir=runs/short\n"
        "  lte train configs/quickstart.yaml run.resume=never     start anew, old run moved aside\n"
        "  lte train configs/quickstart.yaml train.method=ddp run.dir=runs/ddp     torch's DDP, to compare\n"
        "  torchrun --nproc-per-node 4 -m lte train configs/methods/ddp.yaml       the same by torchrun\n\n"
        "settings, as section.name=value (type, default):\n" + pieces.settings_help(),
    )
    pieces.add_recipe(command)
    command.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    # Data-parallel workers, which torchrun or this command has started, need not all say it.
    is_told = os.environ.get("RANK", "0") != "0" or bool(os.environ.get(MEETING))
    recipe = pieces.read_recipe(arguments, quietly=is_told)
    if recipe.train.method == "ddp":
        return _train_data_parallel(recipe, [arguments.config, *arguments.overrides])
    if is_complete(recipe):
        return _say_complete(recipe)
    if recipe.server.key:
        raise UserError(
            "server.key: 'lte train' starts workers on this machine, which have no keys; start 'lte server'"
            " and 'lte worker --key NAME.secret ...', or set server.key=none server.allow=none"
        )
    if recipe.server.address.startswith("inprocess://"):
        code = local.train_in_threads(recipe)
        _conclude(recipe, finished=code == 0)
        return code
    recipes.check_start(recipe)
    task_of(recipe).check_run()
    return local.train_in_processes(recipe, [arguments.config, *arguments.overrides])


def _train_data_parallel(recipe: Recipe, arguments: Sequence[str]) -> int:
    """Start the workers, or be the one that the environment says (torchrun's)."""
    place = ddp.place_of(recipe, os.environ)
    if is_complete(recipe):
        return _say_complete(recipe) if place is None or place.is_first else 0
    if place is None:
        ddp.check(recipe)
        return data_parallel.train_in_processes(recipe, arguments)
    stopped_by = ddp.train(recipe, place, claimed=bool(place.meeting))
    if place.is_first:
        _conclude(recipe, not stopped_by, in_haste=stopped_by in (signal.SIGTERM, signal.SIGUSR1))
    return 128 + stopped_by if stopped_by else 0


def _add_server(commands: pieces.Commands) -> None:
    command = pieces.command(
        commands,
        "server",
        "run a recipe's parameter server and wait for its workers",
        "example (each line in a terminal of its own):\n"
        "  lte server configs/quickstart.yaml server.address=tcp://127.0.0.1:5555\n"
        "  lte worker --server tcp://127.0.0.1:5555        as often as train.workers says\n\n"
        "Ctrl-C, SIGTERM and SIGUSR1 save and end, a second Ctrl-C at once; the same command goes on from\n"
        "there. After SIGUSR1 the workers wait for it (worker.patience_s). Settings: lte train --help",
    )
    pieces.add_recipe(command)
    command.add_argument(
        "--take-over",
        action="store_true",
        help="claim run.dir from a server that hangs or is cut off; it is fenced, and ends when it wakes",
    )
    command.add_argument("--announce", type=int, metavar="FD", help=argparse.SUPPRESS)
    command.set_defaults(run=_server)


def _server(arguments: argparse.Namespace) -> int:
    # 'lte train', which is announced to, has said it.
    recipe = pieces.read_recipe(arguments, quietly=arguments.announce is not None)
    if is_complete(recipe):
        return _say_complete(recipe)

    def announce(address: str) -> None:
        if arguments.announce is not None:
            os.write(arguments.announce, f"{address}\n".encode())
            os.close(arguments.announce)

    with recipes.make_server(recipe, announce=announce, take_over=arguments.take_over) as server:
        local.warn(recipe)
        server.stop_on_signals()
        finished = server.serve()
    stopped_by = server.stopped_by
    del server
    gc.collect()  # the sample's model need not be there beside the server's
    _conclude(recipe, finished, in_haste=stopped_by in (signal.SIGTERM, signal.SIGUSR1))
    return 0 if finished else 128 + stopped_by


def _say_complete(recipe: Recipe) -> int:
    """Print what a run came to that is there already."""
    Console().print(report.summary(Path(recipe.run.dir)))
    print(
        f"{recipe.run.dir}: finished already. run.resume=never starts anew (this run is moved aside);"
        " more train.rounds go on with it."
    )
    return 0


def _conclude(recipe: Recipe, finished: bool, *, in_haste: bool = False) -> None:
    """Print what a run came to: summary, plot, and a sample of what the model writes.

    Args:
        in_haste: this machine is wanted back: no plot.
    """
    console = Console()
    folder = Path(recipe.run.dir)
    if report.outcome(folder).rounds and not in_haste:
        report.plot(folder)
    console.print(report.summary(folder))
    task = task_of(recipe)
    if finished and recipe.eval.sample_tokens and isinstance(task, Text):
        model, _, _ = recipes.load_run(folder)
        text = task.sample(
            model,
            recipe.eval.prompt,
            recipe.eval.sample_tokens,
            temperature=0.8,
            seed=recipe.run.seed,
        )
        (folder / "sample.txt").write_text(text, encoding="utf-8")
        console.print("[bold]The trained model writes:[/]")
        console.print(textwrap.indent(text.strip(), "  "), markup=False, highlight=False)
    if not finished:
        print(f"Saved in {folder}. The same command goes on from here.")


def _add_worker(commands: pieces.Commands) -> None:
    command = pieces.command(
        commands,
        "worker",
        "train LoRA heads for a server",
        "examples:\n"
        "  lte worker --server tcp://127.0.0.1:5555\n"
        "  lte worker --server file://runs/book/address      where its folder is shared: also if it moves\n"
        "  lte worker --server tcp://127.0.0.1:5555 --rank 8       a small device, or a thin link\n"
        "  lte worker --server tcp://127.0.0.1:5555 --rank 8 --scale 8\n"
        "  lte worker --server tcp://127.0.0.1:5555 --processes 4          a machine of four GPUs\n"
        "  lte worker --server tcp://10.0.0.1:5555 --key alice.secret --server-key server.public\n\n"
        "Workers may join and leave at any time, more of them than train.workers, too. Everything but the\n"
        "address comes from the server. A CONFIG makes the worker refuse a server of another model.\n"
        "Ctrl-C, SIGTERM and SIGUSR1 save after the local step at hand and leave, a second Ctrl-C at once;\n"
        "with --id and --state the next one takes the next step.",
    )
    pieces.add_address(command)
    command.add_argument("--id", default="", metavar="NAME", help="name of this worker (default: given)")
    command.add_argument(
        "--state",
        metavar="FOLDER",
        type=Path,
        help="where to keep its state: started again with the same --id and --state it goes on bit for bit",
    )
    command.add_argument(
        "--wait",
        type=pieces.number,
        default=30.0,
        metavar="S",
        help="seconds to look for the server (default: 30)",
    )
    pieces.add_keys_of_worker(command, "this worker's secret key")
    command.add_argument(
        "--data", metavar="FOLDER", help="shards, where the recipe's path is not theirs here"
    )
    command.add_argument(
        "--rank",
        type=pieces.count,
        default=0,
        metavar="R",
        help="largest lora_rank of its heads (default: the recipe's)",
    )
    command.add_argument(
        "--heads",
        type=pieces.count,
        default=0,
        metavar="H",
        help="heads, the recipe's or fewer (default: the recipe's)",
    )
    command.add_argument(
        "--scale",
        type=pieces.positive,
        default=0.0,
        metavar="S",
        help="lora_scale of its heads, in every module (default: the recipe's)",
    )
    command.add_argument(
        "--processes",
        type=pieces.count,
        default=0,
        metavar="P",
        help="processes that it is, each with a share of every batch, and a GPU of its own where there are as"
        " many (default: the recipe's worker.processes)",
    )
    command.add_argument(
        "--local-number",
        type=pieces.whole,
        default=0,
        metavar="K",
        help="its number, from 0, among the workers of this machine, which share out its GPUs (default: 0)",
    )
    command.add_argument("config", nargs="?", metavar="CONFIG", help="YAML recipe to insist on")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings of that recipe")
    command.set_defaults(run=_worker)


def _worker(arguments: argparse.Namespace) -> int:
    if arguments.state and not arguments.id:
        raise UserError("--state belongs to a worker of a name; give it one with --id NAME")
    recipe = pieces.read_recipe(arguments) if arguments.config else None
    recipes.work(
        arguments.server,
        worker_id=arguments.id,
        folder=arguments.state,
        wait_s=arguments.wait,
        key=arguments.key,
        server_key=arguments.server_key,
        shards=arguments.data,
        rank=arguments.rank,
        heads=arguments.heads,
        scale=arguments.scale,
        processes=arguments.processes,
        local_number=arguments.local_number,
        recipe=recipe,
        say=lambda line: print(line, flush=True),
    )
    return 0


def _add_relay(commands: pieces.Commands) -> None:
    command = pieces.command(
        commands,
        "relay",
        "stand before workers that share one slow link: what is the same for all crosses it once",
        "examples (on a machine of the site; the second line on each of its workers' machines):\n"
        "  lte relay --server tcp://127.0.0.1:5555 --listen tcp://127.0.0.1:5556\n"
        "  lte worker --server tcp://127.0.0.1:5556\n"
        "  lte relay --server tcp://10.0.0.1:5555 --listen tcp://*:5555 \\\n"
        "            --key paris.secret --server-key server.public --allow workers-of-paris\n\n"
        "Workers give the relay's address (and public key) as the server's, and notice nothing else. It may\n"
        "be killed and started again at any time. With keys, the server's allow-list needs a line that says\n"
        "for whom it may speak: relay/NAME PUBLIC_KEY WORKER_ID,WORKER_ID,... or site-* (docs/security.md).",
    )
    pieces.add_address(command)
    command.add_argument(
        "--listen",
        required=True,
        metavar="ADDRESS",
        help="where the site's workers connect; port * is a free one",
    )
    pieces.add_keys_of_worker(command, "the relay's secret key, to server and workers")
    command.add_argument(
        "--allow", metavar="FILE", help="public keys of the site's workers, WORKER_ID KEY a line"
    )
    command.add_argument(
        "--insecure", action="store_true", help="listen where other machines reach it, without keys"
    )
    command.add_argument(
        "--cache",
        type=pieces.positive,
        default=1024.0,
        metavar="MB",
        help="most memory for what other workers will want, beside --queue; at best the whole quantized"
        " model's size and more (default: 1024)",
    )
    command.add_argument(
        "--queue",
        type=pieces.positive,
        default=relay.WAITING_BYTES / 1e6,
        metavar="MB",
        help="most memory for what waits for the link, at best more than its workers send in a round; beyond"
        " it who has most waiting loses that, and sends it again (default: 1000)",
    )
    command.add_argument(
        "--max-message-bytes",
        type=pieces.count,
        default=ServerSettings().max_message_bytes,
        metavar="N",
        help="largest frame accepted from workers, best as server.max_message_bytes in the server's recipe"
        " (default: the recipes')",
    )
    command.set_defaults(run=_relay)


def _relay(arguments: argparse.Namespace) -> int:
    stopped_by = 0
    with relay.Relay(
        arguments.server,
        arguments.listen,
        shelf_bytes=int(arguments.cache * 1e6),
        waiting_bytes=int(arguments.queue * 1e6),
        max_message_bytes=arguments.max_message_bytes,
        key=arguments.key,
        server_key=arguments.server_key,
        allow=arguments.allow,
        insecure=arguments.insecure,
        say=lambda line: print(line, flush=True),
    ) as running:

        def stop(number: int) -> None:
            nonlocal stopped_by
            stopped_by = number
            running.stop()

        with signals.told(stop):
            print(
                f"relay of {arguments.server}; its workers: lte worker --server {running.address}", flush=True
            )
            running.serve()
    return 128 + stopped_by
