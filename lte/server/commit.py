"""How the servers of a divided model (`server.shards`) merge as one: protocol, words and decisions.

Layers are divided by bytes among K shards. Shard 0 is the run's server, and coordinates: it alone hears
Hellos, runs the rounds, records, and says what is merged. Shards 1 to K-1 are *holders*: processes of the
coordinator's that hold the master, the journal and the checkpoints of their part, in RUN/shards/K, hear
contributions to it and publish its updates. A connection leads from each to the coordinator; where it
breaks, the group ends, to be started anew as one: nobody has to guess who is slow and who is dead.

A round:

    worker          holder                        coordinator
      part k  ->      valid, journaled, fsynced
                      Durable                ->     (and its own part is there)
                                             <-     Counted: all shards have said so
                                             <-     Merge: whose, in which order, with which weights
                      merged, Merged is in the journal, fsynced
                      Prepared: digests      ->     merged its own part
                                                    all are prepared: its own Merged, fsynced. Decided.
                                             <-     Publish
      Update  <-      publishes                     publishes

All merge the same contributions, in the coordinator's order, by the weights that follow from the same
numbers, so each part is bit for bit what one server would have made of it: merging looks at one tensor at a
time. What looks at all of them (`outer.bound_norm`, say) is refused by the rules of recipes.

Why a crash anywhere leaves one version. Let the coordinator's journal lead to version c and a holder's to h.
A holder's Merged comes before the coordinator's, and none is asked for the next version before that one is
decided; so h is c or c + 1. Updates leave after the decision, so whatever a worker was given is at most
version c. A group that starts takes the least of its versions, c, and holders forget a merge that was never
decided (`agreed`); the contributions to it are sent again by those who trained them, as they are to a single
server that is started anew. If the decision is on disk all shards have their merge, and it stands, whoever
had published it or not: a worker takes over an update only when all shards' parts of one version have come,
each with its digest, and who misses some gets them from the shard that has them. Checkpoints are ordered
after the decision, so none is of a version that is forgotten.

Generations fence all of it: the coordinator raises its own, then has each holder raise that of its folder,
then they read. A group that was taken over can neither journal (each fsync looks at the generation) nor
decide; what its coordinator decided before, the newer one has read.

A holder that hangs is found by `Ping`, which it answers whatever else it waits for: its coordinator ends, and
with it the group. A full disk is no such thing: all wait for room, hear their workers, and say so.

No socket, disk or clock is in here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from lte.server.journal import Admitted, Merged


class Edition(NamedTuple):
    """Names one contribution: a worker may send it again, and another after it was refused."""

    worker_id: str
    incarnation: int
    version: int
    stream: int
    tokens: int


class Word(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of what coordinator and holders say to each other."""


# The coordinator's orders.


class Recover(Word, frozen=True, kw_only=True):
    """Bind, raise the folder's generation to this one, and find the last version: `Found`."""

    generation: int
    address: str


class Begin(Word, frozen=True, kw_only=True):
    """Go on from this version, which all shards have: `Ready`."""

    version: int


class Admit(Word, frozen=True, kw_only=True):
    """A worker takes part. Answered by `Remembered`."""

    worker: Admitted


class Dismiss(Word, frozen=True, kw_only=True):
    """A worker is gone. What it contributed to the open round stays."""

    worker_id: str


class Counted(Word, frozen=True, kw_only=True):
    """All shards have a worker's contribution to the open round: what else comes of it is not kept."""

    worker_id: str
    incarnation: int


class Merge(Word, frozen=True, kw_only=True):
    """Merge these contributions, which are durable here: `Prepared`. Fields are those of `journal.Merged`."""

    version: int
    incarnations: tuple[int, ...]
    num_missing_heads: int
    remain: tuple[str, ...]
    tokens: int
    is_last: bool

    def journaled(self, master_digest: str, base_digest: str) -> Merged:
        """What the journal says of it, with the digests of what it came to."""
        return Merged(
            version=self.version,
            incarnations=self.incarnations,
            num_missing_heads=self.num_missing_heads,
            remain=self.remain,
            tokens=self.tokens,
            master_digest=master_digest,
            base_digest=base_digest,
        )


class Publish(Word, frozen=True, kw_only=True):
    """What was prepared is decided: send it to these workers. Answered by `Published`."""

    told: tuple[str, ...]


class SendWhole(Word, frozen=True, kw_only=True):
    """Send a worker the whole of this part, at once or as soon as it is heard here."""

    worker_id: str


class Save(Word, frozen=True, kw_only=True):
    """Write a checkpoint. `Saved` answers where it is to be there then; else it is written meanwhile."""

    is_awaited: bool


class Tell(Word, frozen=True, kw_only=True):
    """Send the plain model's tensors of these names of this part, for an evaluation: a `State`. `which` as
    `Master.parameters` has it."""

    which: str
    names: tuple[str, ...]


