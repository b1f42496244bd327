"""Rounds and membership as a pure state machine: (state, event, now) -> (state, actions).

No socket, disk, clock or tensor is in here; `now` is in seconds of any clock that only rises.

    starting   workers join until `rules.workers` are there; then the first round opens
    collecting the round waits for its expected workers; it closes when all of them have
               contributed, or with its quorum after the grace window or at the deadline
    merging    `Merge` was ordered; the service answers with the event `Merged`
    finished   the last round is merged

The expected set is frozen when a round opens. A death shrinks it, unless that worker's contribution
is held already; a new process of a worker that was expected takes its place in it; any other joiner
waits for the next round. A round below its quorum stays open.

Where contributions are merged on arrival, all members are expected all the time, each on the version that
it was told last. What is held, if it is a quorum, is merged at the next tick, so that one merge is for all
that has come meanwhile. A contribution counts only on the version that its worker was told last: who was
sent a later one was told in it what was merged, and still owes the rest.

What strangers can make the state hold is bounded: there are `rules.most_workers` members at most, and
twice as many workers are known; those who never contributed are forgotten first, then the oldest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What of the recipe decides about rounds; see `config.Train`, `config.Server` and `config.Outer`."""

    workers: int
    rounds: int
    quorum: int
    on_arrival: bool = False
    max_staleness: int | None = None
    grace_s: float
    deadline_s: float
    silence_s: float
    most_workers: int

    def closing_time(self, opened_s: float, quorum_s: float) -> float:
        """When a round that has had its quorum since `quorum_s` closes without the rest."""
        return min(quorum_s + self.grace_s, max(opened_s + self.deadline_s, quorum_s))


@dataclass(frozen=True, kw_only=True)
class Member:
    """A worker that was welcomed and has neither left nor fallen silent."""

    worker_id: str
    session: str
    incarnation: int
    slot: int
    heads: int
    rank: int
    scale: float = 0.0
    heard_s: float


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that the rules look at.

    Attributes:
        version: the published version, on which the open round trains. num_merged: contributions in it.
        members: by worker_id. next_incarnation: rises with each worker welcomed. known: those who
            were, as they were last: who comes back gets its own slot, with the data and heads of it.
        contributed: those of whom a contribution was kept once.
        fenced: sessions of processes that newer ones replaced, the last of them. A Hello of theirs may
            still be under way; it must not fence the newer one in turn.
        expected: workers of the open round; held: those of them whose contribution is kept.
        told: on arrival, the version that each member was sent last. early: those whose contribution came
            while a merge waited for the disk.
        opened_s: when the round opened. quorum_s: when its quorum was reached, or None.
    """

    rules: Rules
    version: int
    num_merged: int = 0
    phase: Literal["starting", "collecting", "merging", "finished"] = "starting"
    members: Mapping[str, Member] = field(default_factory=dict)
    known: Mapping[str, Member] = field(default_factory=dict)
    contributed: frozenset[str] = frozenset()
    next_incarnation: int = 1
    fenced: tuple[str, ...] = ()
    expected: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    told: Mapping[str, int] = field(default_factory=dict)
    early: frozenset[str] = frozenset()
    opened_s: float = 0.0
    quorum_s: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether all of the run is merged."""
        if self.rules.on_arrival:
            return self.num_merged >= self.rules.rounds * self.rules.workers
        return self.version >= self.rules.rounds

    def version_of(self, worker_id: str) -> int:
        """The version that a worker is to train on."""
        return self.told.get(worker_id, self.version)

    def expects(self, worker_id: str, version: int) -> bool:
        """Whether this worker may contribute to this version.

        On arrival that is the one that it was sent last. That of now it may have from the server before this
        one.
        """
        return version in (self.version_of(worker_id), self.version)

    def awaits(self, worker_id: str, version: int) -> bool:
        """Whether its contribution to this version can be told to be valid now: not while a merge waits for
        the disk, as there is nothing to hold it against, nor when one is held already."""
        if self.phase == "merging" or (self.rules.on_arrival and worker_id in self.held):
            return False
        return self.expects(worker_id, version)


def resumed(state: State, now_s: float) -> State:
    """The state with which a server that was started anew begins: the open round expects its members."""
    if state.is_over:
        return replace(state, phase="finished")
    if state.members and (state.version or len(state.members) >= state.rules.workers):
        return replace(state, phase="collecting", expected=frozenset(state.members), opened_s=now_s)
    return state


# Events: what the service saw.


@dataclass(frozen=True)
class Joined:
    """A Hello that the service found nothing wrong with; an empty worker_id asks for one. `scale` is 0 where
    it is the recipe's, `incarnation` that of a process that was welcomed before, else 0."""

    worker_id: str
    session: str
    heads: int
    rank: int
    scale: float = 0.0
    incarnation: int = 0


