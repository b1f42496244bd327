"""Frames that no honest worker sends, made of frames that one sent: for fuzzing.

Most carry a checksum that is right, so that what they hold is looked at. All is drawn from one
`random.Random`: a seed's, or hypothesis's own.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from lte import wire

Frames = list[bytes]

NUMBERS: list[Any] = [
    *(-1, 0, 1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
    *(float("nan"), float("inf"), -float("inf"), -0.0, 1e308, 5e-324),
]
TEXTS = ["", "w0", "w1", "a b", "../../x", "\x00", "Ω" * 80, "x" * 65, "x" * 5_000, "x" * 60_000]
OTHERS: list[Any] = [None, True, [], {}, [[]], b"\xff", {"a": 1}]
NAMED = ("worker_id", "incarnation", "generation", "version", "stream", "session", "schema")
"""Fields by which a message is told to be somebody's, or of another time."""


def sealed(body: bytes, *payload: bytes) -> Frames:
    """Frames of this header and payload, with the checksum that belongs to them."""
    checksum = zlib.crc32(b"".join([body, *payload])).to_bytes(4, "little")
    return [wire.MAGIC + checksum + body, *payload]


def body_of(frames: Frames) -> bytes:
    """The header without magic and checksum."""
    return frames[0][len(wire.MAGIC) + 4 :]


def renamed(frames: Frames, **fields: Any) -> Frames:
    """The same message with some fields changed, of those that it has."""
    message, table = msgspec.msgpack.decode(body_of(frames))
    message |= {name: value for name, value in fields.items() if name in message}
    return sealed(msgspec.msgpack.encode([message, table]), *frames[1:])


def kind_of(frames: Frames) -> str:
    """Name of the message's class."""
    return str(msgspec.msgpack.decode(body_of(frames))[0]["type"])


