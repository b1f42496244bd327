"""Data as shards: made once by `pack`, read by every worker as a pure function of the step."""

from lte.data import tokenizer
from lte.data.folder import partition
from lte.data.images import ImageIndex, Images, TrainingImages, validation_images
from lte.data.pack import pack
from lte.data.pack_images import pack_images
from lte.data.shards import Index, Shard, TrainingStream, validation_batches
from lte.data.tokenizer import Tokenizer

__all__ = [
    "ImageIndex",
    "Images",
    "Index",
    "Shard",
    "Tokenizer",
    "TrainingImages",
    "TrainingStream",
    "pack",
    "pack_images",
    "partition",
    "tokenizer",
    "validation_batches",
    "validation_images",
]
