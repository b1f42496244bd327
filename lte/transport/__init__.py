"""Ways to carry frames between a server and its workers, directly or through relays. They know nothing
of rounds."""

from __future__ import annotations

from pathlib import Path

from lte.errors import KeysError
from lte.transport import collective, inprocess, meeting, posted, zmq
from lte.transport.base import Frames, Peer, ServerEndpoint, WorkerEndpoint
from lte.transport.followed import FollowedWorker
from lte.transport.lanes import Lanes
from lte.transport.relayed import RelayedServer

__all__ = ["Frames", "Peer", "ServerEndpoint", "WorkerEndpoint", "bind", "connect"]


def bind(
    address: str,
    *,
    max_message_bytes: int,
    insecure: bool = False,
    key: str | Path | None = None,
    allow: str | Path | None = None,
    relays: bool = True,
) -> ServerEndpoint:
    """Open the server's end of an address.

    Args:
        address: `tcp://HOST:PORT` (PORT `*` picks a free one), `ipc://PATH`, `inprocess://NAME`,
            `collective://HOST:PORT`, or `collective://env` in a process that torchrun started.
        max_message_bytes: larger frames are not accepted.
        insecure: allow addresses that other machines reach, without keys.
        key: file of the server's secret key; allow: of the workers' public keys (see `keys`). With
            them everything is encrypted, and nobody else is heard. Only for tcp://, and together.
        relays: hear workers through relays, too; not for a relay's own end, as these form no chains.

    Raises:
        ConnectError: the address cannot be bound. KeysError: the files of keys cannot be used.
    """
    _check_keys(address, key, allow, "a server's key and the allow-list")
    own: ServerEndpoint
    if address.startswith("inprocess://"):
        own = inprocess.bind(address, max_message_bytes=max_message_bytes)
    elif address.startswith(meeting.SCHEME):
        own = collective.bind(address, max_message_bytes=max_message_bytes, insecure=insecure)
    else:
        own = zmq.bind(address, max_message_bytes=max_message_bytes, insecure=insecure, key=key, allow=allow)
    return RelayedServer(own, max_message_bytes=max_message_bytes) if relays else own


def connect(
    address: str,
    *,
    key: str | Path | None = None,
    server_key: str | Path | None = None,
    lanes: Lanes | None = None,
) -> WorkerEndpoint:
    """Open a worker's end of an address. Returns at once, also when no server is there yet.

    Args:
        address: as of `bind`; or `file://PATH` of a file that holds one, such as `RUN/address`, which a
            server writes: it is followed to wherever it is started next, and by whichever transport.
        key: file of this worker's secret key; server_key: of the server's public key. For servers
            that have keys; only for tcp://, and together.
        lanes: by which what is sent takes turns, instead of going in one order; from then on they are the
            connection's own. For a relay, and by zmq alone.

    Raises:
        ConnectError: the address is malformed, or in this process no server has it. KeysError: the
        files of keys cannot be used.
    """
    _check_keys(address, key, server_key, "a worker's key and the server's public key")
    if address.startswith("inprocess://"):
        return inprocess.connect(address)
    if address.startswith(meeting.SCHEME):
        return collective.connect(address)

    def by_zmq() -> WorkerEndpoint:
        return zmq.connect(address, key=key, server_key=server_key, lanes=lanes)

    if (file := posted.file_of(address)) is None:
        return by_zmq()
    return FollowedWorker(
        file, by_zmq=by_zmq, by_collective=lambda: collective.connect(address), has_keys=key is not None
    )


def _check_keys(address: str, one: str | Path | None, other: str | Path | None, names: str) -> None:
    if (one is None) != (other is None):
        raise KeysError(f"{one or other}: {names} go together, and one is missing; give both files")
    if one is not None and not address.startswith(("tcp://", posted.SCHEME)):
        raise KeysError(f"{address}: keys are for tcp:// addresses; leave them out here")
