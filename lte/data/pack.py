"""Text files to a folder of packed text; see `lte.data.shards` for its layout."""

from __future__ import annotations

import codecs
import gzip
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lte.data.folder import INDEX, claim, publish, write_shard
from lte.data.shards import CHUNK_TOKENS, Index, Shard, Tokens, storage
from lte.data.tokenizer import BPETokenizer, GivenTokenizer, Tokenizer, given, make
from lte.errors import DataError

BLOCK_BYTES = 1 << 20
"""Read at a time."""
PIECE_BYTES = 1 << 16
"""Most bytes encoded at a time, cut at a line's end."""
BPE_TRAINING_PIECES = 1 << 10
"""Pieces that BPE learns from, of the start of the training text: 64 MiB."""
VALID_SHARD_TOKENS = 1 << 22
"""Most tokens of a validation shard, so that a short evaluation reads little."""


def pack(
    texts: Sequence[Path],
    out: Path,
    *,
    tokenizer: str = "bytes",
    valid_fraction: float = 0.1,
    num_shards: int = 16,
    valid_texts: Sequence[Path] = (),
    force: bool = False,
) -> Index:
    """Pack text files, plain or .gz, into WebDataset shards.

    The files are joined in the order given, with a newline between them. The text is copied to disk
    beside the shards while it is packed; memory stays small. The same text gives the same bytes.

    Args:
        texts: files to train on.
        out: folder to make. It is complete once it holds index.json.
        tokenizer: `bytes`; `bpe:SIZE`, learned from the training text alone; or the path of a tokenizer.json,
            or of a folder that holds one, such as a checkpoint of transformers: copied beside the shards.
        valid_fraction: share of the text, at its end, that is kept for validation; in bytes.
        num_shards: training shards, of nearly as many tokens each; so many workers can have their own.
        valid_texts: files to validate on; then all of `texts` is for training.
        force: replace what was packed into `out` before.

    Raises:
        DataError: texts that are missing, unreadable, too short or, for BPE, not UTF-8; settings that
            make no sense; an `out` that is taken.
    """
    reader: Tokenizer | None = given(tokenizer)
    if not 0 <= valid_fraction < 1:
        raise DataError(f"valid_fraction {valid_fraction}: must be at least 0 and less than 1")
    if num_shards < 1:
        raise DataError(f"num_shards {num_shards}: must be at least 1")
    if missing := [str(path) for path in (*texts, *valid_texts) if not path.is_file()]:
        raise DataError(f"{', '.join(missing)}: no such text file; check the path")
    claim(out, force=force)
    with tempfile.TemporaryDirectory(dir=out, prefix=".packing-") as temporary:
        folder = Path(temporary)
        utf8 = tokenizer != "bytes"
        train = _joined(texts, folder / "train.text", utf8)
        if valid_texts:
            valid = _joined(valid_texts, folder / "valid.text", utf8)
        else:
            train, valid = _split(train, valid_fraction)
        if reader is None:
            reader = make(tokenizer, islice(_pieces(train), BPE_TRAINING_PIECES))
        train_tokens = _encode(train, reader, folder / "train.tokens")
        if len(train_tokens) < 2 * num_shards:
            raise DataError(
                f"{len(train_tokens)} tokens to train on are too few for {num_shards} shards;"
                " give more text, or pack fewer shards (--shards)"
            )
        valid_tokens = _encode(valid, reader, folder / "valid.tokens")
        num_valid_shards = -(-len(valid_tokens) // VALID_SHARD_TOKENS)
        index = Index(
            tokenizer=reader.name,
            vocab_size=reader.vocab_size,
            dtype=reader.dtype.name,  # type: ignore[arg-type]
            train=_write_shards(train_tokens, "train", num_shards, folder, reader),
            valid=_write_shards(valid_tokens, "valid", num_valid_shards, folder, reader),
        )
        if isinstance(reader, BPETokenizer | GivenTokenizer):
            reader.save(folder)
        (folder / INDEX).write_bytes(index.dump())
        publish(folder, out)
    return index


def _joined(texts: Sequence[Path], target: Path, utf8: bool) -> npt.NDArray[np.uint8]:
    """The texts, one after the other in a file, as an array that lies on disk.

    Raises:
        DataError: no text in them.
    """
    with target.open("wb") as file:
        for number, path in enumerate(texts):
            if number:
                file.write(b"\n")
            file.writelines(_blocks(path, utf8))
    if not target.stat().st_size:
        raise DataError(f"{', '.join(map(str, texts))}: no text in it; give a file that has some")
    return np.memmap(target, np.uint8, "r")


def _blocks(path: Path, utf8: bool) -> Iterator[bytes]:
    """A file's content, decompressed, and checked to be UTF-8 if asked to."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    checked = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while True:
                block = file.read(BLOCK_BYTES)
                if utf8:
                    pending = len(decoder.getstate()[0])
                    decoder.decode(block, final=not block)
                if not block:
                    return
                yield block
                checked += len(block)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {checked - pending + error.start} is not UTF-8, which this tokenizer needs;"
            " convert the file (iconv -t utf-8), or pack it with the tokenizer bytes"
        ) from None
    except (OSError, EOFError, zlib.error) as error:  # a damaged .gz raises any of the three
        raise DataError(f"{path}: cannot be read ({error}); copy it again") from None


def _split(
    text: npt.NDArray[np.uint8], valid_fraction: float
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Training and validation text; the cut does not depend on the tokenizer."""
    cut = int(len(text) * (1 - valid_fraction))
    for _ in range(3):  # at most three more bytes belong to the same UTF-8 character
        if cut < len(text) and text[cut] >> 6 == 0b10:
            cut += 1
    return text[:cut], text[cut:]


def _pieces(text: npt.NDArray[np.uint8]) -> Iterator[str]:
    """UTF-8 text in pieces that end with a line; a line longer than a piece is cut anywhere."""
    start = 0
    while start < len(text):
        block = text[start : start + PIECE_BYTES].tobytes()
        if start + len(block) < len(text):
            block = block[: block.rfind(b"\n") + 1] or block
        piece = block.decode(errors="ignore")  # ignores at most the start of a character cut in two
        assert piece, "the text was checked to be UTF-8"
        yield piece
        start += len(piece.encode())


def _encode(text: npt.NDArray[np.uint8], reader: Tokenizer, target: Path) -> Tokens:
    """The tokens of a text, as an array that lies on disk."""
    if reader.name == "bytes" or not len(text):
        return text  # bytes are their own tokens, also where they are not UTF-8
    with target.open("wb") as file:
        file.writelines(reader.encode(piece).tobytes() for piece in _pieces(text))
    return np.memmap(target, reader.dtype, "r")


def _write_shards(
    tokens: Tokens, split: str, num_shards: int, folder: Path, reader: Tokenizer
) -> tuple[Shard, ...]:
    """Write tokens as shards of nearly as many tokens each."""
    stored, extension = storage(reader.dtype)
    shards = []
    for number in range(num_shards):
        name = f"{split}-{number:06d}"
        part = tokens[number * len(tokens) // num_shards : (number + 1) * len(tokens) // num_shards]
        chunks = [part[start : start + CHUNK_TOKENS] for start in range(0, len(part), CHUNK_TOKENS)]
        sha256 = write_shard(
            folder / f"{name}.tar",
            (
                {"__key__": f"{name}-{k:06d}", extension: chunk.astype(stored).tobytes()}
                for k, chunk in enumerate(chunks)
            ),
        )
        num_bytes = sum(map(reader.num_bytes, chunks))
        shards.append(Shard(file=f"{name}.tar", num_tokens=len(part), num_bytes=num_bytes, sha256=sha256))
    return tuple(shards)
