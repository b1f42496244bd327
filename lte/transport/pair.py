"""One connection of the collective transport: a torch.distributed group of two, over Gloo.

Gloo can neither cancel a receive nor say whether one is done. But all waits of a group end at once when
its connection breaks, and also when one of them runs out of time: so each waits without limit in a
thread of its own, and `abort` ends them by one that has no time at all.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Set
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroupGloo, Store

from lte.transport.base import Frames

Device = ProcessGroupGloo.Device
"""Where a process's connections end: an interface of the machine."""

SERVER, WORKER = 0, 1
"""The ranks of a group."""
_MEET_S = 15.0
"""How long the two of a group have to find each other once one of them has begun."""
_NO_LIMIT = timedelta(days=365)
_AT_ONCE = timedelta(milliseconds=1)
_FRAMES, _NOTHING = 0, 1
"""Tags: of what is sent, and of what never comes."""
_MAGIC = 0x6C74652D636F6C31
"""Begins each header, so that a stream out of step is noticed."""
_MOST_FRAMES = 1 << 16
_LENGTH_BYTES = 8
# The kernel looks after a peer whose machine is gone, as for zmq: Gloo asks it for nothing of the kind.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


def device_at(ip: str) -> Device:
    """The interface with this address, unless GLOO_SOCKET_IFNAME names another.

    Raises:
        ConnectionError: there is none.
    """
    try:
        if interface := os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]:
            return ProcessGroupGloo.create_device(interface=interface)
        return ProcessGroupGloo.create_device(hostname=ip)
    except RuntimeError as error:
        raise ConnectionError(str(error)) from None


class Pair:
    """One end of a connection. One thread may send while another receives."""

    def __init__(self, store: Store, rank: int, device: Device, *, most_bytes: int | None) -> None:
        """Meet the other end; blocks until it is there.

        Args:
            store: in which the two find each other, and nobody else.
            most_bytes: larger frames are not accepted, nor messages of twice as much; None: any are.

        Raises:
            ConnectionError: it did not come in time.
        """
        self._other, self._most_bytes = 1 - rank, most_bytes
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices, options._threads, options._timeout = [device], 1, timedelta(seconds=_MEET_S)
        before = _sockets()
        try:
            self._group: Any = ProcessGroupGloo(store, rank, 2, options)
        except RuntimeError as error:
            raise ConnectionError(str(error)) from None
        _keep_alive(_sockets() - before)

    def send(self, frames: Frames) -> None:
        """Send a message: blocks until the network has taken it.

        Raises:
            ConnectionError: the connection is broken.
        """
        lengths = np.array([memoryview(frame).nbytes for frame in frames], np.int64)
        held = [np.frombuffer(frame, np.uint8) for frame in frames if memoryview(frame).nbytes]
        payload = torch.from_numpy(np.concatenate([lengths.view(np.uint8), *held]))
        header = torch.tensor([_MAGIC, len(lengths), int(lengths.sum())])
        with _broken():
            works = [self._group.send([part], self._other, _FRAMES) for part in (header, payload)]
            for work in works:
                work.wait(_NO_LIMIT)

    def receive(self) -> list[memoryview]:
        """The next message: blocks until one has come.

        Raises:
            ConnectionError: the connection is broken, or what came is no message that is accepted.
        """
        magic, num_frames, num_bytes = self._received(torch.empty(3, dtype=torch.int64)).tolist()
        is_message = magic == _MAGIC and 0 < num_frames <= _MOST_FRAMES and num_bytes >= 0
        if not is_message or (self._most_bytes is not None and num_bytes > 2 * self._most_bytes):
            raise ConnectionError(f"a message of {num_frames} frames and {num_bytes} bytes")
        payload = self._received(torch.empty(_LENGTH_BYTES * num_frames + num_bytes, dtype=torch.uint8))
        lengths = payload[: _LENGTH_BYTES * num_frames].view(torch.int64).tolist()
        most = num_bytes if self._most_bytes is None else self._most_bytes
        if min(lengths) < 0 or max(lengths) > most or sum(lengths) != num_bytes:
            raise ConnectionError(f"frames of {lengths[:10]} bytes")
        view, frames, start = payload.numpy().data, [], _LENGTH_BYTES * num_frames
        for length in lengths:
            frames.append(view[start : start + length])
            start += length
        return frames

    def abort(self) -> None:
        """Break the connection: whoever waits for something on it, here or at its other end, is told."""
        with contextlib.suppress(RuntimeError):
            self._group.recv([torch.empty(1)], self._other, _NOTHING).wait(_AT_ONCE)

    def _received(self, buffer: Tensor) -> Tensor:
        with _broken():
            self._group.recv([buffer], self._other, _FRAMES).wait(_NO_LIMIT)
        return buffer


@contextlib.contextmanager
def _broken() -> Iterator[None]:
    """Gloo's errors as what they mean."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(str(error)) from None


def _sockets() -> Set[tuple[int, str]]:
    """Descriptor and name of each socket of this process; none where /proc does not tell."""
    found = set()
    for entry in Path("/proc/self/fd").glob("*") if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):  # closed meanwhile
            if (name := os.readlink(entry)).startswith("socket:"):
                found.add((int(entry.name), name))
    return found


def _keep_alive(sockets: Set[tuple[int, str]]) -> None:
    """Have the kernel look after the TCP connections among these."""
    for descriptor, _ in sockets:
        with contextlib.suppress(OSError), _borrowed(descriptor) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A socket beside the one that has this descriptor, unless that is another file's by now.

    Raises:
        OSError: it is.
    """
    own = os.dup(descriptor)
    try:
        connection = socket.socket(fileno=own)
    except OSError:
        os.close(own)
        raise
    with connection:
        yield connection