@dataclass(frozen=True)
class Contributed:
    """A contribution whose contents were found valid."""

    worker_id: str
    incarnation: int
    version: int


@dataclass(frozen=True)
class Heard:
    """A heartbeat."""

    worker_id: str
    incarnation: int


@dataclass(frozen=True)
class Told:
    """A member was sent the published version, with word of what is merged of it."""

    worker_id: str


@dataclass(frozen=True)
class Left:
    """A worker said that it goes."""

    worker_id: str
    incarnation: int
    reason: str


@dataclass(frozen=True)
class Ticked:
    """Time passed."""


@dataclass(frozen=True)
class Merged:
    """The ordered merge is done and the next version published; on arrival, to those who are in it."""


Event = Joined | Contributed | Heard | Told | Left | Ticked | Merged

# Actions: what the service must do, in order.


@dataclass(frozen=True)
class Admit:
    """Welcome this member; `again` if it was welcomed before and asks once more."""

    member: Member
    again: bool = False


@dataclass(frozen=True)
class Open:
    """Tell these workers that the round is open, on the state's version or the one that each was told."""

    worker_ids: tuple[str, ...]


@dataclass(frozen=True)
class Keep:
    """Hold this worker's contribution for the merge."""

    worker_id: str


@dataclass(frozen=True)
class Drop:
    """Hold this worker's contribution no more: it owes what is in it."""

    worker_id: str


@dataclass(frozen=True)
class Renew:
    """Send this worker the published version: it is too far behind to contribute."""

    worker_id: str


@dataclass(frozen=True)
class Answer:
    """Say what became of a contribution that is not kept anew."""

    worker_id: str
    status: Literal["held", "superseded"]
    reason: str


@dataclass(frozen=True)
class Fence:
    """Tell the sender of the last message that it no longer takes part."""

    worker_id: str
    reason: str


@dataclass(frozen=True)
class Decline:
    """Tell the sender of the last message, who asks to join, that there is no place for it."""

    reason: str


@dataclass(frozen=True)
class Ask:
    """Tell the sender of the last message, which is known and no member any more, to say Hello again."""

    worker_id: str


@dataclass(frozen=True)
class Merge:
    """Merge the held contributions of these workers, in this order.

    `num_missing_heads` counts the heads of expected workers that are not among them.
    """

    worker_ids: tuple[str, ...]
    num_missing_heads: int


@dataclass(frozen=True)
class Forget:
    """This worker is gone; `reason` says why."""

    member: Member
    reason: str


Action = Admit | Open | Keep | Drop | Renew | Answer | Fence | Decline | Ask | Merge | Forget


def step(state: State, event: Event, now_s: float) -> tuple[State, tuple[Action, ...]]:
    """The state after an event, and what to do about it."""
    match event:
        case Joined():
            state, actions = _joined(state, event, now_s)
        case Contributed():
            state, actions = _contributed(state, event, now_s)
        case Heard(worker_id, incarnation):
            state, actions = _heard(state, worker_id, incarnation, now_s)
        case Told(worker_id):
            state, actions = _told(state, worker_id)
        case Left(worker_id, incarnation, reason):
            member = state.members.get(worker_id)
            known = member is not None and member.incarnation == incarnation
            state, actions = _remove(state, worker_id, reason) if known else (state, ())
        case Ticked():
            state, actions = _silenced(state, now_s)
        case Merged():
            assert state.phase == "merging", "nothing was ordered to be merged"
            waiting, told = frozenset[str](), state.told
            if state.rules.on_arrival:
                waiting = state.expected - state.held - state.early
                sent = state.held & state.members.keys()
                told = {**told, **dict.fromkeys(sent, state.version + 1)}
            state = replace(
                state,
                version=state.version + 1,
                num_merged=state.num_merged + len(state.held),
                phase="collecting",
                expected=waiting,
                held=frozenset(),
                told=told,
                early=frozenset(),
                quorum_s=None,
            )
            if state.is_over:
                return replace(state, phase="finished"), ()
            actions = ()
    state, opened = _maybe_open(state, now_s)
    if state.rules.on_arrival and not isinstance(event, Ticked):
        return state, actions + opened  # all that has come is heard first
    state, closed = _maybe_close(state, now_s)
    return state, actions + opened + closed


def next_deadline(state: State) -> float | None:
    """When time alone changes something, in seconds of the clock, or None."""
    times = [member.heard_s + state.rules.silence_s for member in state.members.values()]
    if state.phase == "collecting" and state.quorum_s is not None:
        times.append(state.quorum_s if state.rules.on_arrival else _closing_time(state))
    return min(times, default=None)


