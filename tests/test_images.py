"""Packing images, reading them back, dealing them out."""

from __future__ import annotations

import gzip
import importlib
import io
import itertools
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import webdataset as wds  # type: ignore[import-untyped]
from PIL import Image

from lte import cli
from lte.data import ImageIndex, TrainingImages, TrainingStream, pack, pack_images, validation_images
from lte.data.images import crop_flip, read
from lte.errors import DataError, UserError
from lte.lowrank import generator_of

# Importing it by name would give the function that lte.data shows under the same name.
PACK = importlib.import_module("lte.data.pack_images")
CLASSES = ("ape", "bee", "cow")
Pixels = npt.NDArray[np.uint8]


def picture(number: int, *, channels: int = 1, height: int = 8, width: int = 8) -> Pixels:
    """An image whose first two pixels tell its number, so that no two are alike."""
    noise = np.random.default_rng(number).integers(0, 256, (height, width, channels), np.uint8)
    noise[0, :2] = [[number % 256], [number // 256]]
    return noise


def label_of(number: int) -> int:
    return number % len(CLASSES)


def number_of(pixels: Any) -> int:
    return int(pixels[0, 0, 0]) + 256 * int(pixels[0, 1, 0])


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "png")
    return file.getvalue()


def write_folders(folder: Path, numbers: range, *, prefix: str = "", **shape: int) -> Path:
    """PNG files, a folder a class."""
    for number in numbers:
        path = folder / prefix / CLASSES[label_of(number)] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture(number, **shape)))
    return folder


