"""What a server tells of its run to whoever asks: its rounds and workers, in bounded size. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from lte import wire
from lte.server.rounds import Member, State

_MOST_WORKERS, _MOST_GONE = 256, 32
"""Told of; a status stays below a hundred kB."""


@dataclass(frozen=True)
class Seen:
    """What a member said of itself last, and what was merged of it since it is one; see
    `wire.WorkerStatus`."""

    version: int | None = None
    local_step: int | None = None
    address: str = ""
    rounds: int = 0
    step_s: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class _Gone:
    member: Member
    seen: Seen
    reason: str


class Roll:
    """Keeps `Seen` of each member for as long as it is one, and who went last."""

    def __init__(self) -> None:
        self._seen: dict[str, Seen] = {}
        self._gone: deque[_Gone] = deque(maxlen=_MOST_GONE)

    def heard(self, worker_id: str, version: int, local_step: int, address: str) -> None:
        """A member gave a sign of life."""
        seen = self._seen.get(worker_id, Seen())
        self._seen[worker_id] = replace(seen, version=version, local_step=local_step, address=address)

    def merged(self, contribution: wire.Contribution, local_steps: int) -> None:
        """A contribution was merged, of so many local steps; its worker may have left since."""
        if (seen := self._seen.get(contribution.worker_id)) is None:
            return
        step_s = contribution.step_s
        self._seen[contribution.worker_id] = replace(
            seen,
            rounds=seen.rounds + 1,
            step_s=step_s,
            tokens_per_s=contribution.tokens / (local_steps * step_s) if step_s > 0 else None,
        )

    def left(self, member: Member, reason: str) -> None:
        """A member is one no more."""
        self._gone.append(_Gone(member, self._seen.pop(member.worker_id, Seen()), reason))

    def workers(self, state: State, now_s: float, silent_after_s: float) -> tuple[wire.WorkerStatus, ...]:
        """Members by slot, then those who went and did not come back, the last first."""
        members = sorted(state.members.values(), key=lambda member: member.slot)[:_MOST_WORKERS]
        told = [
            _told(member, seen, _state_of(member, seen, state, now_s, silent_after_s), "", now_s)
            for member in members
            for seen in [self._seen.get(member.worker_id, Seen())]
        ]
        last = {gone.member.worker_id: gone for gone in self._gone}
        away = [gone for gone in reversed(last.values()) if gone.member.worker_id not in state.members]
        return (*told, *(_told(gone.member, gone.seen, "gone", gone.reason, now_s) for gone in away))


def _state_of(
    member: Member, seen: Seen, state: State, now_s: float, silent_after_s: float
) -> wire.WorkerState:
    if now_s - member.heard_s > silent_after_s:
        return "silent"
    if member.worker_id in state.held:
        return "contributed"
    if member.worker_id not in state.expected:
        return "waiting"
    return "training" if seen.version == state.version_of(member.worker_id) else "behind"


def _told(member: Member, seen: Seen, what: wire.WorkerState, reason: str, now_s: float) -> wire.WorkerStatus:
    return wire.WorkerStatus(
        worker_id=member.worker_id,
        slot=member.slot,
        state=what,
        version=seen.version,
        local_step=seen.local_step,
        heard_s=max(now_s - member.heard_s, 0.0),
        rounds=seen.rounds,
        step_s=seen.step_s,
        tokens_per_s=seen.tokens_per_s,
        address=seen.address,
        reason=reason,
    )


def in_words(state: State, now_s: float) -> str:
    """What the rounds wait for."""
    rules, held, expected = state.rules, len(state.held), len(state.expected | state.held)
    if state.phase == "starting":
        return f"waiting for workers: {len(state.members)} of {rules.workers} are there"
    if state.phase == "merging":
        return "merged, and waiting for room on the disk"
    if state.phase == "finished":
        return "finished; the last workers leave"
    if not state.members:
        return "all workers are gone; the round is open to whoever joins"
    if rules.on_arrival:
        behind = [state.version - version for version in state.told.values()]
        mean = sum(behind) / max(len(behind), 1)
        said = f"merging on arrival: {state.num_merged:,} of {rules.rounds * rules.workers:,} contributions"
        return f"{said}; workers are {mean:.1f} versions behind on average"
    said = f"round open for {now_s - state.opened_s:.1f} s: {held} of {expected} contributions held"
    if held < rules.quorum:
        return f"{said}, below the quorum of {rules.quorum}"
    return said