class Digest(Word, frozen=True, kw_only=True):
    """Say what W holds: `Digested`."""


class Ping(Word, frozen=True, kw_only=True):
    """Give a sign of life: a `Pong`."""


Order = (
    Recover | Begin | Admit | Dismiss | Counted | Merge | Publish | SendWhole | Save | Tell | Digest | Ping
)

# What holders say.


class Found(Word, frozen=True, kw_only=True):
    """This part's journal leads to a version. Workers are heard at an address."""

    version: int
    address: str
    faults: tuple[str, ...]


class Ready(Word, frozen=True, kw_only=True):
    """This part is at the version that was named, its base has this digest."""

    base_digest: str


class Remembered(Word, frozen=True, kw_only=True):
    """Digest of what is merged of a worker that was admitted."""

    merged_digest: str


class Durable(Word, frozen=True, kw_only=True):
    """A worker's part of a contribution is valid and on disk."""

    edition: Edition


class Refused(Word, frozen=True, kw_only=True):
    """A worker's part of a contribution cannot be merged."""

    edition: Edition
    reason: str


class Prepared(Word, frozen=True, kw_only=True):
    """The ordered merge is done and on disk. `change` and `step` as in `master.Outcome`."""

    base_digest: str
    change: float
    step: float


class Published(Word, frozen=True, kw_only=True):
    """The update has left. Bytes since the last one, as `Publisher.close_round` has them; `changed`, what
    `Publisher.publish` returned, of so many parameters and scales."""

    changed: dict[str, float]
    num_parameters: int
    num_scales: int
    uplink_bytes: int
    downlink_bytes: int
    by_kind: dict[str, int]


class Saved(Word, frozen=True, kw_only=True):
    """Whether the checkpoint is there: not where the disk has no room."""

    is_there: bool


class State(Word, frozen=True, kw_only=True):
    """The tensors that were asked for, in safetensors' format."""

    tensors: bytes


class Digested(Word, frozen=True, kw_only=True):
    """Digests of W of this part's modules, by name."""

    of_modules: dict[str, str]


class Pong(Word, frozen=True, kw_only=True):
    """Answers a `Ping`, after the orders before it. `is_full`: what is to be on disk waits for room there."""

    is_full: bool


class Happened(Word, frozen=True, kw_only=True):
    """For the records."""

    what: str
    message: str


class Failed(Word, frozen=True, kw_only=True):
    """This holder ends: why, in words for a person, who can mend it unless it is a failure."""

    reason: str
    is_users: bool


Report = (
    Found
    | Ready
    | Remembered
    | Durable
    | Refused
    | Prepared
    | Published
    | Saved
    | State
    | Digested
    | Pong
    | Happened
    | Failed
)

_ENCODER = msgspec.msgpack.Encoder()
_ORDERS, _REPORTS = msgspec.msgpack.Decoder(Order), msgspec.msgpack.Decoder(Report)


def encode(word: Word) -> bytes:
    return _ENCODER.encode(word)


def order_of(data: bytes) -> Order:
    """An order of its coordinator's, for a holder."""
    order: Order = _ORDERS.decode(data)
    return order


def report_of(data: bytes) -> Report:
    """What a holder says, for its coordinator."""
    report: Report = _REPORTS.decode(data)
    return report


def in_parts(sizes: Mapping[str, int], most_bytes: int) -> list[list[str]]:
    """Names in their order, in as many parts as it takes for each to have at most so many bytes: one message
    has less than 4 GiB. What has more by itself is a part by itself; of nothing there is one part."""
    parts: list[list[str]] = [[]]
    left = most_bytes
    for name, num_bytes in sizes.items():
        if num_bytes > left and parts[-1]:
            parts.append([])
            left = most_bytes
        parts[-1].append(name)
        left -= num_bytes
    return parts


def agreed(versions: Iterable[int]) -> int:
    """The version that a group goes on from, of those that its shards' journals lead to: what one of them
    does not have was never decided."""
    return min(versions)


class Gathering:
    """Which parts of contributions to the open round are durable, by shard."""

    def __init__(self, num_shards: int) -> None:
        self._num = num_shards
        # worker_id -> shard -> the newest of its contributions there.
        self._found: dict[str, dict[int, Edition]] = {}

    def durable(self, shard: int, edition: Edition) -> bool:
        """A part is. Returns whether all of that contribution is now."""
        found = self._found.setdefault(edition.worker_id, {})
        found[shard] = edition
        return len(found) == self._num and set(found.values()) == {edition}

    def drop(self, worker_id: str) -> None:
        """Forget a worker's."""
        self._found.pop(worker_id, None)

    def clear(self) -> None:
        """Forget all: their round is over."""
        self._found = {}
