"""What workers send, checked before the rounds hear of it: who asks to join, what is contributed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from lte import wire
from lte.config import LoRA, Recipe
from lte.errors import WireError
from lte.nn import Plan, difference
from lte.server.journal import Kept
from lte.server.master import Master, Received
from lte.server.rounds import Member
from lte.server.watch import TRIMS_IN_A_ROW, Outliers
from lte.transport import Frames

_WORKER_ID = re.compile(r"[\w.-]{0,64}", re.ASCII)

MAX_SCALE = 1e6
"""Largest lora_scale that a worker may have of its own."""

OTHER_VERSION = (
    "it speaks another version of the protocol",
    "install the server's version of lte on every machine",
)
"""Why a message of another schema is refused, and the cure."""
BEHIND_A_RELAY = (
    "this run's master is divided among several servers (server.shards), and a relay stands before one",
    "connect to the server itself",
)


def objection(hello: wire.Hello, plan: Plan, lora: LoRA) -> tuple[str, str] | None:
    """Why a worker cannot join that says this, and the cure; None if it can."""
    rank, heads = hello.rank or plan.rank, hello.heads or lora.heads
    if hello.schema != wire.SCHEMA:
        return OTHER_VERSION
    if rank > plan.rank or heads > lora.heads:
        return (
            f"it trains {so_many(heads, rank)}, the recipe {so_many(lora.heads, plan.rank)}",
            "choose at most the recipe's rank and heads",
        )
    if hello.scale > MAX_SCALE:
        return f"its lora_scale is {hello.scale:g}", f"choose one of {MAX_SCALE:g} at most"
    if lora.merge == "never" and (rank, heads, hello.scale) != (plan.rank, lora.heads, 0):
        return (
            f"it trains {so_many(heads, rank, hello.scale)}, the run's own are"
            f" {so_many(lora.heads, plan.rank)}",
            "leave rank, heads and scale to the recipe: with lora.merge = never whoever comes goes on with"
            " its heads",
        )
    if hello.scale and lora.nested != "none" and lora.keeps_factors:
        return (
            f"its lora_scale is {hello.scale:g}, and ranks are taken out of the master at the recipe's",
            "leave the scale to the recipe",
        )
    own = plan.capped(rank, hello.scale)
    if hello.model and (differs := difference(hello.model, own.describe(lora))):
        return (
            f"it trains another model ({differs[:500]})",
            "use the server's recipe, or leave the recipe out to get it from the server",
        )
    if not _WORKER_ID.fullmatch(hello.worker_id):
        return (
            "its name is not of letters, digits, '.', '_' and '-', 64 at most",
            "choose another, or none to be given one",
        )
    return None


def so_many(heads: int, rank: int, scale: float = 0.0) -> str:
    """Heads and their rank, in words, and their scale where it is not the recipe's."""
    own = f" and lora_scale {scale:g}" if scale else ""
    return f"{heads} head{'s' if heads > 1 else ''} of lora_rank {rank}{own}"


@dataclass(frozen=True)
class Offered:
    """A contribution as it came: what is in it, its message, and its bytes for the journal."""

    received: Received
    message: wire.Contribution
    blobs: dict[str, Tensor]

    def kept(self) -> Kept:
        """What the journal holds of it."""
        received, message = self.received, self.message
        return Kept(
            version=message.version,
            worker_id=received.worker_id,
            incarnation=message.incarnation,
            heads=received.heads,
            rank=received.rank,
            scale=received.scale,
            first_head=received.first_head,
            draw=received.draw,
            tokens=received.tokens,
            loss=message.loss,
            blobs={name: blob.numpy().tobytes() for name, blob in self.blobs.items()},
        )


class Intake:
    """Puts contributions to the open round together from their parts, and says which can be merged."""

    def __init__(self, master: Master, recipe: Recipe, outliers: Outliers) -> None:
        self._master, self._recipe, self._outliers = master, recipe, outliers
        # worker_id -> what has come of its contribution
        self._staged: dict[str, wire.Assembly] = {}

    def add(
        self, part: wire.Part, member: Member, frames: Frames, entries: tuple[wire.TensorEntry, ...]
    ) -> dict[str, int]:
        """Stage a part of a member's contribution.

        Returns:
            The bytes of each name in it; none where it came before or belongs to an older stream.
        """
        staged = self._staged.get(part.worker_id)
        if staged is None or part.stream > staged.stream:
            most = self._master.max_contribution(member.heads, member.rank)
            staged = self._staged[part.worker_id] = wire.Assembly(part.stream, part.version, most)
        return staged.add(part, frames, entries) if part.stream == staged.stream else {}

    def close(self, message: wire.Contribution, member: Member, base_digest: str) -> Offered | None:
        """A member's contribution with its tensors, or None where parts of it are missing.

        Args:
            base_digest: of the base of that version.

        Raises:
            WireError: it cannot be merged.
        """
        if fault := self._fault_of(message, member, base_digest):
            raise WireError(fault)
        assembly = self._staged.get(message.worker_id)
        if assembly is None or assembly.stream != message.stream:
            assembly = wire.Assembly(message.stream, message.version)
        if (blobs := assembly.close(message.parts)) is None:
            return None
        self.drop(message.worker_id)
        received = Received(
            worker_id=message.worker_id,
            heads=member.heads,
            rank=member.rank,
            scale=member.scale,
            first_head=self._recipe.lora.first_head(member.slot),
            draw=message.draw,
            tokens=message.tokens,
            tensors=self._master.decode(blobs, message.worker_id, member.heads, member.rank),
        )
        return Offered(received, message, blobs)

    def drop(self, worker_id: str) -> None:
        """Forget the parts that have come of a worker."""
        self._staged.pop(worker_id, None)

    def clear(self) -> None:
        """Forget all parts: their round is over."""
        self._staged.clear()

    def _fault_of(self, message: wire.Contribution, member: Member, base_digest: str) -> str:
        """What is wrong with a contribution before its tensors are looked at, or ''."""
        if message.base_digest != base_digest:
            return f"its base is not bit for bit the published version {message.version}"
        heads, rank = member.heads, member.rank
        if message.merged_digest != self._master.merged_digest(member.worker_id, heads, rank):
            return "it is encoded against merged factors that the server does not hold"
        if self._outliers.is_stuck(message.worker_id):
            return f"{TRIMS_IN_A_ROW} merges in a row left it out (outer.trim): its heads start over"
        train = self._recipe.train
        merges = train.rounds * train.workers if self._recipe.merges_on_arrival else message.version
        if message.draw > merges:
            return "it counts more draws of its A than there were merges"
        if self._recipe.outer.weights == "tokens" and not message.tokens:
            return "it counts no tokens, by which it would be weighted (worker.step(loss, tokens=...))"
        first_head = self._recipe.lora.first_head(member.slot)
        if message.given_digest != self._master.given_digest(first_head, heads, rank, message.draw):
            return (
                "its A is not what the server draws from the seed; use lora.A=trained between such machines"
            )
        return ""
