"""What a server and a relay say to each other around the messages that the relay passes on.

An envelope is one frame: magic, checksum, MessagePack. Nothing in it is trusted but by the key of the
connection that it comes on.

    relay                               server
      Passed + frames     ->                                   a worker's message, as it came
                          <-            Accepts                how large a frame may be; once a connection
                          <-            Delivery + frames      a message to a worker: frames that the relay
                                                               holds are named by their digests, not sent
      Missing             ->                                   the relay does not hold these after all
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec

from lte.errors import WireError
from lte.printable import printable
from lte.transport.base import Frames

MAGIC = b"LTR\x01"
_CHECKSUM_BYTES = 4
_MAX_BYTES = 1 << 16
LEAST_BYTES = 256
"""Smaller frames are sent as they are: their names would save nothing."""
DIGEST_BYTES = 32
_MOST_FRAMES = 1024
"""Of one message. The protocol has two."""

Route = Annotated[bytes, msgspec.Meta(min_length=1, max_length=255)]
"""Names the connection of one worker at its relay."""
_Text = Annotated[str, msgspec.Meta(max_length=256)]
_Entry = Annotated[bytes, msgspec.Meta(max_length=1 + DIGEST_BYTES)]

SENT, KEEP, HELD = b"", b"+", b"="
"""Of a frame in a `Delivery`: it follows; it follows and is to be kept (by the digest behind this); it is
kept already."""


class _Envelope(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of all envelopes."""


class Passed(_Envelope, frozen=True, array_like=True):
    """A worker's message follows.

    `sender` is the worker_id that the relay has found its key to belong to, "" where it asks for no keys;
    `origin` is the address of the worker's machine. `shelf_bytes` is how much the relay keeps.
    """

    route: Route
    sender: _Text
    origin: _Text
    shelf_bytes: Annotated[int, msgspec.Meta(ge=0)]


class Missing(_Envelope, frozen=True, array_like=True):
    """The relay was told to hand out what it does not hold: the message was dropped, and the worker will
    ask again."""

    digests: Annotated[tuple[bytes, ...], msgspec.Meta(max_length=_MOST_FRAMES)]


class Delivery(_Envelope, frozen=True, array_like=True):
    """A message to a worker. `frames` says of each of its frames where it is (see `SENT`)."""

    route: Route
    frames: Annotated[tuple[_Entry, ...], msgspec.Meta(max_length=_MOST_FRAMES)]


class Accepts(_Envelope, frozen=True, array_like=True):
    """The largest frame that the server accepts: on a larger one it breaks the connection of all."""

    max_message_bytes: Annotated[int, msgspec.Meta(ge=0)]


FromRelay = Passed | Missing
FromServer = Delivery | Accepts
Opened = TypeVar("Opened", FromRelay, FromServer)

_ENCODER = msgspec.msgpack.Encoder()
_FROM_RELAY: msgspec.msgpack.Decoder[FromRelay] = msgspec.msgpack.Decoder(FromRelay)
_FROM_SERVER: msgspec.msgpack.Decoder[FromServer] = msgspec.msgpack.Decoder(FromServer)


def seal(envelope: FromRelay | FromServer) -> bytes:
    """The frame of an envelope."""
    body = _ENCODER.encode(envelope)
    return MAGIC + _checksum(body) + body


def is_sealed(frames: Frames) -> bool:
    """Whether these frames begin with an envelope."""
    return bool(frames) and bytes(memoryview(frames[0])[: len(MAGIC)]) == MAGIC


def open_from_relay(frames: Frames) -> FromRelay:
    """What a relay says before these frames' others.

    Raises:
        WireError: it is damaged, or nothing that relays say.
    """
    return _open(frames, _FROM_RELAY)


def open_from_server(frames: Frames) -> FromServer:
    """What a server says before these frames' others.

    Raises:
        WireError: it is damaged, or nothing that servers say to relays.
    """
    return _open(frames, _FROM_SERVER)


def _open(frames: Frames, decoder: msgspec.msgpack.Decoder[Opened]) -> Opened:
    frame = memoryview(frames[0])
    if frame.nbytes > _MAX_BYTES or not is_sealed(frames):
        raise WireError("no envelope of this version of lte")
    body = frame[len(MAGIC) + _CHECKSUM_BYTES :]
    if bytes(frame[len(MAGIC) : len(MAGIC) + _CHECKSUM_BYTES]) != _checksum(body):
        raise WireError("an envelope was damaged on its way: its checksum is another")
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"malformed envelope: {printable(str(error)[:200])}") from None


def digests(frames: Frames) -> Sequence[bytes]:
    """SHA-256 of each frame; b"" of those that are too small to be kept."""
    return [digest(frame) if memoryview(frame).nbytes >= LEAST_BYTES else b"" for frame in frames]


def digest(frame: bytes | bytearray | memoryview) -> bytes:
    """Names the bytes of a frame."""
    return hashlib.sha256(frame).digest()


def _checksum(body: bytes | memoryview) -> bytes:
    return zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little")