def write_idx(folder: Path, split: str, numbers: range, *, zipped: bool = True) -> None:
    """The two files of a split, as MNIST has them."""
    pixels = np.stack([picture(number)[..., 0] for number in numbers])
    labels = np.array([label_of(number) for number in numbers], np.uint8)
    for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
        path = folder / f"{split}-{kind}-ubyte{'.gz' * zipped}"
        with gzip.open(path, "wb") if zipped else path.open("wb") as file:
            file.write(header + array.tobytes())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folders(tmp_path / "source", range(40))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Packed pictures 0 to num_images - 1, once per setting."""
    folders: dict[Any, Path] = {}

    def make(num_images: int, **arguments: Any) -> Path:
        key = (num_images, *sorted(arguments.items()))
        if key not in folders:
            folder = tmp_path_factory.mktemp("packed")
            pack_images(write_folders(folder / "source", range(num_images)), folder / "out", **arguments)
            folders[key] = folder / "out"
        return folders[key]

    return make


def content(folder: Path, split: str) -> list[tuple[Pixels, int]]:
    """Images and labels of a split, by tarfile, numpy and index.json alone."""
    found = []
    for shard in json.loads((folder / "index.json").read_text())[split]:
        with tarfile.open(folder / shard["file"]) as tar:
            files = {name: tar.extractfile(name) for name in tar.getnames()}
            arrays = {name: np.load(io.BytesIO(file.read())) for name, file in files.items() if file}
        keys = sorted({name.split(".")[0] for name in arrays})
        pairs = [
            pair
            for key in keys
            for pair in zip(arrays[f"{key}.pixels.npy"], arrays[f"{key}.labels.npy"].tolist(), strict=True)
        ]
        assert len(pairs) == shard["num_images"]
        found += pairs
    return found


def refusal(call: Callable[[], object]) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    return line


# Packing


def test_every_image_survives_with_its_class(packed: Callable[..., Path]) -> None:
    folder = packed(40, num_shards=3, valid_fraction=0.25)
    train, valid = content(folder, "train"), content(folder, "valid")
    assert (len(train), len(valid)) == (30, 10)
    assert {number_of(pixels) for pixels, _ in train + valid} == set(range(40))
    for pixels, label in train + valid:
        assert np.array_equal(pixels, picture(number_of(pixels)))
        assert label == label_of(number_of(pixels))
    index = ImageIndex.load(folder)
    assert (index.height, index.width, index.channels, index.classes) == (8, 8, 1, CLASSES)
    assert all({label for _, label in train[k : k + 10]} == {0, 1, 2} for k in (0, 10, 20)), "all mixed"
    values = np.stack([pixels for pixels, _ in train]) / 255.0
    assert index.mean == pytest.approx([values.mean()], abs=1e-12)
    assert index.std == pytest.approx([values.std()], abs=1e-12)


def test_all_sources_of_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    folders = write_folders(tmp_path / "folders", range(30), prefix="train")
    write_folders(folders, range(30, 40), prefix="test")
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as tar:  # in an order of its own, in a folder more
        for path in sorted(folders.rglob("*.png"), reverse=True):
            tar.add(path, Path("images") / path.relative_to(folders))
        (tmp_path / "._junk.png").write_bytes(b"what some systems leave in archives")
        tar.add(tmp_path / "._junk.png", "images/train/ape/._junk.png")
    indices = [
        pack_images(source, tmp_path / f"out-{k}", num_shards=2)
        for k, source in enumerate((folders, tmp_path / "images.tar.gz"))
    ]
    assert indices[0] == indices[1], "sha256 and all"
    assert {number_of(pixels) for pixels, _ in content(tmp_path / "out-0", "valid")} == set(range(30, 40))


@pytest.mark.parametrize("zipped", [True, False])
def test_mnists_files(tmp_path: Path, zipped: bool) -> None:
    source = tmp_path / "mnist"
    source.mkdir()
    write_idx(source, "train", range(30), zipped=zipped)
    write_idx(source, "t10k", range(30, 40), zipped=zipped)
    index = pack_images(source, tmp_path / "out", num_shards=2)
    assert (index.channels, index.classes) == (1, ("0", "1", "2"))
    for split, numbers in (("train", range(30)), ("valid", range(30, 40))):
        met = content(tmp_path / "out", split)
        assert {number_of(pixels) for pixels, _ in met} == set(numbers)
        assert all(np.array_equal(pixels, picture(number_of(pixels))) for pixels, _ in met)
        assert all(label == label_of(number_of(pixels)) for pixels, label in met)


def test_images_in_colour_and_gray_ones_among_them(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "source", range(10), channels=3, height=6)
    (source / "ape" / "gray.png").write_bytes(png(picture(300, height=6)))
    index = pack_images(source, tmp_path / "out", num_shards=1, valid_fraction=0)
    assert (index.height, index.width, index.channels, len(index.std)) == (6, 8, 3, 3)
    for pixels, _ in content(tmp_path / "out", "train"):
        number = number_of(pixels)
        expected = picture(number, channels=1 if number == 300 else 3, height=6)
        assert np.array_equal(pixels, np.broadcast_to(expected, (6, 8, 3)))


def test_jpegs_are_decoded_once_and_for_all(tmp_path: Path) -> None:
    (tmp_path / "source" / "ape").mkdir(parents=True)
    path = tmp_path / "source" / "ape" / "1.JPG"
    Image.fromarray(picture(1, channels=3, height=16, width=16)).save(path, "jpeg")
    pack_images(tmp_path / "source", tmp_path / "out", num_shards=1, valid_fraction=0)
    ((pixels, _),) = content(tmp_path / "out", "train")
    with Image.open(path) as image:
        assert np.array_equal(pixels, np.asarray(image))


def test_a_channel_without_variation_stays_finite(tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / "1.png").write_bytes(png(np.full((8, 8, 1), 7, np.uint8)))
    pack_images(tmp_path / "source", tmp_path / "out", num_shards=1, valid_fraction=0)
    pixels = stream(tmp_path / "out", batch_size=3).batch(0).pixels
    assert torch.allclose(pixels, torch.zeros(3, 1, 8, 8), atol=1e-5)


def write_webdataset(
    path: Path, numbers: range, labels: Callable[[int], str] = lambda n: str(label_of(n))
) -> None:
    """A tar by the library's own writer: 0000.png, 0000.cls, 0000.json, 0001.png, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path), encoder=False) as writer:
        for n in numbers:
            sample = {"png": png(picture(n)), "cls": labels(n).encode(), "json": b"{}"}
            writer.write({"__key__": f"{n:04d}", **sample})


