"""Packing text, reading it back, dealing it out."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import itertools
import json
import os
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import webdataset as wds  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from lte.data import Index, TrainingStream, pack, partition, tokenizer, validation_batches
from lte.errors import DataError

# Importing it by name would give the function that lte.data shows under the same name.
PACK = importlib.import_module("lte.data.pack")
SHAKESPEARE = Path(__file__).parents[1] / "data/tinyshakespeare/input.txt.gz"
CONTEXT = 16


def prose(num_words: int, seed: int = 0) -> str:
    """Text with repeated words, line ends and characters of 1 to 4 bytes."""
    words = ["the", "whale", "Ahab", "sea", "naïve", "Größe", "鯨", "🐋", "said,", "\n", "\n\n", "  "]
    return " ".join(random.Random(seed).choices(words, k=num_words))


def numbered(num_tokens: int) -> bytes:
    """A text in which every 8 bytes tell where they stand."""
    return b"".join(b"%07d " % i for i in range(num_tokens // 8))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Pack a text once per setting: packed(text, num_shards=3) -> folder."""
    folders: dict[Any, Path] = {}

    def make(text: bytes, **arguments: Any) -> Path:
        key = (text, *sorted(arguments.items()))
        if key not in folders:
            folder = tmp_path_factory.mktemp("packed")
            (folder / "text.txt").write_bytes(text)
            pack([folder / "text.txt"], folder / "shards", **arguments)
            folders[key] = folder / "shards"
        return folders[key]

    return make


def tokens_of(folder: Path, split: str) -> np.ndarray[Any, Any]:
    """All tokens of a split, by tarfile and index.json alone."""
    index = json.loads((folder / "index.json").read_text())
    parts = []
    for shard in index[split]:
        with tarfile.open(folder / shard["file"]) as tar:
            names = tar.getnames()
            assert names == sorted(names)
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                parts.append(np.frombuffer(file.read(), np.dtype(index["dtype"]).newbyteorder("<")))
            assert sum(len(part) for part in parts[-len(names) :]) == shard["num_tokens"]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def refusal(call: Callable[[], object]) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(DataError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    return line


# Packing


@pytest.mark.parametrize("name", ["bytes", "bpe:300"])
def test_text_survives(packed: Callable[..., Path], name: str) -> None:
    text = prose(4000)
    folder = packed(text.encode(), tokenizer=name, num_shards=3, valid_fraction=0.25)
    reader, index = tokenizer.load(folder), Index.load(folder)
    train, valid = (reader.decode(tokens_of(folder, split)) for split in ("train", "valid"))
    assert train + valid == text
    cut = int(len(text.encode()) * 0.75)
    assert 0 <= len(train.encode()) - cut < 4  # to the end of a character
    assert (index.tokenizer, index.vocab_size, index.dtype) == (
        name,
        reader.vocab_size,
        {"bytes": "uint8", "bpe:300": "uint16"}[name],
    )
    assert sum(shard.num_bytes for shard in index.train) == len(train.encode())
    assert sum(shard.num_bytes for shard in index.valid) == len(valid.encode())


def test_the_cut_does_not_depend_on_the_tokenizer(packed: Callable[..., Path]) -> None:
    text = prose(500, seed=1).encode()
    for fraction in np.linspace(0.1, 0.2, 11).tolist():
        lengths = {
            sum(shard.num_bytes for shard in Index.load(folder).train)
            for name in ("bytes", "bpe:256")
            for folder in [packed(text, tokenizer=name, num_shards=2, valid_fraction=fraction)]
        }
        assert len(lengths) == 1


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # wds.WebDataset leaves the file open
def test_webdataset_reads_the_shards(packed: Callable[..., Path]) -> None:
    text = numbered(300_000)
    folder = packed(text, num_shards=2, valid_fraction=0)
    chunks, keys = b"", []
    for shard in Index.load(folder).train:
        for sample in wds.WebDataset(str(folder / shard.file), shardshuffle=False, empty_check=False):
            assert len(sample["u8"]) <= 65_536
            chunks += sample["u8"]
            keys.append(sample["__key__"])
    assert chunks == text
    assert keys == sorted(set(keys))


def test_shards_are_equal_and_files_are_joined(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 501)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"b" * 502))
    (tmp_path / "c").write_bytes(b"c" * 33)
    index = pack(
        [tmp_path / "a.txt", tmp_path / "b.txt.gz"],
        tmp_path / "out",
        num_shards=10,
        valid_texts=[tmp_path / "c"],
    )
    assert tokens_of(tmp_path / "out", "train").tobytes() == b"a" * 501 + b"\n" + b"b" * 502
    assert tokens_of(tmp_path / "out", "valid").tobytes() == b"c" * 33
    assert {shard.num_tokens for shard in index.train} == {100, 101}
    assert index == Index.load(tmp_path / "out")


