"""The protocol's vocabulary and its bytes. Every message that travels is defined here.

A message is two frames: a header (magic, protocol version, checksum, then MessagePack of the message
and of a table of tensors) and, where there are tensors, a payload with their raw little-endian bytes,
each at a 64-byte boundary. Nothing is pickled. `SCHEMA` names this vocabulary: it changes with any
field or dtype, and peers of another schema refuse each other.

    worker                              server
      Hello               ->
                          <-            Welcome | Refusal
                          <-            Part ... Update        the whole model
                          <-            Begin                  a round opens
      Part ... Contribution ->
                          <-            Receipt
                          <-            Part ... Update        version v to v + 1
      Heartbeat           ->
                          <-            Pulse
      Behind              ->
                          <-            Update                 again
      Leave               ->
                          <-            Farewell               the run ended, or the server stops
      Inquiry             ->
                          <-            Status | Refusal       for people; whoever asks needs not join

Contributions and updates are as large as the model is, so their tensors travel ahead of them in
parts, each sent as soon as it is encoded; the message that names their number closes them. They are
staged, and taken whole or not at all.

Where several servers have a part of the model each (`server.shards`), a `Placement` tells of the others
before each Welcome, and a worker says to each one what concerns its part: heartbeats, contributions,
Behind and Recall. These answer with Receipt, Update, Pulse and Factors of their part; all else is said
by the first, which decides. An update counts when it has come whole from all of them.

A connection keeps order. So a pulse that answers a heartbeat sent after a contribution comes after
that contribution's receipt, and one that names a version comes after the update to it: what has not
come by then was lost with a broken connection, however slow the link. No timer decides it.
"""

from __future__ import annotations

import hashlib
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
import torch
from torch import Tensor

from lte.errors import WireError
from lte.printable import printable

MAGIC = b"LTE\x02"
_CHECKSUM_BYTES = 4
ALIGNMENT = 64
MAX_HEADER_BYTES = 4 << 20
"""Of which a message's fields make many times as much in memory."""
MAX_DIMENSIONS = 16
"""Of a tensor, so that nobody multiplies a million sizes to learn that they do not fit."""
MAX_TENSOR_BYTES = 1 << 62
"""With sizes of 0 read as 1: an empty tensor's strides must be numbers, too."""

Whole = Annotated[int, msgspec.Meta(ge=0)]
"""A count or an index; what arrives negative is malformed."""
Tokens = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
"""So many that no run's sum of them is too large for a journal."""
OwnScale = Annotated[float, msgspec.Meta(ge=0, le=sys.float_info.max)]
"""A worker's lora_scale; 0: the recipe's. Finite: a message with another number is malformed."""
MAX_TEXT = 1024
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
"""What workers say of themselves: servers keep and record it."""

assert sys.byteorder == "little", "tensors travel little-endian, as every supported machine has them"


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages."""


class Hello(Message, frozen=True, kw_only=True):
    """A worker asks to join.

    `session` is random, one a process: the same session again is a repeated question, not a new
    worker. `model` describes the worker's model (see `nn.Plan.describe`); empty when the worker will
    build the model of the recipe that it is welcomed with. `heads` and `rank` are how many heads it
    trains, and the largest lora_rank of them, `scale` their lora_scale; 0: the recipe's. `incarnation`,
    `version` and `base_digest` are its own and of the base that it holds, where it was welcomed before;
    else 0 and ''. `attempt` rises where what came of a welcome was not whole.
    """

    schema: Text
    worker_id: Text
    session: Text
    model: dict[str, str]
    heads: Whole
    rank: Whole = 0
    scale: OwnScale = 0.0
    incarnation: Whole = 0
    version: Whole = 0
    base_digest: Text = ""
    attempt: Whole = 0


class Welcome(Message, frozen=True, kw_only=True):
    """The worker is in. An `Update` with the whole model follows, unless it `holds` it already.

    `settings` is the whole recipe: it is authoritative. `slot` is the worker's place among all
    workers; it decides its part of the data and its heads. `run_id` names the run, whichever server
    serves it; `model` describes the model with heads of this worker's rank and scale;
    `merged_digest` is of the factors that the server remembers of them.
    """

    run_id: str
    generation: Whole
    worker_id: str
    incarnation: Whole
    slot: Whole
    version: Whole
    settings: dict[str, Any]
    model: dict[str, str]
    holds: bool
    merged_digest: str


class Placement(Message, frozen=True, kw_only=True):
    """The model is divided among several servers: `names` are what each has of it, `addresses` those of
    all but the one that says so. A Welcome follows. A host of 0.0.0.0 or [::] is this one's."""

    generation: Whole
    addresses: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]