def test_webdatasets_tars(tmp_path: Path) -> None:
    one = tmp_path / "one.tar"
    write_webdataset(one, range(20))
    index = pack_images(one, tmp_path / "one", num_shards=2, valid_fraction=0)
    assert index.classes == ("0", "1", "2")
    write_webdataset(tmp_path / "named.tar", range(20), lambda n: CLASSES[label_of(n)] + "\n")
    named = pack_images(tmp_path / "named.tar", tmp_path / "named", num_shards=2, valid_fraction=0)
    assert named.classes == CLASSES
    assert named.train == index.train, "sha256 and all"
    for pixels, label in content(tmp_path / "one", "train"):
        assert np.array_equal(pixels, picture(number_of(pixels)))
        assert label == label_of(number_of(pixels))


@pytest.mark.parametrize(
    ("train", "valid"),
    [("train-{:04d}.tar", "val-{:04d}.tar"), ("train/{:04d}.tar", "test/{:04d}.tar"), ("{}.tar", None)],
)
def test_folders_of_webdatasets_tars(tmp_path: Path, train: str, valid: str | None) -> None:
    source = tmp_path / "source"
    for k in range(3):  # keys begin anew in each, as some writers have it
        write_webdataset(source / train.format(k), range(10 * k, 10 * k + 10))
    if valid:
        write_webdataset(source / valid.format(0), range(30, 36))
    (source / "classnames.txt").write_text("\n".join((*CLASSES, "dog")) + "\n")
    index = pack_images(source, tmp_path / "out", num_shards=2, valid_fraction=0.2)
    assert index.classes == (*CLASSES, "dog")
    met = content(tmp_path / "out", "train"), content(tmp_path / "out", "valid")
    numbers = [{number_of(pixels) for pixels, _ in split} for split in met]
    assert numbers[0] | numbers[1] == set(range(36 if valid else 30))
    assert numbers[1] == set(range(30, 36)) if valid else len(numbers[1]) == 6
    assert all(label == label_of(number_of(pixels)) for split in met for pixels, label in split)


def test_samples_of_webdataset_as_files_and_equal_keys(tmp_path: Path) -> None:
    for k in range(2):
        write_webdataset(tmp_path / "tars" / f"{k}.tar", range(10))
        with tarfile.open(tmp_path / "tars" / f"{k}.tar") as tar:
            tar.extractall(tmp_path / "files", filter="data")
    assert sum(s.num_images for s in pack_images(tmp_path / "tars", tmp_path / "a", num_shards=2).train) == 18
    index = pack_images(tmp_path / "files", tmp_path / "b", num_shards=2, valid_fraction=0)
    assert (sum(s.num_images for s in index.train), index.classes) == (10, ("0", "1", "2"))