@pytest.mark.parametrize("name", ["bytes", "bpe:300"])
def test_packing_again_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose(2000), encoding="utf-8")
    contents = []
    for out, mtime in (("first", 0), ("second", 10**9)):
        os.utime(text, (mtime, mtime))
        pack([text], tmp_path / out, tokenizer=name, num_shards=3)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()})
    assert contents[0] == contents[1]
    with tarfile.open(tmp_path / "first" / "train-000000.tar") as tar:
        assert {(member.mtime, member.uid, member.mode) for member in tar} == {(0, 0, 0o444)}


def test_force_replaces_all_that_was_packed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(prose(2000), encoding="utf-8")
    out = tmp_path / "out"
    pack([tmp_path / "text.txt"], out, tokenizer="bpe:300", num_shards=5)
    (out / "notes.md").touch()
    assert "--force" in refusal(lambda: pack([tmp_path / "text.txt"], out))
    pack([tmp_path / "text.txt"], out, num_shards=2, force=True)
    names = ["index.json", "notes.md", "train-000000.tar", "train-000001.tar", "valid-000000.tar"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert tokenizer.load(out).name == "bytes"


@pytest.mark.parametrize("num_moved", range(5))
def test_an_interrupted_packing_is_not_packed_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_moved: int
) -> None:
    """Stopped after so many of its 5 files were in place; an older packing does not shine through."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_bytes(numbered(1000))
    pack([text], out, num_shards=3)
    moves = iter([shutil.move] * num_moved)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: next(moves)(source, target))
        with pytest.raises(StopIteration):
            pack([text], out, tokenizer="bpe:260", num_shards=2, force=True)
    assert "no index.json" in refusal(lambda: Index.load(out))
    index = pack([text], out, tokenizer="bpe:260", num_shards=2)
    assert Index.load(out) == index


def test_long_texts_are_packed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and blocks of a few bytes cut lines and characters everywhere."""
    for name, size in {"PIECE_BYTES": 7, "BLOCK_BYTES": 5, "CHUNK_TOKENS": 11}.items():
        monkeypatch.setattr(PACK, name, size)
    text = prose(300)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    pack([tmp_path / "text.txt"], tmp_path / "out", tokenizer="bpe:280", valid_fraction=0.5)
    ids = np.concatenate([tokens_of(tmp_path / "out", split) for split in ("train", "valid")])
    assert tokenizer.load(tmp_path / "out").decode(ids) == text


# Tokenizers


@settings(deadline=None)
@given(text=st.text())
@pytest.mark.parametrize("name", ["bytes", "bpe:300"])
def test_tokenizers_give_any_text_back(name: str, text: str) -> None:
    reader = tokenizer.make(name, [prose(200)])
    ids = reader.encode(text)
    assert reader.decode(ids) == reader.decode(ids.tolist()) == text
    assert reader.num_bytes(ids) == len(text.encode())
    assert ids.dtype == reader.dtype
    assert (ids < reader.vocab_size).all()