class HelloAgain(Message, frozen=True, kw_only=True):
    """To a worker that the server knows no more, because it was started anew since, as `generation`,
    or has not heard of it for too long: say Hello again, with the same session."""

    generation: Whole


class Refusal(Message, frozen=True, kw_only=True):
    """The worker may not join, or may no longer take part."""

    generation: Whole
    reason: str
    cure: str


class Begin(Message, frozen=True, kw_only=True):
    """The round on `version` is open, or has been, and this worker is expected in it."""

    generation: Whole
    version: Whole


class Part(Message, frozen=True, kw_only=True):
    """Part `index` of what the message that closes `stream` names. A sender numbers its streams.

    Tensors: pieces of what is encoded. A piece under the name of the last one before it goes on
    where that ended. The server leaves `worker_id` empty and `incarnation` 0.
    """

    generation: Whole
    worker_id: Text
    incarnation: Whole
    version: Whole
    stream: Whole
    index: Whole


class Contribution(Message, frozen=True, kw_only=True):
    """What one worker learnt in one round: closes the `parts` of a `stream`, its factors and dense deltas.

    `version` is the base that it trained on, `draw` counts redraws of its A, `base_digest` is of
    the base that it holds, `merged_digest` of the merged factors that it is encoded against and
    `given_digest` of its A where A is not sent because the server draws it too (else empty).
    `loss` is the mean training loss over `tokens`. `lost` is the share of the heads' change that no
    later contribution owes (see `compress.factors`). `step_s` is the mean time of a local step,
    `encode_s` that of encoding and `apply_s` that of applying the last update.
    """

    generation: Whole
    worker_id: Text
    incarnation: Whole
    version: Whole
    stream: Whole
    parts: Whole
    draw: Whole
    tokens: Tokens
    loss: float | None
    lost: float
    step_s: float
    encode_s: float
    apply_s: float
    base_digest: Text
    merged_digest: Text
    given_digest: Text


class Receipt(Message, frozen=True, kw_only=True):
    """What became of the contribution that closed `stream`: `held` until the round closes, `superseded`
    (it came too late; the next one still owes it) or `refused`."""

    generation: Whole
    version: Whole
    stream: Whole
    status: Literal["held", "superseded", "refused"]
    reason: str


class Update(Message, frozen=True, kw_only=True):
    """The server merged and published `version`: closes `parts` with the changes of base and dense
    parameters since version `since`, or with all of them where that is None.

    `step` is how many local steps of a worker the run has come to with it: by these rates are scheduled.
    `merged` are the incarnations whose contributions are in it; `last` says that no round follows.
    """

    generation: Whole
    version: Whole
    since: Whole | None
    step: Whole
    stream: Whole
    parts: Whole
    merged: tuple[Whole, ...]
    base_digest: str
    last: bool


class Heartbeat(Message, frozen=True, kw_only=True):
    """A sign of life with progress, so that a stuck worker is seen. `number` counts heartbeats."""

    generation: Whole
    number: Whole
    worker_id: Text
    incarnation: Whole
    version: Whole
    local_step: Whole


class Pulse(Message, frozen=True, kw_only=True):
    """The server lives and has published `version`, or means this worker to train on that one. Answers
    heartbeat `number`; a Hello with 0."""

    generation: Whole
    number: Whole
    version: Whole


class Behind(Message, frozen=True, kw_only=True):
    """A worker holds `version` and has missed the update to the published one: once more, please."""

    generation: Whole
    version: Whole
    worker_id: Text
    incarnation: Whole


class Recall(Message, frozen=True, kw_only=True):
    """A worker does not hold what the server has merged of it: its merged factors, please."""

    generation: Whole
    worker_id: Text
    incarnation: Whole


class Factors(Message, frozen=True, kw_only=True):
    """Closes `parts` with the merged factors of a worker, fp32: an answer to `Recall`."""

    generation: Whole
    version: Whole
    stream: Whole
    parts: Whole


class Leave(Message, frozen=True, kw_only=True):
    """A worker goes. Nothing more will come from it."""

    generation: Whole
    worker_id: Text
    incarnation: Whole
    reason: Text


class Farewell(Message, frozen=True, kw_only=True):
    """The server goes; `finished` if the run is complete, `returns` if it is to be started again soon:
    it was preempted, or failed."""

    generation: Whole
    reason: str
    finished: bool
    returns: bool


