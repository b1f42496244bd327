"""What a recipe would do: `lte plan`, `simulate`, `convert`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

from rich.console import Console

from lte import config, cost, inventory, simulate
from lte.cli import pieces
from lte.config import Recipe
from lte.cost import links
from lte.errors import UserError
from lte.nn import without_heads
from lte.printable import some
from lte.tasks import task_of


def add(commands: pieces.Commands) -> None:
    """Add these commands."""
    _add_plan(commands)
    _add_simulate(commands)
    _add_convert(commands)


def _add_plan(commands: pieces.Commands) -> None:
    command = pieces.command(
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
    pieces.add_recipe(command)
    command.add_argument(
        "--bandwidth",
        type=pieces.unit(links.bandwidths),
        metavar="RATE",
        help="of a worker's link, or its UP:DOWN",
    )
    command.add_argument("--rtt", type=pieces.unit(links.duration), metavar="TIME", help="there and back")
    command.add_argument(
        "--loss",
        type=pieces.unit(links.share),
        default=0.0,
        metavar="X",
        help="share of packets lost (default: 0)",
    )
    command.add_argument("--table", type=Path, metavar="FILE", help="instead: workers of many links")
    command.add_argument("--workers", type=pieces.count, metavar="N", help="how many (default: the recipe's)")
    command.add_argument(
        "--server-bandwidth",
        type=pieces.unit(links.bandwidth),
        default=math.inf,
        metavar="RATE",
        help="of the link that all workers share at the server (default: no limit)",
    )
    _add_rates(command)
    command.add_argument(
        "--share",
        type=pieces.unit(links.share),
        default=0.95,
        metavar="X",
        help="of the time, that workers are to compute (default: 0.95)",
    )
    command.add_argument("--json", action="store_true", help="print all of it as JSON")
    command.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    recipe = pieces.read_recipe(arguments).in_round(arguments.round)
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
        "--round",
        type=pieces.whole,
        default=0,
        metavar="N",
        help="with the settings of this one (train.phases)",
    )
    command.add_argument("--step-time", type=pieces.unit(links.seconds), metavar="S", help="of a local step")
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


def _add_simulate(commands: pieces.Commands) -> None:
    command = pieces.command(
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
    pieces.add_recipe(command)
    command.add_argument(
        "--workers", type=pieces.counts, metavar="N,N,...", help="how many (default: the recipe's)"
    )
    command.add_argument("--links", type=Path, required=True, metavar="FILE", help="classes of workers, YAML")
    command.add_argument(
        "--rounds", type=pieces.count, default=20, metavar="N", help="to merge (default: 20)"
    )
    command.add_argument(
        "--seed", type=pieces.whole, default=0, metavar="N", help="of all that is drawn (default: 0)"
    )
    command.add_argument(
        "--quorum", type=pieces.unit(links.share), metavar="X", help="share of the workers, for server.quorum"
    )
    command.add_argument(
        "--shards",
        type=pieces.count,
        default=1,
        metavar="K",
        help="servers that share out the layers (modelled)",
    )
    command.add_argument(
        "--relay-group",
        type=pieces.count,
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
    recipe = pieces.read_recipe(arguments).in_round(arguments.round)
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
        Console(width=max(80, Console().width)).print(simulate.to_text(found, title, recipe.data.counted))
    return 0


def _add_convert(commands: pieces.Commands) -> None:
    command = pieces.command(
        commands,
        "convert",
        "tell what of a recipe's model gets heads, and what becomes of the rest",
        "examples:\n"
        "  lte convert configs/quickstart.yaml --dry-run\n"
        "  lte convert configs/quickstart.yaml lora.embeddings=true lora.rank=8 --dry-run --json\n\n"
        "Which it is: lora.modules, exclude, embeddings, tied, freeze, overrides (lte train --help).",
    )
    pieces.add_recipe(command)
    command.add_argument("--dry-run", action="store_true", help="print the table, and do nothing else")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    if not arguments.dry_run:
        raise UserError(
            "convert: there is nothing to write, as servers and workers convert the model themselves; give"
            " --dry-run for the table, or use 'lte train'"
        )
    recipe = pieces.read_recipe(arguments).in_round(0)
    plan = cost.plan_of(recipe)
    found = inventory.take(plan, recipe)
    if arguments.json:
        print(json.dumps(inventory.to_dict(found), indent=2))
    else:
        text, console = inventory.to_text(found), Console()
        widest = console.measure(text, options=console.options.update(width=1000)).maximum
        Console(width=max(widest, console.width)).print(text)  # names are worth no cutting
    if line := inventory.left_out(plan, recipe):
        print(f"lte: {line}", file=sys.stderr)
    for why, names in without_heads(task_of(recipe).build(), recipe.lora).items():
        print(f"lte: trained in full: {some(names)}: {why}", file=sys.stderr)
    return 0