def test_bpe_learns_from_the_training_part_alone(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    models = []
    for ending in ("xyxy " * 200, "zwzw " * 200):
        text.write_text("the whale " * 100 + ending)
        pack([text], out, tokenizer="bpe:270", valid_fraction=0.5, force=True)
        models.append((out / "tokenizer.json").read_bytes())
    assert models[0] == models[1]
    reader = tokenizer.load(out)
    assert len(reader.encode(" whale")) == 1
    assert reader.name == "bpe:270"


def test_decoding_takes_whatever_a_model_writes() -> None:
    for reader in (tokenizer.make("bytes", []), tokenizer.make("bpe:256", [])):
        whale = reader.encode("🐋").tolist()
        assert reader.decode([*whale, 70_000]) == "🐋"
        assert "\N{REPLACEMENT CHARACTER}" in reader.decode(whale[:2])


# Training


@given(num_shards=st.integers(1, 40), num_workers=st.integers(1, 40))
def test_parts_are_disjoint_and_cover(num_shards: int, num_workers: int) -> None:
    """Of 840 windows a shard (divisible by few part counts only), each has one owner."""
    owners = Counter(
        (shard, window)
        for worker in range(num_workers)
        for shard, part, num_parts in partition(num_shards, worker, num_workers)
        for window in range(part, 840, num_parts)
    )
    assert owners == Counter(itertools.product(range(num_shards), range(840)))
    assert all(partition(num_shards, worker, num_workers) for worker in range(num_workers))
    late = partition(num_shards, num_workers + 3, num_workers)
    assert late == partition(num_shards, 3 % num_workers, num_workers)


def stream(folder: Path, **changes: int) -> TrainingStream:
    arguments = {"context_tokens": CONTEXT, "batch_size": 3, "seed": 5, "worker": 0, "num_workers": 1}
    return TrainingStream(folder, **(arguments | changes))


def epoch_of(one: TrainingStream, epoch: int) -> list[tuple[int, ...]]:
    """The windows of an epoch, in order; batches may reach over its ends."""
    first, last = epoch * one.num_windows, (epoch + 1) * one.num_windows
    size = one.batch_size
    rows = torch.cat([one.batch(step) for step in range(first // size, -(-last // size))])
    skip = first % size
    return [tuple(row) for row in rows[skip : skip + one.num_windows].tolist()]


@pytest.mark.parametrize(("num_shards", "num_workers"), [(1, 1), (5, 2), (4, 4), (3, 5), (1, 3)])
def test_an_epoch_is_every_window_once(
    packed: Callable[..., Path], num_shards: int, num_workers: int
) -> None:
    text = numbered(4000)
    folder = packed(text, num_shards=num_shards, valid_fraction=0)
    workers = [stream(folder, worker=worker, num_workers=num_workers) for worker in range(num_workers)]
    bounds = [number * len(text) // num_shards for number in range(num_shards + 1)]
    grids = []
    for epoch in (0, 1, 2):
        windows = [window for worker in workers for window in epoch_of(worker, epoch)]
        starts = sorted(text.index(bytes(window)) for window in windows)
        assert len(set(starts)) == len(starts)
        assert all(len(window) == CONTEXT + 1 for window in windows)
        offsets = []
        for low, high in itertools.pairwise(bounds):
            mine = [start - low for start in starts if low <= start < high]
            offset = mine[0]
            assert 0 <= offset < CONTEXT
            # a whole grid, of as many windows as fit behind the largest offset
            length = high - low
            most = sum(start + CONTEXT < length for start in range(CONTEXT - 1, length, CONTEXT))
            assert mine == [offset + CONTEXT * number for number in range(most)]
            offsets.append(offset)
        grids.append(offsets)
    assert grids[0] != grids[1] or grids[1] != grids[2]


def test_a_batch_is_a_function_of_seed_worker_and_step(packed: Callable[..., Path]) -> None:
    folder = packed(numbered(3800), num_shards=4, valid_fraction=0)
    one = stream(folder, num_workers=2)
    assert one.num_windows % one.batch_size  # so that some batches straddle epochs
    steps = list(range(3 * one.num_windows // one.batch_size))
    expected = [one.batch(step) for step in steps]
    assert expected[0].dtype == torch.int64
    assert expected[0].shape == (3, CONTEXT + 1)
    random.Random(0).shuffle(steps)
    torch.manual_seed(99)
    other = stream(folder, num_workers=2)
    for step in steps:
        assert torch.equal(other.batch(step), expected[step])
    assert torch.equal(stream(folder, num_workers=2).batch(steps[0]), expected[steps[0]])
    larger = stream(folder, num_workers=2, batch_size=6)  # the order does not depend on the batches
    assert torch.equal(larger.batch(4), torch.cat([expected[8], expected[9]]))
    assert not torch.equal(stream(folder, num_workers=2, seed=6).batch(0), expected[0])
    assert not torch.equal(stream(folder, num_workers=2, worker=1).batch(0), expected[0])


def test_orders_are_drawn_anew_for_epochs_and_late_joiners(
    packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards are shuffled together here, pair after pair. A late joiner reads the same windows as
    the worker whose part it shares, in another order."""
    monkeypatch.setattr("lte.data.shards.MIX_TOKENS", 2000)
    text = numbered(4000)
    folder = packed(text, num_shards=4, valid_fraction=0)
    pairs, window_orders = set(), set()
    for epoch in range(3):
        first, late = (epoch_of(stream(folder, worker=worker), epoch) for worker in (0, 1))
        assert set(first) == set(late)
        for windows in (first, late):
            starts = [text.index(bytes(window)) for window in windows]
            shards = [start // 1000 for start in starts]
            half = len(shards) // 2
            one, other = shards[:half], shards[half:]
            assert len(set(one)) == len(set(other)) == 2
            assert not set(one) & set(other)
            for pair in (one, other):
                assert pair != sorted(pair, key=pair.index), "the pair's windows are not mixed"
            first_shard = [start // CONTEXT for start in starts if start < 1000]
            pairs.add(frozenset(one))
            window_orders.add(tuple(number - min(first_shard) for number in first_shard))
    assert len(pairs) > 1
    assert len(window_orders) == 6


def test_shards_are_read_where_webdataset_would_stumble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that look like URLs, a torchrun environment, and the global generators left alone."""
    (tmp_path / "text.txt").write_bytes(numbered(4000))
    folder = tmp_path / "a {1..2} b::c#d?e%20f"
    pack([tmp_path / "text.txt"], folder, num_shards=2)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "WORKER": "1", "NUM_WORKERS": "2"}.items():
        monkeypatch.setenv(name, value)
    state = random.getstate(), torch.get_rng_state()
    assert len(epoch_of(stream(folder), 0)) > 200
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


# Evaluation


@given(num_tokens=st.integers(17, 200), context=st.integers(1, 8), batch_size=st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_validation_predicts_every_token_once(
    packed: Callable[..., Path], num_tokens: int, context: int, batch_size: int
) -> None:
    text = bytes(range(256))[:num_tokens]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PACK, "VALID_SHARD_TOKENS", 20)  # windows reach over the ends of shards
        folder = packed(text, num_shards=1, valid_fraction=0.5)
    assert len(Index.load(folder).valid) == -(-(num_tokens - num_tokens // 2) // 20)
    valid = text[num_tokens // 2 :]
    batches = list(validation_batches(folder, context_tokens=context, batch_size=batch_size))
    sizes = [len(batch) for batch in batches]
    assert all(size == batch_size for size in sizes[:-1])
    assert 0 < sizes[-1] <= batch_size
    rows = torch.cat(batches)
    length = (len(valid) - 1) // context * context
    assert bytes(rows[:, 1:].flatten().tolist()) == valid[1 : 1 + length]
    assert bytes(rows[:, :-1].flatten().tolist()) == valid[:length]


def test_a_short_validation_is_spread_evenly_over_the_text(packed: Callable[..., Path]) -> None:
    text = numbered(4000)
    folder = packed(text, num_shards=1, valid_fraction=0.5)
    for max_tokens, num_windows in ((1, 1), (50, 3), (64, 4), (10**6, 1999 // 16)):
        batches = validation_batches(folder, context_tokens=16, batch_size=3, max_tokens=max_tokens)
        starts = [text.index(bytes(row.tolist())) for batch in batches for row in batch]
        apart = 1999 // 16 // num_windows * 16
        assert starts == list(range(2000, 2000 + num_windows * apart, apart))


# Refusals


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(numbered(4000))
    return path


def test_pack_refuses_bad_texts(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    missing, empty = tmp_path / "nowhere.txt", tmp_path / "empty.txt"
    empty.touch()
    assert f"{missing}: no such text" in refusal(lambda: pack([text, missing], out))
    assert "no such text" in refusal(lambda: pack([text], out, valid_texts=[tmp_path]))
    assert f"{empty}: no text in it" in refusal(lambda: pack([empty], out))
    assert "no text in it" in refusal(lambda: pack([text], out, valid_texts=[empty]))
    assert "3600 tokens" in refusal(lambda: pack([text], out, num_shards=1801))
    damaged, good = tmp_path / "damaged.gz", gzip.compress(numbered(4000))
    for content in (b"no gzip", good[:-20], good[:12] + b"?" * 9):
        damaged.write_bytes(content)
        assert "damaged.gz: cannot be read" in refusal(lambda: pack([damaged], out))
    assert not list(out.iterdir())


def test_bpe_refuses_what_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latin1.txt"
    faults = {b"caf\xe9 noir " * 9: 3, "é".encode() * 20 + b"\xc3": 40, b"ab\xf0\x9f\x90": 2}
    for content, where in faults.items():
        path.write_bytes(content)
        for block_bytes in (1, 3, 1 << 20):
            monkeypatch.setattr(PACK, "BLOCK_BYTES", block_bytes)
            line = refusal(lambda: pack([path], tmp_path / "bpe", tokenizer="bpe:300", num_shards=1))
            assert f"latin1.txt: byte {where} is not UTF-8" in line
    index = pack([path], tmp_path / "bytes", num_shards=1)
    assert sum(shard.num_tokens for shard in index.train + index.valid) == len(path.read_bytes())


@pytest.mark.parametrize("name", ["bpe:x", "bpe", "bpe:", "bpe:255", "bpe:-1", "char", "", "bytes:256"])
def test_unknown_tokenizers_are_refused(text: Path, name: str) -> None:
    assert "bpe:4096" in refusal(lambda: pack([text], text.parent / "out", tokenizer=name))
    assert not (text.parent / "out").exists()


@pytest.mark.parametrize("setting", [{"valid_fraction": 1}, {"valid_fraction": -1}, {"num_shards": 0}])
def test_senseless_settings_are_refused(text: Path, setting: dict[str, Any]) -> None:
    assert next(iter(setting)) in refusal(lambda: pack([text], text.parent / "out", **setting))


def test_out_that_is_a_file_is_refused(text: Path) -> None:
    assert "cannot be made a folder" in refusal(lambda: pack([text], text))


def test_index_says_what_is_wrong(text: Path) -> None:
    folder = text.parent / "out"
    assert f"lte data pack TEXT --out {folder}" in refusal(lambda: Index.load(folder))
    pack([text], folder, num_shards=3)
    whole = json.loads((folder / "index.json").read_text())
    for content in (
        "{",
        "[]",
        json.dumps(whole | {"format": 2}),
        json.dumps(whole | {"surprise": 1}),
        json.dumps(whole | {"dtype": "float32"}),
        json.dumps({key: value for key, value in whole.items() if key != "vocab_size"}),
    ):
        (folder / "index.json").write_text(content)
        line = refusal(lambda: Index.load(folder))
        assert "index.json: damaged" in line
        assert "--force" in line
    (folder / "index.json").write_text(json.dumps(whole))
    (folder / "train-000001.tar").unlink()
    assert "without train-000001.tar (1 of 4 shards" in refusal(lambda: Index.load(folder))


def test_damaged_shards_are_refused(text: Path) -> None:
    folder = text.parent / "out"
    pack([text], folder, num_shards=1)
    for split in ("train", "valid"):
        path = folder / f"{split}-000000.tar"
        content = bytearray(path.read_bytes())
        content[600] ^= 1
        path.write_bytes(content)
    assert "train-000000.tar: damaged" in refusal(lambda: stream(folder).batch(0))
    batches = validation_batches(folder, context_tokens=16, batch_size=1)
    assert "valid-000000.tar: damaged" in refusal(lambda: next(batches))
    one = stream(folder)
    path = folder / "train-000000.tar"
    path.unlink()
    assert "train-000000.tar: cannot be read" in refusal(lambda: one.batch(0))


def test_a_wrong_token_count_is_refused(text: Path) -> None:
    folder = text.parent / "out"
    index = pack([text], folder, num_shards=1)
    shard = dataclasses.replace(index.train[0], num_tokens=3599)
    (folder / "index.json").write_bytes(dataclasses.replace(index, train=(shard,)).dump())
    assert "3600 tokens instead of index.json's 3599" in refusal(lambda: stream(folder).batch(0))


def test_too_little_text_for_a_window_is_refused(text: Path) -> None:
    folder = text.parent / "out"
    pack([text], folder, num_shards=3, valid_fraction=0)  # 1,333 tokens a shard
    assert "1333 tokens are too few" in refusal(lambda: stream(folder, context_tokens=667))
    stream(folder, context_tokens=666).batch(0)
    stream(folder, context_tokens=400, num_workers=6, worker=5).batch(0)
    line = refusal(lambda: stream(folder, context_tokens=600, num_workers=6, worker=5))
    assert "too few for windows of 600 and 6 workers" in line
    line = refusal(lambda: validation_batches(folder, context_tokens=16, batch_size=1))
    assert "0 tokens of validation text, a window needs 17" in line


def test_a_damaged_tokenizer_is_refused(text: Path) -> None:
    folder = text.parent / "out"
    pack([text], folder, tokenizer="bpe:300", num_shards=1)
    saved = folder / "tokenizer.json"
    shutil.copy(saved, text.parent / "good.json")
    saved.write_text(saved.read_text()[:500])
    assert "tokenizer.json: missing or damaged" in refusal(lambda: tokenizer.load(folder))
    saved.unlink()
    assert "tokenizer.json: missing or damaged" in refusal(lambda: tokenizer.load(folder))
    pack([text], text.parent / "other", tokenizer="bpe:270", num_shards=1)
    shutil.copy(text.parent / "other" / "tokenizer.json", saved)
    assert "270 tokens, index.json says 300" in refusal(lambda: tokenizer.load(folder))
    shutil.copy(text.parent / "good.json", saved)
    assert tokenizer.load(folder).vocab_size == 300


def others_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer as a stranger may have made it: pieces of words, a normalizer, a special token before each
    text, a limit of length, numbers of tokens with a gap, and an unknown token."""
    words = ["<s>", "<unk>", "▁the", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: number + 3 * (number > 9) for number, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(["<s>", "<unk>"])
    single = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.post_processor = single
    made.enable_truncation(8)
    made.enable_padding(length=8)
    made.save(str(path))
    return made


def test_a_given_tokenizer_is_used_as_it_is(tmp_path: Path, text: Path) -> None:
    text.write_text("The cat and the dog met.\n" * 200)
    (tmp_path / "made").mkdir()
    made = others_tokenizer(tmp_path / "made" / "tokenizer.json")
    made.no_truncation()
    made.no_padding()
    expected = made.encode(text.read_text(), add_special_tokens=False).ids
    for name in ("made", "made/tokenizer.json"):
        out = tmp_path / "out"
        index = pack([text], out, tokenizer=str(tmp_path / name), num_shards=2, valid_fraction=0, force=True)
        assert (index.tokenizer, index.vocab_size) == ("tokenizer.json", max(made.get_vocab().values()) + 1)
        assert tokens_of(out, "train").tolist() == expected
        assert (out / "tokenizer.json").read_bytes() == (tmp_path / "made" / "tokenizer.json").read_bytes()
    shutil.rmtree(tmp_path / "made")
    reader = tokenizer.load(out)
    assert reader.encode("The cat").tolist() == made.encode("The cat", add_special_tokens=False).ids
    assert reader.decode([2, *expected[:8], 11, 99]) == made.decode([2, *expected[:8]])


def test_an_own_tokenizer_can_be_given_on(tmp_path: Path, text: Path) -> None:
    """The same tokens, whether it is learned or read."""
    pack([text], tmp_path / "one", tokenizer="bpe:300", num_shards=2)
    indices = [
        pack([text], tmp_path / f"out-{k}", tokenizer=str(tmp_path / source), num_shards=2)
        for k, source in enumerate(("one", "out-0"))
    ]
    assert indices[0] == indices[1]
    assert indices[0].train == Index.load(tmp_path / "one").train, "sha256, bytes and all"


def test_a_given_tokenizer_that_is_none_is_one_line(tmp_path: Path, text: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('{"model":\n 3}')
    for name, line in (
        ("gone/tokenizer.json", "or the path of a tokenizer.json"),
        ("empty", "has no tokenizer.json; transformers writes one"),
        ("bad.json", "bad.json cannot be read ("),
    ):
        met = refusal(lambda name=name: pack([text], tmp_path / "out", tokenizer=str(tmp_path / name)))
        assert line in met
    assert not (tmp_path / "out").exists()
    others_tokenizer(tmp_path / "tokenizer.json")
    pack([text], tmp_path / "out", tokenizer=str(tmp_path), num_shards=2)
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert "tokenizer.json: missing or damaged" in refusal(lambda: tokenizer.load(tmp_path / "out"))


# Real text


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="data/tinyshakespeare is not there")
def test_tiny_shakespeare_has_its_usual_split(tmp_path: Path) -> None:
    index = pack([SHAKESPEARE], tmp_path)
    whole = gzip.decompress(SHAKESPEARE.read_bytes())
    assert sum(shard.num_tokens for shard in index.train + index.valid) == len(whole) == 1_115_394
    assert tokens_of(tmp_path, "train").tobytes() == whole[: int(0.9 * len(whole))]
    assert tokens_of(tmp_path, "valid").tobytes() == whole[int(0.9 * len(whole)) :]
    assert [shard.file for shard in index.train] == [f"train-{number:06d}.tar" for number in range(16)]
    assert [shard.file for shard in index.valid] == ["valid-000000.tar"]
