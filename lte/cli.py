"""The `lte` command. Mistakes of the person at the keyboard get one line each and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from rich.console import Console

from launch import children, data_parallel, local
from lte import (
    __version__,
    config,
    cost,
    ddp,
    export,
    inventory,
    ranks,
    recipes,
    report,
    signals,
    simulate,
    status,
)
from lte.config import Recipe
from lte.cost import links
from lte.data import pack, pack_images
from lte.errors import ConfigError, LTEError, RunEnded, UserError
from lte.relay import Relay
from lte.server import rollback
from lte.server.folder import is_complete
from lte.tasks import Text, task_of
from lte.transport import keys

EXIT_USER_ERROR = 2
EXIT_PIPE = 128 + signal.SIGPIPE

Read = TypeVar("Read")


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"lte: {message} (see '{self.prog} --help')", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 for a failure; 2 for a mistake of the user's; 3 for a worker whose run
        ended before its last round; 128 and the signal's number if that ended the command.
    """
    try:
        with signals.raised():
            try:
                children.end_with_parent()
                arguments = _parser().parse_args(argv)
                return int(arguments.run(arguments))
            finally:
                sys.stdout.flush()  # here: at the interpreter's end nobody could catch a broken pipe
    except ConfigError as error:
        for line in error.faults:
            print(f"lte: {line}", file=sys.stderr)
        return EXIT_USER_ERROR
    except UserError as error:
        print(f"lte: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RunEnded as error:
        print(f"lte: the run ended: {error}", file=sys.stderr)
        return 0 if error.finished else local.EXIT_RUN_ENDED
    except signals.Ended as error:
        print("lte: interrupted", file=sys.stderr)
        return 128 + error.number
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except (LTEError, OSError) as error:
        print(f"lte: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lte",
        description="Pretrain neural networks from scratch with LoRA workers and a parameter server.",
        epilog=textwrap.dedent("""\
            examples:
              lte data pack book.txt --out data/book       text -> WebDataset shards
              lte train configs/quickstart.yaml            server and workers on this machine
              lte generate runs/quickstart --prompt "O "   let the result write
            'lte COMMAND --help' tells more of each."""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lte {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_server(commands)
    _add_worker(commands)
    _add_relay(commands)
    _add_status(commands)
    _add_report(commands)
    _add_rollback(commands)
    _add_eval(commands)
    _add_generate(commands)
    _add_export(commands)
    _add_ranks(commands)
    _add_plan(commands)
    _add_simulate(commands)
    _add_convert(commands)
    _add_data(commands)
    _add_keys(commands)
    return parser


def _command(commands: argparse._SubParsersAction[_Parser], name: str, help: str, epilog: str) -> _Parser:
    return commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=textwrap.dedent(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


# train, server, worker


def _add_train(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "train",
        "run a recipe with one server and its workers on this machine",
        "examples:\n"
        "  lte train configs/quickstart.yaml\n"
        "  lte train configs/quickstart.yaml train.rounds=20 lora.rank=16 run.dir=runs/short\n"
        "  lte train configs/quickstart.yaml run.resume=never     start anew, old run moved aside\n"
        "  lte train configs/quickstart.yaml train.method=ddp run.dir=runs/ddp     torch's DDP, to compare\n"
        "  torchrun --nproc-per-node 4 -m lte train configs/methods/ddp.yaml       the same by torchrun\n\n"
        "settings, as section.name=value (type, default):\n" + _settings_help(),
    )
    _add_recipe(command)
    command.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    recipe = config.load(arguments.config, arguments.overrides)
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


def _add_server(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "server",
        "run a recipe's parameter server and wait for its workers",
        "example (each line in a terminal of its own):\n"
        "  lte server configs/quickstart.yaml server.address=tcp://127.0.0.1:5555\n"
        "  lte worker --server tcp://127.0.0.1:5555        as often as train.workers says\n\n"
        "Ctrl-C, SIGTERM and SIGUSR1 save and end, a second Ctrl-C at once; the same command goes on from\n"
        "there. After SIGUSR1 the workers wait for it (worker.patience_s). Settings: lte train --help",
    )
    _add_recipe(command)
    command.add_argument(
        "--take-over",
        action="store_true",
        help="claim run.dir from a server that hangs or is cut off; it is fenced, and ends when it wakes",
    )
    command.add_argument("--announce", type=int, metavar="FD", help=argparse.SUPPRESS)
    command.set_defaults(run=_server)


def _server(arguments: argparse.Namespace) -> int:
    recipe = config.load(arguments.config, arguments.overrides)
    if is_complete(recipe):
        return _say_complete(recipe)

    def announce(address: str) -> None:
        if arguments.announce is not None:
            os.write(arguments.announce, f"{address}\n".encode())
            os.close(arguments.announce)

    with recipes.make_server(recipe, announce=announce, take_over=arguments.take_over) as server:
        server.stop_on_signals()
        finished = server.serve()
    _conclude(recipe, finished, in_haste=server.stopped_by in (signal.SIGTERM, signal.SIGUSR1))
    return 0 if finished else 128 + server.stopped_by


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


def _add_worker(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "worker",
        "train LoRA heads for a server",
        "examples:\n"
        "  lte worker --server tcp://127.0.0.1:5555\n"
        "  lte worker --server file://runs/book/address      where its folder is shared: also if it moves\n"
        "  lte worker --server tcp://127.0.0.1:5555 --rank 8       a small device, or a thin link\n"
        "  lte worker --server tcp://127.0.0.1:5555 --rank 8 --scale 8\n"
        "  lte worker --server tcp://10.0.0.1:5555 --key alice.secret --server-key server.public\n\n"
        "Workers may join and leave at any time, more of them than train.workers, too. Everything but the\n"
        "address comes from the server. A CONFIG makes the worker refuse a server of another model.\n"
        "Ctrl-C, SIGTERM and SIGUSR1 save after the local step at hand and leave, a second Ctrl-C at once;\n"
        "with --id and --state the next one takes the next step.",
    )
    _add_address(command)
    command.add_argument("--id", default="", metavar="NAME", help="name of this worker (default: given)")
    command.add_argument(
        "--state",
        metavar="FOLDER",
        type=Path,
        help="where to keep its state: started again with the same --id and --state it goes on bit for bit",
    )
    command.add_argument(
        "--wait", type=_number, default=30.0, metavar="S", help="seconds to look for the server (default: 30)"
    )
    _add_keys_of_worker(command, "this worker's secret key")
    command.add_argument(
        "--data", metavar="FOLDER", help="shards, where the recipe's path is not theirs here"
    )
    command.add_argument(
        "--rank",
        type=_count,
        default=0,
        metavar="R",
        help="largest lora_rank of its heads (default: the recipe's)",
    )
    command.add_argument(
        "--heads",
        type=_count,
        default=0,
        metavar="H",
        help="heads, the recipe's or fewer (default: the recipe's)",
    )
    command.add_argument(
        "--scale",
        type=_positive,
        default=0.0,
        metavar="S",
        help="lora_scale of its heads, in every module (default: the recipe's)",
    )
    command.add_argument("config", nargs="?", metavar="CONFIG", help="YAML recipe to insist on")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings of that recipe")
    command.set_defaults(run=_worker)


def _worker(arguments: argparse.Namespace) -> int:
    if arguments.state and not arguments.id:
        raise UserError("--state belongs to a worker of a name; give it one with --id NAME")
    recipe = config.load(arguments.config, arguments.overrides) if arguments.config else None
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
        recipe=recipe,
        say=lambda line: print(line, flush=True),
    )
    return 0


# relay


def _add_relay(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
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
    _add_address(command)
    command.add_argument(
        "--listen",
        required=True,
        metavar="ADDRESS",
        help="where the site's workers connect; port * is a free one",
    )
    _add_keys_of_worker(command, "the relay's secret key, to server and workers")
    command.add_argument(
        "--allow", metavar="FILE", help="public keys of the site's workers, WORKER_ID KEY a line"
    )
    command.add_argument(
        "--insecure", action="store_true", help="listen where other machines reach it, without keys"
    )
    command.add_argument(
        "--cache",
        type=_positive,
        default=1024.0,
        metavar="MB",
        help="most memory for what other workers will want, at best the whole quantized model's size and"
        " more (default: 1024)",
    )
    command.set_defaults(run=_relay)


def _relay(arguments: argparse.Namespace) -> int:
    stopped_by = 0
    with Relay(
        arguments.server,
        arguments.listen,
        shelf_bytes=int(arguments.cache * 1e6),
        key=arguments.key,
        server_key=arguments.server_key,
        allow=arguments.allow,
        insecure=arguments.insecure,
        say=lambda line: print(line, flush=True),
    ) as relay:

        def stop(number: int) -> None:
            nonlocal stopped_by
            stopped_by = number
            relay.stop()

        with signals.told(stop):
            print(
                f"relay of {arguments.server}; its workers: lte worker --server {relay.address}", flush=True
            )
            relay.serve()
    return 128 + stopped_by


# status


def _add_status(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "status",
        "ask a server how its run is: version, workers, when they were seen, rates",
        "examples:\n"
        "  lte status --server tcp://127.0.0.1:5555\n"
        "  lte status --server tcp://10.0.0.1:5555 --key alice.secret --server-key server.public --json\n\n"
        "Exit code 0 if the server answers, 2 if none does: a health check. A server in the midst of a\n"
        "merge or of an evaluation answers after it: give it --wait.",
    )
    _add_address(command)
    command.add_argument(
        "--wait", type=_number, default=10.0, metavar="S", help="seconds to wait for an answer (default: 10)"
    )
    _add_keys_of_worker(command, "a key that may join")
    command.add_argument("--json", action="store_true", help="print all of it as JSON")
    command.set_defaults(run=_status)


def _status(arguments: argparse.Namespace) -> int:
    found = status.inquire(
        arguments.server, wait_s=arguments.wait, key=arguments.key, server_key=arguments.server_key
    )
    if arguments.json:
        print(status.to_json(found))
    else:
        console = Console()
        console.print(status.to_text(found, console.width))
    return 0


# report


def _add_report(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "report",
        "tell what a run came to, or how far it is, and draw its losses",
        "examples:\n"
        "  lte report runs/quickstart                                  a summary, and loss.png in the run\n"
        "  lte report runs/quickstart --diagnostics heads.png\n"
        "  lte report runs/rank8 --overlap runs/rank64\n\n"
        "Diagnostics are recorded by runs with log.diagnostics_every: cosine and Grassmann distance between\n"
        "heads, ranks of the update, its amplification of W, quantization error, gradient noise.",
    )
    command.add_argument("folder", type=Path, metavar="RUN", help="run.dir of a run, also of one that goes")
    command.add_argument(
        "--diagnostics", type=_figure, metavar="FILE", help="draw its diagnostics into a .png, .pdf or .svg"
    )
    command.add_argument(
        "--overlap",
        type=Path,
        metavar="RUN",
        help="another run, of another rank or seed, say: how far the subspaces of both updates\n"
        "hold each other (LoRA, section 7.2)",
    )
    command.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    folder = arguments.folder
    if arguments.diagnostics:
        report.plot_diagnostics(folder, arguments.diagnostics)
        print(arguments.diagnostics)
        return 0
    if arguments.overlap:
        found = recipes.compare_updates(folder, arguments.overlap)
        Console().print(report.overlap(folder, arguments.overlap, found))
        return 0
    if report.outcome(folder).rounds:
        report.plot(folder)
    Console().print(report.summary(folder))
    return 0


# rollback


def _add_rollback(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "rollback",
        "bring a stopped run back to an earlier version",
        "examples:\n"
        "  lte rollback runs/quickstart                  which versions there are\n"
        "  lte rollback runs/quickstart --version 60\n"
        "  lte train configs/quickstart.yaml optimizer.lr=5e-4     goes on from there\n\n"
        "What came after is kept in RUN/rolled-back-N. Workers start over from what is merged of them.",
    )
    command.add_argument("folder", type=Path, metavar="RUN", help="run.dir of a run that no server holds")
    command.add_argument(
        "--version", type=_whole, metavar="V", help="to go back to (default: only tell what there is)"
    )
    command.set_defaults(run=_rollback)


def _rollback(arguments: argparse.Namespace) -> int:
    folder = arguments.folder
    if arguments.version is None:
        Console().print(report.versions(folder, rollback.versions(folder)))
        return 0
    done = recipes.roll_back(folder, arguments.version)
    print(
        f"{folder}: back at version {done.version}; what came after, up to version {done.last}, is in"
        f" {done.aside}. 'lte train' or 'lte server' goes on from here, also with another optimizer.lr."
    )
    return 0


# eval, generate


def _add_eval(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "eval",
        "measure a trained model on its validation data",
        "examples:\n"
        "  lte eval runs/quickstart\n"
        "  lte eval runs/quickstart --data data/other --tokens 100000 --json\n"
        "  lte eval runs/dylora --rank 4          with its nested heads cut to rank 4",
    )
    command.add_argument("folder", type=Path, metavar="RUN", help="run.dir of a run")
    command.add_argument("--data", metavar="FOLDER", help="other shards than the run's")
    command.add_argument(
        "--tokens", type=_whole, default=0, metavar="N", help="at most so many, or images (default: all)"
    )
    _add_rank(command)
    command.add_argument("--json", action="store_true", help="print all of it as JSON")
    command.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    has_average = recipes.recipe_of(arguments.folder).outer.ema is not None and arguments.rank is None
    lines = []
    for which in ("published", "master", *(["ema"] if has_average else [])):
        model, recipe, version = recipes.load_run(arguments.folder, which, arguments.rank)
        if arguments.data:
            recipe = config.replace(recipe, **{"data.shards": arguments.data})
        task = task_of(recipe)
        task.check()
        with torch.no_grad():
            measured = task.evaluate(model, arguments.tokens)
        if arguments.json:
            found = {"loss": measured.loss, "unit": task.unit, **measured.extras}
            lines.append({"weights": which, "version": version, "rank": arguments.rank, **found})
            continue
        extras = "".join(f"  {name} {value:.4f}" for name, value in measured.extras.items())
        print(f"{which:<9}  version {version}  validation loss {measured.loss:.4f} {task.unit}{extras}")
    if arguments.json:
        print(json.dumps(lines, indent=2))
    return 0


def _add_generate(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "generate",
        "let a trained model continue a text",
        'example:\n  lte generate runs/quickstart --prompt "ROMEO:" --tokens 500 --temperature 0.7',
    )
    command.add_argument("folder", type=Path, metavar="RUN", help="run.dir of a run")
    command.add_argument(
        "--prompt", default="\n", metavar="TEXT", help="text to continue (default: a new line)"
    )
    command.add_argument("--tokens", type=_whole, default=300, metavar="N", help="how many (default: 300)")
    command.add_argument(
        "--temperature", type=_number, default=0.8, metavar="X", help="0: the likeliest (default: 0.8)"
    )
    command.add_argument("--seed", type=_whole, default=0, metavar="N", help="of the sampling (default: 0)")
    command.add_argument(
        "--weights", choices=("published", "master", "ema"), default="published", help="default: published"
    )
    _add_rank(command)
    command.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    model, recipe, _ = recipes.load_run(arguments.folder, arguments.weights, arguments.rank)
    task = task_of(recipe)
    if not isinstance(task, Text):
        raise UserError(
            f"{arguments.folder}: a model of {recipe.data.kind} writes no text; 'lte eval' measures it"
        )
    text = task.sample(
        model,
        arguments.prompt,
        arguments.tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    print(text)
    return 0


# export


def _add_export(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "export",
        "write what a run trained for other libraries",
        "examples:\n"
        "  lte export runs/quickstart --format hf --out exports/model       for transformers\n"
        "  lte export runs/quickstart --format safetensors --weights master --out exports/weights\n"
        "  lte export runs/dylora --format hf --rank 4 --out exports/rank4   its nested heads cut to rank 4\n"
        "  lte export runs/quickstart --format peft --out exports/heads     a folder a head, and their base\n"
        "  lte train configs/quickstart.yaml run.dir=runs/more model.init_from=exports/weights\n\n"
        "hf: AutoModelForCausalLM (or ...ForImageClassification).from_pretrained(DIR) loads the merged\n"
        "  model, of a reference model its counterpart there (Arcee, ViT); AutoTokenizer its tokenizer.\n"
        "safetensors: the state dict, by the model's own names, in DIR/model.safetensors.\n"
        "peft: PeftModel.from_pretrained(base, DIR/WORKER-head-K) computes what a worker did when it saved\n"
        "  its state last, that is before its last contribution was sent, or when it was stopped.",
    )
    command.add_argument("folder", type=Path, metavar="RUN", help="run.dir of a run")
    command.add_argument("--format", required=True, choices=("hf", "safetensors", "peft"))
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; a new one")
    command.add_argument(
        "--weights", choices=("published", "master", "ema"), help="of hf and safetensors (default: published)"
    )
    command.add_argument(
        "--state",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="of peft: of a worker's state, where it is not in the run's folder; may be given often",
    )
    _add_rank(command)
    command.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    folder, out, which = arguments.folder, arguments.out, arguments.weights or "published"
    if arguments.format == "peft":
        if arguments.weights:
            raise UserError("--weights: is of merged models; adapters are on the base that workers held")
        if arguments.rank is not None:
            raise UserError("--rank: is of merged models; adapters are heads as workers hold them, whole")
        for line in export.to_peft(folder, out, arguments.state):
            print(line)
    elif arguments.state:
        raise UserError("--state: is of --format peft; merged models are the server's")
    elif arguments.format == "hf":
        if left_out := export.to_transformers(folder, out, which, arguments.rank):
            print(left_out)
    else:
        export.to_safetensors(folder, out, which, arguments.rank)
    print(out)
    return 0


# ranks


def _add_ranks(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "ranks",
        "find the smallest rank of each module's head in a run with nested ranks (lora.nested)",
        "examples:\n"
        "  lte ranks runs/dylora --max-loss-increase 0.01\n"
        "  lte ranks runs/dylora --budget-parameters 50000 --out ranks.yaml\n\n"
        "Each lower rank of each module is measured alone; the cuts that cost least for what they save come\n"
        "first, and where to stop is measured again. What --out writes is a section lora of a recipe.",
    )
    command.add_argument("folder", type=Path, metavar="RUN", help="run.dir of a run")
    bound = command.add_mutually_exclusive_group(required=True)
    bound.add_argument(
        "--budget-parameters", type=_count, metavar="P", help="most numbers in all heads together"
    )
    bound.add_argument(
        "--max-loss-increase", type=_number, metavar="X", help="most nats above the loss of the whole heads"
    )
    command.add_argument(
        "--weights", choices=("published", "master"), default="published", help="default: published"
    )
    command.add_argument("--data", metavar="FOLDER", help="other shards than the run's")
    command.add_argument(
        "--tokens",
        type=_whole,
        metavar="N",
        help="of validation in an evaluation (default: eval.tokens; 0: all)",
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="write lora.overrides as YAML")
    command.add_argument("--json", action="store_true", help="print all of it as JSON")
    command.set_defaults(run=_ranks)


def _ranks(arguments: argparse.Namespace) -> int:
    if arguments.out and not arguments.out.parent.is_dir():
        raise UserError(f"--out: {arguments.out.parent} is no folder")
    found, overrides = recipes.find_ranks(
        arguments.folder,
        arguments.weights,
        tokens=arguments.tokens,
        shards=arguments.data,
        most_parameters=arguments.budget_parameters,
        most_increase=arguments.max_loss_increase,
        say=lambda line: print(line, file=sys.stderr),
    )
    section = ranks.to_yaml(overrides)
    if arguments.json:
        print(json.dumps(ranks.to_dict(found), indent=2))
    else:
        Console().print(ranks.to_text(found))
        if not arguments.out:
            print(f"\n{section}", end="")
    if arguments.out:
        arguments.out.write_text(section, encoding="utf-8")
    return 0


# plan


def _add_plan(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "plan",
        "tell what a recipe will cost over given links: bytes, seconds, memory",
        "examples:\n"
        "  lte plan configs/quickstart.yaml --bandwidth 100mbit --rtt 50ms\n"
        "  lte plan configs/quickstart.yaml train.local_steps=50 --bandwidth 20mbit:100mbit --rtt 80ms \\\n"
        "           --loss 0.5% --workers 16 --server-bandwidth 1gbit --share 0.9 --probe\n"
        "  lte plan configs/quickstart.yaml --table links.txt --from runs/quickstart --json\n\n"
        "Lines of a table: name bandwidth rtt [step_time] [count], such as 'pi 20mbit:100mbit 80ms 2s 4'.",
    )
    _add_recipe(command)
    command.add_argument(
        "--bandwidth", type=_unit(links.bandwidths), metavar="RATE", help="of a worker's link, or its UP:DOWN"
    )
    command.add_argument("--rtt", type=_unit(links.duration), metavar="TIME", help="there and back")
    command.add_argument(
        "--loss", type=_unit(links.share), default=0.0, metavar="X", help="share of packets lost (default: 0)"
    )
    command.add_argument("--table", type=Path, metavar="FILE", help="instead: workers of many links")
    command.add_argument("--workers", type=_count, metavar="N", help="how many (default: the recipe's)")
    command.add_argument(
        "--server-bandwidth",
        type=_unit(links.bandwidth),
        default=math.inf,
        metavar="RATE",
        help="of the link that all workers share at the server (default: no limit)",
    )
    _add_rates(command)
    command.add_argument(
        "--share",
        type=_unit(links.share),
        default=0.95,
        metavar="X",
        help="of the time, that workers are to compute (default: 0.95)",
    )
    command.add_argument("--json", action="store_true", help="print all of it as JSON")
    command.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    recipe = config.load(arguments.config, arguments.overrides).in_round(arguments.round)
    if arguments.table:
        if arguments.bandwidth or arguments.rtt is not None or arguments.workers:
            raise UserError("--table says it for each worker: leave out --bandwidth, --rtt and --workers")
        sites = cost.read_table(arguments.table, arguments.loss)
    else:
        if not arguments.bandwidth or arguments.rtt is None:
            raise UserError("a plan needs --bandwidth and --rtt, such as 100mbit and 50ms, or --table FILE")
        up_bps, down_bps = arguments.bandwidth
        link = cost.Link(up_bps=up_bps, down_bps=down_bps, rtt_s=arguments.rtt, loss=arguments.loss)
        sites = [cost.Site(name="worker", link=link, count=arguments.workers or recipe.train.workers)]
    rates = _rates(recipe, arguments)
    found = cost.outlook(recipe, sites, rates, server_bps=arguments.server_bandwidth, share=arguments.share)
    if arguments.json:
        print(json.dumps(cost.to_dict(found), indent=2))
    else:
        Console(width=max(80, Console().width)).print(cost.to_text(found))
    return 0


def _add_rates(command: argparse.ArgumentParser) -> None:
    """What tells how fast machines compute."""
    command.add_argument(
        "--round", type=_whole, default=0, metavar="N", help="with the settings of this one (train.phases)"
    )
    command.add_argument("--step-time", type=_unit(links.seconds), metavar="S", help="of a local step")
    command.add_argument(
        "--from", dest="run_folder", type=Path, metavar="RUN", help="take speeds and bits from this run"
    )
    command.add_argument("--probe", action="store_true", help="measure speeds on this machine, some seconds")


def _rates(recipe: Recipe, arguments: argparse.Namespace) -> cost.Rates:
    rates = cost.assumed(recipe)
    if arguments.probe:
        rates = cost.probe(recipe, rates)
    if arguments.run_folder:
        rates = cost.from_run(arguments.run_folder, recipe, rates)
    if arguments.step_time is not None:
        rates = cost.said(rates, step_s=arguments.step_time)
    return rates


# simulate


def _add_simulate(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "simulate",
        "simulate a recipe with many workers over mixed links, with deaths and stragglers",
        "examples:\n"
        "  lte simulate configs/gpt-10m.yaml --workers 10,100,1000 --links configs/links/mixed.yaml\n"
        "  lte simulate configs/gpt-10m.yaml worker.heartbeat_s=5 server.grace_s=10 --quorum 80% \\\n"
        "           --workers 1000 --links configs/links/mixed.yaml --from runs/gpt-10m --json\n"
        "  lte simulate configs/gpt-10m.yaml --workers 1000 --links configs/links/mixed.yaml --shards 4\n\n"
        "Needs simpy (pip install 'lte[simulate]'). Classes of workers and what may be said of them:\n"
        "configs/links/mixed.yaml. Equal seeds give equal figures. Shards have a machine each here; those\n"
        "of server.shards share one. What is not modelled: pydoc lte.simulate.",
    )
    _add_recipe(command)
    command.add_argument(
        "--workers", type=_counts, metavar="N,N,...", help="how many (default: the recipe's)"
    )
    command.add_argument("--links", type=Path, required=True, metavar="FILE", help="classes of workers, YAML")
    command.add_argument("--rounds", type=_count, default=20, metavar="N", help="to merge (default: 20)")
    command.add_argument(
        "--seed", type=_whole, default=0, metavar="N", help="of all that is drawn (default: 0)"
    )
    command.add_argument(
        "--quorum", type=_unit(links.share), metavar="X", help="share of the workers, for server.quorum"
    )
    command.add_argument(
        "--shards", type=_count, default=1, metavar="K", help="servers that share out the layers (modelled)"
    )
    command.add_argument(
        "--relay-group",
        type=_count,
        default=1,
        metavar="N",
        help="workers of a class that get updates through one relay (modelled)",
    )
    _add_rates(command)
    command.add_argument("--json", action="store_true", help="print all of it as JSON")
    command.set_defaults(run=_simulate)


def _simulate(arguments: argparse.Namespace) -> int:
    if arguments.rounds < 2:
        raise UserError("--rounds: a simulation needs 2 or more; the first is how it begins")
    recipe = config.load(arguments.config, arguments.overrides).in_round(arguments.round)
    fleet = simulate.read_fleet(arguments.links)
    rates = _rates(recipe, arguments)
    found = []
    for workers in arguments.workers or [recipe.train.workers]:
        changes: dict[str, int] = {"train.workers": workers}
        changes["server.max_workers"] = max(workers, recipe.server.max_workers)
        if arguments.quorum is not None:
            changes["server.quorum"] = max(1, math.ceil(arguments.quorum * workers))
        found.append(
            simulate.simulate(
                config.replace(recipe, **changes),
                fleet,
                rates,
                rounds=arguments.rounds,
                seed=arguments.seed,
                shards=arguments.shards,
                relay_group=arguments.relay_group,
            )
        )
    if arguments.json:
        asked = {key: getattr(arguments, key) for key in ("rounds", "seed", "shards", "relay_group")}
        given = {**asked, "local_steps": recipe.train.local_steps, "rates": dataclasses.asdict(rates)}
        print(json.dumps(simulate.to_dict(found, given), indent=2))
    else:
        name, steps = Path(arguments.config).name, recipe.train.local_steps
        title = f"{name}: T = {steps}, {arguments.rounds} rounds simulated"
        extras = [(arguments.shards, "shards"), (arguments.relay_group, "workers a relay")]
        title += "".join(f", {number} {what} (modelled)" for number, what in extras if number > 1)
        Console(width=max(80, Console().width)).print(simulate.to_text(found, title))
    return 0


# convert


def _add_convert(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "convert",
        "tell what of a recipe's model gets heads, and what becomes of the rest",
        "examples:\n"
        "  lte convert configs/quickstart.yaml --dry-run\n"
        "  lte convert configs/quickstart.yaml lora.embeddings=true lora.rank=8 --dry-run --json\n\n"
        "Which it is: lora.modules, exclude, embeddings, tied, freeze, overrides (lte train --help).",
    )
    _add_recipe(command)
    command.add_argument("--dry-run", action="store_true", help="print the table, and do nothing else")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    if not arguments.dry_run:
        raise UserError(
            "convert: there is nothing to write, as servers and workers convert the model themselves; give"
            " --dry-run for the table, or use 'lte train'"
        )
    recipe = config.load(arguments.config, arguments.overrides).in_round(0)
    found = inventory.take(cost.plan_of(recipe), recipe)
    if arguments.json:
        print(json.dumps(inventory.to_dict(found), indent=2))
    else:
        text, console = inventory.to_text(found), Console()
        widest = console.measure(text, options=console.options.update(width=1000)).maximum
        Console(width=max(widest, console.width)).print(text)  # names are worth no cutting
    return 0


# data


def _add_data(commands: argparse._SubParsersAction[_Parser]) -> None:
    data = _command(
        commands, "data", "prepare training data", "example:\n  lte data pack book.txt --out data/book"
    )
    actions = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = _command(
        actions,
        "pack",
        "turn text files into WebDataset shards",
        "examples:\n"
        "  lte data pack book.txt --out data/book                      one token a byte\n"
        "  lte data pack *.txt.gz --out data/books --tokenizer bpe:4096\n"
        "  lte train configs/quickstart.yaml data.shards=data/books model.vocab_size=4096",
    )
    command.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="text files, .gz too")
    command.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the shards go")
    command.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="NAME",
        help="bytes, or bpe:SIZE trained here (default: bytes)",
    )
    command.add_argument(
        "--valid", nargs="+", type=Path, default=[], metavar="TEXT", help="validation text of its own"
    )
    command.add_argument(
        "--valid-fraction",
        type=_number,
        default=0.1,
        metavar="X",
        help="else the last X of the text (default: 0.1)",
    )
    _add_shards(command)
    command.set_defaults(run=_pack)

    command = _command(
        actions,
        "pack-images",
        "turn images and their classes into WebDataset shards",
        "examples:\n"
        "  lte data pack-images fashion-mnist --out data/fashion        idx-ubyte files, .gz too\n"
        "  lte data pack-images cifar10.tar.gz --out data/cifar10       train/CLASS/*.png, test/CLASS/*.png\n"
        "  lte train configs/vit-cifar10.yaml data.shards=data/cifar10",
    )
    command.add_argument(
        "source",
        type=Path,
        metavar="IMAGES",
        help="folder, or .tar(.gz) of one: a sub-folder of PNG or JPEG files a class, also in folders train"
        " and test; or the files of MNIST",
    )
    command.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the shards go")
    command.add_argument(
        "--valid-fraction",
        type=_number,
        default=0.1,
        metavar="X",
        help="of the images, for validation, where the source does not say which (default: 0.1)",
    )
    _add_shards(command)
    command.set_defaults(run=_pack_images)


def _add_shards(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shards",
        type=_count,
        default=16,
        metavar="N",
        help="training shards, at least one a worker (default: 16)",
    )
    command.add_argument("--force", action="store_true", help="replace shards that are there")


def _pack(arguments: argparse.Namespace) -> int:
    index = pack(
        arguments.texts,
        arguments.out,
        tokenizer=arguments.tokenizer,
        valid_fraction=arguments.valid_fraction,
        valid_texts=arguments.valid,
        num_shards=arguments.shards,
        force=arguments.force,
    )
    train, valid = (sum(s.num_tokens for s in shards) for shards in (index.train, index.valid))
    print(f"{arguments.out}: {train:,} training and {valid:,} validation tokens ({index.tokenizer})")
    return 0


def _pack_images(arguments: argparse.Namespace) -> int:
    index = pack_images(
        arguments.source,
        arguments.out,
        valid_fraction=arguments.valid_fraction,
        num_shards=arguments.shards,
        force=arguments.force,
    )
    train, valid = (sum(s.num_images for s in shards) for shards in (index.train, index.valid))
    shape = f"{index.width}x{index.height} pixels, {index.channels} channel{'s' * (index.channels > 1)}"
    print(
        f"{arguments.out}: {train:,} training and {valid:,} validation images of {shape},"
        f" {len(index.classes)} classes"
    )
    return 0


# keys


def _add_keys(commands: argparse._SubParsersAction[_Parser]) -> None:
    keys_ = _command(
        commands, "keys", "make keys of servers and workers", "example:\n  lte keys new keys/alice"
    )
    actions = keys_.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = _command(
        actions,
        "new",
        "make a pair of keys for a server or a worker",
        "examples:\n"
        "  lte keys new keys/server      keys/server.secret for server.key, keys/server.public for workers\n"
        "  lte keys new keys/alice       and add the line that it prints to the server's server.allow\n\n"
        "A worker needs a key of its own, made where it runs: secrets need not travel.",
    )
    command.add_argument(
        "name", metavar="PATH", help="writes PATH.secret and PATH.public; its last part names the worker"
    )
    command.set_defaults(run=_keys_new)


def _keys_new(arguments: argparse.Namespace) -> int:
    path = Path(arguments.name)
    if not keys.WORKER_ID.fullmatch(path.name):
        raise UserError(f"{path}: its last part names a worker: letters, digits, '.', '_', '-', 64 at most")
    pair = keys.create(path)
    print(f"{path}.secret (keep it here)  {path}.public (hand it out)")
    print("A worker's: add this line to the server's allow-list (server.allow), which needs no restart,")
    print(f"  {path.name} {pair.public}")
    print(f"and start  lte worker --server tcp://HOST:PORT --key {path}.secret --server-key SERVER.public")
    print(
        f"A server's: lte server CONFIG server.key={path}.secret server.allow=FILE; give {path}.public out."
    )
    return 0


# Pieces


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="YAML recipe, such as configs/quickstart.yaml")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's"
    )


def _add_address(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--server",
        required=True,
        metavar="ADDRESS",
        help="as printed by 'lte server', or file://RUN/address where that folder is seen",
    )


def _add_rank(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--rank",
        type=_count,
        metavar="B",
        help="cut its heads to this lora_rank, in a run with lora.nested (default: whole)",
    )


def _add_keys_of_worker(command: argparse.ArgumentParser, which: str) -> None:
    command.add_argument(
        "--key",
        metavar="FILE",
        default=os.environ.get(local.KEY_VARIABLE) or None,
        help=f"{which}, from 'lte keys new' (default: ${local.KEY_VARIABLE})",
    )
    command.add_argument(
        "--server-key",
        metavar="FILE",
        default=os.environ.get(local.SERVER_KEY_VARIABLE) or None,
        help=f"the server's public key (default: ${local.SERVER_KEY_VARIABLE})",
    )


def _settings_help() -> str:
    lines, section = [], ""
    for key, kind, default, text in config.describe():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines.append("")
        lines.append(f"  {key} ({kind}, {default})")
        lines += textwrap.wrap(text, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(word) for word in text.split(",")]


def _figure(text: str) -> Path:
    path = Path(text)
    if path.suffix not in report.FORMATS or not path.parent.is_dir():
        kinds = ", ".join(report.FORMATS)
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in a folder that exists, ending in {kinds}")
    return path


def _unit(read: Callable[[str], Read]) -> Callable[[str], Read]:
    """A reader of numbers with units, for argparse."""

    def read_or_complain(text: str) -> Read:
        try:
            return read(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read_or_complain


def _positive(text: str) -> float:
    if not (value := _number(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value
