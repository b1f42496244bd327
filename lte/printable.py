"""Text for terminals and logs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice


def printable(text: str) -> str:
    """Text from the network, each character of which that prints nothing of its own replaced.

    Those are control characters, which move a terminal's cursor or retitle its window, line breaks, which
    would begin a line of a log that nobody wrote, and marks that turn the direction of what follows.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def some(names: Iterable[str], most: int = 3) -> str:
    """The first names, after which dots say that there are more; "none" of none."""
    first = list(islice(names, most + 1))
    return ", ".join([*first[:most], *(["..."] if len(first) > most else [])]) or "none"
