"""Packed images: the index of their shards, and how training and evaluation read them.

A folder of packed images holds WebDataset shards `train-000000.tar`, ..., `valid-000000.tar`, ..., whose
samples are chunks of at most `CHUNK_IMAGES` images, in numpy's own format, which needs no decoder and
loses nothing: `pixels.npy`, uint8 (images, height, width, channels), and `labels.npy`, uint16 (images,);
and `index.json`, written last.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor

from lte.data.folder import INDEX, Epochs, Part, cure, load_index, partition, permutation, read_shard
from lte.errors import DataError
from lte.lowrank import generator_of

CHUNK_IMAGES = 1024
"""Images of a sample; the last sample of a shard may hold fewer."""
MIX_BYTES = 1 << 28
"""Most bytes of images that are shuffled together, and so are held in memory; at least one shard's."""

Count = Annotated[int, Field(ge=1)]
Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.uint16]
Augment = Literal["none", "crop-flip"]


@dataclass(frozen=True, kw_only=True)
class ImageShard:
    """One tar file.

    Attributes:
        file: its name in the folder. num_images: in it. sha256: of the file, in hex.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    file: str
    num_images: Count
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ImageIndex:
    """What a folder of packed images holds.

    Attributes:
        height, width: of every image, pixels. channels: 1 (gray) or 3 (red, green, blue).
        classes: their names; a label is a place in them.
        mean, std: of each channel of the training images, where a pixel is 0 to 1.
        train, valid: shards; no valid ones if none were kept for validation.
        format: version of the layout.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    height: Count
    width: Count
    channels: Literal[1, 3]
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Annotated[tuple[ImageShard, ...], Field(min_length=1)]
    valid: tuple[ImageShard, ...]
    kind: Literal["images"] = "images"
    format: Literal[1] = 1

    @classmethod
    def load(cls, folder: str | Path) -> ImageIndex:
        """Read a folder's index and see that its shards are there.

        Raises:
            DataError: nothing packed there, a damaged index, or missing shards.
        """
        return load_index(Path(folder), _ADAPTER, "images")

    def dump(self) -> bytes:
        """The bytes of index.json."""
        return _ADAPTER.dump_json(self, indent=1) + b"\n"

    @property
    def image_bytes(self) -> int:
        return self.height * self.width * self.channels


_ADAPTER: TypeAdapter[ImageIndex] = TypeAdapter(ImageIndex)


@dataclass(frozen=True)
class Images:
    """A batch.

    Attributes:
        pixels: float32 (images, channels, height, width); each channel of the training images has mean
            0 and standard deviation 1. labels: int64 (images,).
    """

    pixels: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Self:
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Self:
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])


def read(folder: Path, index: ImageIndex, shard: ImageShard) -> tuple[Pixels, Labels]:
    """All images of a shard.

    Raises:
        DataError: the file is not the one that was packed.
    """
    samples = read_shard(folder, shard, "images")
    pixels, labels = (
        np.concatenate([np.load(io.BytesIO(sample[part]), allow_pickle=False) for sample in samples])
        for part in ("pixels.npy", "labels.npy")
    )
    shape = (shard.num_images, index.height, index.width, index.channels)
    if pixels.shape != shape or labels.shape != shape[:1] or labels.max() >= len(index.classes):
        raise DataError(
            f"{folder / shard.file}: its images or labels are not {INDEX}'s; {cure(folder, 'images')}"
        )
    return pixels, labels


class TrainingImages:
    """A worker's endless training data, by step.

    `batch(step)` depends on nothing but the arguments given here, the step and the packed images: a
    resumed worker goes on exactly, without reading what went before.

    In an epoch a worker reads each image of its part once, in an order of its own: its shards are
    shuffled and taken in groups of up to `MIX_BYTES`; the images of a group are shuffled. Memory: one
    group of shards.

    Args:
        folder: packed images.
        batch_size: images of a batch.
        augment: `none`, or `crop-flip`; see `crop_flip`.
        seed: the run's seed.
        worker: its number; see `partition` for numbers of num_workers and above.
        num_workers: how many parts the data is dealt into.

    Raises:
        DataError: no packed images, or none for this worker; from `batch`, a damaged shard.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        batch_size: int,
        augment: Augment,
        seed: int,
        worker: int,
        num_workers: int,
    ) -> None:
        folder = Path(folder)
        self._index = index = ImageIndex.load(folder)
        self.batch_size, self._augment, self._seed = batch_size, augment, ("augment", seed, worker)
        parts = [
            (index.train[number], range(part, index.train[number].num_images, num_parts))
            for number, part, num_parts in partition(len(index.train), worker, num_workers)
        ]
        for shard, images in parts:
            if not images:
                raise DataError(
                    f"{folder / shard.file}: {shard.num_images} images are too few for {num_workers} workers;"
                    " pack more images, or fewer shards"
                )
        self._epochs = Epochs(
            parts,
            size=lambda shard: shard.num_images * index.image_bytes,
            most=MIX_BYTES,
            seed=seed,
            worker=worker,
        )
        self.num_images = self._epochs.num_items
        """Images of an epoch of this worker."""
        # Two orders: a batch may reach into the next group and the next epoch.
        self._order = lru_cache(2)(partial(_order, seed, worker))
        self._images = lru_cache(1)(partial(_read_group, folder, index))

    def batch(self, step: int) -> Images:
        """Batch number `step`, counted from 0."""
        first = step * self.batch_size
        images = [self._image(number) for number in range(first, first + self.batch_size)]
        pixels, labels = np.stack([image for image, _ in images]), np.stack([label for _, label in images])
        if self._augment == "crop-flip":
            pixels = crop_flip(pixels, generator_of("data", *self._seed, step))
        return _normalized(pixels, labels, self._index)

    def _image(self, number: int) -> tuple[Pixels, np.uint16]:
        """The worker's image `number`, counted over all epochs, and its label."""
        epoch, group, place = self._epochs.find(number)
        which, image = self._order(epoch, group)[place]
        pixels, labels = self._images(tuple(shard for shard, _ in group))[which]
        return pixels[image], labels[image]