def is_member(state: State, session: str) -> bool:
    """Whether a process that says Hello is among the workers already."""
    return any(member.session == session for member in state.members.values())


def _joined(state: State, event: Joined, now_s: float) -> tuple[State, tuple[Action, ...]]:
    last = state.known.get(event.worker_id)
    is_older = event.incarnation and last is not None and event.incarnation < last.incarnation
    if event.session in state.fenced or is_older:
        return state, (Fence(event.worker_id, f"{event.worker_id or 'it'} was replaced by a newer process"),)
    known = state.members.get(event.worker_id) or next(
        (m for m in state.members.values() if m.session == event.session), None
    )
    if known is not None and known.session == event.session:
        again = replace(known, heard_s=now_s)
        actions: tuple[Action, ...] = (Admit(again, again=True),)
        if known.worker_id in state.expected and known.worker_id not in state.held:
            actions += (Open((known.worker_id,)),)
        return _with_member(state, again), actions
    actions, is_awaited = (), False
    if known is None and len(state.members) >= state.rules.most_workers:
        return state, (Decline(f"there are {state.rules.most_workers} workers, and no more may join"),)
    if known is not None:  # the same worker in a new process: the old one is fenced
        is_awaited = known.worker_id in state.expected - state.held
        state, actions = _remove(state, known.worker_id, "replaced by a new process")
    taken = {member.slot for member in state.members.values()}
    free = next(slot for slot in range(len(taken) + 1) if slot not in taken)
    worker_id = event.worker_id or _free_id(state, free)
    last = state.known.get(worker_id)
    slot = free if last is None or last.slot in taken else last.slot
    if last is not None and last.session != event.session:
        state = replace(state, fenced=(*state.fenced, last.session)[-2 * state.rules.most_workers :])
    is_back = last is not None and last.session == event.session  # after a silence
    member = Member(
        worker_id=worker_id,
        session=event.session,
        incarnation=last.incarnation if last is not None and is_back else state.next_incarnation,
        slot=slot,
        heads=event.heads,
        rank=event.rank,
        scale=event.scale,
        heard_s=now_s,
    )
    state = replace(
        _with_member(state, member),
        known={**state.known, member.worker_id: member},
        next_incarnation=state.next_incarnation + (not is_back),
    )
    if state.rules.on_arrival:
        state = replace(state, told={**state.told, worker_id: state.version})
    state = _forgetful(state)
    actions = (*actions, Admit(member))
    if is_awaited and state.expected:  # the round still waits for this worker; without others it opens anew
        state = replace(state, expected=state.expected | {member.worker_id})
        actions += (Open((member.worker_id,)),)
    return state, actions


def _forgetful(state: State) -> State:
    """Where too many are known, without those welcomed longest ago that are no members any more."""
    num_too_many = len(state.known) - 2 * state.rules.most_workers
    if num_too_many <= 0:
        return state
    kept = state.members.keys() | state.held  # the order of a merge is by the slots of these
    gone = [member for member in state.known.values() if member.worker_id not in kept]
    gone.sort(key=lambda member: (member.worker_id in state.contributed, member.incarnation))
    forgotten = {member.worker_id for member in gone[:num_too_many]}
    return replace(
        state,
        known={worker_id: member for worker_id, member in state.known.items() if worker_id not in forgotten},
        contributed=state.contributed - forgotten,
    )


def _contributed(state: State, event: Contributed, now_s: float) -> tuple[State, tuple[Action, ...]]:
    state, fenced = _heard(state, event.worker_id, event.incarnation, now_s)
    if fenced:
        return state, fenced
    if not state.expects(event.worker_id, event.version):
        return state, (Answer(event.worker_id, "superseded", f"version {state.version} is published"),)
    if event.worker_id in state.held:
        return state, (Answer(event.worker_id, "held", "sent before"),)
    if state.phase != "collecting":
        if state.phase == "merging" and state.rules.on_arrival:
            state = replace(state, early=state.early | {event.worker_id})
        return state, (Answer(event.worker_id, "superseded", "no round is open"),)
    staleness, most = state.version - event.version, state.rules.max_staleness
    if most is not None and staleness > most:
        said = f"it is {staleness} versions behind, and outer.max_staleness is {most}"
        return state, (Answer(event.worker_id, "superseded", said), Renew(event.worker_id))
    if event.worker_id not in state.expected:
        return state, (Answer(event.worker_id, "superseded", "not expected before the next round"),)
    state = replace(
        state, held=state.held | {event.worker_id}, contributed=state.contributed | {event.worker_id}
    )
    if len(state.held) >= state.rules.quorum and state.quorum_s is None:
        state = replace(state, quorum_s=now_s)
    return state, (Keep(event.worker_id),)


