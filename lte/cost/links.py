"""Links between a server and its workers: how long bytes take over them, and how people write them.

Transfers are TCP's. A connection that lay idle begins with a window of 10 segments and doubles it
each round trip until the link is full (slow start). Lost segments hold the window down for good, to
what CUBIC, or Reno where that gets more, reaches on average; the first is met after 1 / loss segments.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from lte.errors import UserError

SEGMENT_BYTES = 1448
"""What a TCP segment carries of the user's in an Ethernet frame of `FRAME_BYTES`."""
FRAME_BYTES = 1514
INITIAL_WINDOW = 10
"""Segments that a fresh or idle connection may send before the first acknowledgement."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """One worker's way to the server.

    Attributes:
        up_bps, down_bps: bits a second to and from the server, frames' headers included.
        rtt_s: there and back, seconds. loss: share of packets lost, in each direction.
    """

    up_bps: float
    down_bps: float
    rtt_s: float
    loss: float = 0.0

    def shared(self, bps: float) -> Link:
        """This link where no more than so many bits a second get through at its other end."""
        return replace(self, up_bps=min(self.up_bps, bps), down_bps=min(self.down_bps, bps))

    def up_s(self, num_bytes: float) -> float:
        """Seconds until the last of so many bytes is at the server."""
        return transfer_s(num_bytes, self.up_bps, self.rtt_s, self.loss)

    def down_s(self, num_bytes: float) -> float:
        """Seconds until the last of so many bytes is at the worker."""
        return transfer_s(num_bytes, self.down_bps, self.rtt_s, self.loss)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Workers alike.

    Attributes:
        step_s: seconds of a local step; None: as fast as all.
    """

    name: str
    link: Link
    count: int
    step_s: float | None = None


def transfer_s(num_bytes: float, bps: float, rtt_s: float, loss: float = 0.0) -> float:
    """Seconds from the first byte's leaving to the last one's arrival, over an idle connection.

    Args:
        bps: nominal rate in bits a second. loss: share of segments lost.
    """
    link_bps = bps * SEGMENT_BYTES / FRAME_BYTES
    before_loss = min(num_bytes, SEGMENT_BYTES / loss) if loss else num_bytes
    window, sent, ramp_s = float(INITIAL_WINDOW * SEGMENT_BYTES), 0.0, 0.0
    while sent + window < before_loss and window < bps / 8 * rtt_s:
        sent += window
        window *= 2
        ramp_s += rtt_s
    steady_s = (before_loss - sent) / link_bps + (num_bytes - before_loss) / min(
        link_bps, congested_bps(rtt_s, loss)
    )
    return rtt_s / 2 + ramp_s + 8 * steady_s


def congested_bps(rtt_s: float, loss: float) -> float:
    """Bits a second that random loss leaves a connection: the mean windows of RFC 9438 (CUBIC)."""
    if not loss or not rtt_s:
        return math.inf
    reno = math.sqrt(1.5 / loss)
    cubic = math.pow(0.4 * 3.7 / 1.2, 0.25) * math.pow(rtt_s / loss, 0.75)
    return 8 * SEGMENT_BYTES * max(reno, cubic) / rtt_s


# As people write them

_POWERS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_DURATIONS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = r"(\d+\.?\d*|\.\d+)"


def bandwidth(text: str) -> float:
    """Bits a second of `100mbit`, `1.5Gbit/s`, `500kbps` or, in bytes, `12.5MB/s`.

    Raises:
        UserError: it is none of these, or 0.
    """
    met = re.fullmatch(rf"{_NUMBER} ?([kKmMgG]?)(bit|bit/s|bps|B/s)", text)
    if met is None or not float(met[1]):
        raise UserError(f"{text!r} is no bandwidth, such as 100mbit, 1gbit, 500kbit or 12.5MB/s")
    return float(met[1]) * _POWERS[met[2].lower()] * (8 if met[3] == "B/s" else 1)


def bandwidths(text: str) -> tuple[float, float]:
    """Bits a second up and down of `100mbit`, or of `20mbit:100mbit` where they differ."""
    up, colon, down = text.partition(":")
    return bandwidth(up), bandwidth(down if colon else up)


def duration(text: str) -> float:
    """Seconds of `50ms`, `0.2s`, `300us`, or of 0.

    Raises:
        UserError: it is none of these.
    """
    met = re.fullmatch(rf"{_NUMBER} ?(us|ms|s)", text)
    if met is not None:
        return float(met[1]) * _DURATIONS[met[2]]
    if re.fullmatch(r"0+\.?0*", text):
        return 0.0
    raise UserError(f"{text!r} is no time with a unit, such as 50ms or 0.8s")


def seconds(text: str) -> float:
    """Seconds of `0.3`, or of a duration with its unit, such as `300ms`."""
    return float(text) if re.fullmatch(_NUMBER, text) else duration(text)


def share(text: str) -> float:
    """A part of 1, below it, of `0.5%` or `0.005`.

    Raises:
        UserError: it is none.
    """
    met = re.fullmatch(rf"{_NUMBER} ?(%?)", text)
    value = float(met[1]) / (100 if met[2] else 1) if met else 1.0
    if value >= 1:
        raise UserError(f"{text!r} is no share below 1, such as 0.95 or 0.5%")
    return value


def read_table(path: Path, loss: float = 0.0) -> list[Site]:
    """Sites of a file with lines `name bandwidth rtt [step_time] [count]`; `#` begins a comment.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise UserError(f"{path}: cannot be read ({reason})") from None
    sites = []
    for number, line in enumerate(lines, 1):
        if words := line.partition("#")[0].split():
            try:
                sites.append(_site(words, loss))
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    if not sites:
        raise UserError(f"{path}: names no worker; lines are: name bandwidth rtt [step_time] [count]")
    return sites


def _site(words: list[str], loss: float) -> Site:
    count = int(words.pop()) if len(words) > 3 and words[-1].isdecimal() else 1
    if len(words) not in (3, 4) or not count:
        raise UserError("must be: name bandwidth rtt [step_time] [count], such as 'pi 10mbit 80ms 2s 4'")
    up_bps, down_bps = bandwidths(words[1])
    link = Link(up_bps=up_bps, down_bps=down_bps, rtt_s=duration(words[2]), loss=loss)
    return Site(name=words[0], link=link, count=count, step_s=duration(words[3]) if words[3:] else None)