class Mutations:
    """Makes messages of each kind from recorded ones."""

    def __init__(self, recorded: Sequence[Frames], chance: random.Random) -> None:
        """Args: recorded: frames of honest workers' messages, some with payloads."""
        self._recorded, self._chance = recorded, chance
        self._with_payload = [frames for frames in recorded if len(frames) == 2]
        self.kinds: dict[str, Callable[[], Frames]] = {
            "random bytes": self._random,
            "bits flipped": self._flipped,
            "cut short or extended": self._cut,
            "spliced": self._spliced,
            "fields mutated": self._fields,
            "tables mutated": self._table,
            "blobs mutated": self.blob,
            "replayed": self._any,
            "strange frames": self._strange,
        }

    def make(self, kind: str) -> Frames:
        return self.kinds[kind]()

    def _any(self) -> Frames:
        return list(self._chance.choice(self._recorded))

    def _mended(self, frames: Frames) -> Frames:
        """As it is, or more often with a checksum that is right."""
        if not frames or not self._chance.randrange(4):
            return frames
        return sealed(body_of(frames), *frames[1:])

    def _random(self) -> Frames:
        frames = [
            self._chance.randbytes(self._chance.choice([0, 1, 8, 40, 300, 3_000]))
            for _ in range(self._chance.choice([1, 1, 2]))
        ]
        return sealed(*frames) if self._chance.randrange(2) else frames

    def _flip(self, data: bytes, most: int) -> bytes:
        flipped = bytearray(data)
        for _ in range(self._chance.randint(1, most) if flipped else 0):
            flipped[self._chance.randrange(len(flipped))] ^= 1 << self._chance.randrange(8)
        return bytes(flipped)

    def _flipped(self) -> Frames:
        frames = self._any()
        which = self._chance.randrange(len(frames))
        frames[which] = self._flip(frames[which], 8)
        return self._mended(frames)

    def _cut(self) -> Frames:
        frames = self._any()
        which = self._chance.randrange(len(frames))
        if self._chance.randrange(4):
            frames[which] = frames[which][: self._chance.randrange(len(frames[which]) + 1)]
        else:
            frames[which] += self._chance.randbytes(self._chance.choice([1, 64, 1000]))
        return self._mended(frames)

    def _spliced(self) -> Frames:
        one, other = self._any(), self._any()
        if self._chance.randrange(3):
            head, tail = body_of(one), body_of(other)
            body = head[: self._chance.randrange(len(head))] + tail[self._chance.randrange(len(tail)) :]
            return sealed(body, *one[1:])
        return sealed(body_of(one), *other[1:])

    def _value(self, old: Any) -> Any:
        """Another value for a field: most often of its kind."""
        if not self._chance.randrange(6):
            return self._chance.choice([*NUMBERS, *TEXTS, *OTHERS])
        if isinstance(old, str):
            return self._chance.choice([*TEXTS, self._flip(old.encode(), 1).decode(errors="replace")])
        if isinstance(old, int | float):
            return self._chance.choice(
                [*NUMBERS, min(old + 1, 2**64 - 1), max(0, old - 1), self._chance.getrandbits(64)]
            )
        if isinstance(old, dict):
            extra = {self._chance.choice(TEXTS): self._chance.choice(TEXTS) for _ in range(3)}
            return old | extra if self._chance.randrange(2) else {}
        return self._chance.choice(OTHERS)

    def _fields(self) -> Frames:
        frames = self._any()
        message, table = msgspec.msgpack.decode(body_of(frames))
        # What only names the sender is mutated less often: past it, more is looked at.
        others = [name for name in message if name not in NAMED]
        for _ in range(self._chance.choice([1, 1, 1, 2, 4])):
            name = self._chance.choice(others if self._chance.randrange(3) else list(message))
            message[name] = self._value(message[name])
        return sealed(msgspec.msgpack.encode([message, table]), *frames[1:])

    def _table(self) -> Frames:
        frames = list(self._chance.choice(self._with_payload))
        message, table = msgspec.msgpack.decode(body_of(frames))
        for _ in range(self._chance.choice([1, 1, 2])):
            if not table:
                break
            entry = self._chance.choice(table)
            column = self._chance.randrange(6)
            if column == 0:
                entry[0] = self._chance.choice([*TEXTS, self._chance.choice(table)[0]])
            elif column == 1:
                entry[1] = self._chance.choice([*wire.DTYPES, "", "c8"])
            elif column == 2:
                sizes = [0, 1, 2**31, 2**62, 2**64 - 1, -1, entry[2][0] if entry[2] else 1]
                entry[2] = [self._chance.choice(sizes) for _ in range(self._chance.choice([0, 1, 1, 2, 17]))]
            elif column == 3:
                entry[3] = self._chance.choice([0, 1, 64, 2**40, 2**63, self._chance.getrandbits(64)])
            elif column == 4:
                table.remove(entry)
            else:
                table.append(list(entry))
        return sealed(msgspec.msgpack.encode([message, table]), *frames[1:])

    def blob(self, frames: Frames | None = None) -> Frames:
        """A part whose table is right and whose bytes are not: they reach the decoders."""
        frames = list(frames or self._chance.choice(self._with_payload))
        _, table = wire.decode(frames)
        payload = bytearray(frames[1])
        for _ in range(self._chance.choice([1, 1, 2, 5])):
            entry = self._chance.choice(table)
            start, size = entry.offset, entry.num_bytes
            if not size:
                continue
            where = self._chance.randrange(4)
            if where == 0:  # its first bytes: kinds, lengths, the first scales, frame headers
                at = start + self._chance.randrange(min(size, 12))
                payload[at] = self._chance.choice([0, 1, 2, 0x7F, 0x80, 0xFF, self._chance.randrange(256)])
            elif where == 1:  # a length or a number, whole
                at = start + self._chance.randrange(min(size, 8))
                number = self._chance.choice(
                    [0, 1, size, 2**31 - 1, 2**31, 2**32 - 1, 0x7F800000, 0x7F7FFFFF]
                )
                payload[at : min(at + 4, start + size)] = number.to_bytes(4, "little")[: start + size - at]
            elif where == 2:
                payload[start : start + size] = self._flip(bytes(payload[start : start + size]), 16)
            else:
                payload[start : start + size] = self._chance.randbytes(size)
        return sealed(body_of(frames), bytes(payload))

    def _strange(self) -> Frames:
        """Numbers and sizes of frames that no message has."""
        message = self._any()
        return self._chance.choice(
            [
                [b""],
                [b"", b""],
                [b"", *message],
                [*message, b"", b""],
                [message[0]] * 3,
                [self._chance.randbytes(10)] * 100,
                [b""] * 100,
                [*message, self._chance.randbytes(200_000)],
            ]
        )