class Inquiry(Message, frozen=True, kw_only=True):
    """How is the run? Answered as often as `admission.Inquiries` says, and else not at all."""

    schema: Text


WorkerState = Literal["training", "contributed", "behind", "waiting", "silent", "gone"]
"""In the open round: taking local steps, done with them, still without the version that it is on, or not
expected in it. Or: not heard for some heartbeats, or no member any more."""


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the server knows of one worker.

    `version` and `local_step` are what it said last, None before it did; `heard_s` is how long ago it
    was heard. Since this server knows it: `rounds` are contributions merged. Of the last one:
    `step_s` is the mean time of a local step, and `tokens_per_s` the speed of these. `address` is of
    its machine, where the transport tells; `reason`, why it is gone.
    """

    worker_id: str
    slot: Whole
    state: WorkerState
    version: Whole | None
    local_step: Whole | None
    heard_s: float
    rounds: Whole
    step_s: float | None
    tokens_per_s: float | None
    address: str
    reason: str


class Status(Message, frozen=True, kw_only=True):
    """How the run is. Times are in seconds, ago where they are of events; losses are nats a token.

    `phase` is the rounds' (see `server.rounds`) and `words` tells people what is waited for; `version`
    is published, of `rounds` in all, unless contributions are merged `on_arrival`: then rounds are worth
    more versions. `num_members` and `num_gone` count all workers, of which `workers` holds some hundreds
    at most. `tokens_per_s` is of all workers, waits included, over the
    last rounds. None: not known yet.
    """

    generation: Whole
    run_id: str
    folder: str
    phase: Literal["starting", "collecting", "merging", "finished"]
    words: str
    version: Whole
    rounds: Whole
    on_arrival: bool
    local_steps: Whole
    train_loss: float | None
    valid_loss: float | None
    tokens: Whole
    tokens_per_s: float | None
    uplink_bytes: Whole
    downlink_bytes: Whole
    merged_s: float | None
    elapsed_s: float
    left_s: float | None
    num_members: Whole
    num_gone: Whole
    workers: tuple[WorkerStatus, ...]


FromWorker = Hello | Part | Contribution | Heartbeat | Behind | Recall | Leave | Inquiry
"""What a server hears."""

AnyMessage = (
    Hello
    | Welcome
    | Placement
    | HelloAgain
    | Refusal
    | Begin
    | Part
    | Contribution
    | Receipt
    | Update
    | Heartbeat
    | Pulse
    | Behind
    | Recall
    | Factors
    | Leave
    | Farewell
    | Inquiry
    | Status
)

DTYPES: dict[str, torch.dtype] = {
    "f4": torch.float32,
    "f8": torch.float64,
    "bf2": torch.bfloat16,
    "f2": torch.float16,
    "u1": torch.uint8,
    "i1": torch.int8,
    "i4": torch.int32,
    "i8": torch.int64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorEntry(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of a payload: its name, dtype, shape and where its bytes begin."""

    name: str
    dtype: str
    shape: tuple[Whole, ...]
    offset: Whole

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class _Header(msgspec.Struct, frozen=True, array_like=True):
    message: AnyMessage
    tensors: tuple[TensorEntry, ...]


class _HeaderFromWorker(msgspec.Struct, frozen=True, array_like=True):
    message: FromWorker
    tensors: tuple[TensorEntry, ...]


def schema_of(kinds: Sequence[type[msgspec.Struct]]) -> str:
    """Names a vocabulary by its fields, their types, and what tensors may hold."""
    everything: list[type[msgspec.Struct]] = [*kinds, WorkerStatus, TensorEntry]
    described = [
        (kind.__name__, [(f.name, str(f.type)) for f in msgspec.structs.fields(kind)]) for kind in everything
    ]
    return hashlib.sha256(repr((MAGIC, described, sorted(DTYPES))).encode()).hexdigest()[:16]


SCHEMA = schema_of(get_args(AnyMessage))

Decoded = TypeVar("Decoded", _Header, _HeaderFromWorker)

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Header)
_FROM_WORKER = msgspec.msgpack.Decoder(_HeaderFromWorker)

Frames = Sequence[bytes | bytearray | memoryview]