def test_webdatasets_that_cannot_be_packed_are_one_line(tmp_path: Path) -> None:
    def refused(labels: Callable[[int], str]) -> str:
        write_webdataset(tmp_path / "source" / "a.tar", range(9), labels)
        return refusal(lambda: pack_images(tmp_path / "source", tmp_path / "out", num_shards=1))

    assert "0000.png: the .cls beside it is neither" in refused(lambda n: " ")
    assert "class 65536 in a .cls; 65535 is the largest" in refused(lambda n: "65536")
    (tmp_path / "source" / "classnames.txt").write_text("ape\nbee\n")
    assert "classnames.txt: 2 names, but there is a class 2" in refused(lambda n: str(label_of(n)))
    with wds.TarWriter(str(tmp_path / "source" / "a.tar"), encoder=False) as writer:
        for n in range(4):
            writer.write({"__key__": f"{n}", "png": png(picture(n))} | ({"cls": b"1"} if n % 2 else {}))
    line = refusal(lambda: pack_images(tmp_path / "source", tmp_path / "out", num_shards=1))
    assert "a/0.png has no .cls beside it" in line


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "of another size": (
        lambda s: (s / "cow" / "0000.png").write_bytes(png(picture(0, width=9))),
        "cow/0000.png: 9x8 pixels, others have 8x8",
    ),
    "no image": (lambda s: (s / "ape" / "0000.png").write_bytes(b"?"), "ape/0000.png: cannot be read"),
    "cut off": (lambda s: _cut(s / "ape" / "0000.png"), "ape/0000.png: cannot be read"),
    "of 16 bits": (
        lambda s: Image.fromarray(np.zeros((8, 8), np.uint16)).save(s / "ape" / "0000.png"),
        "ape/0000.png: its pixels have more than 8 bits",
    ),
    "without a class": (lambda s: (s / "0.png").write_bytes(png(picture(0))), "0.png is in no folder that"),
    "of no split": (
        lambda s: [write_folders(s, range(9), prefix=split) for split in ("train", "test")],
        "ape/0000.png is in no folder train or test, as others are",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_an_image_that_cannot_be_packed_is_named(source: Path, tmp_path: Path, what: str) -> None:
    spoil, line = SPOILT[what]
    spoil(source)
    assert line in refusal(lambda: pack_images(source, tmp_path / "out", num_shards=2))
    assert not (tmp_path / "out" / "index.json").exists()
    assert not list((tmp_path / "out").glob(".*")), "nothing is left behind"


def test_sources_that_cannot_be_packed_are_one_line(source: Path, tmp_path: Path) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "not.tar").write_bytes(b"?")
    for refused, line in (
        (lambda: pack_images(tmp_path / "gone", out), "gone: no such folder or tar file"),
        (lambda: pack_images(empty, out), "empty: no images in it"),
        (lambda: pack_images(tmp_path / "not.tar", out), "not.tar: not a folder or tar file that can be"),
        (lambda: pack_images(source, out, num_shards=37), "36 images to train on are too few for 37 shards"),
        (lambda: pack_images(source, out, num_shards=37), "or pack fewer shards (--shards)"),
        (lambda: pack_images(source, out, valid_fraction=1.0), "valid_fraction 1.0: must be"),
        (lambda: pack_images(source, out, num_shards=0), "num_shards 0: must be"),
    ):
        assert line in refusal(refused)
    pack_images(source, out, num_shards=2)
    assert "holds packed data already" in refusal(lambda: pack_images(source, out))
    assert len(pack_images(source, out, num_shards=3, force=True).train) == 3


