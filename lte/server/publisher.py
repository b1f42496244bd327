"""What the server publishes, on its way to the workers: encoded, cut into parts, counted, remembered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lte import wire
from lte.compress import CODES, KINDS, SCALES, changes, kind_of
from lte.config import Recipe
from lte.server.master import Advance, Master
from lte.transport import Peer, ServerEndpoint


class Publisher:
    """Sends the master's versions and factors.

    Attributes:
        version, base_digest: what is published. num_merged: contributions in it.
    """

    def __init__(
        self,
        endpoint: ServerEndpoint,
        master: Master,
        recipe: Recipe,
        *,
        generation: int,
        version: int,
        num_merged: int,
    ) -> None:
        self._endpoint, self._master, self._recipe, self._generation = endpoint, master, recipe, generation
        self.version, self.num_merged, self.base_digest = version, num_merged, master.base_digest()
        self._stream = 0
        # Of the open round, by direction and kind; and the transport's own count when it opened.
        self._bytes, self._accounted_bytes = _no_bytes(), (0, 0)
        # The bytes of the last updates, each on the one before, for who is behind.
        self._history: deque[dict[str, Tensor]] = deque()
        self._whole_bytes = _size(master.snapshot())

    def publish(
        self,
        peers: Sequence[Peer],
        advance: Advance,
        merged: Sequence[int],
    ) -> dict[str, float]:
        """Send the next version to all, each layer as soon as it is encoded, and remember its bytes; the
        whole of it where the base's format is another one than before.

        Args:
            advance: what the version brought.
            merged: incarnations of the workers whose contributions are in it.

        Contributions merged on arrival are answered each by its own `bring_up`: there `peers` are none.

        Returns:
            `codes_changed` and `scales_changed`, the shares that did; `changes_bytes` of their change.
        """
        blobs: dict[str, Tensor] = {}
        codes = scales = num_bytes = 0

        def encoded() -> Iterator[tuple[str, Tensor]]:
            nonlocal codes, scales, num_bytes
            for name, change in self._master.changes_since(advance.before):
                codes, scales = codes + change.codes_changed, scales + change.scales_changed
                num_bytes += change.codes.numel() + change.scales.numel()
                for ending, blob in ((CODES, change.codes), (SCALES, change.scales)):
                    blobs[name + ending] = blob
                    yield name + ending, blob
            blobs.update(advance.dense)
            yield from advance.dense.items()

        since, self.version = self.version, self.version + 1
        self.base_digest, self.num_merged = advance.base_digest, self.num_merged + len(merged)
        if changes.is_reformatted(advance.before, self._master.base):
            return self._publish_whole(peers, merged)
        self._send_update(peers, since, encoded(), merged)
        self._history.append(blobs)
        # More of them would be no smaller than the whole model.
        while sum(map(_size, self._history)) > self._whole_bytes:
            self._history.popleft()
        num_scales = sum(base.scales.numel() for base in self._master.base.values())
        return {
            "codes_changed": codes / max(self._master.plan.num_adapted_parameters, 1),
            "scales_changed": scales / max(num_scales, 1),
            "changes_bytes": num_bytes,
        }

    def _publish_whole(self, peers: Sequence[Peer], merged: Sequence[int]) -> dict[str, float]:
        """Send a version whose base has another format: no change leads to it."""
        whole = self._master.snapshot()
        self._send_update(peers, None, whole.items(), merged)
        self._history.clear()
        self._whole_bytes = _size(whole)
        of_base = {name: blob for name, blob in whole.items() if name.endswith((CODES, SCALES))}
        return {"codes_changed": 1.0, "scales_changed": 1.0, "changes_bytes": _size(of_base)}

    def send_whole(self, peer: Peer, merged: Sequence[int]) -> None:
        """Send the whole published model."""
        self._send_update([peer], None, self._master.snapshot().items(), merged)

    def whole(self) -> Callable[[Peer], None]:
        """What sends the model as it is published now, also when it is another."""
        snapshot, now = self._master.snapshot(), (self.version, self.base_digest, self.num_merged)
        return lambda peer: self._send_update([peer], None, snapshot.items(), (), now)

    def bring_up(self, peer: Peer, version: int, merged: Sequence[int]) -> None:
        """Send the published version to a worker that holds an older one and missed what came since:
        the changes folded into one, or the whole model where that is smaller.

        Args:
            merged: as in `publish`, of all versions since.
        """
        behind = self.version - version
        folded = self._folded(behind) if behind <= len(self._history) else None
        if folded is not None and _size(folded) < self._whole_bytes:
            self._send_update([peer], version, folded.items(), merged)
        else:
            self.send_whole(peer, merged)

    def _folded(self, behind: int) -> Mapping[str, Tensor] | None:
        """The last changes as one, or None where one of them was so large that it came in full."""
        if behind == 1:
            return self._history[-1]
        try:
            return self._master.folded(list(self._history)[-behind:])
        except ValueError:
            return None

    def _send_update(
        self,
        peers: Sequence[Peer],
        since: int | None,
        blobs: Iterable[tuple[str, Tensor]],
        merged: Sequence[int],
        published: tuple[int, str, int] | None = None,
    ) -> None:
        """Send an update to these peers in parts, then the message that closes them.

        Args:
            published: version, digest of the base and number of contributions that it leads to; None: those
                of now.
        """
        version, base_digest, num_merged = published or (self.version, self.base_digest, self.num_merged)
        stream, num_parts = self._send_parts(peers, blobs, version)
        recipe = self._recipe
        update = wire.Update(
            generation=self._generation,
            version=version,
            since=since,
            step=recipe.step_of(version, num_merged),
            stream=stream,
            parts=num_parts,
            merged=tuple(merged),
            base_digest=base_digest,
            last=recipe.round_of(version, num_merged) >= recipe.train.rounds,
        )
        for peer in peers:
            self._send(peer, update)

    def send_factors(self, peer: Peer, merged: Mapping[str, Tensor]) -> None:
        """Send what is merged of a worker."""
        blobs = ((name, tensor.reshape(-1).view(torch.uint8)) for name, tensor in merged.items())
        stream, num_parts = self._send_parts([peer], blobs, self.version)
        factors = wire.Factors(
            generation=self._generation, version=self.version, stream=stream, parts=num_parts
        )
        self._send(peer, factors)

    def _send_parts(
        self, peers: Sequence[Peer], blobs: Iterable[tuple[str, Tensor]], version: int
    ) -> tuple[int, int]:
        """Send named bytes in parts, each as soon as it is full. Returns the stream and how many."""
        self._stream += 1
        stream = self._stream

        def part(index: int) -> wire.Part:
            return wire.Part(
                generation=self._generation,
                worker_id="",
                incarnation=0,
                version=version,
                stream=stream,
                index=index,
            )

        num_parts = 0
        for frames, sizes in wire.in_parts(blobs, self._recipe.compress.part_bytes, part):
            num_parts += 1
            for peer in peers:
                sent_bytes = self._endpoint.sent_bytes
                self._endpoint.send(peer, frames)
                sent_bytes = self._endpoint.sent_bytes - sent_bytes
                if sent_bytes >= sum(sizes.values()):  # not to one that is gone, nor from a relay's shelf
                    self.count("downlink", sizes)
        return stream, num_parts

    def _send(self, peer: Peer, message: wire.AnyMessage) -> None:
        self._endpoint.send(peer, wire.encode(message))

    def count(self, direction: str, sizes: Mapping[str, int]) -> None:
        """Add to the bytes of this round, by direction and kind. Factors that are recalled are control."""
        for name, num_bytes in sizes.items():
            if (kind := f"{direction}_{kind_of(name)}_bytes") in self._bytes:
                self._bytes[kind] += num_bytes

    def close_round(self) -> tuple[int, int, dict[str, int]]:
        """The bytes since the last call, up and down, and of each kind; what is of none is control."""
        now = (self._endpoint.received_bytes, self._endpoint.sent_bytes)
        up, down = (n - before for n, before in zip(now, self._accounted_bytes, strict=True))
        by_kind, self._bytes, self._accounted_bytes = self._bytes, _no_bytes(), now
        for direction, total in (("uplink", up), ("downlink", down)):
            known = sum(n for key, n in by_kind.items() if key.startswith(direction))
            by_kind[f"{direction}_control_bytes"] = total - known
        return up, down, by_kind


def _size(blobs: Mapping[str, Tensor]) -> int:
    return sum(blob.numel() for blob in blobs.values())


def _no_bytes() -> dict[str, int]:
    """Bytes by direction and kind, none yet."""
    up, down = KINDS[:2], KINDS[1:]
    return {f"uplink_{kind}_bytes": 0 for kind in up} | {f"downlink_{kind}_bytes": 0 for kind in down}
