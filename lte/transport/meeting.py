"""Where the two ends of a connection of the collective transport meet: the server's own TCPStore.

A worker draws a number there, and the two form a group under a prefix of that number, which nobody else
ever uses. So a process that is started anew meets no key of one that is gone: its number is another,
and a server that is started anew has a new store. Under torchrun (`collective://env`) the server's
address stands in torchrun's own store, where each new server writes it over: torchrun's count of
restarts is no name for a group, as each of its agents counts only the failures of its own node.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from lte.errors import ConnectError
from lte.transport import posted
from lte.transport.base import is_loopback

SCHEME = "collective://"
ENV = "collective://env"
"""The address that torchrun's variables tell."""
FORMS = "a collective address is collective://HOST:PORT, or collective://env where torchrun starts all"
_ADDRESS = re.compile(SCHEME + r"(?P<host>[A-Za-z0-9_.-]+|\*):(?P<port>\*|\d{1,5})", re.ASCII)
_MOST_LABEL_CHARS = 63
"""Of a name; Python refuses longer ones by an error of text, not of the network."""
_POSTED, _STARTS = "lte/address", "lte/starts"
"""Keys in torchrun's store."""
_ARRIVALS = "arrivals"
_REACH_S = 3.0
_ANSWER_S = 10.0
"""How long a store may take to answer."""


class Place(NamedTuple):
    """Host and port of a server's store."""

    host: str
    port: int


class Arrived(NamedTuple):
    """A worker at the server's store.

    Attributes:
        store: for its group alone. server_ip, worker_ip: of the interfaces through which it came.
    """

    store: Store
    server_ip: str
    worker_ip: str


class Listener:
    """The server's store.

    Attributes:
        address: where workers come to.
    """

    def __init__(self, address: str, *, insecure: bool) -> None:
        """Open it.

        Raises:
            ConnectError: it cannot be bound, or other machines reach it and nobody insists on that.
        """
        place = _to_bind(address)
        if not insecure and not is_loopback(place.host):
            raise ConnectError(
                f"{address}: other machines reach this address, and this transport has no keys; use tcp://"
                " with server.key and server.allow, or set server.insecure=true on a network that you trust"
            )
        try:
            listening = socket.create_server(("" if place.host == "*" else place.host, place.port))
        except OSError as error:
            raise ConnectError(
                f"{address}: cannot be bound, or in use ({error.strerror}); choose another, or * for a free"
                " port"
            ) from None
        host = "0.0.0.0" if place.host == "*" else place.host
        port = int(listening.getsockname()[1])
        self.address = f"{SCHEME}{host}:{port}"
        self._own = Place("127.0.0.1" if place.host == "*" else host, port)
        # A socket of our own: one that the store opens listens on all interfaces.
        self._store: TCPStore | None = TCPStore(
            *self._own,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
            timeout=timedelta(seconds=_ANSWER_S),
        )
        if address == ENV and has_agent():
            _post(self.address)

    def num_arrivals(self) -> int:
        """Workers that have drawn a number so far.

        Raises:
            ConnectionError: the store does not answer.
        """
        assert self._store is not None
        try:
            return self._store.add(_ARRIVALS, 0)
        except RuntimeError as error:
            raise ConnectionError(str(error)) from None

    def arrived(self, number: int) -> Arrived:
        """The worker that drew a number.

        Raises:
            ConnectionError: it is gone again, or this is closed.
        """
        store = _opened(self._own)
        try:
            ips = store.get(_told(number)).decode("ascii", "replace").split()
        except RuntimeError as error:
            raise ConnectionError(str(error)) from None
        if len(ips) != 2:
            raise ConnectionError(f"{ips!r} are not two addresses")
        return Arrived(_of_two(store, number), *ips)

    def close(self) -> None:
        """Whoever waits at the store is told."""
        self._store = None


def arrive(place: Place) -> Arrived:
    """Go to a server's store, and draw a number.

    Raises:
        ConnectionError: no server is there.
    """
    try:  # tells whether anybody listens, without the words that torch has for it if not
        with socket.create_connection(place, timeout=_REACH_S) as probe:
            server_ip, worker_ip = probe.getpeername()[0], probe.getsockname()[0]
    except OSError as error:
        raise ConnectionError(str(error)) from None
    store = _opened(Place(server_ip, place.port))
    try:
        number = store.add(_ARRIVALS, 1)
        store.set(_told(number), f"{server_ip} {worker_ip}")
    except RuntimeError as error:
        raise ConnectionError(str(error)) from None
    return Arrived(_of_two(store, number), server_ip, worker_ip)


