"""What a run trained: `lte eval`, `generate`, `export`, `ranks`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from lte import config, export, ranks, recipes
from lte.cli import pieces
from lte.errors import UserError
from lte.tasks import Text, task_of


def add(commands: pieces.Commands) -> None:
    """Add these commands."""
    _add_eval(commands)
    _add_generate(commands)
    _add_export(commands)
    _add_ranks(commands)


def _add_eval(commands: pieces.Commands) -> None:
    command = pieces.command(
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
        "--tokens",
        type=pieces.whole,
        default=0,
        metavar="N",
        help="at most so many, or images (default: all)",
    )
    pieces.add_rank(command)
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


def _add_generate(commands: pieces.Commands) -> None:
    command = pieces.command(
        commands,
        "generate",
        "let a trained model continue a text",
        'example:\n  lte generate runs/quickstart --prompt "ROMEO:" --tokens 500 --temperature 0.7',
    )
    command.add_argument("folder", type=Path, metavar="RUN", help="run.dir of a run")
    command.add_argument(
        "--prompt", default="\n", metavar="TEXT", help="text to continue (default: a new line)"
    )
    command.add_argument(
        "--tokens", type=pieces.whole, default=300, metavar="N", help="how many (default: 300)"
    )
    command.add_argument(
        "--temperature", type=pieces.number, default=0.8, metavar="X", help="0: the likeliest (default: 0.8)"
    )
    command.add_argument(
        "--seed", type=pieces.whole, default=0, metavar="N", help="of the sampling (default: 0)"
    )
    command.add_argument(
        "--weights", choices=("published", "master", "ema"), default="published", help="default: published"
    )
    pieces.add_rank(command)
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


def _add_export(commands: pieces.Commands) -> None:
    command = pieces.command(
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
        "  model, of a reference model its counterpart there (Arcee, ViT); AutoTokenizer its tokenizer,\n"
        "  AutoImageProcessor how images are read (of one channel: from gray files).\n"
        "safetensors: the state dict, by the model's own names, in DIR/model.safetensors.\n"
        "peft: PeftModel.from_pretrained(base, DIR/WORKER-head-K) computes what a worker did when it saved\n"
        "  its state last, that is before its last contribution was sent, or when it was stopped. base is\n"
        "  DIR/base-K; AutoPeftModel finds it by its absolute path, so not once DIR was moved.",
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
    pieces.add_rank(command)
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


def _add_ranks(commands: pieces.Commands) -> None:
    command = pieces.command(
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
        "--budget-parameters", type=pieces.count, metavar="P", help="most numbers in all heads together"
    )
    bound.add_argument(
        "--max-loss-increase",
        type=pieces.number,
        metavar="X",
        help="most nats above the loss of the whole heads",
    )
    command.add_argument(
        "--weights", choices=("published", "master"), default="published", help="default: published"
    )
    command.add_argument("--data", metavar="FOLDER", help="other shards than the run's")
    command.add_argument(
        "--tokens",
        type=pieces.whole,
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
