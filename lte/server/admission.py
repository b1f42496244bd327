"""Who speaks for whom, and how often what strangers do is recorded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import msgspec

from lte import wire
from lte.transport import keys
from lte.transport.limits import Buckets


def vouched(message: wire.FromWorker, sender: str) -> wire.FromWorker | None:
    """A message as the owner of its key may say it; None if it speaks as another.

    Args:
        sender: the worker_id that the key is bound to; "" where there are no keys, and anyone may be
            anyone. A Hello that names nobody gets this name. A relay's own name is no worker's.
    """
    if not sender or isinstance(message, wire.Inquiry):
        return message
    if sender.startswith(keys.RELAY):
        return None
    if isinstance(message, wire.Hello) and not message.worker_id:
        return msgspec.structs.replace(message, worker_id=sender)
    return message if message.worker_id == sender else None


def not_vouched(sender: str) -> tuple[str, str]:
    """Why a message is refused that `vouched` gives nothing for, and the cure."""
    if sender.startswith(keys.RELAY):
        return (
            f"{sender} may not speak for it",
            f"have its name added to the line of {sender} in the server's allow-list",
        )
    return f"its key is {sender}'s, and it speaks as another worker", f"join as {sender}, or by another key"


class Inquiries:
    """Bounds how often anyone asks how the run is, by each key and name or, without keys, all together."""

    def __init__(self) -> None:
        """Make it."""
        self._buckets = Buckets(burst=20, per_s=5.0, most=1024)

    def may(self, sender: str, key_owner: str, now_s: float) -> bool:
        """Whether this one is answered; the two are those of `ServerEndpoint`."""
        return _have_left(self._buckets, sender, key_owner, now_s)


class Joins:
    """Bounds how often new processes join, by each key and name and, without keys, by all together: every
    one of them costs a model on the link, and a line in the journal and in the records."""

    def __init__(self, most_workers: int, now_s: Callable[[], float] = time.monotonic) -> None:
        """Make it.

        Args:
            most_workers: twice as many may join at once, then one a second.
        """
        self._now_s = now_s
        self._buckets = Buckets(burst=2 * most_workers, per_s=1.0, most=1024)

    def may(self, sender: str, key_owner: str) -> bool:
        """Whether one more may join; the two are those of `ServerEndpoint`."""
        return _have_left(self._buckets, sender, key_owner, self._now_s())


def _have_left(buckets: Buckets, sender: str, key_owner: str, now_s: float) -> bool:
    """Take from the bucket of who speaks, and from that of the relay by which it does: its names may be
    without number. In this order, so that one name does not use up what all of its site have."""
    return all(buckets.take(each, now_s) for each in dict.fromkeys((sender, key_owner)))


class Complaints:
    """Records what anyone can cause as often as they like, at a bounded rate: disks are finite."""

    def __init__(self, record: Callable[..., None], now_s: Callable[[], float] = time.monotonic) -> None:
        """Make it.

        Args:
            record: called with the kind of event, its message and its fields.
        """
        self._record, self._now_s = record, now_s
        # Of each kind fifty at once, then one in ten seconds: some megabytes a day at most.
        self._buckets = Buckets(burst=50, per_s=0.1, most=16)
        self._left_out: Counter[str] = Counter()

    def __call__(self, what: str, message: str, **fields: str) -> None:
        if not self._buckets.take(what, self._now_s()):
            self._left_out[what] += 1
            return
        more = self._left_out.pop(what, 0)
        self._record(what, f"{message} ({more} more were not recorded)" if more else message, **fields)
