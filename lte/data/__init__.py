"""Text as packed tokens: made once by `pack`, read by every worker as a pure function of the step."""

from lte.data import tokenizer
from lte.data.pack import pack
from lte.data.shards import Index, Shard, TrainingStream, partition, validation_batches
from lte.data.tokenizer import Tokenizer

__all__ = [
    "Index",
    "Shard",
    "Tokenizer",
    "TrainingStream",
    "pack",
    "partition",
    "tokenizer",
    "validation_batches",
]