def finder(address: str) -> Callable[[], Place]:
    """What looks up where the server is now; it raises ConnectionError where none is known.

    Raises:
        ConnectError: this is no address.
    """
    if (file := posted.file_of(address)) is not None:
        return lambda: _placed(posted.read(file))
    if address == ENV:
        master = _master()
        return (lambda: _placed(_look_up(master))) if has_agent() else (lambda: master)
    place = _parsed(address)
    if place.host == "*" or place.port == 0:
        raise ConnectError(f"{address}: * is for servers; give the host and port that the server prints")
    return lambda: place


def _to_bind(address: str) -> Place:
    if address != ENV:
        return _parsed(address)
    master = _master()  # its name may mean loopback here, and this machine elsewhere
    host = "127.0.0.1" if is_loopback(master.host) else "*"
    return Place(host, 0 if has_agent() else master.port)


def _parsed(address: str) -> Place:
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ConnectError(f"{address!r}: not an address; {FORMS}")
    port = 0 if found["port"] == "*" else int(found["port"])
    if port > 65_535:
        raise ConnectError(f"{address}: ports end at 65535")
    labels = found["host"].removesuffix(".").split(".")
    if not all(1 <= len(label) <= _MOST_LABEL_CHARS for label in labels):
        raise ConnectError(
            f"{address[:300]}: the host is no name; between its dots are 1 to {_MOST_LABEL_CHARS} characters"
        )
    return Place(found["host"], port)


def _placed(address: str) -> Place:
    """Host and port of an address that a server posted.

    Raises:
        ConnectionError: none is there yet, or of another transport.
    """
    if not address.startswith(SCHEME):
        raise ConnectionError(f"no server has posted its address yet, but {address!r}")
    return _parsed(address)


# The store that the two meet at


def _opened(place: Place) -> TCPStore:
    """A store of another process, or of this one's server. Each of its users has a connection of its own, as
    one that waits keeps others waiting.

    Raises:
        ConnectionError: it is not there.
    """
    try:
        return TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_ANSWER_S))
    except RuntimeError as error:
        raise ConnectionError(str(error)) from None


def _of_two(store: Store, number: int) -> Store:
    return PrefixStore(f"pair-{number}", store)


def _told(number: int) -> str:
    return f"ips-{number}"


# torchrun


def _master() -> Place:
    try:
        return Place(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except (KeyError, ValueError):
        raise ConnectError(
            f"{ENV}: MASTER_ADDR and MASTER_PORT are not set; this address is for processes that torchrun"
            " starts, others use collective://HOST:PORT"
        ) from None


def has_agent() -> bool:
    """Whether torchrun keeps a store at MASTER_PORT; else the port is for a store of the first rank's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _post(address: str) -> None:
    """Tell, in torchrun's store, where the server is.

    Raises:
        ConnectError: torchrun is gone.
    """
    master = _master()
    host, port = address.removeprefix(SCHEME).split(":")
    try:
        with socket.create_connection(master, timeout=_ANSWER_S) as probe:
            own_ip = str(probe.getsockname()[0])
        if host == "0.0.0.0":  # as others reach it: the way to torchrun's store, unless it is on this machine
            host = master.host if is_loopback(own_ip) else own_ip
        _opened(master).set(_POSTED, f"{SCHEME}{host}:{port}")
    except (OSError, RuntimeError) as error:
        raise _agent_is_gone(master, error) from None


def num_starts() -> int:
    """How often this was called under this torchrun before, as by the server of each attempt.

    Raises:
        ConnectError: there is no torchrun, or it is gone.
    """
    master = _master()
    if not has_agent():
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    try:
        return _opened(master).add(_STARTS, 1) - 1
    except (ConnectionError, RuntimeError) as error:
        raise _agent_is_gone(master, error) from None


def _look_up(master: Place) -> str:
    store = _opened(master)
    try:
        return store.get(_POSTED).decode("ascii", "replace") if store.check([_POSTED]) else ""
    except RuntimeError as error:
        raise ConnectionError(str(error)) from None


def _agent_is_gone(master: Place, error: Exception) -> ConnectError:
    return ConnectError(f"{ENV}: torchrun's store at {master.host}:{master.port} is gone ({error})")
