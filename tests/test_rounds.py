"""The round state machine: examples of every rule, then random traces. No clock is read."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lte.server.rounds import (
    Action,
    Admit,
    Answer,
    Ask,
    Contributed,
    Decline,
    Drop,
    Event,
    Fence,
    Forget,
    Heard,
    Joined,
    Keep,
    Left,
    Member,
    Merge,
    Merged,
    Open,
    Renew,
    Rules,
    State,
    Ticked,
    Told,
    next_deadline,
    resumed,
    step,
)

LONG_S = 1e6


def rules(**changes: Any) -> Rules:
    """Rules under which nothing closes a round but its workers."""
    plain = {"workers": 2, "rounds": 100, "quorum": 1, "most_workers": 100} | dict.fromkeys(
        ("grace_s", "deadline_s", "silence_s"), LONG_S
    )
    return Rules(**(plain | changes))


class Trace:
    """A state, a clock of our own, and what the machine ordered so far."""

    def __init__(self, **changes: Any) -> None:
        self.state = State(rules=rules(**changes), version=0)
        self.now_s = 0.0
        self.incarnations: dict[str, int] = {}

    def happen(self, event: Event, at: float | None = None) -> tuple[Action, ...]:
        self.now_s = self.now_s if at is None else at
        self.state, actions = step(self.state, event, self.now_s)
        for action in actions:
            if isinstance(action, Admit):
                self.incarnations[action.member.worker_id] = action.member.incarnation
        return actions

    def join(self, worker_id: str, session: str = "", heads: int = 1, at: float | None = None) -> Any:
        return self.happen(Joined(worker_id, session or f"session of {worker_id}", heads, 4), at)

    def contribute(self, worker_id: str, version: int | None = None, at: float | None = None) -> Any:
        version = self.state.version if version is None else version
        return self.happen(Contributed(worker_id, self.incarnations[worker_id], version), at)

    def heard(self, worker_id: str, at: float | None = None) -> Any:
        return self.happen(Heard(worker_id, self.incarnations[worker_id]), at)

    def leave(self, worker_id: str, at: float | None = None) -> Any:
        return self.happen(Left(worker_id, self.incarnations[worker_id], "bye"), at)

    def tick(self, at: float) -> Any:
        return self.happen(Ticked(), at)

    def merged(self, at: float | None = None) -> Any:
        return self.happen(Merged(), at)

    @classmethod
    def opened(cls, *worker_ids: str, **changes: Any) -> Trace:
        """The first round, just opened to these workers."""
        trace = cls(workers=len(worker_ids), **changes)
        for worker_id in worker_ids:
            actions = trace.join(worker_id)
        assert actions[-1] == Open(worker_ids)
        return trace


def kinds(actions: tuple[Action, ...]) -> list[type]:
    return [type(action) for action in actions]


# Joining


def test_the_first_round_opens_when_all_are_there() -> None:
    trace = Trace(workers=3)
    assert kinds(trace.join("a")) == [Admit]
    assert kinds(trace.join("b")) == [Admit]
    assert kinds(trace.tick(at=1000)) == []
    admit, opened = trace.join("c")
    assert admit.member.slot == 2
    assert opened == Open(("a", "b", "c"))


def test_a_contribution_before_the_first_round_is_not_kept() -> None:
    trace = Trace(workers=2)
    trace.join("a")
    assert trace.contribute("a") == (Answer("a", "superseded", "no round is open"),)


def test_a_repeated_hello_gets_the_same_answer() -> None:
    trace = Trace(workers=2)
    (first,) = trace.join("a")
    (again,) = trace.join("a", at=3)
    assert again == Admit(replace(first.member, heard_s=3.0), again=True)
    trace.join("b")
    assert trace.join("a")[1:] == (Open(("a",)),), "the word that the round is open may be lost, too"
    trace.contribute("a")
    assert kinds(trace.join("a")) == [Admit]
    assert [m.incarnation for m in trace.state.members.values()] == [1, 2]


def test_a_repeated_hello_for_a_name_gets_the_same_name() -> None:
    trace = Trace(workers=3)
    (first,) = trace.join("", session="s")
    (other,) = trace.join("", session="t")
    assert trace.join("", session="s") == (replace(first, again=True),)
    assert (first.member.worker_id, other.member.worker_id) == ("w0", "w1")
    assert (first.member.incarnation, other.member.incarnation) == (1, 2)


def test_a_given_name_is_free() -> None:
    trace = Trace(workers=9)
    trace.join("w1")
    trace.join("", session="s")
    trace.join("", session="t")
    assert sorted(trace.state.members) == ["w1", "w2", "w3"]


def test_a_joiner_waits_for_the_next_round() -> None:
    trace = Trace.opened("a", "b")
    assert kinds(trace.join("c")) == [Admit]
    assert trace.contribute("c") == (Answer("c", "superseded", "not expected before the next round"),)
    trace.contribute("a")
    assert trace.contribute("b")[-1] == Merge(("a", "b"), 0)
    assert trace.merged() == (Open(("a", "b", "c")),)


def test_a_new_process_fences_the_old_one() -> None:
    trace = Trace.opened("a", "b")
    old = trace.incarnations["a"]
    forget, admit, opened = trace.join("a", session="new")
    assert opened == Open(("a",)), "the round still waits for a"
    assert forget == Forget(forget.member, "replaced by a new process")
    assert forget.member.incarnation == old < admit.member.incarnation
    for event in (Contributed("a", old, 0), Heard("a", old)):
        assert trace.happen(event) == (Fence("a", "a was replaced by a newer process"),)
    assert trace.happen(Left("a", old, "bye")) == ()
    assert "a" in trace.state.members


def test_a_late_hello_of_a_replaced_process_does_not_fence_the_new_one() -> None:
    """It asks again while the server is busy; then it dies, and its successor is heard first."""
    trace = Trace.opened("a", "b")
    trace.join("a", session="new")
    trace.incarnations["a"] = trace.state.members["a"].incarnation
    assert trace.join("a") == (Fence("a", "a was replaced by a newer process"),)
    assert trace.heard("a") == ()
    assert trace.happen(Joined("a", "newer still", 1, 4))[1].member.incarnation == 4


def test_who_was_silent_for_too_long_comes_back_in_its_place() -> None:
    trace = Trace.opened("a", "b", silence_s=10)
    trace.heard("b", at=9)
    trace.tick(10)
    assert "a" not in trace.state.members
    assert trace.heard("a") == (Ask("a"),)
    (admit,) = trace.join("a")
    assert (admit.member.slot, admit.member.incarnation) == (0, 1), "it is the same process"


def test_who_was_silent_and_replaced_is_fenced() -> None:
    """By its session, and after a restart of the server, which forgets these, by its incarnation."""
    trace = Trace.opened("a", "b", silence_s=10)
    trace.heard("b", at=9)
    trace.tick(10)
    old = trace.incarnations["a"]
    trace.join("a", session="new")
    assert (
        trace.happen(Heard("a", old)) == trace.join("a") == (Fence("a", "a was replaced by a newer process"),)
    )
    trace.state = replace(trace.state, fenced=())
    assert kinds(trace.happen(Joined("a", "session of a", 1, 4, incarnation=1))) == [Fence]
    assert kinds(trace.happen(Joined("a", "new", 1, 4, incarnation=3)))[0] is Admit


def test_a_server_that_was_started_anew_waits_for_those_who_were_there() -> None:
    trace = Trace.opened("a", "b")
    members = trace.state.members
    trace.state = resumed(State(rules=rules(workers=2), version=3, members=members, known=members), 50.0)
    assert kinds(trace.join("a", at=50)) == [Admit, Open]
    assert kinds(trace.join("b", at=51)) == [Admit, Open]
    assert trace.contribute("a", version=3) == (Keep("a"),)
    assert trace.contribute("b", version=3)[-1] == Merge(("a", "b"), 0)
    finished = State(rules=rules(rounds=3), version=3, members=members)
    assert resumed(finished, 0.0).phase == "finished"
    first = State(rules=rules(workers=3), version=0, members=members)
    assert resumed(first, 0.0).phase == "starting", "others are still to come before the first round"


def test_a_stranger_is_fenced() -> None:
    trace = Trace.opened("a", "b")
    trace.incarnations["c"] = 7
    assert kinds(trace.heard("c")) == kinds(trace.contribute("c")) == [Fence]
    assert trace.leave("c") == ()


def test_a_dead_workers_slot_and_name_are_used_again() -> None:
    trace = Trace(workers=3)
    for session in "rst":
        trace.join("", session=session)
    trace.leave("w1")
    admit = trace.join("", session="u")[0]
    assert (admit.member.worker_id, admit.member.slot, admit.member.incarnation) == ("w1", 1, 4)


def test_the_name_of_a_held_contribution_is_not_given_to_another() -> None:
    """At most one contribution of a name is merged; the newcomer could not take part."""
    trace = Trace(workers=2, quorum=3)
    trace.join("", session="s")
    trace.join("", session="t")
    trace.contribute("w0")
    trace.leave("w0")
    assert trace.join("", session="u")[0].member.worker_id == "w2"


# Contributing


@pytest.mark.parametrize("order", ["abc", "cba", "bca"])
def test_all_contribute_and_are_merged_in_one_order(order: str) -> None:
    trace = Trace.opened("a", "b", "c")
    first, second, third = order
    assert trace.contribute(first) == (Keep(first),)
    assert trace.contribute(second) == (Keep(second),)
    assert trace.contribute(third) == (Keep(third), Merge(("a", "b", "c"), 0))
    assert trace.merged() == (Open(("a", "b", "c")),)
    assert trace.state.version == 1


def test_a_contribution_sent_twice_is_merged_once() -> None:
    trace = Trace.opened("a", "b")
    trace.contribute("a")
    assert trace.contribute("a") == (Answer("a", "held", "sent before"),)
    assert trace.contribute("b")[-1] == Merge(("a", "b"), 0)
    assert trace.contribute("a") == (Answer("a", "held", "sent before"),), "while it is being merged"
    trace.merged()
    assert trace.contribute("a", version=0) == (Answer("a", "superseded", "version 1 is published"),)


def test_a_contribution_that_comes_too_late_is_superseded() -> None:
    trace = Trace.opened("a", "b", grace_s=5)
    trace.contribute("a", at=1)
    trace.tick(at=6)
    assert trace.contribute("b") == (Answer("b", "superseded", "no round is open"),)
    trace.merged()
    assert trace.contribute("b", version=0) == (Answer("b", "superseded", "version 1 is published"),)
    assert trace.contribute("b") == (Keep("b"),)


def test_a_contribution_of_a_version_to_come_is_not_kept() -> None:
    trace = Trace.opened("a", "b")
    assert kinds(trace.contribute("a", version=1)) == [Answer]


# Leaving


def test_a_death_shrinks_the_round_and_may_close_it() -> None:
    trace = Trace.opened("a", "b", "c")
    trace.contribute("a")
    assert kinds(trace.leave("b")) == [Forget]
    assert trace.contribute("c") == (Keep("c"), Merge(("a", "c"), 0))
    trace = Trace.opened("a", "b")
    trace.contribute("a")
    assert trace.leave("b")[-1] == Merge(("a",), 0)


def test_a_death_after_the_contribution_keeps_it() -> None:
    trace = Trace.opened("a", "b")
    trace.contribute("a")
    assert kinds(trace.leave("a")) == [Forget]
    assert trace.contribute("b")[-1] == Merge(("a", "b"), 0), "who has left keeps its place"
    assert trace.merged() == (Open(("b",)),)


def test_a_contribution_outlives_the_replacement_of_its_process() -> None:
    trace = Trace.opened("a", "b")
    trace.contribute("a")
    assert kinds(trace.join("a", session="new")) == [Forget, Admit]
    assert trace.contribute("a") == (Answer("a", "held", "sent before"),), "one of a name is enough"
    assert trace.contribute("b")[-1] == Merge(("a", "b"), 0)
    assert trace.merged() == (Open(("a", "b")),)


def test_a_round_waits_for_the_successor_of_a_replaced_process() -> None:
    """It may come back with the very contribution that its predecessor had not sent yet."""
    trace = Trace.opened("a", "b")
    trace.contribute("b")
    assert kinds(trace.join("a", session="new")) == [Forget, Admit, Open]
    trace.incarnations["a"] = trace.state.members["a"].incarnation
    assert trace.contribute("a")[-1] == Merge(("a", "b"), 0)
    assert trace.merged() == (Open(("a", "b")),)


def test_replacing_the_only_worker_opens_the_round_to_the_new_one() -> None:
    trace = Trace.opened("a")
    assert kinds(trace.join("a", session="new")) == [Forget, Admit, Open]


def test_silence_is_death() -> None:
    trace = Trace.opened("a", "b", silence_s=10)
    trace.heard("a", at=8)
    assert next_deadline(trace.state) == 10
    assert trace.tick(at=9.99) == ()
    (forgotten,) = trace.tick(at=10)
    assert (forgotten.member.worker_id, forgotten.reason) == ("b", "no sign of life for 10 s")
    assert trace.contribute("a", at=17)[-1] == Merge(("a",), 0)
    assert trace.tick(at=26.9) == (), "a contribution is a sign of life"
    assert kinds(trace.tick(at=27)) == [Forget]
    assert next_deadline(trace.state) is None


def test_everything_that_a_worker_says_is_a_sign_of_life() -> None:
    for say in (Trace.join, Trace.heard, Trace.contribute):
        trace = Trace.opened("a", silence_s=10)
        say(trace, "a", at=9)
        assert trace.tick(at=18) == ()
        assert kinds(trace.tick(at=19))[:1] == [Forget]


def test_new_workers_go_on_when_all_are_gone() -> None:
    trace = Trace.opened("a", "b")
    for worker_id in "ab":
        trace.leave(worker_id)
    assert trace.tick(at=100) == ()
    admit, opened = trace.join("c", at=101)
    assert (admit.member.slot, opened) == (0, Open(("c",)))
    assert trace.contribute("c")[-1] == Merge(("c",), 0)


def test_new_workers_go_on_when_all_left_after_a_merge() -> None:
    trace = Trace.opened("a", "b", grace_s=1)
    trace.contribute("a")
    trace.leave("b")
    trace.leave("a")
    trace.merged(at=500)
    assert next_deadline(trace.state) is None, "a deadline in the past is a busy loop"
    assert kinds(trace.join("c")) == [Admit, Open]


# Quorum, grace, deadline


def test_a_round_with_its_quorum_closes_after_the_grace_window() -> None:
    trace = Trace.opened("a", "b", "c", quorum=2, grace_s=5)
    trace.contribute("a", at=10)
    assert next_deadline(trace.state) == LONG_S, "below the quorum no time closes a round"
    trace.contribute("b", at=20)
    assert next_deadline(trace.state) == 25
    assert trace.tick(at=24.9) == ()
    assert trace.tick(at=25) == (Merge(("a", "b"), 1),)


def test_a_round_with_its_quorum_closes_at_the_deadline() -> None:
    trace = Trace.opened("a", "b", "c", quorum=2, deadline_s=30)
    trace.contribute("a", at=10)
    trace.contribute("b", at=20)
    assert next_deadline(trace.state) == 30
    assert trace.tick(at=29.9) == ()
    assert trace.tick(at=30) == (Merge(("a", "b"), 1),)


def test_a_quorum_after_the_deadline_closes_at_once() -> None:
    trace = Trace.opened("a", "b", "c", quorum=2, deadline_s=30)
    trace.contribute("a", at=10)
    assert trace.tick(at=31) == ()
    assert trace.contribute("b", at=40) == (Keep("b"), Merge(("a", "b"), 1))


def test_the_deadline_counts_from_when_the_round_opened() -> None:
    trace = Trace.opened("a", "b", deadline_s=30)
    trace.contribute("a", at=30)
    assert trace.merged(at=100) == (Open(("a", "b")),)
    trace.contribute("a", at=101)
    assert next_deadline(trace.state) == 130


def test_the_last_contribution_closes_a_round_without_waiting() -> None:
    trace = Trace.opened("a", "b", quorum=1, grace_s=5)
    trace.contribute("a", at=10)
    assert trace.contribute("b", at=11)[-1] == Merge(("a", "b"), 0)


def test_a_round_below_its_quorum_is_never_merged() -> None:
    trace = Trace.opened("a", "b", quorum=2, grace_s=1, deadline_s=1)
    trace.contribute("a")
    trace.leave("b")
    for now_s in (1, 10, LONG_S - 1):
        assert trace.tick(at=now_s) == ()
    assert kinds(trace.tick(at=LONG_S)) == [Forget]
    assert trace.tick(at=10 * LONG_S) == ()
    assert trace.state.held == {"a"}


def test_a_joiner_gets_a_round_below_its_quorum_going_again() -> None:
    trace = Trace.opened("a", "b", quorum=2)
    trace.contribute("a")
    trace.leave("b")
    admit, opened = trace.join("c")
    assert (admit.member.slot, opened) == (1, Open(("c",)))
    assert trace.contribute("c")[-1] == Merge(("a", "c"), 0)


def test_a_joiner_that_came_before_the_round_was_stuck_is_called_then() -> None:
    trace = Trace.opened("a", "b", quorum=2)
    trace.join("c")
    trace.contribute("a")
    assert trace.leave("b")[-1] == Open(("c",))
    assert trace.contribute("c")[-1] == Merge(("a", "c"), 0)


def test_the_missing_count_with_all_their_heads() -> None:
    trace = Trace(workers=3, grace_s=5)
    for worker_id, heads in (("a", 1), ("b", 2), ("c", 4)):
        trace.join(worker_id, heads=heads)
    trace.contribute("b")
    assert trace.tick(at=5) == (Merge(("b",), 5),)


# On arrival


def arriving(*worker_ids: str, **changes: Any) -> Trace:
    return Trace.opened(*worker_ids, on_arrival=True, **changes)


def test_on_arrival_a_tick_merges_what_has_come() -> None:
    trace = arriving("a", "b", "c")
    assert trace.contribute("b") == (Keep("b"),), "more may have come"
    assert next_deadline(trace.state) == trace.now_s
    assert trace.tick(at=1) == (Merge(("b",), 2),)
    assert trace.merged() == (Open(("b",)),), "nobody else waits"
    assert (trace.state.version, trace.state.num_merged) == (1, 1)
    trace.contribute("c", version=0)
    trace.contribute("a", version=0)
    assert trace.tick(at=2) == (Merge(("a", "c"), 1),)
    assert trace.merged() == (Open(("a", "c")),)
    assert (trace.state.version, trace.state.num_merged) == (2, 3)
    assert trace.state.told == {"a": 2, "b": 1, "c": 2}


def test_on_arrival_a_contribution_counts_on_the_version_that_was_told_last() -> None:
    """Who was sent a later one was told by it that this is not merged, and sends it again."""
    trace = arriving("a", "b")
    for worker_id in "ba":
        trace.contribute(worker_id, version=0)
        trace.tick(at=1)
        trace.merged()
    assert trace.contribute("a", version=0) == (Answer("a", "superseded", "version 2 is published"),)
    assert kinds(trace.contribute("a", version=1)) == [Answer]
    assert trace.happen(Told("b")) == ()
    assert kinds(trace.contribute("b", version=1)) == [Answer]
    assert trace.contribute("b", version=2) == (Keep("b"),)
    assert kinds(trace.happen(Told("stranger"))) == []


def test_on_arrival_the_version_of_now_counts_too() -> None:
    """A worker may have it from the server before this one, which died before it could tell whom it told."""
    trace = arriving("a", "b")
    trace.contribute("b")
    trace.tick(at=1)
    trace.merged()
    assert trace.state.told["a"] == 0
    assert trace.contribute("a", version=1) == (Keep("a"),)


def test_on_arrival_what_is_held_is_dropped_where_its_worker_was_told_otherwise() -> None:
    trace = arriving("a", "b")
    trace.contribute("a")
    assert trace.happen(Told("a")) == (Drop("a"), Open(("a",)))
    assert next_deadline(trace.state) != trace.now_s
    assert trace.tick(at=1) == ()
    assert trace.contribute("a") == (Keep("a"),)
    assert trace.tick(at=2) == (Merge(("a",), 1),)
    assert trace.happen(Told("a")) == (), "it is merged, and that will be told"


def test_on_arrival_too_stale_a_contribution_is_put_off_and_its_worker_renewed() -> None:
    trace = arriving("a", "b", max_staleness=1)
    for at in (1, 2):
        trace.contribute("b", version=trace.state.told["b"])
        trace.tick(at)
        trace.merged()
    answer, renew = trace.contribute("a", version=0)
    assert renew == Renew("a")
    assert answer == Answer("a", "superseded", "it is 2 versions behind, and outer.max_staleness is 1")
    trace.happen(Told("a"))
    assert trace.contribute("a") == (Keep("a"),)


def test_on_arrival_a_quorum_is_merged_together_and_a_smaller_rest_waits() -> None:
    trace = arriving("a", "b", "c", quorum=2)
    trace.contribute("a")
    assert trace.tick(at=LONG_S / 2) == ()
    trace.contribute("b")
    assert trace.tick(at=LONG_S / 2) == (Merge(("a", "b"), 1),)


def test_on_arrival_joiners_begin_at_once_and_count() -> None:
    trace = arriving("a", "b")
    admit, opened = trace.join("c")
    assert (admit.member.slot, opened) == (2, Open(("c",)))
    trace.contribute("a")
    assert trace.tick(at=1) == (Merge(("a",), 2),)
    trace.leave("b")
    trace.merged()
    trace.contribute("c", version=0)
    assert trace.tick(at=2) == (Merge(("c",), 1),), "who is gone counts no more"


def test_on_arrival_who_contributes_while_a_merge_waits_for_the_disk_is_called_then() -> None:
    trace = arriving("a", "b", "c")
    trace.contribute("a")
    trace.tick(at=1)
    assert trace.contribute("b") == (Answer("b", "superseded", "no round is open"),)
    assert trace.contribute("a") == (Answer("a", "held", "sent before"),)
    assert trace.merged() == (Open(("a", "b")),)
    assert trace.contribute("b", version=0) == (Keep("b"),)


def test_on_arrival_the_run_ends_with_so_many_contributions() -> None:
    trace = arriving("a", "b", rounds=2)
    for n in range(4):
        assert trace.state.phase == "collecting", n
        trace.contribute("b", version=trace.state.told["b"])
        trace.tick(at=n)
        opened = trace.merged()
    assert (trace.state.phase, trace.state.num_merged, opened) == ("finished", 4, ())
    assert kinds(trace.contribute("a", version=0)) == [Answer]
    over = State(rules=rules(rounds=2, on_arrival=True), version=3, num_merged=4)
    assert resumed(over, 0.0).phase == "finished"
    assert resumed(replace(over, num_merged=3), 0.0).phase == "starting"


# Bounds


def test_there_are_so_many_workers_and_no_more() -> None:
    trace = Trace.opened("a", "b", most_workers=3)
    assert kinds(trace.join("c")) == [Admit]
    assert kinds(trace.join("d")) == [Decline]
    assert set(trace.state.members) == {"a", "b", "c"}
    assert kinds(trace.join("c", session="a new process of c")) == [Forget, Admit]
    trace.leave("b")
    assert kinds(trace.join("d"))[0] == Admit


def test_who_asks_again_is_answered_where_no_more_may_join() -> None:
    trace = Trace(workers=2, most_workers=2)
    trace.join("a", session="a's")
    trace.join("b", session="b's")
    (again, *_) = trace.join("a", session="a's")
    assert isinstance(again, Admit)
    assert again.again


def test_what_strangers_make_the_state_hold_is_bounded() -> None:
    """Ever new workers, and ever new processes of one."""
    trace = Trace.opened("a", "b", most_workers=4)
    trace.contribute("a")
    for n in range(100):
        trace.join(f"s{n}")
        trace.join("s", session=f"{n}")
        trace.leave(f"s{n}")
    state = trace.state
    assert len(state.known) == 8
    assert len(state.fenced) == 8
    assert {"a", "b", "s", "s99"} <= set(state.known)


def test_who_never_contributed_is_forgotten_first() -> None:
    trace = Trace.opened("a", "b", most_workers=3)
    trace.contribute("a")
    trace.leave("a")
    for n in range(100):
        trace.join(f"s{n}")
        trace.leave(f"s{n}")
    assert set(trace.state.known) == {"a", "b", "s96", "s97", "s98", "s99"}
    assert trace.state.contributed == {"a"}
    (admit, *_) = trace.join("a")
    assert admit.member.slot == 0, "it is known by its slot"


# The end


def test_nothing_follows_the_last_round() -> None:
    trace = Trace.opened("a", "b", rounds=2)
    for worker_id in "abab":
        actions = trace.contribute(worker_id)
        if isinstance(actions[-1], Merge):
            opened = trace.merged()
    assert (trace.state.phase, trace.state.version, opened) == ("finished", 2, ())
    assert kinds(trace.contribute("a")) == [Answer]
    assert kinds(trace.contribute("b", version=1)) == [Answer]
    assert kinds(trace.join("c")) == [Admit]
    assert kinds(trace.leave("a")) == [Forget]
    assert kinds(trace.tick(at=LONG_S)) == [Forget, Forget]
    assert trace.state.phase == "finished"


def test_a_merge_that_was_not_ordered_is_a_broken_invariant() -> None:
    trace = Trace.opened("a", "b")
    with pytest.raises(AssertionError):
        trace.merged()


# Random traces


class AnyTrace(RuleBasedStateMachine):
    """Workers that join, die, come back, repeat themselves, are late, in any order and at any time.

    The machine below is judged by a book of its own, kept from events and actions alone.
    """

    @initialize(
        workers=st.integers(1, 4),
        num_rounds=st.integers(1, 4),
        quorum=st.integers(1, 4),
        grace_s=st.sampled_from([0.0, 3.0, LONG_S]),
        deadline_s=st.sampled_from([1.0, 5.0, LONG_S]),
        silence_s=st.sampled_from([7.0, LONG_S]),
        some_are_stuck=st.booleans(),
        on_arrival=st.booleans(),
        max_staleness=st.sampled_from([None, 0, 2]),
    )
    def begin(self, workers: int, num_rounds: int, some_are_stuck: bool, **others: Any) -> None:
        self.some_are_stuck = some_are_stuck
        self.state = State(rules=rules(workers=workers, rounds=num_rounds, **others), version=0)
        self.now_s = 0.0
        self.known: list[Member] = []  # everyone ever admitted, in order
        self.alive: dict[str, Member] = {}
        self.merges: dict[int, Merge] = {}
        self.sessions = self.num_merged = 0
        self.called: dict[str, int] = {}  # worker_id -> heads, of those that the round waits for or holds
        self.kept: dict[str, int] = {}
        # On arrival, of each process: what it was told last.
        self.told: dict[int, int] = {}
        self.new_round()

    def new_round(self) -> None:
        if self.state.rules.on_arrival:
            for worker_id in self.kept:
                self.called.pop(worker_id, None)
        else:
            self.called = {}
        self.kept = {}
        self.opened_s = self.quorum_s = float("inf")

    def happen(self, event: Event) -> tuple[Action, ...]:
        before = copy.deepcopy(self.state)
        state, actions = step(self.state, event, self.now_s)
        assert self.state == before, "the state given was changed"
        assert (state, actions) == step(self.state, event, self.now_s)
        self.state = state
        if isinstance(event, Merged):
            assert state.version == before.version + 1
            self.num_merged += len(self.kept)
            for worker_id in self.kept.keys() & self.alive.keys():
                self.told[self.alive[worker_id].incarnation] = state.version
            self.new_round()
        else:
            assert state.version == before.version
        for action in actions:
            assert before.phase != "finished" or not isinstance(action, Open | Keep | Merge)
            self.note(action, event)
        return actions

    def lives(self, member: Member) -> bool:
        """Whether this process is among the members; one that was silent may be again."""
        alive = self.alive.get(member.worker_id)
        return alive is not None and alive.incarnation == member.incarnation

    def note(self, action: Action, event: Event) -> None:
        match action:
            case Admit(member, again=True):
                assert replace(member, heard_s=0.0) == replace(self.alive[member.worker_id], heard_s=0.0)
            case Admit(member):
                assert member.worker_id not in self.alive
                before = {m.session: m.incarnation for m in self.known}
                if member.session in before:  # it was silent, or left
                    assert member.incarnation == before[member.session]
                else:
                    assert member.incarnation > max(before.values(), default=0)
                taken = {m.slot for m in self.alive.values()}
                free = next(slot for slot in count() if slot not in taken)
                own = next((m.slot for m in reversed(self.known) if m.worker_id == member.worker_id), free)
                assert member.slot == (free if own in taken else own)
                self.known.append(member)
                self.alive[member.worker_id] = member
                self.told[member.incarnation] = self.state.version
            case Drop(worker_id):
                assert isinstance(event, Told)
                assert self.state.phase != "merging"
                del self.kept[worker_id]
                if len(self.kept) < self.state.rules.quorum:
                    self.quorum_s = float("inf")
            case Renew(worker_id):
                assert isinstance(event, Contributed)
                assert self.state.version - event.version > (self.state.rules.max_staleness or 0)
            case Forget(member):
                assert self.alive.pop(member.worker_id).incarnation == member.incarnation
                if member.worker_id not in self.kept:
                    self.called.pop(member.worker_id, None)
            case Open(worker_ids):
                assert worker_ids
                assert len(set(worker_ids)) == len(worker_ids)
                self.opened_s = min(self.opened_s, self.now_s)
                if not self.called:
                    self.opened_s = self.now_s
                for worker_id in worker_ids:
                    assert worker_id not in self.kept
                    self.called[worker_id] = self.alive[worker_id].heads
            case Keep(worker_id):
                assert isinstance(event, Contributed)
                told = self.told[event.incarnation] if self.state.rules.on_arrival else self.state.version
                assert event.version in (told, self.state.version)
                most = self.state.rules.max_staleness
                assert most is None or self.state.version - event.version <= most
                assert event.incarnation == self.alive[worker_id].incarnation
                assert worker_id in self.called
                assert worker_id not in self.kept
                self.kept[worker_id] = self.alive[worker_id].heads
                if len(self.kept) == self.state.rules.quorum:
                    self.quorum_s = self.now_s
            case Answer(worker_id):
                assert worker_id in self.alive
            case Fence(worker_id):
                assert worker_id == event.worker_id
            case Merge(worker_ids, num_missing_heads):
                assert self.state.version not in self.merges, "two merges of one version"
                self.merges[self.state.version] = action
                assert sorted(worker_ids) == sorted(self.kept), "all that is held, once"
                slots = [self.state.members[w].slot for w in worker_ids if w in self.state.members]
                assert slots == sorted(slots), "in the order of slots, whatever the names and arrivals"
                assert len(worker_ids) >= self.state.rules.quorum
                counted = sum(self.kept.values()) + num_missing_heads
                assert counted == sum(self.called.values()), "weights are 1 / expected"
                if self.state.rules.on_arrival:
                    assert isinstance(event, Ticked), "all that has come is heard first"
                elif num_missing_heads:
                    grace_is_over = self.now_s >= self.quorum_s + self.state.rules.grace_s
                    assert grace_is_over or self.now_s >= self.opened_s + self.state.rules.deadline_s

    @rule(name=st.sampled_from(["", "", "a", "b", "w1"]), heads=st.integers(1, 3), rank=st.integers(1, 4))
    def someone_comes(self, name: str, heads: int, rank: int) -> None:
        self.sessions += 1
        replaced = self.alive.get(name)
        actions = self.happen(Joined(name, f"s{self.sessions}", heads, rank))
        admitted = [action.member for action in actions if isinstance(action, Admit)]
        assert [(m.heads, m.rank) for m in admitted] == [(heads, rank)]
        assert name in ("", admitted[0].worker_id)
        if replaced is not None:
            assert kinds(actions)[0] is Forget
            assert kinds(self.happen(Heard(name, replaced.incarnation))) == [Fence]
            assert kinds(self.happen(Joined(name, replaced.session, heads, rank))) == [Fence]

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def someone_asks_again(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(self.known))
        is_alive = self.lives(member)
        if not is_alive and member.worker_id in self.alive:
            return  # a Hello of a process whose place another took: see `someone_comes`
        actions = self.happen(Joined(member.worker_id, member.session, member.heads, member.rank))
        if is_alive:
            (admit,) = (action for action in actions if isinstance(action, Admit))
            assert admit.again
            alive = self.alive[member.worker_id]
            assert (admit.member.incarnation, admit.member.slot) == (member.incarnation, alive.slot)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), lag=st.sampled_from([0, 0, 0, 1, -1]))
    def someone_contributes(self, data: st.DataObject, lag: int) -> None:
        alive = list(self.alive.values())
        member = data.draw(st.sampled_from(alive) if alive and lag == 0 else st.sampled_from(self.known))
        version, phase, is_late = self.state.version - lag, self.state.phase, lag != 0
        if self.state.rules.on_arrival:
            told, most = self.told[member.incarnation], self.state.rules.max_staleness
            version = (self.state.version if data.draw(st.booleans()) else told) - lag
            is_too_stale = most is not None and self.state.version - version > most
            is_late = version not in (told, self.state.version) or is_too_stale
        should_be_kept = (
            self.lives(member)
            and not is_late
            and phase == "collecting"
            and member.worker_id in self.called
            and member.worker_id not in self.kept
        )
        actions = self.happen(Contributed(member.worker_id, member.incarnation, version))
        assert (kinds(actions)[:1] == [Keep]) == should_be_kept

    @precondition(lambda self: self.alive and self.state.rules.on_arrival)
    @rule(data=st.data())
    def someone_is_told(self, data: st.DataObject) -> None:
        """The service does so where a worker asks, but not while its contribution is being merged."""
        member = data.draw(st.sampled_from(list(self.alive.values())))
        should_be_dropped = member.worker_id in self.kept and self.state.phase != "merging"
        self.told[member.incarnation] = self.state.version
        actions = self.happen(Told(member.worker_id))
        who = member.worker_id
        assert actions == ((Drop(who), Open((who,))) if should_be_dropped else ())

    @precondition(lambda self: self.known)
    @rule(data=st.data(), leaves=st.booleans())
    def someone_is_heard(self, data: st.DataObject, leaves: bool) -> None:
        member = data.draw(st.sampled_from(self.known))
        is_alive = self.lives(member)
        if leaves:
            actions = self.happen(Left(member.worker_id, member.incarnation, "bye"))
            assert (Forget in kinds(actions)) == is_alive
        else:
            told = kinds(self.happen(Heard(member.worker_id, member.incarnation)))
            newest = max(m.incarnation for m in self.known if m.worker_id == member.worker_id)
            is_gone = member.worker_id not in self.alive and member.incarnation == newest
            assert (Ask in told) == is_gone
            assert (Fence in told) == (not is_alive and not is_gone)

    @rule(passed_s=st.sampled_from([0.0, 0.1, 1.0, 3.0, 6.9, 7.0, 100.0]))
    def time_passes(self, passed_s: float) -> None:
        self.now_s += passed_s
        self.happen(Ticked())
        if self.state.rules.on_arrival and self.state.phase == "collecting":
            assert len(self.kept) < self.state.rules.quorum, "nothing waits longer than for a tick"
        deadline_s = next_deadline(self.state)
        assert deadline_s is None or deadline_s > self.now_s, "the server would spin"

    @precondition(lambda self: next_deadline(self.state) is not None)
    @rule()
    def time_passes_to_the_next_deadline(self) -> None:
        deadline_s = next_deadline(self.state)
        assert deadline_s is not None
        self.now_s = max(self.now_s, deadline_s)
        assert self.happen(Ticked()), "nothing was due"

    @precondition(lambda self: self.state.phase == "merging")
    @rule()
    def the_merge_is_done(self) -> None:
        self.happen(Merged())

    @invariant()
    def the_books_agree(self) -> None:
        if not hasattr(self, "state"):
            return
        state = self.state
        assert state.held <= state.expected
        assert (set(self.kept), set(self.called)) == (state.held, state.expected)
        assert state.expected - state.held <= set(state.members)
        assert {w: m.incarnation for w, m in state.members.items()} == {
            w: m.incarnation for w, m in self.alive.items()
        }
        is_over = state.version >= state.rules.rounds
        if state.rules.on_arrival:
            is_over = self.num_merged >= state.rules.rounds * state.rules.workers
            assert {w: self.told[m.incarnation] for w, m in self.alive.items()} == dict(state.told)
            assert state.phase != "collecting" or set(state.members) <= state.expected, "nobody waits"
        assert state.num_merged == self.num_merged
        assert (state.phase == "finished") == is_over
        assert sorted(self.merges) == list(range(state.version + (state.phase == "merging")))

    def teardown(self) -> None:
        """Liveness: with workers enough, the run ends if all contribute, or just the quorum of each
        round while the others are alive and stuck, and time goes on."""
        if not hasattr(self, "state"):
            return
        quorum = self.state.rules.quorum
        for _ in range(3 * self.state.rules.rounds * self.state.rules.workers):
            while len(self.alive) < max(self.state.rules.workers, quorum):
                self.someone_comes("", 1, 4)
            for worker_id in sorted(self.called.keys() - self.kept.keys()):
                is_stuck = self.some_are_stuck and len(self.kept) >= quorum
                if self.state.phase == "collecting" and not is_stuck:
                    self.happen(Contributed(worker_id, self.alive[worker_id].incarnation, self.state.version))
            if self.state.rules.on_arrival:
                self.happen(Ticked())
            while self.state.phase == "collecting" and len(self.kept) >= quorum:
                # To when the round closes at once: silence by silence may be a hundred thousand steps.
                closing_s = next_deadline(replace(self.state, members={}))
                self.now_s = max(self.now_s, closing_s or 0.0)
                for worker_id, member in self.alive.items():
                    self.happen(Heard(worker_id, member.incarnation))
                self.happen(Ticked())
            if self.state.phase == "merging":
                self.the_merge_is_done()
        assert self.state.phase == "finished"


AnyTrace.TestCase.settings = settings(deadline=None, max_examples=150, stateful_step_count=40)
test_any_trace = AnyTrace.TestCase
