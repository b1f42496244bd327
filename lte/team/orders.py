"""What the processes of a worker say to each other through their pipes."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a follower, first.

    Attributes:
        settings: the server's recipe. slot: of the worker. rank, heads, scale: of its heads, 0: as the
            recipe says.
        process: the follower's number, 1 and on. processes: of the worker. number: of the follower
            among all processes of workers on this machine, by which GPUs are shared out.
        backend, meeting: of their group.
    """

    settings: dict[str, Any]
    slot: int
    rank: int
    heads: int
    scale: float
    process: int
    processes: int
    number: int
    backend: Literal["gloo", "nccl"]
    meeting: str


class Step(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a follower: what the leader broadcasts next, and the batch to take then.

    Attributes:
        step: local steps of the worker before. version: whose settings hold for the heads.
        whole: whether base, merged factors and heads that are not trained come, too. constants: whether
            these do. num_bytes: of all that comes.
    """

    step: int
    version: int
    whole: bool
    constants: bool
    num_bytes: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """From a follower that has built its model, and joins the group."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a follower that ends.

    Attributes:
        is_users: a person can mend it.
    """

    reason: str
    is_users: bool


Order = Begin | Step
Report = Ready | Failed
encode = msgspec.msgpack.Encoder().encode
order_of = msgspec.msgpack.Decoder(Order).decode
report_of = msgspec.msgpack.Decoder(Report).decode
