"""What a relay keeps of what came over its link, so that it need not come again. Its size is bounded; what
was not used for longest goes first.

Server and relay keep one each, of the same size. Both do the same to theirs in the same order, as a
connection keeps order: so the server knows what the relay holds without asking. The relay's may hold more
(of an earlier connection), never less, but where something was lost; then the relay says so.
"""

from __future__ import annotations

from typing import Generic, TypeVar

Kept = TypeVar("Kept")

MOST_PIECES = 1 << 16
"""On one shelf, so that the server's knowledge of it is bounded, too: some 10 MB."""


class Shelf(Generic[Kept]):
    """Pieces by their digest. The server's holds no bytes, only that they are there.

    Attributes:
        num_bytes: of the pieces that are on it.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self.num_bytes = most_bytes, 0
        self._pieces: dict[bytes, tuple[Kept, int]] = {}  # by last use, oldest first

    def __len__(self) -> int:
        return len(self._pieces)

    def take(self, digest: bytes) -> Kept | None:
        """The piece, which counts as used, or None where it is not there."""
        found = self._pieces.pop(digest, None)
        if found is None:
            return None
        self._pieces[digest] = found
        return found[0]

    def put(self, digest: bytes, piece: Kept, num_bytes: int) -> None:
        """Keep a piece, and let go of those not used for longest. Too large a one is not kept."""
        self.drop(digest)
        if num_bytes > self._most_bytes:
            return
        self._pieces[digest] = piece, num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self._most_bytes or len(self._pieces) > MOST_PIECES:
            self.drop(next(iter(self._pieces)))

    def drop(self, digest: bytes) -> None:
        """Forget a piece, if it is there."""
        if (found := self._pieces.pop(digest, None)) is not None:
            self.num_bytes -= found[1]
