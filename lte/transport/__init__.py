"""Ways to carry frames between a server and its workers. They know nothing of rounds."""

from __future__ import annotations

from lte.transport import inprocess, zmq
from lte.transport.base import Frames, Peer, ServerEndpoint, WorkerEndpoint

__all__ = ["Frames", "Peer", "ServerEndpoint", "WorkerEndpoint", "bind", "connect"]


def bind(address: str, *, max_message_bytes: int, insecure: bool = False) -> ServerEndpoint:
    """Open the server's end of an address.

    Args:
        address: `tcp://HOST:PORT` (PORT `*` picks a free one), `ipc://PATH` or `inprocess://NAME`.
        max_message_bytes: larger frames are not accepted.
        insecure: allow addresses that other machines reach.

    Raises:
        ConnectError: the address cannot be bound.
    """
    if address.startswith("inprocess://"):
        return inprocess.bind(address, max_message_bytes=max_message_bytes)
    return zmq.bind(address, max_message_bytes=max_message_bytes, insecure=insecure)


def connect(address: str) -> WorkerEndpoint:
    """Open a worker's end of an address. Returns at once, also when no server is there yet.

    Raises:
        ConnectError: the address is malformed, or in this process no server has it.
    """
    if address.startswith("inprocess://"):
        return inprocess.connect(address)
    return zmq.connect(address)
