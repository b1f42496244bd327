"""Text to tokens and back: bytes, or byte-level BPE, which take any text and give it back; or a tokenizer
that somebody else made, which does what it does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lte.data.folder import INDEX, TOKENIZER, cure
from lte.data.shards import Index, Tokens
from lte.errors import DataError


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
        name: `bytes`, `bpe:SIZE`, where SIZE is the vocabulary asked for, or `tokenizer.json`.
        vocab_size: tokens are 0 to vocab_size - 1; a short text may give fewer than were asked for.
        dtype: smallest of uint8, uint16, uint32 that holds them.
    """

    name: str
    vocab_size: int
    dtype: np.dtype[np.unsignedinteger[Any]]

    def encode(self, text: str) -> Tokens:
        """Tokens of a text, of `dtype`."""

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """Text of tokens. Bytes that are not UTF-8 become U+FFFD; tokens not in the vocabulary, which a
        model of a larger one can produce, nothing."""

    def num_bytes(self, ids: Tokens) -> int:
        """UTF-8 bytes of the text that tokens stand for."""

    def of_library(self) -> tokenizers.Tokenizer:
        """The same tokenizer as one of the tokenizers library."""


class ByteTokenizer:
    """Every byte of the UTF-8 text is a token."""

    name = "bytes"
    vocab_size = 256
    dtype: np.dtype[np.unsignedinteger[Any]] = np.dtype(np.uint8)

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        ids = np.asarray(ids, np.int64)
        return ids[ids < self.vocab_size].astype(np.uint8).tobytes().decode(errors="replace")

    def num_bytes(self, ids: Tokens) -> int:
        return len(ids)

    def of_library(self) -> tokenizers.Tokenizer:
        # Of a vocabulary of bytes alone every character falls back to its own.
        model = models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True)
        same = tokenizers.Tokenizer(model)
        same.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        return same


class BPETokenizer:
    """Byte-level BPE with GPT-2's way of cutting text into words; no special or unknown tokens."""

    def __init__(self, name: str, model: tokenizers.Tokenizer) -> None:
        self.name = name
        self.model = model
        self.vocab_size = model.get_vocab_size()
        self.dtype: np.dtype[np.unsignedinteger[Any]] = np.dtype(
            np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        )
        # A byte-level vocabulary writes each byte as one character.
        tokens = sorted((number, token) for token, number in model.get_vocab().items())
        self._num_bytes = np.array([len(token) for _, token in tokens])

    @classmethod
    def train(cls, name: str, vocab_size: int, texts: Iterable[str]) -> BPETokenizer:
        """Learn the merges from pieces of text; the same pieces give the same tokenizer."""
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[], show_progress=False
        )
        model.train_from_iterator(texts, trainer)
        return cls(name, model)

    def encode(self, text: str) -> Tokens:
        return np.array(self.model.encode(text).ids, self.dtype)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        return self.model.decode(np.asarray(ids, np.int64).tolist())

    def num_bytes(self, ids: Tokens) -> int:
        return int(self._num_bytes[ids].sum())

    def of_library(self) -> tokenizers.Tokenizer:
        return self.model

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, which the `tokenizers` and `transformers` libraries also read."""
        self.model.save(str(folder / TOKENIZER))


class GivenTokenizer:
    """One that a tokenizer.json describes, as the tokenizers and transformers libraries write it. It adds no
    special tokens to a text, and cuts and pads none."""

    name = TOKENIZER

    def __init__(self, path: Path) -> None:
        """Read it.

        Args:
            path: the file, or a folder that holds it.

        Raises:
            DataError: it is missing or damaged.
        """
        file = path / TOKENIZER if path.is_dir() else path
        try:
            self._content = file.read_bytes()
            self.model = tokenizers.Tokenizer.from_buffer(self._content)
        except FileNotFoundError:
            raise DataError(
                f"tokenizer {str(path)!r}: has no {TOKENIZER}; transformers writes one:"
                " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW)"
            ) from None
        except Exception as error:  # the library raises no narrower class
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"tokenizer {str(path)!r}: {file} cannot be read ({reason})") from None
        self.model.no_truncation()
        self.model.no_padding()
        # Numbers of tokens may have gaps.
        self.vocab_size = max(self.model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.vocab_size:
            raise DataError(f"tokenizer {str(path)!r}: {file} has no vocabulary")
        self.dtype: np.dtype[np.unsignedinteger[Any]] = np.dtype(
            np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        )

    def encode(self, text: str) -> Tokens:
        """See `Tokenizer`.

        Raises:
            DataError: it cannot read this text.
        """
        try:
            return np.array(self.model.encode(text, add_special_tokens=False).ids, self.dtype)
        except Exception as error:  # the library raises no narrower class
            raise DataError(f"tokenizer: it cannot read this text ({error}); use another") from None

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        return self.model.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=False)

    def num_bytes(self, ids: Tokens) -> int:
        # What its normalizer took away is in no token.
        return max(1, len(self.decode(ids).encode()))

    def of_library(self) -> tokenizers.Tokenizer:
        return self.model

    def save(self, folder: Path) -> None:
        """Write the file as it was read."""
        (folder / TOKENIZER).write_bytes(self._content)


def parse(name: str) -> int | Path:
    """What a name asks for: the size of a BPE vocabulary, 0 for `bytes`, or the path of a tokenizer.json or
    of a folder that holds one.

    Raises:
        DataError: the name of no tokenizer.
    """
    if name == "bytes":
        return 0
    kind, _, size = name.partition(":")
    if kind == "bpe" and size.isdecimal() and int(size) >= 256:
        return int(size)
    if name and Path(name).exists():
        return Path(name)
    raise DataError(
        f"tokenizer {name!r}: must be bytes, bpe:SIZE (from 256) such as bpe:4096, or the path of a"
        f" {TOKENIZER} or of a folder that holds one"
    )


def given(name: str) -> GivenTokenizer | None:
    """The tokenizer of a name that is a path, or None where it is another's.

    Raises:
        DataError: the name of no tokenizer, or of a missing or damaged one.
    """
    return GivenTokenizer(found) if isinstance(found := parse(name), Path) else None


def make(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of a name, trained on pieces of text if it is one that learns.

    Raises:
        DataError: the name of no tokenizer, or of a missing or damaged one.
    """
    found = parse(name)
    if isinstance(found, Path):
        return GivenTokenizer(found)
    return BPETokenizer.train(name, found, texts) if found else ByteTokenizer()


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a folder of packed text.

    Raises:
        DataError: no packed text there, or its tokenizer is missing or damaged.
    """
    index = Index.load(folder)
    if index.tokenizer == "bytes":
        return ByteTokenizer()
    path = folder / TOKENIZER
    loaded: Tokenizer
    try:
        if index.tokenizer == TOKENIZER:
            loaded = GivenTokenizer(path)
        else:
            loaded = BPETokenizer(index.tokenizer, tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises no narrower class
        raise DataError(f"{path}: missing or damaged ({error}); {cure(folder)}") from None
    if loaded.vocab_size != index.vocab_size:
        raise DataError(
            f"{path}: {loaded.vocab_size} tokens, {INDEX} says {index.vocab_size}; {cure(folder)}"
        )
    return loaded