def encode(message: AnyMessage, tensors: Mapping[str, Tensor] | None = None) -> list[bytes | memoryview]:
    """The frames of a message. Copies the tensors, which may change as soon as this returns."""
    entries, offset = [], 0
    for name, tensor in (tensors or {}).items():
        entry = TensorEntry(name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), offset)
        entries.append(entry)
        offset = _aligned(offset + entry.num_bytes)
    header = _ENCODER.encode(_Header(message, tuple(entries)))
    if not entries:
        return [MAGIC + _checksum(header) + header]
    payload = torch.zeros(offset, dtype=torch.uint8)
    for entry, tensor in zip(entries, (tensors or {}).values(), strict=True):
        _view(payload, entry).copy_(tensor.detach())
    data = payload.numpy().data
    return [MAGIC + _checksum(header, data) + header, data]


def decode(frames: Frames) -> tuple[AnyMessage, tuple[TensorEntry, ...]]:
    """The message of these frames and the table of its tensors, checked against the payload's size.

    Takes no memory for tensors: look at the table first, then call `tensors`.

    Raises:
        WireError: these frames are no message of this protocol.
    """
    header = _decode(frames, _DECODER)
    return header.message, header.tensors


def decode_from_worker(frames: Frames) -> tuple[FromWorker, tuple[TensorEntry, ...]]:
    """`decode` for a server, which trusts nobody: what only servers say is no message here. That holds
    settings, lists in lists of which take a hundred times their bytes and minutes to read. Texts are made
    printable, as they are recorded and shown."""
    header = _decode(frames, _FROM_WORKER)
    for entry in header.tensors:
        if not entry.name.isprintable():
            raise WireError(f"malformed tensor entry {entry.name[:200]!r}")
    return _printable(header.message), header.tensors


def _printable(message: FromWorker) -> FromWorker:
    said = {name: getattr(message, name) for name in message.__struct_fields__}
    texts: dict[str, Any] = {name: printable(text) for name, text in said.items() if isinstance(text, str)}
    if isinstance(message, Hello):
        texts["model"] = {printable(name): printable(text) for name, text in message.model.items()}
    is_changed = any(said[name] != text for name, text in texts.items())
    return msgspec.structs.replace(message, **texts) if is_changed else message


def _decode(frames: Frames, decoder: msgspec.msgpack.Decoder[Decoded]) -> Decoded:
    if not 1 <= len(frames) <= 2:
        raise WireError(f"a message has 1 or 2 frames, not {len(frames)}")
    header = memoryview(frames[0])
    if header.nbytes > MAX_HEADER_BYTES:
        raise WireError(f"a header of {header.nbytes} bytes, more than {MAX_HEADER_BYTES}")
    if bytes(header[: len(MAGIC)]) != MAGIC:
        raise WireError("these bytes do not begin as a message of this version of lte does")
    body = header[len(MAGIC) + _CHECKSUM_BYTES :]
    if bytes(header[len(MAGIC) : len(MAGIC) + _CHECKSUM_BYTES]) != _checksum(body, *frames[1:]):
        raise WireError("damaged on its way: its checksum is another")
    try:
        decoded = decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"malformed header: {printable(str(error)[:200])}") from None
    if len(frames) != (2 if decoded.tensors else 1):
        raise WireError("a message has a payload if it has tensors, and only then")
    if len({entry.name for entry in decoded.tensors}) != len(decoded.tensors):
        raise WireError("a tensor occurs twice")
    num_bytes, end = sum(memoryview(frame).nbytes for frame in frames[1:]), 0
    for entry in decoded.tensors:
        if not _is_possible(entry) or entry.offset != end:
            raise WireError(f"malformed tensor entry {entry.name[:200]!r}")
        end = _aligned(end + entry.num_bytes)
    if end != num_bytes:
        raise WireError(f"a payload of {num_bytes} bytes where the header announces {end}")
    return decoded


def tensors(frames: Frames, entries: Sequence[TensorEntry]) -> dict[str, Tensor]:
    """The tensors of a decoded message, in memory of their own that is aligned for arithmetic."""
    if not entries:
        return {}
    received = memoryview(frames[1])
    payload = torch.empty(received.nbytes, dtype=torch.uint8)
    payload.numpy().data[:] = received
    return {entry.name: _view(payload, entry) for entry in entries}


