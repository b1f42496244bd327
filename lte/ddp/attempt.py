"""Which processes form a group: those that are alive at the same time.

Where a worker fails torchrun starts all of them again, one node after the other, and keeps its store, with
what the last attempt wrote there. Its count of restarts is no name for an attempt, as each node counts only
its own failures. So whoever is started draws a name, the first worker puts together the names of all that
it finds, and the attempt begins once everybody has agreed to the same names: only the living can.
"""

from __future__ import annotations

import time
import uuid

from torch._C._distributed_c10d import Store
from torch.distributed import DistStoreError

_NAMES = "lte/names"
"""Key of the names that the first worker has put together."""
_LOOK_EVERY_S = 0.05


def agreed(store: Store, number: int, size: int, patience_s: float) -> str:
    """What worker `number` of `size` and all others call this attempt; no other attempt is called so.

    Raises:
        DistStoreError: they did not agree within `patience_s`.
    """
    own, deadline_s = uuid.uuid4().hex, time.monotonic() + patience_s
    store.set(_name_of(number), own)
    while time.monotonic() < deadline_s:
        names = _found(store, own, size) if number == 0 else _told(store)
        if own in names:
            attempt = uuid.uuid5(uuid.NAMESPACE_OID, " ".join(names)).hex
            if number == 0:
                store.set(_NAMES, " ".join(names))
            else:
                store.set(_agrees(attempt, number), "")
            if store.check([_agrees(attempt, k) for k in range(1, size)]):
                return attempt
        time.sleep(_LOOK_EVERY_S)
    raise DistStoreError(f"not all of {size} workers were there within {patience_s:g} s")


def _found(store: Store, own: str, size: int) -> list[str]:
    """The names of all workers, or nothing while some are missing."""
    others = [_name_of(k) for k in range(1, size)]
    return [own, *(store.get(key).decode() for key in others)] if store.check(others) else []


def _told(store: Store) -> list[str]:
    """The names that a first worker put together; it need not live any more."""
    return store.get(_NAMES).decode().split() if store.check([_NAMES]) else []


def _name_of(number: int) -> str:
    return f"lte/name/{number}"


def _agrees(attempt: str, number: int) -> str:
    return f"lte/{attempt}/agrees/{number}"
