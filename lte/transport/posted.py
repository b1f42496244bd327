"""The file in which a server posts its address, for workers that are to find it wherever it is started.

It lies in the run's folder, where all of them must see it: a folder that machines share.
"""

from __future__ import annotations

import errno
import re
import socket
from pathlib import Path

from lte import durable
from lte.errors import ConnectError

SCHEME = "file://"
"""Of a worker's address that names such a file."""
NAME = "address"
"""Of the file in the run's folder."""
_EVERYWHERE = re.compile(r"(tcp|collective)://(0\.0\.0\.0|\[::\])(?=:)")


def file_of(address: str) -> Path | None:
    """The file that an address names, or None for one that says itself where the server is."""
    return Path(address.removeprefix(SCHEME)) if address.startswith(SCHEME) else None


def post(folder: Path, address: str, host: str | None) -> None:
    """Write where a server is bound.

    Args:
        host: by which others reach this machine, if it is bound to all addresses; None: its hostname.
    """
    durable.write(folder / NAME, _EVERYWHERE.sub(rf"\1://{host or socket.gethostname()}", address) + "\n")


def read(path: Path) -> str:
    """The address in a file, or "" where none is there yet.

    Raises:
        ConnectError: there is something else.
    """
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # the second while it is replaced, on NFS
            return ""
        raise ConnectError(
            f"{path}: cannot be read ({error.strerror}); a server's address is in {NAME}, in its run's folder"
        ) from None
