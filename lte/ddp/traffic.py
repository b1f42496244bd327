"""Bytes that the kernel counted on TCP connections of this process (Linux)."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

_RECEIVED_AT, _SENT_AT = 128, 200
"""Where struct tcp_info (linux/tcp.h) has tcpi_bytes_received, and tcpi_bytes_sent and _retrans."""
_LENGTH = 216


class Moved(NamedTuple):
    """Bytes of payload, without headers and without what was sent again."""

    sent: int
    received: int

    def since(self, earlier: Moved) -> Moved:
        """What came after an earlier count."""
        return Moved(self.sent - earlier.sent, self.received - earlier.received)


def sockets() -> dict[int, str]:
    """This process's sockets, descriptor -> a name that no other one has; none where /proc does not tell."""
    found = {}
    for entry in Path("/proc/self/fd").glob("*") if sys.platform == "linux" else ():
        try:
            target = os.readlink(entry)
        except OSError:  # the listing's own
            continue
        if target.startswith("socket:"):
            found[int(entry.name)] = target
    return found


def counted(descriptors: Collection[int]) -> Moved | None:
    """What the TCP connections among these have carried; None where there are none, or it is not told."""
    total = None
    for descriptor in descriptors:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
            if not is_tcp or connection.type != socket.SOCK_STREAM:
                continue
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        if len(info) < _LENGTH:
            return None
        (received,) = struct.unpack_from("=Q", info, _RECEIVED_AT)
        sent, again = struct.unpack_from("=QQ", info, _SENT_AT)
        so_far = total or Moved(0, 0)
        total = Moved(so_far.sent + sent - again, so_far.received + received)
    return total