def _heard(state: State, worker_id: str, incarnation: int, now_s: float) -> tuple[State, tuple[Action, ...]]:
    member = state.members.get(worker_id)
    last = state.known.get(worker_id)
    if member is None and (last is None or last.incarnation != incarnation):
        return state, (Fence(worker_id, f"{worker_id} is not among the workers"),)
    if member is None:  # it was silent for too long
        return state, (Ask(worker_id),)
    if member.incarnation != incarnation:
        return state, (Fence(worker_id, f"{worker_id} was replaced by a newer process"),)
    return _with_member(state, replace(member, heard_s=now_s)), ()


def _told(state: State, worker_id: str) -> tuple[State, tuple[Action, ...]]:
    if not state.rules.on_arrival or worker_id not in state.members:
        return state, ()
    state = replace(state, told={**state.told, worker_id: state.version})
    if state.phase == "merging" or worker_id not in state.held:
        return state, ()
    # It was told that this is not merged, and will send it again with what it learns next.
    held = state.held - {worker_id}
    quorum_s = state.quorum_s if len(held) >= state.rules.quorum else None
    return replace(state, held=held, quorum_s=quorum_s), (Drop(worker_id), Open((worker_id,)))


def _silenced(state: State, now_s: float) -> tuple[State, tuple[Action, ...]]:
    actions: tuple[Action, ...] = ()
    for member in sorted(state.members.values(), key=lambda m: m.slot):
        if now_s >= member.heard_s + state.rules.silence_s:
            reason = f"no sign of life for {now_s - member.heard_s:.0f} s"
            state, removed = _remove(state, member.worker_id, reason)
            actions += removed
    return state, actions


def _remove(state: State, worker_id: str, reason: str) -> tuple[State, tuple[Action, ...]]:
    members = dict(state.members)
    gone = members.pop(worker_id)
    expected = state.expected
    if worker_id not in state.held:
        expected = expected - {worker_id}
    told = {who: version for who, version in state.told.items() if who != worker_id}
    state = replace(state, members=members, expected=expected, told=told, early=state.early - {worker_id})
    return state, (Forget(gone, reason),)


def _maybe_open(state: State, now_s: float) -> tuple[State, tuple[Action, ...]]:
    """Open the first round when all are there, the next ones at once, and one that lost all its
    expected workers below its quorum to whoever has joined since."""
    if state.phase == "starting":
        if len(state.members) < state.rules.workers:
            return state, ()
        fresh = True
    elif state.phase == "collecting":
        fresh = not state.expected
        is_stuck = state.expected == state.held and len(state.held) < state.rules.quorum
        if not (fresh or is_stuck or state.rules.on_arrival):
            return state, ()
    else:
        return state, ()
    called = frozenset(state.members) - state.held
    if state.rules.on_arrival:
        called -= state.expected
    if not called - state.expected:
        return state, ()
    state = replace(state, phase="collecting", expected=state.expected | called)
    if fresh:
        state = replace(state, opened_s=now_s, quorum_s=None)
    return state, (Open(_by_slot(state, called)),)


def _maybe_close(state: State, now_s: float) -> tuple[State, tuple[Action, ...]]:
    if state.phase != "collecting" or not state.held or len(state.held) < state.rules.quorum:
        return state, ()
    if not state.rules.on_arrival and state.held != state.expected and now_s < _closing_time(state):
        return state, ()
    missing = state.expected - state.held
    num_missing_heads = sum(state.members[worker_id].heads for worker_id in missing)
    return replace(state, phase="merging"), (Merge(_by_slot(state, state.held), num_missing_heads),)


def _closing_time(state: State) -> float:
    """When a round that has its quorum closes without the rest."""
    assert state.quorum_s is not None
    return state.rules.closing_time(state.opened_s, state.quorum_s)


def _by_slot(state: State, worker_ids: frozenset[str]) -> tuple[str, ...]:
    """In an order that no arrival and no departure decides, and a name only where two had one slot."""
    return tuple(sorted(worker_ids, key=lambda worker_id: (state.known[worker_id].slot, worker_id)))


def _free_id(state: State, slot: int) -> str:
    """`w` and the slot, so that whoever takes a dead worker's slot takes its name too."""
    name, n = f"w{slot}", slot
    while name in state.members or name in state.held:
        n += 1
        name = f"w{n}"
    return name


def _with_member(state: State, member: Member) -> State:
    return replace(state, members={**state.members, member.worker_id: member})
