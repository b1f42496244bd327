"""A bound on what strangers can cause: token buckets, in bounded memory."""

from __future__ import annotations


class Buckets:
    """One bucket of tokens for each key. The keys not seen for longest are forgotten first."""

    def __init__(self, *, burst: int, per_s: float, most: int) -> None:
        """Make buckets, which are full at first.

        Args:
            burst: tokens of a full bucket. per_s: how fast it fills. most: buckets kept.
        """
        self.burst, self.per_s, self.most = burst, per_s, most
        self._left: dict[str, tuple[float, float]] = {}  # tokens, and when they were counted

    def __len__(self) -> int:
        return len(self._left)

    def take(self, key: str, now_s: float) -> bool:
        """Take a token from a key's bucket; False if it is empty."""
        tokens, counted_s = self._left.pop(key, (float(self.burst), now_s))
        tokens = min(self.burst, tokens + (now_s - counted_s) * self.per_s)
        is_free = tokens >= 1
        self._left[key] = (tokens - is_free, now_s)
        if len(self._left) > self.most:
            del self._left[next(iter(self._left))]
        return is_free