def in_parts(
    blobs: Iterable[tuple[str, Tensor]], part_bytes: int, make: Callable[[int], Part]
) -> Iterator[tuple[list[bytes | memoryview], dict[str, int]]]:
    """Cut named bytes into parts, each as soon as it is full.

    Args:
        blobs: names and uint8 tensors of one dimension. make: the message of part 0, 1, ...

    Yields:
        A part's frames, and the bytes of each name in it.
    """
    pieces: dict[str, Tensor] = {}
    room, index = part_bytes, 0

    def close() -> tuple[list[bytes | memoryview], dict[str, int]]:
        sizes = {name: piece.numel() for name, piece in pieces.items()}
        return encode(make(index), pieces), sizes

    for name, blob in blobs:
        start = 0
        while start < blob.numel() or name not in pieces:
            piece = blob[start : start + room]
            pieces[name] = piece
            start += piece.numel()
            room -= _aligned(piece.numel())
            if room <= 0:
                yield close()
                pieces, room, index = {}, part_bytes, index + 1
                if start >= blob.numel():
                    break
    if pieces:
        yield close()


class Assembly:
    """The parts of one stream as they come, in any order and how often, until what closes them.

    Attributes:
        stream, version: that they name. fault: why what came may not be taken, or ''.
    """

    def __init__(self, stream: int, version: int, max_bytes: Mapping[str, int] | None = None) -> None:
        """Args: max_bytes: the names that may come, with the most bytes of each; None: whatever comes."""
        self.stream, self.version, self.fault = stream, version, ""
        self._max_bytes = max_bytes
        # Pieces are padded in memory; whoever sends them smaller than parts are may take twice the room.
        self._room = 2 * sum(map(_aligned, max_bytes.values())) if max_bytes is not None else math.inf
        self._parts: dict[int, dict[str, Tensor]] = {}
        self._sizes: dict[str, int] = {}

    def add(self, part: Part, frames: Frames, entries: Sequence[TensorEntry]) -> dict[str, int]:
        """Take a part of this stream. What is wrong with it comes out when all are closed.

        Returns:
            The bytes of each name in it; none of a part that came before, and after a wrong one.
        """
        if part.index in self._parts or self.fault:
            return {}
        self.fault = next(filter(None, map(self._fault_of, entries)), "" if entries else "a part is empty")
        if part.version != self.version:
            self.fault = "parts of one stream name several versions"
        if self.fault:
            self._parts = {}
            return {}
        self._parts[part.index] = tensors(frames, entries)
        sizes = {entry.name: entry.num_bytes for entry in entries}
        for name, num_bytes in sizes.items():
            self._sizes[name] = self._sizes.get(name, 0) + num_bytes
        return sizes

    def _fault_of(self, entry: TensorEntry) -> str:
        if entry.dtype != "u1" or len(entry.shape) != 1:
            return "a part holds what is not bytes"
        if self._max_bytes is None:
            return ""
        if entry.name not in self._max_bytes:
            return f"it holds {entry.name[:100]!r}, which is not of the model's heads and dense parameters"
        before = self._sizes.get(entry.name, 0)
        if entry.name in self._sizes and not entry.num_bytes:
            return f"a piece of {entry.name!r} is empty"
        self._room -= _aligned(entry.num_bytes)
        if self._room < 0 or before + entry.num_bytes > self._max_bytes[entry.name]:
            return f"{entry.name!r} is larger than the {self._max_bytes[entry.name]} bytes it may have"
        return ""

    def close(self, num_parts: int) -> dict[str, Tensor] | None:
        """All that came, by name; None where parts were lost on the way.

        Raises:
            WireError: something came that may not.
        """
        if self.fault:
            raise WireError(self.fault)
        if len(self._parts) != num_parts or self._parts.keys() != set(range(num_parts)):
            return None
        pieces: dict[str, list[Tensor]] = {}
        for index in range(num_parts):
            for name, piece in self._parts[index].items():
                pieces.setdefault(name, []).append(piece)
        return {name: torch.cat(some) for name, some in pieces.items()}


def num_bytes(frames: Frames) -> int:
    """Bytes of these frames as they are handed to a transport."""
    return sum(memoryview(frame).nbytes for frame in frames)


def _is_possible(entry: TensorEntry) -> bool:
    if entry.dtype not in DTYPES or len(entry.shape) > MAX_DIMENSIONS:
        return False
    return math.prod(max(size, 1) for size in entry.shape) * DTYPES[entry.dtype].itemsize <= MAX_TENSOR_BYTES


def _checksum(*frames: bytes | bytearray | memoryview) -> bytes:
    """Against damage; forgery is for keys to prevent."""
    checksum = 0
    for frame in frames:
        checksum = zlib.crc32(frame, checksum)
    return checksum.to_bytes(_CHECKSUM_BYTES, "little")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _view(payload: Tensor, entry: TensorEntry) -> Tensor:
    raw = payload[entry.offset : entry.offset + entry.num_bytes]
    return raw.view(DTYPES[entry.dtype]).view(entry.shape)
