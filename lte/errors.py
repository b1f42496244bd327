"""Every exception that lte raises on purpose.

    LTEError
    |-- UserError            a person can mend it: one line, exit code 2
    |   |-- ConfigError      a recipe or an override is wrong; holds one line per fault
    |   |-- DataError        shards, texts or tokenizers that are missing or unreadable
    |   |-- RunError         a run folder that is missing, in use, or of another recipe
    |   |-- ConnectError     no server answers or admits the key, or the address cannot be bound
    |   |   |-- AbsentError  no server answers yet
    |   |-- KeysError        key files or allow-lists that are missing, damaged or open to others
    |   |-- RefusedError     the server refused this worker, and said why
    |   |   `-- JoinAnewError    its place is another's, or the run went back; it may join anew
    |   `-- DivergedError    what is trained is not finite any more
    |-- WireError            bytes that are not a message of this protocol
    |-- DigestError          server and worker do not hold the same bits
    |-- ShardError           one of several processes that are one server has ended, and so all do
    |-- ProcessError         one of several processes that are one worker has ended, and so all do
    |-- StoppedError         this process was told to stop, and did not finish what it was at
    `-- RunEnded             the run is over (finished, stopped, or its server is gone)
        `-- FencedError      for this process alone: a newer one has taken its place

Broken invariants are `assert`s, not exceptions of this tree.
"""

from __future__ import annotations


class LTEError(Exception):
    """Base of all exceptions of this package."""


class UserError(LTEError):
    """A mistake that the person at the keyboard can mend; shown as one line, exit code 2."""


class ConfigError(UserError):
    """A recipe that cannot be used.

    Args:
        faults: one line per fault; all faults of a recipe are reported together.
    """

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


class DataError(UserError):
    """Shards, texts or a tokenizer that are missing, damaged or do not fit the recipe."""


class RunError(UserError):
    """A run folder that is missing, in use by another process, or of another recipe."""


class ConnectError(UserError):
    """No server answers at an address or admits this key, or an address cannot be bound."""


class AbsentError(ConnectError):
    """No server has answered yet: one may come."""


class KeysError(UserError):
    """A key file or an allow-list that is missing, damaged, or readable by others."""


class RefusedError(UserError):
    """The server refused this worker.

    Args:
        reason: what the server met.
        cure: what to do about it.
    """

    def __init__(self, reason: str, cure: str) -> None:
        self.reason = reason
        self.cure = cure
        super().__init__(f"the server refused this worker: {reason}; {cure}")


class JoinAnewError(RefusedError):
    """The server has no place any more for this worker as it was: it went back, or gave its part of the
    data to another. It may join anew."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, "start the worker again")


class DivergedError(UserError):
    """What a worker trains holds numbers that are not finite."""


class WireError(LTEError):
    """Bytes that are not a well-formed message of this protocol version."""


class DigestError(LTEError):
    """Server and worker do not hold the same bits."""


class ShardError(LTEError):
    """A process that holds a shard of the server's master is gone; the server ends, to be started again."""


class ProcessError(LTEError):
    """One of the processes of a worker is gone; the worker ends, to be started again."""


class StoppedError(LTEError):
    """What was under way was given up, as this process was told to stop."""


class RunEnded(LTEError):
    """The run is over.

    Args:
        reason: why, in words for a person.
        finished: whether the run reached its last round.
    """

    def __init__(self, reason: str, *, finished: bool) -> None:
        self.finished = finished
        super().__init__(reason)


class FencedError(RunEnded):
    """A newer process has taken this one's place; it must not write or send anything more."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, finished=False)