def _order(seed: int, worker: int, epoch: int, group: tuple[Part[ImageShard], ...]) -> npt.NDArray[np.int64]:
    """Images of a group in the order in which a worker reads them: (images, 2), shard and place in it."""
    images = np.concatenate(
        [
            np.stack([np.full(len(part), which), np.array(part)], axis=1)
            for which, (_, part) in enumerate(group)
        ]
    )
    return images[permutation(len(images), seed, worker, epoch, group[0][0].file)]


def _read_group(
    folder: Path, index: ImageIndex, shards: tuple[ImageShard, ...]
) -> list[tuple[Pixels, Labels]]:
    return [read(folder, index, shard) for shard in shards]


def _normalized(pixels: Pixels, labels: npt.NDArray[Any], index: ImageIndex) -> Images:
    mean, std = torch.tensor(index.mean), torch.tensor(index.std)
    values = (torch.from_numpy(pixels).float() / 255 - mean) / std
    return Images(values.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64)))


def crop_flip(pixels: Pixels, generator: torch.Generator) -> Pixels:
    """Move each image by up to an eighth of its height and width, black coming in, and mirror half of
    them, at random: (images, height, width, channels) both ways."""
    num_images, height, width, _ = pixels.shape
    reach_y, reach_x = height // 8, width // 8
    padded = np.pad(pixels, ((0, 0), (reach_y, reach_y), (reach_x, reach_x), (0, 0)))

    def draw(limit: int) -> npt.NDArray[np.int64]:
        drawn: npt.NDArray[np.int64] = torch.randint(limit, (num_images, 1), generator=generator).numpy()
        return drawn

    rows = draw(2 * reach_y + 1) + np.arange(height)
    columns = draw(2 * reach_x + 1) + np.arange(width)
    columns = np.where(draw(2) == 1, columns[:, ::-1], columns)
    moved: Pixels = padded[np.arange(num_images)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved


def validation_images(folder: str | Path, *, batch_size: int, max_images: int = 0) -> Iterator[Images]:
    """The validation images in order, each once.

    Args:
        batch_size: images of a batch; the last batch may have fewer.
        max_images: most images, spread evenly over all and at least one; 0: all.

    Raises:
        DataError: no packed images, or none of them for validation; while iterating, a damaged shard.
    """
    folder = Path(folder)
    index = ImageIndex.load(folder)
    num_images = sum(shard.num_images for shard in index.valid)
    if not num_images:
        raise DataError(f"{folder}: no images for validation; pack with a larger --valid-fraction")
    wanted = min(num_images, max_images or num_images)
    stride = num_images // wanted
    return _validation_images(folder, index, batch_size, range(0, wanted * stride, stride))


def _validation_images(folder: Path, index: ImageIndex, batch_size: int, numbers: range) -> Iterator[Images]:
    first = 0
    pixels = np.empty((0, index.height, index.width, index.channels), np.uint8)
    labels = np.empty(0, np.uint16)
    for shard in index.valid:
        more_pixels, more_labels = read(folder, index, shard)
        chosen = [number - first for number in numbers if first <= number < first + shard.num_images]
        first += shard.num_images
        pixels = np.concatenate([pixels, more_pixels[chosen]])
        labels = np.concatenate([labels, more_labels[chosen]])
        while len(labels) >= batch_size or (len(labels) and shard is index.valid[-1]):
            yield _normalized(pixels[:batch_size], labels[:batch_size], index)
            pixels, labels = pixels[batch_size:], labels[batch_size:]
