"""What a holder keeps of an open round: bounded by worker, and enough to merge whatever is ordered."""

from __future__ import annotations

import msgspec
import torch
from test_session import CONTRIBUTION

from lte.server.commit import Edition
from lte.server.intake import Offered
from lte.server.master import Received
from lte.server.parts import MOST_WRITTEN, Parts


def offered(value: int, incarnation: int = 1) -> Offered:
    received = Received(
        worker_id="a",
        heads=1,
        rank=1,
        scale=0.0,
        first_head=0,
        draw=0,
        tokens=value,
        tensors={},
    )
    message = msgspec.structs.replace(CONTRIBUTION, worker_id="a", incarnation=incarnation)
    return Offered(received, message, {"x": torch.tensor([value], dtype=torch.uint8)})


def edition(stream: int, incarnation: int = 1) -> Edition:
    return Edition("a", incarnation, 0, stream, 1)


def test_what_is_sent_again_is_written_once() -> None:
    parts = Parts()
    assert parts.add(edition(1), offered(1))
    assert not any(parts.add(edition(stream), offered(1)) for stream in range(2, 50))
    assert parts.holds(edition(49)) and not parts.holds(edition(1))
    assert parts.has_room("a")


def test_so_many_others_are_written() -> None:
    """A worker that is refused elsewhere sends another one each time."""
    parts = Parts()
    for stream in range(MOST_WRITTEN):
        assert parts.has_room("a")
        assert parts.add(edition(stream), offered(stream))
    assert not parts.has_room("a") and parts.has_room("b")
    (merged,) = parts.take([1])
    assert merged.tokens == MOST_WRITTEN - 1, "the last one"
    assert parts.has_room("a"), "in the next round"


def test_what_counts_stays_whoever_comes_after_it() -> None:
    parts = Parts()
    parts.add(edition(1, incarnation=1), offered(1, incarnation=1))
    parts.add(edition(1, incarnation=2), offered(2, incarnation=2))
    assert not parts.is_counted("a")
    parts.count("a", 1)
    assert parts.is_counted("a")
    assert not parts.holds(edition(1, incarnation=2))
    parts.dismiss("a")
    assert [received.tokens for received in parts.take([1])] == [1]
    assert not parts.is_counted("a")


def test_what_a_worker_leaves_unfinished_goes_with_it() -> None:
    parts = Parts()
    parts.add(edition(1), offered(1))
    parts.dismiss("a")
    assert not parts.holds(edition(1))
    assert parts.take([]) == []