def test_classes_that_cannot_be_learnt_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, place in enumerate(("train/ape", "train/bee", "test/ape", "test/cow", "test/dog")):
        (tmp_path / "source" / place).mkdir(parents=True)
        (tmp_path / "source" / place / "1.png").write_bytes(png(picture(number)))
    source = str(tmp_path / "source")
    arguments = ["data", "pack-images", source, "--out", str(tmp_path / "out"), "--shards", "1"]
    assert cli.main(arguments) == 0
    line = f"lte: {source}: of cow, dog there are images to validate on, but none to train on\n"
    assert capsys.readouterr().err == line
    (tmp_path / "source" / "train" / "cow").mkdir()
    (tmp_path / "source" / "test" / "dog").rename(tmp_path / "source" / "train" / "dog")
    (tmp_path / "source" / "train" / "cow" / "1.png").write_bytes(png(picture(9)))
    assert cli.main([*arguments, "--force"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("spoil", ["cut", "magic", "labels missing", "fewer labels"])
def test_spoilt_files_of_mnist_are_one_line(tmp_path: Path, spoil: str) -> None:
    write_idx(tmp_path, "train", range(30), zipped=False)
    images, labels = (tmp_path / f"train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    if spoil == "cut":
        _cut(images)
    elif spoil == "magic":
        images.write_bytes(b"\1" + images.read_bytes()[1:])
    elif spoil == "labels missing":
        labels.unlink()
    else:
        labels.write_bytes(np.array([0x801, 3], ">u4").tobytes() + bytes(3))
    line = refusal(lambda: pack_images(tmp_path, tmp_path / "out"))
    assert line.startswith(f"{labels if spoil == 'labels missing' else images}: ")


def test_only_packing_png_and_jpeg_needs_pillow(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install 'lte[images]'" in refusal(lambda: pack_images(source, tmp_path / "out"))
    (tmp_path / "mnist").mkdir()
    write_idx(tmp_path / "mnist", "train", range(30))
    pack_images(tmp_path / "mnist", tmp_path / "mnist-out", num_shards=1)
    assert stream(tmp_path / "mnist-out", batch_size=4).batch(0).labels.shape == (4,)


# Training


def stream(folder: Path, **changes: Any) -> TrainingImages:
    settings: dict[str, Any] = {"batch_size": 5, "augment": "none", "seed": 1, "worker": 0, "num_workers": 1}
    return TrainingImages(folder, **(settings | changes))


def numbers_of(images: Any, folder: Path) -> list[int]:
    """Which pictures a batch holds."""
    index = ImageIndex.load(folder)
    pixels = (images.pixels * index.std[0] + index.mean[0]) * 255
    return [number_of(image) for image in pixels.round().permute(0, 2, 3, 1)]


def test_a_batch_is_normalized_and_keeps_its_labels(packed: Callable[..., Path]) -> None:
    folder = packed(40, num_shards=3, valid_fraction=0)
    index, batch = ImageIndex.load(folder), stream(folder, batch_size=40).batch(0)
    assert (batch.pixels.dtype, batch.labels.dtype) == (torch.float32, torch.int64)
    assert batch.pixels.mean().item() == pytest.approx(0, abs=1e-5)
    assert batch.pixels.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    for number, pixels, label in zip(numbers_of(batch, folder), batch.pixels, batch.labels, strict=True):
        expected = (picture(number).transpose(2, 0, 1) / 255 - index.mean[0]) / index.std[0]
        assert torch.allclose(pixels, torch.from_numpy(expected).float(), atol=1e-5)
        assert label == label_of(number)


def test_an_epoch_holds_every_image_once_in_another_order(packed: Callable[..., Path]) -> None:
    folder = packed(40, num_shards=3, valid_fraction=0)
    one = stream(folder)
    read_ = [number for step in range(24) for number in numbers_of(one.batch(step), folder)]
    epochs = [read_[start : start + 40] for start in range(0, 120, 40)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_depends_on_nothing_but_its_place(packed: Callable[..., Path]) -> None:
    """Neither on what was read before, nor on a global generator; but on seed and worker."""
    folder = packed(40, num_shards=3, valid_fraction=0)
    for augment in ("none", "crop-flip"):
        forward = [one.batch(step) for one in [stream(folder, augment=augment)] for step in range(20)]
        torch.manual_seed(7)
        for step in (19, 3, 8):
            again = stream(folder, augment=augment).batch(step)
            assert torch.equal(again.pixels, forward[step].pixels)
            assert torch.equal(again.labels, forward[step].labels)
        for change in ({"seed": 2}, {"worker": 1}):
            other = stream(folder, augment=augment, **change).batch(3)
            assert not torch.equal(other.pixels, forward[3].pixels)


def test_augmentation_is_drawn_anew_for_each_seed_worker_and_step(packed: Callable[..., Path]) -> None:
    folder = packed(1, num_shards=1, valid_fraction=0)  # of which every batch is full
    places = [(seed, worker, step) for seed in (1, 2) for worker in (0, 1) for step in (0, 1)]
    batches = [
        stream(folder, augment="crop-flip", seed=seed, worker=worker, batch_size=20).batch(step).pixels
        for seed, worker, step in places
    ]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(batches, 2))


@pytest.mark.parametrize(("num_shards", "num_workers"), [(5, 2), (4, 4), (2, 5)])
def test_workers_share_out_the_images(packed: Callable[..., Path], num_shards: int, num_workers: int) -> None:
    folder = packed(40, num_shards=num_shards, valid_fraction=0)
    parts = []
    for worker in range(num_workers):
        one = stream(folder, worker=worker, num_workers=num_workers, batch_size=1)
        parts.append({numbers_of(one.batch(step), folder)[0] for step in range(one.num_images)})
        assert len(parts[-1]) == one.num_images
    assert set.union(*parts) == set(range(40))
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(parts, 2))


def test_shards_beyond_the_memory_are_read_one_after_the_other(
    packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed(40, num_shards=4, valid_fraction=0)
    monkeypatch.setattr("lte.data.images.MIX_BYTES", 10 * 64)
    shards = [
        {number_of(p) for p in read(folder, i, shard)[0]}
        for i in [ImageIndex.load(folder)]
        for shard in i.train
    ]
    one = stream(folder, batch_size=10)
    met = [set(numbers_of(one.batch(step), folder)) for step in range(4)]
    assert sorted(map(sorted, met)) == sorted(map(sorted, shards))


def test_more_workers_than_images_are_refused(packed: Callable[..., Path]) -> None:
    folder = packed(40, num_shards=20, valid_fraction=0)
    line = refusal(lambda: stream(folder, worker=59, num_workers=60))
    assert "2 images are too few for 60 workers" in line


def test_crop_flip_against_one_image_at_a_time() -> None:
    """Moved by up to an eighth, mirrored or not, black where nothing was; each by its own draw."""
    pixels = np.stack([picture(number, channels=3, height=16, width=24) for number in range(200)])
    moved = crop_flip(pixels, generator_of("test"))
    assert moved.shape == pixels.shape
    seen = set()
    for before, after in zip(pixels, moved, strict=True):
        padded = np.zeros((20, 30, 3), np.uint8)
        padded[2:18, 3:27] = before
        candidates = {
            (top, left, mirrored): padded[top : top + 16, left : left + 24][:, :: -1 if mirrored else 1]
            for top in range(5)
            for left in range(7)
            for mirrored in (False, True)
        }
        fits = [key for key, candidate in candidates.items() if np.array_equal(candidate, after)]
        assert len(fits) == 1
        seen.add(fits[0])
    assert {top for top, _, _ in seen} == set(range(5))
    assert {left for _, left, _ in seen} == set(range(7))
    assert {mirrored for _, _, mirrored in seen} == {False, True}
    assert np.array_equal(crop_flip(pixels, generator_of("test")), moved)


# Evaluation


def test_validation_reads_every_image_once_in_order(packed: Callable[..., Path]) -> None:
    folder = packed(40, num_shards=2, valid_fraction=0.5)
    expected = [number_of(pixels) for pixels, _ in content(folder, "valid")]
    batches = list(validation_images(folder, batch_size=8))
    assert [len(batch.labels) for batch in batches] == [8, 8, 4]
    assert [number for batch in batches for number in numbers_of(batch, folder)] == expected
    assert [int(label) for batch in batches for label in batch.labels] == list(map(label_of, expected))
    some = [
        n
        for batch in validation_images(folder, batch_size=2, max_images=5)
        for n in numbers_of(batch, folder)
    ]
    assert some == expected[::4]


def test_validation_across_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PACK, "VALID_SHARD_IMAGES", 6)
    source, folder = write_folders(tmp_path / "source", range(40)), tmp_path / "out"
    assert len(pack_images(source, folder, num_shards=2, valid_fraction=0.5).valid) == 4
    expected = [number_of(pixels) for pixels, _ in content(folder, "valid")]
    batches = [numbers_of(batch, folder) for batch in validation_images(folder, batch_size=7)]
    assert [len(batch) for batch in batches] == [7, 7, 6]
    assert [number for batch in batches for number in batch] == expected


def test_no_validation_images_are_refused_at_once(packed: Callable[..., Path]) -> None:
    folder = packed(40, num_shards=2, valid_fraction=0)
    assert "no images for validation" in refusal(lambda: validation_images(folder, batch_size=8))


# Folders that are not as they were packed


def test_damage_and_mistakes_are_one_line(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert "no packed images" in refusal(lambda: ImageIndex.load(folder))
    pack_images(source, folder, num_shards=2)
    shard = folder / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    one = stream(folder)
    with pytest.raises(DataError, match=r"train-000001.tar: damaged .* lte data pack-images"):
        [one.batch(step) for step in range(8)]
    shard.unlink()
    assert "without train-000001.tar (1 of 3 shards are missing)" in refusal(lambda: ImageIndex.load(folder))
    (folder / "index.json").write_text("{}")
    assert "damaged, or of another version" in refusal(lambda: ImageIndex.load(folder))


def test_images_are_no_text_and_text_no_images(packed: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words " * 100)
    pack([tmp_path / "text.txt"], tmp_path / "text", num_shards=1)
    line = refusal(lambda: stream(tmp_path / "text"))
    assert (
        line == f"{tmp_path / 'text'}: holds text, not images; set data.kind=text, or choose another folder"
    )
    images = packed(40, num_shards=3, valid_fraction=0)
    line = refusal(
        lambda: TrainingStream(images, context_tokens=8, batch_size=1, seed=0, worker=0, num_workers=1)
    )
    assert line == f"{images}: holds images, not text; set data.kind=images, or choose another folder"
