"""Images to a folder of packed images; see `lte.data.images` for its layout."""

from __future__ import annotations

import gzip
import io
import math
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lte.data.folder import INDEX, claim, permutation, publish, write_shard
from lte.data.images import CHUNK_IMAGES, ImageIndex, ImageShard, Labels, Pixels
from lte.errors import DataError, UserError
from lte.printable import some

SUFFIXES = (".png", ".jpg", ".jpeg")
VALID_FOLDERS, TRAIN_FOLDERS = ("valid", "val", "validation", "test"), ("train", "training")
"""Folders above those of the classes, by which images are for validation or for training."""
VALID_SHARD_IMAGES = 1 << 13
"""Most images of a validation shard, so that a short evaluation reads little."""
TARS = (".tar", ".tar.gz", ".tgz")
LIST = "classnames.txt"
"""Beside a folder's images, or tars of them: names of classes that are numbers, one a line."""
_MOST_CLASSES = (1 << 16) - 1
_IDX = re.compile(r"(train|t10k)-images[.-]idx3-ubyte(\.gz)?")
_GRAY = ("1", "L", "LA")


class Images(NamedTuple):
    """What is to be packed.

    Attributes:
        pixels: (images, height, width, channels), in the order of the source, which may be on disk.
        order: (images,), places of the images in an order that their names alone decide on.
        labels: (images,), places in classes.
        is_valid: (images,), which are for validation; None: the source does not say.
    """

    pixels: Pixels
    order: npt.NDArray[np.int64]
    labels: Labels
    is_valid: npt.NDArray[np.bool_] | None
    classes: tuple[str, ...]


