"""Files that runs need: `lte data`, `keys`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lte.cli import pieces
from lte.data import pack, pack_images
from lte.errors import UserError
from lte.transport import keys


def add(commands: pieces.Commands) -> None:
    """Add these commands."""
    _add_data(commands)
    _add_keys(commands)


def _add_data(commands: pieces.Commands) -> None:
    data = pieces.command(
        commands, "data", "prepare training data", "example:\n  lte data pack book.txt --out data/book"
    )
    actions = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = pieces.command(
        actions,
        "pack",
        "turn text files into WebDataset shards",
        "examples:\n"
        "  lte data pack book.txt --out data/book                      one token a byte\n"
        "  lte data pack *.txt.gz --out data/books --tokenizer bpe:4096\n"
        "  lte train configs/quickstart.yaml data.shards=data/books model.vocab_size=4096\n"
        "  lte data pack book.txt --out data/book --tokenizer exports/model   its tokenizer.json",
    )
    command.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="text files, .gz too")
    command.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the shards go")
    command.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="NAME",
        help="bytes, bpe:SIZE trained here, or the path of a tokenizer.json or of a folder that holds one"
        " (default: bytes)",
    )
    command.add_argument(
        "--valid", nargs="+", type=Path, default=[], metavar="TEXT", help="validation text of its own"
    )
    command.add_argument(
        "--valid-fraction",
        type=pieces.number,
        default=0.1,
        metavar="X",
        help="else the last X of the text (default: 0.1)",
    )
    _add_shards(command)
    command.set_defaults(run=_pack)

    command = pieces.command(
        actions,
        "pack-images",
        "turn images and their classes into WebDataset shards",
        "examples:\n"
        "  lte data pack-images fashion-mnist --out data/fashion        idx-ubyte files, .gz too\n"
        "  lte data pack-images cifar10.tar.gz --out data/cifar10       train/CLASS/*.png, test/CLASS/*.png\n"
        "  lte data pack-images shards --out data/photos                WebDataset's 0.jpg, 0.cls, in tars\n"
        "  lte train configs/vit-cifar10.yaml data.shards=data/cifar10",
    )
    command.add_argument(
        "source",
        type=Path,
        metavar="IMAGES",
        help="folder, or .tar(.gz) of one: a sub-folder of PNG or JPEG files a class, also in folders train"
        " and test; WebDataset's tars, with a .cls beside each image; or the files of MNIST",
    )
    command.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the shards go")
    command.add_argument(
        "--valid-fraction",
        type=pieces.number,
        default=0.1,
        metavar="X",
        help="of the images, for validation, where the source does not say which (default: 0.1)",
    )
    _add_shards(command)
    command.set_defaults(run=_pack_images)


def _add_shards(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shards",
        type=pieces.count,
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
        say=lambda line: print(f"lte: {line}", file=sys.stderr),
    )
    train, valid = (sum(s.num_images for s in shards) for shards in (index.train, index.valid))
    shape = f"{index.width}x{index.height} pixels, {index.channels} channel{'s' * (index.channels > 1)}"
    print(
        f"{arguments.out}: {train:,} training and {valid:,} validation images of {shape},"
        f" {len(index.classes)} classes"
    )
    return 0


def _add_keys(commands: pieces.Commands) -> None:
    keys_ = pieces.command(
        commands, "keys", "make keys of servers and workers", "example:\n  lte keys new keys/alice"
    )
    actions = keys_.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = pieces.command(
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