def pack_images(
    source: Path,
    out: Path,
    *,
    valid_fraction: float = 0.1,
    num_shards: int = 16,
    force: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> ImageIndex:
    """Pack images and their classes into WebDataset shards. The same images give the same bytes.

    Args:
        source: a folder, or a .tar or .tar.gz of one, whose sub-folders of PNG or JPEG files are the
            classes, or hold them in folders train and test (or valid); a WebDataset tar, or a folder of such,
            whose images have a .cls beside them with the number or name of their class (a classnames.txt may
            say the names of numbers; train and valid in the names of tars say the split); or a folder with
            the idx-ubyte files, plain or .gz, of MNIST and Fashion-MNIST.
        out: folder to make. It is complete once it holds index.json.
        valid_fraction: share of the images, drawn at random, that is kept for validation where the
            source has none of its own.
        num_shards: training shards, of nearly as many images each; so many workers can have their own.
        force: replace what was packed into `out` before.
        say: prints a line for a person, of classes that cannot be learnt.

    Raises:
        DataError: images that are missing, unreadable, too few or of different sizes; settings that make
            no sense; an `out` that is taken. UserError: Pillow is needed, and not installed.
    """
    if not 0 <= valid_fraction < 1:
        raise DataError(f"valid_fraction {valid_fraction}: must be at least 0 and less than 1")
    if num_shards < 1:
        raise DataError(f"num_shards {num_shards}: must be at least 1")
    if not source.exists():
        raise DataError(f"{source}: no such folder or tar file; check the path")
    claim(out, force=force)
    with tempfile.TemporaryDirectory(dir=out, prefix=".packing-") as temporary:
        folder = Path(temporary)
        images = _idx(source) if _is_idx(source) else _decoded(source, folder / "pixels")
        order = images.order[permutation(len(images.order), "pack")]
        if images.is_valid is None:
            num_valid = int(len(order) * valid_fraction)
            train, valid = order[num_valid:], order[:num_valid]
        else:
            train, valid = order[~images.is_valid[order]], images.order[images.is_valid[images.order]]
        if len(train) < num_shards:
            raise DataError(
                f"{source}: {len(train)} images to train on are too few for {num_shards} shards;"
                " give more images, or pack fewer shards (--shards)"
            )
        if unseen := np.setdiff1d(images.labels[valid], images.labels[train]).tolist():
            named = some(images.classes[place] for place in unseen)
            say(f"{source}: of {named} there are images to validate on, but none to train on")
        mean, std = _moments(images.pixels, train)
        _, height, width, channels = images.pixels.shape
        index = ImageIndex(
            height=height,
            width=width,
            channels=channels,
            classes=images.classes,
            mean=mean,
            std=std,
            train=_write_shards(images, train, "train", num_shards, folder),
            valid=_write_shards(images, valid, "valid", -(-len(valid) // VALID_SHARD_IMAGES), folder),
        )
        (folder / INDEX).write_bytes(index.dump())
        publish(folder, out)
    return index


def _moments(pixels: Pixels, chosen: npt.NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, where a pixel is 0 to 1. Sums of integers: exact."""
    sums, squares = (np.zeros(pixels.shape[-1], np.int64) for _ in range(2))
    for start in range(0, len(chosen), CHUNK_IMAGES):
        values = pixels[chosen[start : start + CHUNK_IMAGES]].astype(np.int64)
        sums += values.sum((0, 1, 2))
        squares += np.square(values).sum((0, 1, 2))
    count = len(chosen) * pixels.shape[1] * pixels.shape[2]
    mean = [int(total) / count / 255 for total in sums]
    variance = [int(total) / count / 255**2 - m**2 for total, m in zip(squares, mean, strict=True)]
    # A channel that is the same everywhere is zero, whatever it is divided by.
    return tuple(mean), tuple(max(math.sqrt(max(v, 0.0)), 1 / 255) for v in variance)


def _write_shards(
    images: Images, chosen: npt.NDArray[np.int64], split: str, num_shards: int, folder: Path
) -> tuple[ImageShard, ...]:
    """Write the chosen images, in this order, as shards of nearly as many each."""
    shards = []
    for number in range(num_shards):
        name = f"{split}-{number:06d}"
        part = chosen[number * len(chosen) // num_shards : (number + 1) * len(chosen) // num_shards]
        sha256 = write_shard(
            folder / f"{name}.tar",
            (
                {
                    "__key__": f"{name}-{k:06d}",
                    "pixels.npy": _npy(images.pixels[chunk]),
                    "labels.npy": _npy(images.labels[chunk].astype("<u2")),
                }
                for k in range(-(-len(part) // CHUNK_IMAGES))
                for chunk in [part[k * CHUNK_IMAGES : (k + 1) * CHUNK_IMAGES]]
            ),
        )
        shards.append(ImageShard(file=f"{name}.tar", num_images=len(part), sha256=sha256))
    return tuple(shards)


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


# MNIST's format


def _is_idx(source: Path) -> bool:
    return source.is_dir() and any(_IDX.fullmatch(path.name) for path in source.iterdir())


def _idx(source: Path) -> Images:
    pixels, labels, is_valid = [], [], []
    for path in sorted(source.iterdir(), key=lambda path: (path.name.startswith("t10k"), path.name)):
        if found := _IDX.fullmatch(path.name):
            label_path = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
            pixels.append(_idx_array(path, 3)[..., None])
            labels.append(_idx_array(label_path, 1).astype(np.uint16))
            if len(pixels[-1]) != len(labels[-1]):
                raise DataError(f"{path}: {len(pixels[-1])} images, but {len(labels[-1])} labels beside it")
            is_valid.append(np.full(len(labels[-1]), found[1] == "t10k"))
    if len({array.shape[1:] for array in pixels}) > 1:
        raise DataError(f"{source}: its images are of different sizes")
    one_split = len({bool(split[0]) for split in is_valid if len(split)}) < 2
    joined = np.concatenate(labels)
    return Images(
        np.concatenate(pixels),
        np.arange(len(joined)),
        joined,
        None if one_split else np.concatenate(is_valid),
        tuple(str(label) for label in range(int(joined.max(initial=0)) + 1)),
    )


def _idx_array(path: Path, num_dimensions: int) -> npt.NDArray[np.uint8]:
    """The content of an idx-ubyte file: a magic number, the dimensions, the bytes; big-endian."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:  # a damaged .gz raises any of the three
        raise DataError(f"{path}: cannot be read ({error}); copy it again") from None
    header = 4 * (1 + num_dimensions)
    magic, *shape = np.frombuffer(content[: len(content) // 4 * 4][:header], ">u4").tolist() or [0]
    if magic != 0x800 + num_dimensions or len(content) != header + math.prod(shape):
        raise DataError(
            f"{path}: not an idx-ubyte file of {num_dimensions} dimensions, or cut off; copy it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# Files of images


class File(NamedTuple):
    """A file that is an image by its name.

    Attributes:
        name: its path in the source, in which it is unlike all others. content: its bytes.
        label: what the .cls of its sample says, as WebDataset has it; None: there is none, and its folder is
            its class. above: folders that may say which split it is of, from the outermost on.
    """

    name: PurePosixPath
    content: bytes
    label: str | None
    above: tuple[str, ...]


def _decoded(source: Path, target: Path) -> Images:
    """Images of files, decoded into a file that is kept as long as the result is used."""
    names, labels, splits = list[PurePosixPath](), list[str | None](), list[str | None]()
    shape, in_colour = None, False
    with target.open("wb") as file:
        for found in _files(source):
            pixels, mode = _decode(found.name, found.content)
            if shape not in (None, pixels.shape):
                raise DataError(
                    f"{found.name}: {pixels.shape[1]}x{pixels.shape[0]} pixels, others have"
                    f" {shape[1]}x{shape[0]}; make all images one size first"
                )
            shape, in_colour = pixels.shape, in_colour or mode not in _GRAY
            names.append(found.name)
            labels.append(found.label)
            splits.append(_split_of(found.above))
            file.write(pixels.tobytes())
    if shape is None:
        raise DataError(
            f"{source}: no images in it; give a folder or tar whose sub-folders hold PNG or JPEG files, or"
            " WebDataset's tars of them with .cls files"
        )
    held = np.memmap(target, np.uint8, "r", shape=(len(names), *shape))
    classes, places = _classes(source, names, labels)
    says = {"train", "valid"} <= set(splits)
    if says and None in splits:
        lost = names[splits.index(None)]
        raise DataError(f"{source}: {lost} is in no folder train or test, as others are")
    return Images(
        held if in_colour else held[..., :1],
        np.array(sorted(range(len(names)), key=names.__getitem__)),
        np.array(places, np.uint16),
        np.array([split == "valid" for split in splits]) if says else None,
        classes,
    )


def _classes(
    source: Path, names: list[PurePosixPath], labels: list[str | None]
) -> tuple[tuple[str, ...], list[int]]:
    """Names of the classes, and the place in them of each image's: by .cls files if there are any, numbers
    or names, or else by folders."""
    has_labels = any(label is not None for label in labels)
    found = [label if has_labels else name.parent.name for name, label in zip(names, labels, strict=True)]
    if lost := [name for name, label in zip(names, found, strict=True) if not label]:
        raise DataError(
            f"{source}: {lost[0]} has no .cls beside it that says its class, as others have"
            if has_labels
            else f"{source}: {lost[0]} is in no folder that says its class, and has no .cls beside it; make a"
            " folder of each class"
        )
    said = [label for label in found if label is not None]
    if has_labels and all(label.isdecimal() for label in said):
        places = [int(label) for label in said]
        if max(places) > _MOST_CLASSES:
            raise DataError(f"{source}: class {max(places)} in a .cls; {_MOST_CLASSES} is the largest")
        listed = _listed(source)
        if listed and len(listed) <= max(places):
            raise DataError(
                f"{source / LIST}: {len(listed)} names, but there is a class {max(places)}, counted from 0"
            )
        return listed or tuple(str(place) for place in range(max(places) + 1)), places
    classes = tuple(sorted(set(said)))
    numbers = {name: place for place, name in enumerate(classes)}
    return classes, [numbers[label] for label in said]


def _listed(source: Path) -> tuple[str, ...]:
    """Names of numbered classes, where a file beside the images lists them, one a line."""
    path = source / LIST
    if not path.is_file():
        return ()
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _split_of(folders: tuple[str, ...]) -> str | None:
    above = [part.lower() for part in folders]
    if any(part in VALID_FOLDERS for part in above):
        return "valid"
    return "train" if any(part in TRAIN_FOLDERS for part in above) else None


def _files(source: Path) -> Iterator[File]:
    """Each file that is an image by its name, of a folder, of a tar, or of a folder of tars."""
    if not source.is_dir():
        yield from _of_tar(source, ())
        return
    paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
    images = [path for path in paths if _is_image(path.name)]
    for path in images:
        name, beside = PurePosixPath(path.relative_to(source).as_posix()), path.with_name(_key(path.name))
        sample = {
            f"{beside.name}.cls": file.read_bytes() for file in [Path(f"{beside}.cls")] if file.is_file()
        }
        yield _file(name, path.read_bytes(), sample, ())
    if not images:
        for path in paths:
            if path.name.endswith(TARS) and not path.name.startswith("."):
                inside = path.relative_to(source).as_posix().removesuffix(".gz").rpartition(".")[0]
                yield from _of_tar(path, PurePosixPath(inside).parts)


def _of_tar(path: Path, inside: tuple[str, ...]) -> Iterator[File]:
    """Those of a tar file. What follows each other and is of one name up to its dots is one sample.

    Args:
        inside: its path in the source, less its ending. Words of it, as in train-0001, may say its split.
    """
    above = (*inside[:-1], *re.split(r"[-_.]", inside[-1])) if inside else ()

    def files(sample: dict[str, bytes]) -> Iterator[File]:
        for member, content in sample.items():
            if _is_image(PurePosixPath(member).name):
                found = _file(PurePosixPath(member), content, sample, above)
                yield found._replace(name=PurePosixPath(*inside, found.name))

    try:
        with tarfile.open(path) as tar:
            sample, key = dict[str, bytes](), PurePosixPath()
            for member in tar:
                name = PurePosixPath(member.name)
                is_class = name.suffix == ".cls" and not name.name.startswith(".")
                if not member.isfile() or not (is_class or _is_image(name.name)):
                    continue
                if (own := name.with_name(_key(name.name))) != key:
                    yield from files(sample)
                    sample, key = {}, own
                content = tar.extractfile(member)
                assert content is not None, "it is a file"
                sample[member.name] = content.read()
            yield from files(sample)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a folder or tar file that can be read ({reason[:100]})") from None


def _file(name: PurePosixPath, content: bytes, sample: Mapping[str, bytes], above: tuple[str, ...]) -> File:
    """An image, with the class that its sample says.

    Args:
        sample: files of its sample. above: what is above the folders of the name.
    """
    said = next((text for file, text in sample.items() if file.endswith(".cls")), None)
    if said is None:
        return File(name, content, None, (*above, *name.parent.parts[:-1]))
    try:
        label = said.decode().strip()
    except UnicodeDecodeError:
        label = ""
    if not label:
        raise DataError(f"{name}: the .cls beside it is neither a number nor a name")
    return File(name, content, label, (*above, *name.parent.parts))


def _key(name: str) -> str:
    """What WebDataset calls the sample of a file: its name up to the first dot."""
    return name.partition(".")[0]


def _is_image(name: str) -> bool:
    """Not `._x.png`, which some systems put beside x.png."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _decode(name: PurePosixPath, content: bytes) -> tuple[Pixels, str]:
    """Pixels (height, width, 3), and Pillow's name of how the file has them."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("PNG and JPEG files need Pillow to be packed; pip install 'lte[images]'") from None
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{name}: its pixels have more than 8 bits; convert it first")
            return np.asarray(image.convert("RGB")), image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: cannot be read as an image ({error})") from None
